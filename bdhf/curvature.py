"""Products with the generalised Gauss-Newton matrix ``G = Jᵀ H_L J``.

``J`` is the Jacobian of the network's outputs with respect to its parameters and ``H_L`` the
Hessian of the loss with respect to the outputs (Schraudolph 2002, "Fast curvature matrix-vector
products for second-order gradient descent"). `ggn_vector_product` is the plain reference;
`GaussNewton` is what the optimizer uses.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from bdhf.batches import Batch, Criterion, call_arguments, checked_batch, pieces
from bdhf.output_hessian import (
    OutputHessian,
    differentiable_leaves,
    output_hessian,
    output_hessian_by_autograd,
)

Block = Sequence[nn.Parameter]


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
    draw. Use it to check other implementations, not inside a solver.

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
    model = _unwrapped(model)
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
            return _call(model, dict(zip(trainable, values, strict=True)), inputs)

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
        return _pulled_back(differentiable_leaves(outputs), cotangents, leaves)

    result = {p: torch.zeros_like(p) for p in trainable}
    seen: set[Tensor] = set()
    with torch.no_grad(), _plain_operations(model):
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
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batch: Batch,
        blocks: Sequence[Block],
        micro_batch: int | None = None,
        random_state: RandomState | None = None,
    ) -> None:
        self._model, self._criterion, self._blocks = _unwrapped(model), _wide(criterion), blocks
        self._pieces = list(pieces(self._model, criterion, batch, micro_batch))
        self._random_state = random_state or RandomState.capture(blocks[0])
        self._whole: _Linearization | None = None
        if len(self._pieces) == 1:
            with _plain_operations(self._model):
                self._whole = self._linearized(*self._pieces[0])
        #: How products are computed: "linearized" once, or "recomputed in pieces".
        self.path = "linearized" if self._whole else "recomputed in pieces"

    def products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``G_bb v`` for each block that has a vector.

        Args:
            vectors: for each block a flat vector (its parameters concatenated, in its order), or
                None: nothing is computed for that block.

        Returns:
            Flat vectors, and None where None was given.
        """
        with _plain_operations(self._model):
            return self._products(vectors)

    def _products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        if self._whole is not None:
            return self._whole.products(vectors)
        totals: list[Tensor | None] = [None] * len(vectors)
        with self._random_state.replayed():
            for piece in self._pieces:
                products = self._linearized(*piece, replay=False).products(vectors)
                totals = [
                    new if total is None or new is None else total.add_(new)
                    for total, new in zip(totals, products, strict=True)
                ]
        return totals

    def _linearized(self, weight: float, batch: Batch, replay: bool = True) -> _Linearization:
        blocks = [[_widened(p.detach()).requires_grad_() for p in block] for block in self._blocks]
        values = {p: _widened(p.detach()) for p in self._model.parameters()}
        for block, leaves in zip(self._blocks, blocks, strict=True):
            values.update(zip(block, leaves, strict=True))
        inputs, targets = tree_map_only(Tensor, _widened, batch)
        with contextlib.ExitStack() as stack:
            if replay:
                stack.enter_context(self._random_state.replayed())
            stack.enter_context(torch.enable_grad())
            outputs = _call(self._model, values, inputs)
            hessian = output_hessian(self._criterion, outputs, targets)
            return _Linearization.of(differentiable_leaves(outputs), hessian, blocks, weight)


