"""Prints the peak memory, in bytes, of a gradient or an HF update: network, batch and all.

    python benchmarks/memory.py PROBLEM gradient|update

Tensors that live from one update to the next, plus what a second update adds to the process at its
peak; the first one traces and loads libraries.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch
from problems import PROBLEMS
from run import gradient, update

_STATUS = Path("/proc/self/status")


def kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1])


def living_tensors() -> int:
    """Bytes of all tensors that Python knows of, each storage once."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # not the fake tensors in a trace
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    found += [thing.grad for thing in found if thing.is_leaf and thing.grad is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


def main() -> None:
    torch.set_num_threads(1)
    name, what = sys.argv[1:]
    problem = PROBLEMS[name]()
    thunk = gradient(problem) if what == "gradient" else update(problem, [problem.parameters])
    thunk()
    lasting = living_tensors()
    ctypes.CDLL(None).malloc_trim(0)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    thunk()
    print(lasting + 1024 * (kilobytes("VmHWM") - before))


if __name__ == "__main__":
    main()
