"""Products with ``H_L``, the Hessian of the loss with respect to the network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bdhf.batches import Criterion, checked_loss, loss_module

#: Maps one tensor for each tensor of the outputs to one for each again.
OutputHessian = Callable[[list[Tensor]], list[Tensor]]


def output_hessian(criterion: Criterion, outputs: Any, targets: Any) -> OutputHessian:
    """The map ``u ↦ H_L u`` at ``outputs``, where ``H_L = ∂²L/∂outputs²``.

    Closed form for torch's mean squared error, cross-entropy with class targets and binary
    cross-entropy with logits, under mean or sum; by two passes of autograd over the loss alone
    for any other twice differentiable loss. The Gauss-Newton matrix is positive semidefinite
    where the loss is convex in the outputs.

    Args:
        criterion: the loss, called as ``criterion(outputs, targets)``; must return a scalar.
        outputs: what the network returned: a tensor, or tensors in tuples, lists and dicts.
        targets: what the loss compares them with.
    """
    criterion = loss_module(criterion)
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        closed = _closed_form(criterion, outputs.detach(), targets)
        if closed is not None:
            return lambda vectors: [closed(vectors[0])]
    return output_hessian_by_autograd(criterion, outputs, targets)


def _closed_form(
    criterion: Criterion, outputs: Tensor, targets: Tensor
) -> Callable[[Tensor], Tensor] | None:
    # The exact type: a subclass may compute anything.
    kind = type(criterion)
    reduction = getattr(criterion, "reduction", None)
    if reduction not in ("mean", "sum"):
        return None
    mean = reduction == "mean"

    if kind is nn.MSELoss and outputs.shape == targets.shape:
        factor = 2.0 / outputs.numel() if mean else 2.0
        return lambda vector: vector * factor

    if kind is nn.BCEWithLogitsLoss and outputs.shape == targets.shape:
        if criterion.weight is not None or criterion.pos_weight is not None:  # type: ignore[attr-defined]
            return None
        probability = outputs.sigmoid()
        diagonal = probability * (1 - probability)
        if mean:
            diagonal = diagonal / outputs.numel()
        return lambda vector: vector * diagonal

    if kind is nn.CrossEntropyLoss and not targets.is_floating_point():
        return _cross_entropy_form(criterion, outputs, targets, mean)  # type: ignore[arg-type]
    return None


def _cross_entropy_form(
    criterion: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor, mean: bool
) -> Callable[[Tensor], Tensor] | None:
    """``diag(p) - p pᵀ`` for each sample; label smoothing leaves it as it is."""
    if criterion.weight is not None:
        return None
    classes = 0 if outputs.ndim == 1 else 1
    counted = (targets != criterion.ignore_index).unsqueeze(classes).to(outputs.dtype)
    scale = counted / counted.sum() if mean else counted
    probability = outputs.softmax(classes)
    scaled = probability * scale

    def product(vector: Tensor) -> Tensor:
        expected = (probability * vector).sum(classes, keepdim=True)
        return scaled * (vector - expected)

    return product


def output_hessian_by_autograd(criterion: Criterion, outputs: Any, targets: Any) -> OutputHessian:
    """`output_hessian` without closed forms, for any loss: the reference."""
    loss, variables = loss_of_outputs(criterion, outputs, targets)
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
    curved = [slope for slope in slopes if slope.requires_grad]

    def product(vectors: list[Tensor]) -> list[Tensor]:
        if not curved:  # a loss linear in the outputs
            return [torch.zeros_like(vector) for vector in vectors]
        cotangents = [v for v, s in zip(vectors, slopes, strict=True) if s.requires_grad]
        return list(
            torch.autograd.grad(
                curved, variables, cotangents, retain_graph=True, materialize_grads=True
            )
        )

    return product


def loss_of_outputs(
    criterion: Criterion, outputs: Any, targets: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss as a function of the outputs alone: its value with a graph, and its variables."""
    leaves, structure = tree_flatten(outputs)
    points = [
        leaf.detach().requires_grad_() if _is_differentiable(leaf) else leaf for leaf in leaves
    ]
    variables = [point for point in points if _is_differentiable(point)]
    if not variables:
        raise ValueError(
            f"the model returned {type(outputs).__name__}, in which there is no floating-point "
            "tensor; return a tensor, or tensors in tuples, lists and dicts"
        )
    with torch.enable_grad():
        return checked_loss(criterion(tree_unflatten(points, structure), targets)), variables


def differentiable_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in a network's outputs, in the order the Hessian takes them."""
    return [leaf for leaf in tree_leaves(outputs) if _is_differentiable(leaf)]


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
