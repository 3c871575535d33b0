"""The tangent and adjoint maps of a network as graphs of tensor operations, traced once.

At its parameters ``w``, a network's outputs ``f(w)`` have a tangent map ``v ↦ Jv`` and an adjoint
map ``u ↦ Jᵀu``. A trace of both at once, with the parameters and the batch as *inputs*, falls into
three graphs: what depends on neither ``v`` nor ``u`` (the primal graph: the forward pass and the
derivatives of its operations), on ``v`` (tangent), and on ``u`` (adjoint). What crosses from the
first to the others, the residuals, is computed once at each ``w``; the linear graphs then run
without the network, and the same graphs serve every update.

For each block of parameters the linear graphs are cut down to what is not zero and not unwanted.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, jvp, vjp
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_MATRIX_PRODUCT = (_aten.mm.default,)
#: Operations that make a tensor of their own, which may be changed while it has one use.
_FRESH = (
    *_MATRIX_PRODUCT,
    _aten.add_.Tensor,
    _aten.clone.default,
    _aten.addmm.default,
    _aten.addmm_.default,
    _aten.bmm.default,
    _aten.convolution.default,
)
_COPIES = (_aten.clone.default, _aten.copy.default)

#: Maps points (parameters, buffers, inputs) to floating-point outputs and to others.
Network = Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Trace:
    """The graphs of a network for points of certain shapes and for certain blocks of them."""

    primal: GraphModule  # points -> outputs, others, residuals
    tangents: list[LinearGraph]  # one for each block
    adjoints: list[LinearGraph]

    def linearized(self, points: Sequence[Tensor]) -> TracedMaps:
        """The outputs at ``points``, and the maps there."""
        return TracedMaps(self, *self.primal.forward(*points))


@dataclass(frozen=True)
class TracedMaps:
    """A trace at certain points.

    Attributes:
        outputs: what the network returned, the floating-point tensors.
        others: the tensors that are not.
    """

    trace: Trace
    outputs: list[Tensor]
    others: list[Tensor]
    residuals: list[Tensor]

    def tangent(self, block: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """``Jv`` for each output; ``direction`` has a tensor for each of the block's points."""
        return self.trace.tangents[block](direction, self.residuals)

    def adjoint(self, block: int, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """``Jᵀu`` for each of the block's points; ``cotangents`` has a tensor for each output."""
        return self.trace.adjoints[block](cotangents, self.residuals)


@dataclass(frozen=True)
class LinearGraph:
    """A graph that is linear in its arguments, given residuals."""

    graph: GraphModule
    strides: list[tuple[int, ...]]  # of the arguments, since views in the graph rely on them
    taken: list[int]  # which of all residuals it takes

    def __call__(self, arguments: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(arguments, self.strides, strict=True)
        laid_out = [
            x if x.stride() == strides else strided_copy(x, strides) for x, strides in pairs
        ]
        return self.graph.forward(*laid_out, *(residuals[place] for place in self.taken))


def strided_copy(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in memory of its own, laid out by ``strides``."""
    options = {"dtype": tensor.dtype, "device": tensor.device}
    return torch.empty_strided(tensor.shape, strides, **options).copy_(tensor)  # type: ignore[arg-type]


def trace(
    network: Network,
    points: Sequence[Tensor],
    blocks: Sequence[Sequence[int]],
    fixed: Collection[int] = (),
) -> Trace:
    """Trace ``network`` at ``points``, of which only the shapes, types and layouts matter.

    Args:
        network: a pure function of the points.
        points: parameters, buffers and inputs.
        blocks: for each block, which of the points belong to it.
        fixed: points by which nothing is ever differentiated: buffers.

    Raises:
        Exception: of any kind, where the network cannot be traced (it branches on the value of a
            tensor, say), or an operation has no forward- or reverse-mode derivative.
    """
    trainable = sorted(place for block in blocks for place in block)
    joint = _Joint.of(network, points, trainable, fixed)
    tangents = [joint.tangent(block) for block in blocks]
    adjoints = [joint.adjoint(block) for block in blocks]
    crossing = dict.fromkeys(node for cut in tangents + adjoints for node in cut.residuals)
    places = {node: place for place, node in enumerate(crossing)}

    def linear(cut: _Cut) -> LinearGraph:
        strides = [node.meta["val"].stride() for node in cut.arguments]
        taken = [places[node] for node in cut.residuals]
        return LinearGraph(joint.compiled(cut.graph), strides, taken)

    primal = joint.compiled(joint.primal(list(crossing)))
    return Trace(primal, list(map(linear, tangents)), list(map(linear, adjoints)))


@dataclass
class _Cut:
    """A linear graph in the making, and the nodes it takes, in the order it takes them."""

    graph: Graph
    arguments: list[Node]
    residuals: list[Node]  # from the primal graph


@dataclass(frozen=True)
class _Joint:
    """One trace of outputs, tangents and adjoints together."""

    module: GraphModule
    points: list[Node]
    directions: dict[int, Node]  # by the place of their point
    cotangents: list[Node]
    outputs: list[Node]
    others: list[Node]
    output_tangents: list[Node]
    adjoints: dict[int, Node]  # by the place of their point
    of_tangent: set[Node]  # all that depends on a direction
    of_adjoint: set[Node]  # all that depends on a cotangent

    @classmethod
    def of(
        cls,
        network: Network,
        points: Sequence[Tensor],
        trainable: list[int],
        fixed: Collection[int],
    ) -> _Joint:
        # Parameters and inputs have directions, all of them: where one had none, torch would make
        # zeros of its own and multiply them. `tangent` knows which are zero and leaves them out.
        floating = [
            place
            for place, point in enumerate(points)
            if point.is_floating_point() and place not in fixed
        ]
        outputs, _ = network(points)

        def joint(
            points: list[Tensor], directions: list[Tensor], cotangents: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
            def at(values: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
                replaced = dict(zip(places, values, strict=True))
                return [replaced.get(place, point) for place, point in enumerate(points)]

            def with_tangents(trained: list[Tensor]) -> tuple[list[Tensor], Any]:
                whole = at(trained, trainable)
                found, tangents, others = jvp(  # type: ignore[misc]
                    lambda *values: network(at(values, floating)),
                    tuple(whole[place] for place in floating),
                    tuple(directions),
                    has_aux=True,
                )
                return found, (tangents, others)

            trained = [points[place] for place in trainable]
            found, pull, aside = vjp(with_tangents, trained, has_aux=True)  # type: ignore[misc]
            tangents, others = aside
            return found, others, tangents, pull(cotangents)[0]

        # Tensors of their own, since the tracer knows arguments apart by their identity.
        directions = [points[place].clone() for place in floating]
        cotangents = [output.clone() for output in outputs]
        with warnings.catch_warnings():  # torch warns of itself when it first loads its formulas
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            # Fake tensors have shapes and layouts but no values: tracing costs neither memory nor
            # arithmetic.
            tracer = make_fx(functionalize(joint), tracing_mode="fake", _allow_non_fake_inputs=True)
            module = tracer(list(points), directions, cotangents)
        return cls._sorted(module, floating, trainable, len(points), len(outputs))

    @classmethod
    def _sorted(
        cls,
        module: GraphModule,
        floating: list[int],
        trainable: list[int],
        points: int,
        outputs: int,
    ) -> _Joint:
        graph = module.graph
        for node in graph.nodes:
            # Batch norm may change its running statistics, which are clones here.
            if any(changed.target is not _aten.clone.default for changed in _changed_by(node)):
                raise NotImplementedError(f"{node.target} changes its argument")
        given = [node for node in graph.nodes if node.op == "placeholder"]
        directions = given[points : points + len(floating)]
        cotangents = given[points + len(floating) :]
        results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        others = len(results) - 2 * outputs - len(trainable)
        cuts = (outputs, outputs + others, 2 * outputs + others)
        of_tangent, of_adjoint = _dependent(graph, directions), _dependent(graph, cotangents)
        _simplify(graph, of_tangent | of_adjoint)
        return cls(
            module,
            given[:points],
            dict(zip(floating, directions, strict=True)),
            cotangents,
            results[: cuts[0]],
            results[cuts[0] : cuts[1]],
            results[cuts[1] : cuts[2]],
            dict(zip(trainable, results[cuts[2] :], strict=True)),
            of_tangent,
            of_adjoint,
        )

    def tangent(self, block: Sequence[int]) -> _Cut:
        """From directions of the block's points to tangents of the outputs; others are zero."""
        moving = [self.directions[place] for place in block]
        zeros = set(self.directions.values()) - set(moving)
        return _cut(self.module.graph, moving, self.of_tangent, zeros, self.output_tangents)

    def adjoint(self, block: Sequence[int]) -> _Cut:
        """From cotangents of the outputs to those of the block's points."""
        wanted = [self.adjoints[place] for place in block]
        return _cut(self.module.graph, self.cotangents, self.of_adjoint, set(), wanted)

    def primal(self, residuals: list[Node]) -> Graph:
        """From the points to outputs, others and residuals."""
        results = (self.outputs, self.others, residuals)
        linear = self.of_tangent | self.of_adjoint
        random = [n for n in self.module.graph.nodes if _draws(n) and n not in linear]
        # All that is drawn stays, so that the generator's stream goes on as in the network.
        needed = _reaching([*self.outputs, *self.others, *residuals, *random])
        graph = Graph()
        copies = {point: graph.placeholder(point.name) for point in self.points}
        for node in self.module.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple([copies[node] for node in part] for part in results))
        return graph

    def compiled(self, graph: Graph) -> GraphModule:
        return GraphModule(self.module, graph)  # which has the constants


def _cut(
    graph: Graph, arguments: list[Node], linear: set[Node], zeros: set[Node], results: list[Node]
) -> _Cut:
    """The part of ``graph`` that leads from ``arguments`` to ``results`` by ``linear`` nodes.

    A node is zero if all its linear arguments are; such nodes are left out.
    """
    new = Graph()
    copies = {node: new.placeholder(node.name) for node in arguments}
    residuals: dict[Node, Node] = {}
    computed: dict[tuple[Any, str, str], Node] = {}
    end = [*copies.values()][-1]  # of the placeholders

    def copied(node: Node) -> Node:
        nonlocal end
        if node in copies:
            return copies[node]
        if node in zeros:
            like = node.meta["val"]
            options = {"dtype": like.dtype, "device": like.device}
            return new.call_function(_aten.zeros.default, (list(like.shape),), options)
        if node not in residuals:
            with new.inserting_after(end):
                end = residuals[node] = new.placeholder(node.name)
        return residuals[node]

    needed = _reaching(results)
    for node in graph.nodes:
        if node not in linear or node not in needed or node.op == "placeholder":
            continue
        inputs = [argument for argument in node.all_input_nodes if argument in linear]
        moving = [argument for argument in inputs if argument not in zeros]
        if not moving:
            zeros.add(node)
        elif len(moving) < len(inputs) and _is_plain_sum(node, moving[0]):
            copies[node] = copied(moving[0])
            if not _alike(node, moving[0]):  # in another shape
                shape = list(node.meta["val"].shape)
                spread = new.call_function(_aten.expand.default, (copies[node], shape))
                copies[node] = new.call_function(
                    _aten.clone.default, (spread,), {"memory_format": torch.contiguous_format}
                )
                copies[node].meta = node.meta
        else:
            copies[node] = new.node_copy(node, copied)
            # The formulas of one operation compute some things twice.
            same = (node.target, str(copies[node].args), str(copies[node].kwargs))
            copies[node] = computed.setdefault(same, copies[node])
    new.output([copied(node) for node in results])
    new.eliminate_dead_code()
    _mask_outputs(new)
    _accumulate(new)
    for node, placeholder in list(residuals.items()):
        if not placeholder.users:
            new.erase_node(placeholder)
            del residuals[node]
    return _Cut(new, arguments, list(residuals))


def _simplify(graph: Graph, linear: set[Node]) -> None:
    """Take out aliases, and out of the linear graphs, where nothing changes a tensor, copies.

    Not out of the primal graph: batch norm changes its running statistics unannounced, which are
    copies of the network's for that reason.
    """
    for node in graph.nodes:
        if node.target is _aten.alias.default:
            node.replace_all_uses_with(node.args[0])
        elif node in linear and node.target in _COPIES:
            source = node.args[-1]
            if source in linear and _alike(node, source):
                node.replace_all_uses_with(source)


def _alike(node: Node, other: Any) -> bool:
    """Whether two nodes' tensors have one shape, layout, type and place."""
    one, two = node.meta["val"], other.meta["val"]
    return (one.shape, one.stride(), one.dtype, one.device) == (
        two.shape,
        two.stride(),
        two.dtype,
        two.device,
    )


def _is_sum(node: Node) -> bool:
    return node.target is _aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2


def _is_plain_sum(node: Node, term: Any) -> bool:
    """Whether nothing but the shape makes the sum differ from its term plus zero."""
    total = node.meta["val"]
    return _is_sum(node) and total.is_contiguous() and total.dtype == term.meta["val"].dtype


def _changed_by(node: Node) -> list[Any]:
    """The arguments that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    return [given for a, given in pairs if a.alias_info is not None and a.alias_info.is_write]


def _mask_outputs(graph: Graph) -> None:
    """Tell operations that can leave out some of their results which ones are not used."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        if "output_mask" in names:
            used = {user.args[1] for user in node.users if user.target is operator.getitem}
            place = names.index("output_mask")
            mask = [asked and k in used for k, asked in enumerate(node.args[place])]
            node.update_arg(place, mask)


def _accumulate(graph: Graph) -> None:
    """Add a product to a sum as it is computed, in place where the sum is used nowhere else."""
    for node in list(graph.nodes):
        if not _is_sum(node):
            continue
        base, term = node.args
        if _is_own(base, _MATRIX_PRODUCT) or not _is_own(base, _FRESH):
            base, term = term, base
        in_place = _is_own(base, _FRESH) and _alike(node, base)
        with graph.inserting_before(node):
            if _is_own(term, _MATRIX_PRODUCT) and _is_plain_sum(node, base) and _alike(node, term):
                target = _aten.addmm_.default if in_place else _aten.addmm.default
                total = graph.call_function(target, (base, *term.args))
            elif in_place:
                total = graph.call_function(_aten.add_.Tensor, (base, term))
            else:
                continue
        total.meta = node.meta
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        if not term.users:
            graph.erase_node(term)


def _is_own(node: Any, targets: Sequence[Any]) -> bool:
    """Whether a node makes a tensor of its own by one of ``targets``, for one use only."""
    return node.target in targets and len(node.users) == 1


def _dependent(graph: Graph, sources: Iterable[Node]) -> set[Node]:
    """All nodes that depend on one of ``sources``, these included."""
    found = set(sources)
    for node in graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _reaching(results: Iterable[Node]) -> set[Node]:
    """All nodes on which one of ``results`` depends, these included."""
    found: set[Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
