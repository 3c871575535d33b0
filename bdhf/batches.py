"""What a mini-batch may be, how a model is called on it, and how it is cut into pieces.

A batch is a pair ``(inputs, targets)``. ``inputs`` is a tensor, a tuple (``model(*inputs)``) or a
dict (``model(**inputs)``); ``targets`` go to ``criterion(outputs, targets)`` untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

Batch = tuple[Any, Any]
Criterion = Callable[[Any, Any], Tensor]

#: Losses of `torch.nn.functional` are used as their modules, with their default settings.
_MODULE_OF: dict[Any, nn.Module] = {
    F.mse_loss: nn.MSELoss(),
    F.cross_entropy: nn.CrossEntropyLoss(),
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss(),
}


def checked_batch(batch: Any, name: str = "batch", may_be_empty: bool = False) -> Batch:
    """The pair in ``batch``; TypeError if it is none, ValueError if it is empty and may not be."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"{name} is a {type(batch).__name__}; give a pair (inputs, targets)")
    for leaf in [] if may_be_empty else tree_leaves(batch[0]):
        if isinstance(leaf, Tensor) and leaf.ndim and not len(leaf):
            raise ValueError(f"{name} is empty; give at least one row")
    return batch[0], batch[1]


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which a model is called on ``inputs``."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def loss_module(criterion: Criterion) -> Criterion:
    """``criterion``, or the module that stands for it where it is a function of torch's."""
    try:
        return _MODULE_OF.get(criterion, criterion)
    except TypeError:  # not hashable
        return criterion


def checked_loss(loss: Any) -> Tensor:
    """``loss`` if it is a scalar tensor; ValueError otherwise."""
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(
        f"criterion returned {found}; it must return a scalar tensor (reduction 'mean' or 'sum')"
    )


def row_count(batch: Batch) -> int:
    """The number of samples: the length of the first tensor among the inputs."""
    for leaf in tree_leaves(batch[0]):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise ValueError("inputs hold no tensor with a batch dimension, so they cannot be cut")


def pieces(
    model: nn.Module, criterion: Criterion, batch: Batch, micro_batch: int | None
) -> Iterator[tuple[float, Batch]]:
    """Cut ``batch`` along its first dimension into pieces of at most ``micro_batch`` rows.

    Yields pairs of a weight and a piece, such that the weighted sum of the pieces' losses is the
    loss of the whole batch. Tensors whose first dimension is not the batch's go to every piece
    as they are.

    Raises:
        ValueError: ``micro_batch`` is below 1, or the sum would not be the whole batch's loss
            (batch norm in training, class weights or ignored targets under a mean, a loss
            without a known reduction).
    """
    if micro_batch is None:
        yield 1.0, batch
        return
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}; must be 1 or more, or None for one piece")
    rows = row_count(batch)
    if micro_batch >= rows:
        yield 1.0, batch
        return
    mean = is_mean_over_rows(model, criterion, batch[1], "micro_batch")
    for start in range(0, rows, micro_batch):
        stop = min(start + micro_batch, rows)
        yield (stop - start) / rows if mean else 1.0, cut(batch, start, stop)


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Rows of a batch; tensors whose first dimension is not the batch's stay as they are."""
    rows = row_count(batch)

    def of_tensor(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.ndim and tensor.shape[0] == rows else tensor

    found: Batch = tree_map_only(Tensor, of_tensor, batch)
    return found


def is_mean_over_rows(model: nn.Module, criterion: Criterion, targets: Any, asked: str) -> bool:
    """Whether a batch's loss is the mean of its rows' (True) or their sum (False).

    Raises:
        ValueError: it is neither (see `pieces`), so the batch cannot be cut, which the argument
            ``asked`` of `BlockDiagonalHF` asks for.
    """
    _refuse_batch_statistics(model, asked)
    criterion = loss_module(criterion)
    reduction = getattr(criterion, "reduction", None)
    if reduction == "sum":
        return False
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"{asked} needs a criterion whose `reduction` is 'mean' or 'sum', and this one's "
            f"is {reduction!r}; set criterion.reduction to what it does, or leave {asked} out"
        )
    if isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
        # Their mean divides by the weight of the targets at hand, which differs between pieces.
        if criterion.weight is not None:
            raise ValueError(
                f"{asked} with class weights under reduction='mean': the pieces would not add "
                f"up to the whole batch; use reduction='sum', or leave {asked} out"
            )
        if not targets.is_floating_point() and bool((targets == criterion.ignore_index).any()):
            raise ValueError(
                f"{asked} with targets equal to ignore_index={criterion.ignore_index} under "
                "reduction='mean': the pieces would not add up to the whole batch; use "
                f"reduction='sum', or leave {asked} out"
            )
    return True


def _refuse_batch_statistics(model: nn.Module, asked: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{asked} with batch norm in training ({name or type(module).__name__}): its "
                f"statistics would be those of a piece; call eval() on it, or leave {asked} out"
            )
