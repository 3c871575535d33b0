"""A network linearised at its parameters: its outputs, its tangent map and its adjoint map.

There are three ways to get the maps, and `Linearizer` takes the first that a network allows:

1. the network brings them itself (`Linearizable`);
2. they are traced once and serve every update (`bdhf.tracing`);
3. two autograd graphs, made anew at every update.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from bdhf import tracing
from bdhf.batches import call_arguments
from bdhf.functional import (
    RandomState,
    call,
    other_generators,
    restore_other_generators,
    widened,
)
from bdhf.output_hessian import differentiable_leaves
from bdhf.structure import NoStructureError, attributes, points_of, structure_of

Block = Sequence[nn.Parameter]

#: For each block the tensors of a direction or a result; None: nothing is asked for this block.
PerBlock = Sequence[Sequence[Tensor] | None]


class Linearization(Protocol):
    """The outputs of a network, and for each block of its parameters the maps ``J_b``, ``J_bᵀ``."""

    @property
    def outputs(self) -> Any:
        """What the network returned."""

    def tangents(self, directions: PerBlock) -> PerBlock:
        """``J_b v_b`` for each block that has a direction.

        A direction has one tensor for each parameter of the block; the result one for each
        floating-point tensor in the outputs.
        """

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        """``J_bᵀ u_b`` for each block that has cotangents; the forms are those of `tangents`."""


class Linearizable(nn.Module):
    """A network that brings its own maps, which can take the tangents of several blocks at once.

    It returns from `linearize` an object with ``outputs``, ``tangents`` and ``adjoints`` as in
    `Linearization`; blocks hold the network's own parameters. For ``outputs = x @ weight.T``::

        class Maps:
            def __init__(self, outputs, x, blocks):
                self.outputs, self.x, self.blocks = outputs, x, blocks

            def tangents(self, directions):  # a list of tensors a block, or None
                return [None if d is None else [self.x @ d[0].T] for d in directions]

            def adjoints(self, cotangents):
                return [None if u is None else [u[0].T @ self.x] for u in cotangents]

        class Linear(bdhf.Linearizable):
            def linearize(self, blocks, x):
                return Maps(self.forward(x), x, blocks) if blocks == [[self.weight]] else None

    `bdhf.peephole_lstm` is a whole one. At their first use the maps are compared with autograd's.
    They are taken while the network has no buffers, no hooks, no parametrizations, parameters in
    single precision or wider, and the ``forward`` they belong to; it is treated as any other else.
    """

    def linearize(self, blocks: Sequence[Block], *inputs: Any, **more: Any) -> Linearization | None:
        """Linearise at the present parameters; called like ``forward``, without autograd.

        Returns None where it cannot (blocks it does not know, say): another way is taken then.
        """
        return None


@dataclass(frozen=True)
class AutogradLinearization:
    """Two kept autograd graphs.

    The adjoint map ``u ↦ Jᵀu`` is the usual backward graph. Differentiating it once more, with
    respect to ``u``, gives the tangent map ``v ↦ Jv``: since ``Jᵀu`` is linear in ``u``, its
    transpose does not depend on ``u`` (Townsend 2017, "A new trick for calculating Jacobian
    vector products"). Autograd prunes both maps to the parameters they are asked for.
    """

    outputs: Any
    leaves: list[Tensor]  # of the outputs, floating-point
    blocks: list[list[Tensor]]
    seeds: list[Tensor]  # the u above
    pulled: list[list[Tensor | None]]  # Jᵀu for each block; None: does not reach the outputs

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[Block], inputs: Any) -> AutogradLinearization:
        points = [[widened(p.detach()).requires_grad_() for p in block] for block in blocks]
        values: dict[Tensor, Tensor] = {p: widened(p.detach()) for p in model.parameters()}
        for block, leaves in zip(blocks, points, strict=True):
            values.update(zip(block, leaves, strict=True))
        with torch.enable_grad():
            outputs = call(model, values, inputs)
            leaves = differentiable_leaves(outputs)
            seeds = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves]
            flat = iter(_pulled(leaves, seeds, [p for block in points for p in block], True))
        detached = tree_map_only(Tensor, Tensor.detach, outputs)
        return cls(detached, leaves, points, seeds, [[next(flat) for _ in b] for b in points])

    def tangents(self, directions: PerBlock) -> PerBlock:
        return [None if v is None else self._tangent(k, v) for k, v in enumerate(directions)]

    def _tangent(self, k: int, direction: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(g, v) for g, v in zip(self.pulled[k], direction, strict=True) if g is not None]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        maps, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            maps, self.seeds, vectors, retain_graph=True, materialize_grads=True
        )
        return [tensor.detach() for tensor in found]  # torch 2.9's zeros require a gradient

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        return [None if u is None else self._adjoint(k, u) for k, u in enumerate(cotangents)]

    def _adjoint(self, k: int, cotangents: Sequence[Tensor]) -> list[Tensor]:
        found = _pulled(self.leaves, cotangents, self.blocks[k], False)
        pairs = zip(found, self.blocks[k], strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def _pulled(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], points: Sequence[Tensor], create: bool
) -> Sequence[Tensor | None]:
    """``Jᵀu``, with a graph of its own if ``create``; None for points that reach no output."""
    pairs = [(o, u) for o, u in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * len(points)
    reached, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(
        reached, points, seeds, retain_graph=True, create_graph=create, allow_unused=True
    )


@dataclass(frozen=True)
class TracedLinearization:
    """Graphs traced once, at the present parameters."""

    outputs: Any
    maps: tracing.TracedMaps

    def tangents(self, directions: PerBlock) -> PerBlock:
        return [None if v is None else self.maps.tangent(k, v) for k, v in enumerate(directions)]

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        return [None if u is None else self.maps.adjoint(k, u) for k, u in enumerate(cotangents)]


class Linearizer:
    """Linearises networks, and keeps their traces from one update to the next.

    A trace holds for one structure: the modules with their attributes and modes, the shapes of
    parameters and inputs, the blocks. Another structure is traced anew, which takes some
    milliseconds for each operation; the last `most` traces are kept. Not traced are networks that
    branch on the values of tensors, draw from Python's or NumPy's random generators, change their
    own attributes, or take inputs other than tensors, numbers and text in tuples, lists and dicts.
    """

    most = 16

    def __init__(self) -> None:
        # The longest unused first; text: why there is no trace.
        self._traced: dict[Hashable, _TracedNetwork | str] = {}
        self._compared: set[type] = set()  # networks whose own maps were

    def __call__(
        self, model: nn.Module, blocks: Sequence[Block], inputs: Any
    ) -> tuple[Linearization, str]:
        """The linearisation of ``model``, and which way was taken (`StepReport.path`).

        ``blocks`` are lists of the model's parameters; the random state moves on as by one call
        of the model. Half-precision parameters take part as float32.
        """
        with torch.no_grad():
            brought = brought_maps(model, blocks, inputs)
            if brought is not None:
                if type(model) not in self._compared:
                    _compare(brought, model, blocks, inputs)
                    self._compared.add(type(model))
                return brought, "brought by the network"
            traced = self._trace(model, blocks, inputs)
            if not isinstance(traced, str):
                return traced.linearized(model, inputs), "traced"
        return AutogradLinearization.of(model, blocks, inputs), f"autograd: {traced}"

    def _trace(
        self, model: nn.Module, blocks: Sequence[Block], inputs: Any
    ) -> _TracedNetwork | str:
        try:
            key = structure_of(model, blocks, inputs)
        except NoStructureError as error:
            return str(error)
        traced = self._traced.pop(key, None) or _traced(model, blocks, inputs)
        self._traced[key] = traced
        if len(self._traced) > self.most:
            del self._traced[next(iter(self._traced))]
        return traced


def brought_maps(model: nn.Module, blocks: Sequence[Block], inputs: Any) -> Linearization | None:
    """The network's own maps, if it has some that hold."""
    if not isinstance(model, Linearizable):
        return None
    # A subclass that changes `forward` alone has left the inherited maps behind.
    for owner in type(model).__mro__:
        if "linearize" in vars(owner):
            break
        if "forward" in vars(owner):
            return None
    if any(map(_is_altered, model.modules())) or next(model.buffers(), None) is not None:
        return None
    if any(widened(p) is not p for p in model.parameters()):
        return None
    args, kwargs = call_arguments(inputs)
    return model.linearize(blocks, *args, **kwargs)


def _is_altered(module: nn.Module) -> bool:
    """Whether a module computes something else than its class says."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    backward = module._backward_hooks, module._backward_pre_hooks
    return any(map(len, hooks + backward)) or "forward" in vars(module) or is_parametrized(module)


class _Slot(enum.Enum):
    """Where a tensor goes in a network's outputs."""

    FLOATING = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True)
