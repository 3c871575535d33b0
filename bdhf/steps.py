"""What an update did, as an optimizer tells it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bdhf.cg import StopReason


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind in an update, as this rank took part in them.

    Attributes:
        kind: ``all_reduce``, ``broadcast`` or ``all_gather``.
        ranks: how many took part in each.
        calls: how many there were.
        bytes: of the tensors that came out of them, all together; what goes over the wires depends
            on the backend's algorithm.
    """

    kind: str
    ranks: int
    calls: int
    bytes: int


@dataclass(frozen=True)
class BlockStep:
    """What one block's solve did in an update.

    Attributes:
        iterations: conjugate gradient steps taken.
        reason: why it stopped (see `conjugate_gradient`).
        value: ``½ Δᵀ(G + λI)Δ + gᵀΔ`` at the solution; negative when it promises a decrease.
        products: curvature products used, the one for the warm start included.
    """

    iterations: int
    reason: StopReason
    value: float
    products: int


@dataclass(frozen=True)
class StepReport:
    """What the last update did; `BlockDiagonalHF.last_step`.

    Attributes:
        blocks: one entry for each param group; all zero for one that is frozen.
        gradient_norm: 2-norm of the gradient over all blocks, a scalar on the device.
        path: how curvature products were computed: by maps ``"brought by the network"``,
            ``"traced"`` once for all updates, or, slower, by ``"autograd: ..."`` with the reason
            why the network could not be traced; with ``micro_batch``, ``", in pieces"``. With
            ``cuda_graphs`` on a GPU, from the third update of a kind on, ``", replayed"``, or
            ``", not replayed: ..."`` and the reason. With several ranks, which one this is.
        traffic: the collectives of the update, where several ranks made it.
    """

    blocks: list[BlockStep]
    gradient_norm: Tensor
    path: str
    traffic: tuple[Collective, ...] = ()

    @property
    def products(self) -> int:
        """Curvature products of all blocks together."""
        return sum(block.products for block in self.blocks)
