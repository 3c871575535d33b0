"""What a trace of a network takes for granted, as something that can be compared and hashed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves


def points_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a network's outputs depend on, each once."""
    given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    return list(dict.fromkeys([*model.parameters(), *model.buffers(), *given]))


def structure_of(model: nn.Module, blocks: Sequence[Sequence[Tensor]], inputs: Any) -> Hashable:
    """All that a trace takes for granted: whatever of these changes, it holds no more.

    Raises:
        NoStructureError: inputs hold something other than tensors, numbers and text.
    """
    variables = points_of(model, inputs)
    places = {variable: place for place, variable in enumerate(variables)}
    leaves, spec = tree_flatten(inputs)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_SIMPLE)):
            raise NoStructureError(f"inputs hold a {type(leaf).__name__}")
    return (
        attributes(model, places),
        tuple((v.shape, v.stride(), v.dtype, v.device) for v in variables),
        tuple(tuple(places[p] for p in block) for block in blocks),
        str(spec),
        tuple(_frozen(leaf, places) for leaf in leaves),
    )


def attributes(model: nn.Module, places: Mapping[Tensor, int]) -> Hashable:
    """The modules by name, with all that each one has."""
    return tuple(
        (name, type(module), _frozen(vars(module), places))
        for name, module in model.named_modules(remove_duplicate=False)
    )


_SIMPLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
#: How far attributes of attributes are followed.
_DEPTH = 4


def _frozen(value: Any, places: Mapping[Tensor, int], depth: int = 0) -> Hashable:
    """Something hashable that changes when ``value`` does, as far as one can tell."""
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, Tensor):
        if value in places:
            return "point", places[value]
        return _Same(value, 0 if value.is_inference() else value._version)
    if isinstance(value, weakref.ref):  # what it refers to is kept, and seen, elsewhere
        return weakref.ref
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return type(value), value.tobytes()
    if isinstance(value, (type, nn.Module, FunctionType, ModuleType)) or depth == _DEPTH:
        return _Same(value)
    if isinstance(value, dict):
        items: Iterable[Any] = value.items()
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = value
    elif hasattr(value, "__dict__"):
        items = vars(value).items()
    else:
        return _Same(value)
    return (type(value), *(_frozen(item, places, depth + 1) for item in items))


class NoStructureError(Exception):
    """There is no telling whether two inputs are of one structure."""


class _Same:
    """Equal only to the same object, which it keeps, so that no other takes its identity."""

    def __init__(self, value: Any, version: int = 0) -> None:
        self.value, self.version = value, version

    def __hash__(self) -> int:
        return hash((id(self.value), self.version))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return NotImplemented
        return self.value is other.value and self.version == other.version