class _TracedNetwork:
    """A network's trace, and how its outputs are put together."""

    trace: tracing.Trace
    form: TreeSpec
    leaves: list[Any]  # with slots for the tensors

    def linearized(self, model: nn.Module, inputs: Any) -> TracedLinearization:
        maps = self.trace.linearized([widened(t.detach()) for t in points_of(model, inputs)])
        tensors = {_Slot.FLOATING: iter(maps.outputs), _Slot.OTHER: iter(maps.others)}
        leaves = [next(tensors[x]) if isinstance(x, _Slot) else x for x in self.leaves]
        return TracedLinearization(tree_unflatten(leaves, self.form), maps)


def _traced(model: nn.Module, blocks: Sequence[Block], inputs: Any) -> _TracedNetwork | str:
    """Trace the model; if that fails, why."""
    variables = points_of(model, inputs)
    parameters_and_buffers = [*model.parameters(), *model.buffers()]
    points = [_standing_alone(widened(tensor.detach())) for tensor in variables]
    places = {variable: place for place, variable in enumerate(variables)}
    template: list[Any] = []
    form: list[TreeSpec] = []

    def network(points: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        values = dict(zip(variables, points, strict=True))
        assert twin is not None
        outputs = call(twin, values, tree_map_only(Tensor, values.__getitem__, inputs))
        leaves, spec = tree_flatten(outputs)
        floating = differentiable_leaves(outputs)
        others = [x for x in leaves if isinstance(x, Tensor) and not x.is_floating_point()]
        slots = [_Slot.FLOATING if any(x is f for f in floating) else _Slot.OTHER for x in leaves]
        pairs = zip(leaves, slots, strict=True)
        template[:] = [slot if isinstance(x, Tensor) else x for x, slot in pairs]
        form[:] = [spec]
        return floating, others

    state = RandomState.capture(list(model.parameters()))
    drawn = other_generators()
    twin: nn.Module | None = None
    try:
        # What forward passes may leave in modules stays in a twin, which shares all tensors.
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in parameters_and_buffers})
        untouched = attributes(twin, places)
        with state.replayed():
            trace = tracing.trace(
                network,
                points,
                [[places[p] for p in block] for block in blocks],
                fixed={places[buffer] for buffer in model.buffers()},
            )
        with state.replayed():
            maps = trace.linearized(points)
        with state.replayed():
            _check(maps, network(points)[0], [[points[places[p]] for p in b] for b in blocks])
        found: _TracedNetwork | str = _TracedNetwork(trace, form[0], template)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network may do that cannot be traced
        found = _reason(error)
    if twin is not None and attributes(twin, places) != untouched:
        found = "its forward pass changes attributes of its modules"
    if other_generators() != drawn:
        found = "it draws from Python's or NumPy's random generator"
    restore_other_generators(drawn)
    return found


