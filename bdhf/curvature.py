"""Products with the generalised Gauss-Newton matrix ``G = Jᵀ H_L J``.

``J`` is the Jacobian of the network's outputs with respect to its parameters and ``H_L`` the
Hessian of the loss with respect to the outputs (Schraudolph 2002, "Fast curvature matrix-vector
products for second-order gradient descent"). `ggn_vector_product` is the plain reference;
`GaussNewton` is what the optimizer uses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from bdhf.batches import Batch, Criterion, checked_batch, pieces
from bdhf.functional import RandomState, call, plain_operations, unwrapped, widened
from bdhf.linearization import Block, Linearization, Linearizer
from bdhf.output_hessian import (
    OutputHessian,
    differentiable_leaves,
    output_hessian,
    output_hessian_by_autograd,
)


def ggn_vector_product(
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    vector: Sequence[Tensor],
    blocks: Sequence[Block] | None = None,
) -> list[Tensor]:
    """``G v`` by forward- and reverse-mode differentiation: slow, plain, right.

    It runs the network anew for every product, in the network's own precision, without touching
    gradients, buffers or the random state; a dropout mask is the one the next forward pass would
    draw. Use it to check other implementations, not inside a solver, and not for a network that
    uses `torch.no_grad` within, through which forward mode sees.

    Args:
        model: the network; parameters that do not require a gradient are left out.
        criterion: the loss, called as ``criterion(outputs, targets)``; returns a scalar.
        batch: ``(inputs, targets)``; inputs as a tensor, a tuple or a dict.
        vector: one tensor for each trainable parameter, in the order of ``model.parameters()``.
        blocks: lists of parameters. Given, the off-diagonal blocks of ``G`` are taken as zero
            (Zhang et al. 2017, section 3), and parameters in no block get zeros.

    Returns:
        The product, in the same form as ``vector``.

    Raises:
        ValueError: ``vector`` does not fit the trainable parameters or there are none, blocks
            overlap, or a block holds a parameter that is not trainable or not the model's.
    """
    model = unwrapped(model)
    inputs, targets = checked_batch(batch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if [v.shape for v in vector] != [p.shape for p in trainable]:
        raise ValueError(
            f"vector has shapes {[tuple(v.shape) for v in vector]}; the model's trainable "
            f"parameters have {[tuple(p.shape) for p in trainable]}"
        )
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    state = RandomState.capture(trainable)

    def network(values: Iterable[Tensor]) -> Any:
        with state.replayed():
            return call(model, dict(zip(trainable, values, strict=True)), inputs)

    def product(tangents: list[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            points = zip(trainable, tangents, strict=True)
            duals = [forward_ad.make_dual(p.detach(), t) for p, t in points]
            pairs = map(forward_ad.unpack_dual, differentiable_leaves(network(duals)))
            output_tangents = [torch.zeros_like(p) if t is None else t for p, t in pairs]
        leaves = [p.detach().requires_grad_() for p in trainable]
        with torch.enable_grad():
            outputs = network(leaves)
        cotangents = output_hessian_by_autograd(criterion, outputs, targets)(output_tangents)
        found = differentiable_leaves(outputs)
        pulled = torch.autograd.grad(found, leaves, cotangents, materialize_grads=True)
        return [piece.detach() for piece in pulled]  # torch 2.9's zeros require a gradient

    result = {p: torch.zeros_like(p) for p in trainable}
    seen: set[Tensor] = set()
    with torch.no_grad(), plain_operations(model):
        for block in [trainable] if blocks is None else blocks:
            inside = set(block)
            if inside & seen:
                raise ValueError("blocks overlap; each parameter belongs to one block at most")
            seen |= inside
            if not inside <= result.keys():
                raise ValueError(
                    "blocks hold a tensor that is not a trainable parameter of the model"
                )
            pairs = zip(trainable, vector, strict=True)
            tangents = [v if p in inside else torch.zeros_like(v) for p, v in pairs]
            for p, piece in zip(trainable, product(tangents), strict=True):
                if p in inside:
                    result[p] = piece
    return list(result.values())


class GaussNewton:
    """The diagonal blocks of the Gauss-Newton matrix of one loss on one batch.

    The network is linearised once, here; a product then runs no forward pass, and a block's
    product touches only what lies between the block and the outputs. With ``micro_batch`` the
    batch is cut into pieces which are linearised anew for every round of products: less memory
    for more work, with equal results.

    Autocast is off inside, half-precision parameters take part as float32, buffers stay as they
    are, and with dropout every product sees the same mask.

    Args:
        model: the network.
        criterion: the loss, called as ``criterion(outputs, targets)``; returns a scalar.
        batch: ``(inputs, targets)``.
        blocks: lists of the model's parameters.
        micro_batch: rows of a piece; None keeps the batch whole.
        random_state: from which the network draws (dropout masks); None: the current one.
        linearizer: keeps traces from one batch to the next; None: a new one.

    Attributes:
        path: how products are computed (see `StepReport.path`).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batch: Batch,
        blocks: Sequence[Block],
        micro_batch: int | None = None,
        random_state: RandomState | None = None,
        linearizer: Linearizer | None = None,
    ) -> None:
        self._model, self._criterion, self._blocks = unwrapped(model), _wide(criterion), blocks
        self._linearizer = linearizer or Linearizer()
        self._random_state = random_state or RandomState.capture(blocks[0])
        self._pieces = list(pieces(self._model, criterion, batch, micro_batch))
        with plain_operations(self._model), self._random_state.replayed():
            first = self._linearized(*self._pieces[0])
        self._whole = first if len(self._pieces) == 1 else None
        self.path = first.path if self._whole else f"{first.path}, in pieces"

    def products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``G_bb v`` for each block that has a vector.

        Args:
            vectors: for each block a flat vector (its parameters concatenated, in its order), or
                None: nothing is computed for that block.

        Returns:
            Flat vectors, and None where None was given.
        """
        with plain_operations(self._model), torch.no_grad():
            if self._whole is not None:
                return self._whole.products(vectors)
            return self._in_pieces(vectors)

    def _in_pieces(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        totals: list[Tensor | None] = [None] * len(vectors)
        with self._random_state.replayed():
            for piece in self._pieces:
                products = self._linearized(*piece).products(vectors)
                totals = [
                    new if total is None or new is None else total.add_(new)
                    for total, new in zip(totals, products, strict=True)
                ]
        return totals

    def _linearized(self, weight: float, batch: Batch) -> _Piece:
        inputs, targets = tree_map_only(Tensor, widened, batch)
        linearization, path = self._linearizer(self._model, self._blocks, inputs)
        hessian = output_hessian(self._criterion, linearization.outputs, targets)
        return _Piece(linearization, hessian, self._blocks, weight, path)


@dataclass(frozen=True)
class _Piece:
    """One piece of a batch, with the weight it has in the whole."""

    linearization: Linearization
    hessian: OutputHessian
    blocks: Sequence[Block]
    weight: float
    path: str

    def products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = list(zip(vectors, self.blocks, strict=True))
        tangents = self.linearization.tangents(
            [
                None if v is None else unflattened(v, [widened(p) for p in block])
                for v, block in pairs
            ]
        )
        adjoints = self.linearization.adjoints(
            [None if t is None else self.hessian(list(t)) for t in tangents]
        )
        return [
            None if v is None or u is None else self._weighted(flattened(u, v.dtype))
            for v, u in zip(vectors, adjoints, strict=True)
        ]

    def _weighted(self, product: Tensor) -> Tensor:
        return product if self.weight == 1 else product.mul_(self.weight)


def flattened(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors concatenated into one vector of ``dtype``."""
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def unflattened(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector in the shapes of ``like`` (copies where the dtype differs)."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [
        part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)
    ]


def wide_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all of them, single precision or wider."""
    dtype = torch.float32
    for p in parameters:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _wide(criterion: Criterion) -> Criterion:
    """The loss with class weights and the like in the precision that the outputs will have."""
    if not isinstance(criterion, nn.Module):
        return criterion
    tensors = [*criterion.parameters(), *criterion.buffers()]
    if all(widened(tensor) is tensor for tensor in tensors):
        return criterion
    return copy.deepcopy(criterion).float()
