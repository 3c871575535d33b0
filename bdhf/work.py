"""Work counted in gradient equivalents, the unit in which optimizers are compared fairly.

One gradient equivalent is the arithmetic of one gradient of one training sample: the multiply-adds
of a forward and a backward pass, as torch's own counter sees them. Counted, not timed, so that a
curve does not depend on the machine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from bdhf.batches import Batch, Criterion
from bdhf.curvature import GaussNewton
from bdhf.functional import RandomState
from bdhf.gradient import loss_and_gradient
from bdhf.linearization import Linearizer
from bdhf.steps import StepReport


@dataclass(frozen=True)
class Work:
    """What an update costs per sample, in gradients of that sample.

    Attributes:
        linearization: setting up the curvature products, once an update.
        products: one product with each block.
    """

    linearization: float
    products: list[float]

    def of_update(self, report: StepReport, rows: int, curvature_rows: int | None) -> float:
        """Gradient equivalents of an update on ``rows`` samples, ``curvature_rows`` for curvature.

        None means all of them. What ``micro_batch`` computes again to save memory is not counted.
        """
        if not report.blocks:
            return float(rows)
        if curvature_rows is None:
            curvature_rows = rows
        pairs = zip(report.blocks, self.products, strict=True)
        products = sum(block.products * cost for block, cost in pairs)
        return rows + curvature_rows * (self.linearization + products)


def count_work(
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    blocks: Sequence[Sequence[nn.Parameter]],
) -> Work:
    """Count an update's parts on a small ``batch``; the model and random streams stay as is.

    Counted on the CPU wherever the model is, since kernels of our own hide from torch's counter.
    Without blocks (a first-order method) there is nothing beside the gradient to count.
    """
    if not blocks:
        return Work(0.0, [])
    places = {p: k for k, p in enumerate(model.parameters())}
    model = copy.deepcopy(model).cpu()  # a forward pass may move buffers
    batch = tree_map_only(Tensor, Tensor.cpu, batch)
    if isinstance(criterion, nn.Module):
        criterion = copy.deepcopy(criterion).cpu()
    twins = list(model.parameters())
    blocks = [[twins[places[p]] for p in block] for block in blocks]
    parameters = [p for block in blocks for p in block]
    with RandomState.capture(parameters).replayed():
        gradient = multiply_adds(lambda: loss_and_gradient(model, criterion, batch, parameters))
        linearizer = Linearizer()
        matrix = GaussNewton(model, criterion, batch, blocks, linearizer=linearizer)
        setup = multiply_adds(  # the trace, made once a run, is there by now
            lambda: GaussNewton(model, criterion, batch, blocks, linearizer=linearizer)
        )
        products = []
        for k, block in enumerate(blocks):
            query: list[Tensor | None] = [None] * len(blocks)
            query[k] = torch.cat([p.detach().reshape(-1) for p in block])
            products.append(multiply_adds(functools.partial(matrix.products, query)))
    return Work(setup / gradient, [product / gradient for product in products])


def multiply_adds(function: Callable[[], object]) -> int:
    """What ``function`` computes, by torch's formulas; a multiply-add counts as two."""
    with _Counter() as counter:
        function()
    return counter.total


class _Counter(TorchDispatchMode):
    """Sums torch's own formulas for the operations it sees.

    `FlopCounterMode` has them too, but its hooks on modules forbid `torch.autograd.grad` with
    respect to outputs (torch 2.14).
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").removesuffix("_")  # in place or not
        formula = flop_registry.get(getattr(torch.ops.aten, name, None))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
