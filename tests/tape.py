"""A stand-in for CUDA graphs on a CPU: operations on fixed memory, recorded and replayed.

What a graph may not do, it may not do either: read a value back, or copy one from Python. What is
recorded is not done. A replay repeats the operations, not the Python around them, in the memory in
which they were recorded; until then that memory holds nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item")


def record(work: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """Stands in for `bdhf.graphs.record`."""
    tape = _Tape()
    try:
        with tape:
            work()
    finally:
        tape.undo()
    return tape.replay


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # With each one's results; None for those that are views of what it was given.
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.own: dict[int, Tensor] = {}  # made while recording
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that was written to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if name == "lift_fresh":
            raise RuntimeError("a copy from Python: operation not permitted when capturing")
        written = self._written(func, args, kwargs)
        for tensor in written:
            if _memory(tensor) not in self.own and _memory(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[_memory(tensor)] = tensor, whole.clone()
        found = func(*args, **kwargs)
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        fresh = [None if _memory(x) in given else x for x in results]
        self.own.update((_memory(x), x) for x in fresh if x is not None)
        if written or any(x is not None for x in fresh):
            self.operations.append((func, args, kwargs, fresh))
        return found

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            announced = argument.alias_info is not None and argument.alias_info.is_write
            if announced or argument.name.startswith("running_"):  # batch norm's are not
                value = kwargs.get(argument.name, args[place] if place < len(args) else None)
                found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        return found

    def undo(self) -> None:
        for tensor, whole in self.before.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).copy_(whole)
        for tensor in self.own.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)

    @torch.no_grad()
    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results in self.operations:
                found = func(*args, **kwargs)
                new = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
                for result, value in zip(results, new, strict=True):
                    if result is not None:
                        with torch.autograd._unsafe_preserve_version_counter(result):
                            result.copy_(value)  # a graph's memory has no versions either