def _reason(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    known = {
        "data-dependent": "it branches on the value of a tensor",
        "they differ by": "its random draws depend on a tensor's layout",
    }
    return next((f"{plain} ({text})" for part, plain in known.items() if part in text), text)


def _standing_alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of another one.

    Torch's cache of fake tensors mixes up parts of tensors between traces (torch 2.14).
    """
    needed = tensor.numel() * tensor.element_size()
    if tensor.untyped_storage().nbytes() == needed or 0 in tensor.stride():
        return tensor
    return tracing.strided_copy(tensor, tensor.stride())


def _compare(
    brought: Linearization, model: nn.Module, blocks: Sequence[Block], inputs: Any
) -> None:
    """Compare a network's own maps with autograd's, once.

    Raises:
        ValueError: they are not the same.
    """
    with RandomState.capture(list(model.parameters())).replayed():
        expected = AutogradLinearization.of(model, blocks, inputs)
    directions, cotangents = map(_random_like, blocks), [_random_like(expected.leaves)]
    given = {"tangents": list(directions), "adjoints": cotangents * len(blocks)}
    for name in ("outputs", *given):
        try:
            one, other = getattr(brought, name), getattr(expected, name)
            if name in given:
                one, other = one(given[name]), other(given[name])
            _check_close(tree_leaves(one), tree_leaves(other))
        except Exception as error:
            brings = f"the {name} that {type(model).__name__}.linearize brings"
            raise ValueError(f"{brings} are not autograd's: {error}") from error


def _check_close(found: list[Any], expected: list[Any]) -> None:
    """As whole tensors: single entries of long sums may be rounding alone.

    Raises:
        AssertionError: they differ, or have other shapes or types.
    """
    close = {"rtol": math.inf, "atol": math.inf, "equal_nan": True}
    torch.testing.assert_close(found, expected, **close)  # type: ignore[arg-type]
    tensors = [pair for pair in zip(found, expected, strict=True) if isinstance(pair[1], Tensor)]
    pairs = [(a, b) for a, b in tensors if b.is_floating_point()]
    error = max((float((a - b).nan_to_num().norm()) for a, b in pairs), default=0.0)
    scale = max((float(b.nan_to_num().norm()) for _, b in pairs), default=0.0)
    if error > 1e-3 * scale:
        raise AssertionError(f"they differ by {error:.3g}, where their norm is {scale:.3g}")


def _check(
    maps: tracing.TracedMaps, outputs: list[Tensor], blocks: Sequence[Sequence[Tensor]]
) -> None:
    """The network's outputs are those of the trace, and ``⟨Jv, Jv⟩ = ⟨v, Jᵀ(Jv)⟩``."""
    _check_close(maps.outputs, outputs)
    if not all(bool(output.isfinite().all()) for output in outputs):
        return
    for k, block in enumerate(blocks):
        direction = _random_like(block)
        tangents = maps.tangent(k, direction)
        squared = _inner(tangents, tangents)
        difference = squared - _inner(direction, maps.adjoint(k, tangents))
        if not difference.abs() <= torch.finfo(outputs[0].dtype).eps ** 0.5 * squared:
            raise ArithmeticError(f"tangent and adjoint maps of block {k} do not fit")


def _random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Always the same normal numbers; the network's own random streams stay as they are."""
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    return [
        torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in tensors
    ]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
