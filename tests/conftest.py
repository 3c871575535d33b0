"""Test set-up: one thread a process, so that results do not depend on the machine."""

import torch
from browsing import browser

__all__ = ["browser"]

torch.set_num_threads(1)
