"""Test set-up: one thread a process, so that results do not depend on the machine."""

import os

import torch
from browsing import browser

__all__ = ["browser"]

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels are tested in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
