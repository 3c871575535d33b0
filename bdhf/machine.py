"""What the suite asks of the machine that it runs on."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def use_machine(threads: int | None, tf32: bool | None = None) -> None:
    """Compute with so many CPU threads (None: torch's choice), and keep freed memory.

    A GPU computes in full single precision unless ``tf32``; torch's own choice is TF32 for
    convolutions.

    glibc gives every freed tensor of some megabytes back to the system, and gets it again, page
    by page, for the next one, which takes a good part of a ResNet's time on a CPU. Kept for reuse
    instead, memory costs nothing. Other C libraries are left alone.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    precision = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_TOP_PAD, 2**28)
            libc.mallopt(_MMAP_MAX, 0)


def release_memory(device: torch.device) -> None:
    """Give back a GPU's memory that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()  # recordings and their updates refer to each other
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU, so that a clock tells the time that it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
