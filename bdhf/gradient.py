"""The loss and its gradient on a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdhf.batches import Batch, Criterion, call_arguments, checked_loss, pieces
from bdhf.functional import plain_operations
from bdhf.linearization import brought_maps
from bdhf.output_hessian import loss_of_outputs


def loss_and_gradient(
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    parameters: list[nn.Parameter],
    micro_batch: int | None = None,
) -> Tensor:
    """Write the gradient of the mini-batch loss to ``p.grad``, replacing what was there.

    A network that brings its own maps gives the gradient by its adjoint map; for any other it is
    a backward pass, which reaches ``parameters`` only. Buffers such as batch norm's running
    statistics move here, once for each piece of the batch.

    Returns:
        The loss, a detached scalar on the model's device. Nothing here waits for that device,
        but for ``micro_batch`` with cross-entropy, which looks for ignored targets.
    """
    total: Tensor | None = None
    gradients: list[Tensor] = []
    for weight, piece in pieces(model, criterion, batch, micro_batch):
        loss, slopes = _of_piece(model, criterion, piece, parameters, weight)
        if total is None:
            total, gradients = loss, slopes
        else:
            total = total + loss
            gradients = list(torch._foreach_add(gradients, slopes))
    assert total is not None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return total


def _of_piece(
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    weight: float,
) -> tuple[Tensor, list[Tensor]]:
    inputs, targets = batch
    with torch.no_grad(), plain_operations(model):
        maps = brought_maps(model, [parameters], inputs)
        if maps is not None:
            loss, variables = loss_of_outputs(criterion, maps.outputs, targets)
            slopes = [weight * slope for slope in torch.autograd.grad(loss, variables)]
            (found,) = maps.adjoints([slopes])
            assert found is not None
            return weight * loss.detach(), list(found)
    args, kwargs = call_arguments(inputs)
    with torch.enable_grad():
        loss = weight * checked_loss(criterion(model(*args, **kwargs), targets))
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    # Embeddings may give sparse gradients; torch 2.9's zeros require a gradient.
    dense = [(g.to_dense() if g.is_sparse else g).detach() for g in gradients]
    return loss.detach(), _apart(dense)


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Each in memory of its own; autograd may give one tensor for two parameters."""
    seen: set[int] = set()
    found = []
    for gradient in gradients:
        spread = any(
            n > 1 and not s for n, s in zip(gradient.shape, gradient.stride(), strict=True)
        )
        shared = gradient.untyped_storage().data_ptr() in seen
        found.append(gradient.clone() if spread or shared else gradient)
        seen.add(found[-1].untyped_storage().data_ptr())
    return found