@dataclass(frozen=True)
class _Linearization:
    """A network linearised at its parameters, as two kept autograd graphs.

    The adjoint map ``u ↦ Jᵀu`` is the usual backward graph. Differentiating it once more, with
    respect to ``u``, gives the tangent map ``v ↦ Jv``: since ``Jᵀu`` is linear in ``u``, its
    transpose does not depend on ``u`` (Townsend 2017, "A new trick for calculating Jacobian
    vector products"). Autograd prunes both maps to the parameters they are asked for.
    """

    outputs: list[Tensor]
    hessian: OutputHessian
    blocks: list[list[Tensor]]
    adjoint_seeds: list[Tensor]  # the u above
    adjoints: list[list[Tensor | None]]  # Jᵀu for each block; None: does not reach the outputs
    weight: float

    @classmethod
    def of(
        cls,
        outputs: list[Tensor],
        hessian: OutputHessian,
        blocks: list[list[Tensor]],
        weight: float,
    ) -> _Linearization:
        seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        connected = [(o, u) for o, u in zip(outputs, seeds, strict=True) if o.requires_grad]
        leaves = [leaf for block in blocks for leaf in block]
        flat = iter(
            torch.autograd.grad(
                [o for o, _ in connected],
                leaves,
                [u for _, u in connected],
                create_graph=True,
                allow_unused=True,
            )
            if connected
            else [None] * len(leaves)
        )
        adjoints = [[next(flat) for _ in block] for block in blocks]
        return cls(outputs, hessian, blocks, seeds, adjoints, weight)

    def products(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if v is None else self._product(k, v) for k, v in enumerate(vectors)]

    def _product(self, k: int, vector: Tensor) -> Tensor:
        tangents = self._tangent(k, unflattened(vector, self.blocks[k]))
        product = _pulled_back(self.outputs, self.hessian(tangents), self.blocks[k])
        return flattened(product, vector.dtype).mul_(self.weight)

    def _tangent(self, k: int, vector: list[Tensor]) -> list[Tensor]:
        pairs = [(g, v) for g, v in zip(self.adjoints[k], vector, strict=True) if g is not None]
        if not pairs:
            return [torch.zeros_like(output) for output in self.outputs]
        maps, directions = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(
                maps, self.adjoint_seeds, directions, retain_graph=True, materialize_grads=True
            )
        )


def _pulled_back(
    outputs: list[Tensor], cotangents: list[Tensor], leaves: list[Tensor]
) -> list[Tensor]:
    """``Jᵀu`` through the kept graph of the outputs; zeros for leaves that reach none."""
    pairs = [(o, u) for o, u in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    reached, seeds = zip(*pairs, strict=True)
    pulled = torch.autograd.grad(reached, leaves, seeds, retain_graph=True, materialize_grads=True)
    return [piece.detach() for piece in pulled]  # torch 2.9's zeros require a gradient


def flattened(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors concatenated into one vector of ``dtype``."""
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def unflattened(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector in the shapes of ``like`` (copies where the dtype differs)."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [
        part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)
    ]


@dataclass(frozen=True)
class RandomState:
    """The state of the random generators from which a network draws."""

    cpu: Tensor
    device: torch.device
    of_device: Tensor | None

    @classmethod
    def capture(cls, tensors: Sequence[Tensor]) -> RandomState:
        """The current state of the CPU's generator and that of the tensors' device."""
        device = tensors[0].device if tensors else torch.device("cpu")
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, of_device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state inside, and go on from the current one afterwards."""
        with torch.random.fork_rng([] if self.of_device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.of_device is not None:
                torch.cuda.set_rng_state(self.of_device, self.device)
            yield


def _call(model: nn.Module, values: dict[nn.Parameter, Tensor], inputs: Any) -> Any:
    """The model's outputs with other values for its parameters, its buffers left as they are."""
    state = {}
    # Names are those of distinct modules: `functional_call` would tie weights by itself, but
    # leaves a module that is used in two places with the wrong parameters (torch 2.14).
    for prefix, module in model.named_modules():
        prefix = prefix + "." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in values:
                state[prefix + name] = values[parameter]
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            state[prefix + name] = _widened(buffer).clone()
    args, kwargs = call_arguments(inputs)
    return functional_call(model, state, args, kwargs, tie_weights=False)


@contextlib.contextmanager
def _plain_operations(model: nn.Module) -> Iterator[None]:
    """No autocast, also in backward passes, and operations that can be differentiated twice."""
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            with warnings.catch_warnings():  # of TF32 on Intel GPUs, which nobody asked for
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _wide(criterion: Criterion) -> Criterion:
    """The loss with class weights and the like in the precision that the outputs will have."""
    if not isinstance(criterion, nn.Module):
        return criterion
    tensors = [*criterion.parameters(), *criterion.buffers()]
    if all(_widened(tensor) is tensor for tensor in tensors):
        return criterion
    return copy.deepcopy(criterion).float()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: curvature needs no hooks of DDP's and no compiled backward pass."""
    if isinstance(model, DistributedDataParallel):
        return _unwrapped(model.module)
    original = getattr(model, "_orig_mod", model)  # torch.compile's
    return model if original is model else _unwrapped(original)
