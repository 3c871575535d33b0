"""Gauss-Newton products, all blocks once: ours and the peers', on the same problem.

Each maps a problem to its set-up (once an update) and to a function that takes one vector for each
of ``blocks`` (lists of tensors) and returns the products. ``peers`` work on the network as a user
would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from problems import Blocks, Problem
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from bdhf.curvature import GaussNewton, flattened
from bdhf.linearization import Linearizer

Vectors = Sequence[Sequence[Tensor]]
Products = Callable[[Vectors], list[Tensor]]


def ours(problem: Problem, blocks: Blocks, linearizer: Linearizer) -> Products:
    """A linearisation; the linearizer keeps the trace from one to the next."""
    batch = problem.inputs, problem.targets
    matrix = GaussNewton(problem.model, problem.criterion, batch, blocks, linearizer=linearizer)

    def products(vectors: Vectors) -> list[Tensor]:
        flat = [flattened(vector, torch.float32) for vector in vectors]
        return [product for product in matrix.products(flat) if product is not None]

    return products


def torch_func(problem: Problem, blocks: Blocks) -> Products:
    """``jvp`` of the network, then ``vjp`` at it: both recompute the forward pass."""
    model = problem.plain
    names = {p: name for name, p in model.named_parameters()}

    def product(block: Sequence[Tensor], vector: Sequence[Tensor]) -> Tensor:
        point = {names[p]: p.detach() for p in block}  # type: ignore[index]

        def network(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, values, (problem.inputs,))

        def slope(outputs: Tensor) -> Tensor:
            return torch.func.grad(lambda o: problem.criterion(o, problem.targets))(outputs)

        direction = dict(zip(point, vector, strict=True))
        outputs, tangent = jvp(network, (point,), (direction,))  # type: ignore[misc]
        if isinstance(problem.criterion, torch.nn.MSELoss):  # jvp of grad of MSE fails (2.14)
            curved = 2 * tangent
        else:
            _, curved = jvp(slope, (outputs,), (tangent,))  # type: ignore[misc]
        _, pull = vjp(network, point)  # type: ignore[misc]
        return flattened(list(pull(curved)[0].values()), torch.float32)

    return lambda vectors: [product(b, v) for b, v in zip(blocks, vectors, strict=True)]


def curvlinops(problem: Problem, blocks: Blocks) -> Products:
    """``GGNLinearOperator``, one for each block."""
    from curvlinops import GGNLinearOperator

    operators = [
        GGNLinearOperator(
            problem.plain,
            problem.criterion,
            list(block),
            [(problem.inputs, problem.targets)],
            check_deterministic=False,
        )
        for block in blocks
    ]

    def products(vectors: Vectors) -> list[Tensor]:
        flat = [flattened(vector, torch.float32) for vector in vectors]
        return [operator @ vector for operator, vector in zip(operators, flat, strict=True)]

    return products


def backpack(problem: Problem, blocks: Blocks) -> Products:
    """``ggn_vector_product_from_plist`` on a forward pass that is kept."""
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    outputs = problem.plain(problem.inputs)
    loss = problem.criterion(outputs, problem.targets)
    return lambda vectors: [
        flattened(
            ggn_vector_product_from_plist(loss, outputs, list(block), list(vector)), torch.float32
        )
        for block, vector in zip(blocks, vectors, strict=True)
    ]


PEERS: dict[str, Callable[[Problem, Blocks], Products]] = {
    "torch.func": torch_func,
    "curvlinops": curvlinops,
    "BackPACK": backpack,
}
