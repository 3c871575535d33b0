"""Who solves which blocks, where several ranks make an update together.

The blocks' systems do not depend on each other (Zhang et al. 2017, section 3), so a *team* of ranks
solves its blocks without a word to the others until it has the solutions. Within a team of several
ranks the curvature mini-batch is split, and every product is summed over them. One team of all
ranks is data-parallel, one rank a team block-parallel; anything between is a mixture.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdhf.batches import Batch, cut
from bdhf.curvature import GaussNewton
from bdhf.functional import unwrapped
from bdhf.machine import synchronize
from bdhf.work import count_work

#: How blocks are placed: by the multiply-adds or the time of a product with each, or all blocks
#: with all ranks.
Placement = Literal["counted", "measured", "data"]

#: Rows on which products are counted; the count is exact for any number.
_COUNTED_ROWS = 2

#: Products of each block that are timed, after one that is not; the fastest counts.
_TIMED = 3


@dataclass(frozen=True)
class Team:
    """Ranks that solve some blocks together.

    Attributes:
        blocks: positions among the param groups that have a trainable parameter.
        ranks: places in the process group; they split the curvature mini-batch in this order.
    """

    blocks: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("blocks", "ranks"):  # lists are as good
            object.__setattr__(self, name, tuple(getattr(self, name)))


def balanced_teams(costs: Sequence[float], ranks: int) -> list[Team]:
    """Teams of ``ranks`` for blocks of these ``costs``, so that the slowest has little to do.

    With fewer ranks than blocks every rank is a team. Otherwise every block has a team, and the
    ranks that are left go one by one to the team that has most to do for each of its ranks.

    Raises:
        ValueError: there is no block or no rank, or a cost is negative or not a number.
    """
    if not costs or ranks < 1:
        raise ValueError(f"{len(costs)} blocks, {ranks} ranks; give at least one of each")
    if ranks < len(costs):
        return [Team(blocks, (rank,)) for rank, blocks in enumerate(balanced_blocks(costs, ranks))]
    _check_costs(costs)
    sizes = [1] * len(costs)
    for _ in range(ranks - len(costs)):
        dearest = max(range(len(costs)), key=lambda k: costs[k] / sizes[k])
        sizes[dearest] += 1
    teams, first = [], 0
    for block, size in enumerate(sizes):
        teams.append(Team((block,), tuple(range(first, first + size))))
        first += size
    return teams


def balanced_blocks(costs: Sequence[float], teams: int) -> list[tuple[int, ...]]:
    """The blocks of each of so many teams of equal size.

    The dearest block that is left goes to the team that has least to do so far, which is at most
    a third above the best (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Raises:
        ValueError: a cost is negative or not a number.
    """
    _check_costs(costs)
    mine: list[list[int]] = [[] for _ in range(teams)]
    loads = [(0.0, 0, team) for team in range(teams)]
    for block in sorted(range(len(costs)), key=lambda k: -costs[k]):
        load, count, team = heapq.heappop(loads)
        mine[team].append(block)
        heapq.heappush(loads, (load + costs[block], count + 1, team))
    return [tuple(sorted(blocks)) for blocks in mine]


def product_costs(
    model: nn.Module,
    criterion: Any,
    batch: Batch,
    blocks: Sequence[Sequence[nn.Parameter]],
    measured: bool = False,
) -> list[float]:
    """What a product with each block costs: counted in gradients, or measured in seconds."""
    model = unwrapped(model)
    if not measured:
        return count_work(model, criterion, cut(batch, 0, _COUNTED_ROWS), blocks).products
    matrix = GaussNewton(model, criterion, batch, blocks)
    return [_seconds(matrix, blocks, k) for k in range(len(blocks))]


def _seconds(matrix: GaussNewton, blocks: Sequence[Sequence[nn.Parameter]], k: int) -> float:
    query: list[Tensor | None] = [None] * len(blocks)
    query[k] = torch.cat([p.detach().reshape(-1) for p in blocks[k]])
    device = blocks[k][0].device
    seconds = []
    for _ in range(1 + _TIMED):
        synchronize(device)
        started = time.perf_counter()
        matrix.products(query)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def check_teams(teams: Sequence[Team], ranks: int, blocks: int | None = None) -> None:
    """Every rank is in one team, and every block.

    Raises:
        ValueError: it is not so, or what is given are no teams.
    """
    for team in teams:
        if not isinstance(team, Team):
            raise ValueError(f"placement holds {team!r}; give bdhf.Team(blocks, ranks) for each")
    for what, count, given in (
        ("ranks", ranks, [rank for team in teams for rank in team.ranks]),
        ("blocks", blocks, [block for team in teams for block in team.blocks]),
    ):
        if count is not None and sorted(given) != list(range(count)):
            raise ValueError(
                f"placement has {what} {sorted(given)}; each of 0 to {count - 1} must be in "
                "exactly one team"
            )
    if not all(team.ranks for team in teams):
        raise ValueError("placement has a team without ranks; leave it out")


def _check_costs(costs: Sequence[float]) -> None:
    if not all(cost >= 0 for cost in costs):
        raise ValueError(f"costs={list(costs)}; must be numbers, 0 or more")
