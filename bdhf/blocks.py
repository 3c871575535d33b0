"""Ways to split a model's parameters into the blocks of the Gauss-Newton matrix.

The paper's blocks are "of roughly equal size, of parameters whose gradients are expected to be
correlated, contiguous in depth" (Zhang et al. 2017, section 3, in our words).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn

ParamGroup = dict[str, Any]


def blocks_from_modules(*parts: nn.Module | Iterable[nn.Module]) -> list[ParamGroup]:
    """One block for each argument, which is a module or several modules that go together.

    A parameter that several arguments share belongs to the first of them.

    >>> blocks_from_modules(model.encoder, [model.decoder, model.output])

    Returns:
        Param groups for `BlockDiagonalHF`.

    Raises:
        ValueError: an argument has no parameter of its own.
    """
    seen: set[nn.Parameter] = set()
    groups = []
    for position, part in enumerate(parts):
        modules = [part] if isinstance(part, nn.Module) else list(part)
        parameters = []
        for parameter in (p for module in modules for p in module.parameters()):
            if parameter not in seen:
                seen.add(parameter)
                parameters.append(parameter)
        if not parameters:
            raise ValueError(
                f"block {position} has no parameter that is not already in an earlier block; "
                "leave it out or join it with another"
            )
        groups.append({"params": parameters})
    return groups


def split_into_blocks(model: nn.Module, count: int) -> list[ParamGroup]:
    """Split any model into ``count`` blocks, contiguous in depth and of roughly equal size.

    A module's own weight and bias stay together, modules are taken in the order in which
    ``model.parameters()`` lists them, and of all such splits this is the one whose blocks' sizes
    have the least sum of squares. Parameters that require no gradient are left out.

    Returns:
        Param groups for `BlockDiagonalHF`.

    Raises:
        ValueError: ``count`` is not between 1 and the number of modules with parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the module to split")
    layers = _layers(model)
    if not isinstance(count, int) or not 1 <= count <= len(layers):
        raise ValueError(
            f"count={count}; must be between 1 and {len(layers)}, the number of modules of "
            f"{type(model).__name__} that have trainable parameters of their own"
        )
    sizes = [sum(p.numel() for p in layer) for layer in layers]
    bounds = _balanced_bounds(sizes, count)
    return [
        {"params": [p for layer in layers[start:stop] for p in layer]}
        for start, stop in itertools.pairwise(bounds)
    ]


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters of each module that has some, tied ones with the first."""
    seen: set[nn.Parameter] = set()
    layers = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            layers.append(own)
    return layers


def _balanced_bounds(sizes: list[int], count: int) -> list[int]:
    """Where to cut ``sizes`` into ``count`` runs so that their sums' squares add up to least.

    Dynamic programming over (runs so far, items so far); returns ``count + 1`` bounds.
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    items = len(sizes)
    cost = [float(s) ** 2 for s in total]  # with one run
    cuts: list[list[int]] = []
    for runs in range(2, count + 1):
        best = [float("inf")] * (items + 1)
        cut = [0] * (items + 1)
        for stop in range(runs, items + 1):
            for start in range(runs - 1, stop):
                candidate = cost[start] + float(total[stop] - total[start]) ** 2
                if candidate < best[stop]:
                    best[stop], cut[stop] = candidate, start
        cost = best
        cuts.append(cut)
    bounds = [items]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [0, *reversed(bounds)]
