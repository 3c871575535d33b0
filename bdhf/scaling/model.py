"""What an update takes on many devices: a small model, as pure functions.

An update is arithmetic, which is shared out, and collectives, which are counted as
`bdhf.distributed.ranks` makes them where all ranks are given the same mini-batches
(``sharded=False``):

- one all-reduce of the gradient and the loss;
- in a team of several ranks, for each product one all-reduce of the parameters of its blocks that
  run, and for each inner product one broadcast of a number for each of its blocks;
- for each team one broadcast of its solutions, with four numbers a block.

``seconds = arithmetic of the slowest rank + collectives``; nothing overlaps, nobody is late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bdhf.distributed.placement import Team, balanced_teams
from bdhf.steps import Collective

#: Bytes of a number: all of them are in single precision.
NUMBER = 4

#: Numbers that a team says of each block beside the solution.
_SAID_OF_A_BLOCK = 4

#: Inner products of a warm start, and of an iteration of conjugate gradient.
_DOTS_AT_START, _DOTS_OF_A_ROUND = 4, 2


@dataclass(frozen=True)
class Network:
    """What connects the ranks, the same for any two of them.

    Attributes:
        latency: α, seconds until the first byte of a message is there.
        bandwidth: β, bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, said: Collective) -> float:
        """What these collectives take, one after the other.

        With W ranks, n bytes and L = ⌈log₂ W⌉ steps:

        - all-reduce ``2 L α + 2 (W - 1)/W n/β``: recursive halving, then recursive doubling
          (Rabenseifner 2004, "Optimization of collective reduction operations"; Thakur,
          Rabenseifner and Gropp 2005, "Optimization of collective communication operations in
          MPICH");
        - broadcast ``L α + n/β``: a binary tree through which long messages go in pieces, so that
          they are sent once (the bound of Sanders, Speck and Träff 2009, "Two-tree algorithms");
        - all-gather ``L α + (W - 1)/W n/β``: recursive doubling, n bytes come out (Thakur et al.).
        """
        if said.ranks == 1:
            return 0.0
        rest = (said.ranks - 1) / said.ranks
        trips, share = {
            "all_reduce": (2, 2 * rest),
            "broadcast": (1, 1.0),
            "all_gather": (1, rest),
        }[said.kind]
        steps = trips * math.ceil(math.log2(said.ranks))
        return said.calls * steps * self.latency + share * said.bytes / self.bandwidth


@dataclass(frozen=True)
class Device:
    """What computes, one for each rank.

    Attributes:
        speed: how many times faster than the core that was measured.
        launch: seconds that each operation takes beside its arithmetic, on any device.
        cores: how many ranks compute at once; others wait for their turn. (Two ranks on a machine
            with ``cores=1.7`` get 0.85 of a core each.)
        check_every: CG iterations between two looks at which systems have stopped (`bdhf.cg`).
    """

    speed: float = 1.0
    launch: float = 0.0
    cores: float = math.inf
    check_every: int = 1

    def stretched(self, seconds: Sequence[float]) -> float:
        """How many times longer ranks that compute so long take, with fewer cores than ranks.

        All are done after ``max(longest, sum / cores)``, as if cores went round among them.
        """
        longest = max(seconds)
        return max(1.0, sum(seconds) / self.cores / longest) if longest else 1.0


@dataclass(frozen=True)
class Cost:
    """What a part of an update takes: ``(fixed + per_row · rows) / speed + launches · launch``.

    Attributes:
        fixed, per_row: seconds on the core that was measured.
        launches: operations of which it consists.
    """

    fixed: float
    per_row: float = 0.0
    launches: float = 0.0

    def seconds(self, device: Device, rows: float = 0.0) -> float:
        """On so many rows."""
        return (self.fixed + self.per_row * rows) / device.speed + self.launches * device.launch


@dataclass(frozen=True)
class SolveCost:
    """What it takes to solve some blocks side by side.

    Attributes:
        setup: linearising the network.
        product: a product with each of the blocks.
        algebra: the vector operations of a CG iteration.
    """

    setup: Cost
    product: Cost
    algebra: Cost


@dataclass(frozen=True)
class Costs:
    """What an optimizer's update takes, part by part.

    Attributes:
        parameters: of each block; a first-order method has one.
        counted: work of a product with each block, by which teams are balanced; first-order: none.
        gradient: loss and gradient.
        step: everything else that is made once: norms, the systems' start, the new weights.
        packing: copying a parameter into a message, for each of them.
        solves: by the blocks that a team has.
    """

    parameters: tuple[int, ...]
    counted: tuple[float, ...]
    gradient: Cost
    step: Cost
    packing: Cost
    solves: Mapping[tuple[int, ...], SolveCost] = field(default_factory=dict)

    def teams(self, ranks: int, placement: str) -> list[Team]:
        """As `bdhf.distributed.ranks` makes them, for ``placement`` "data" or "counted"."""
        if placement == "data" or len(self.counted) < 2:
            return [Team(tuple(range(len(self.counted))), tuple(range(ranks)))]
        return balanced_teams(self.counted, ranks)


@dataclass(frozen=True)
class Sizes:
    """What an update is made on.

    Attributes:
        rows, few: of the mini-batch, and of the curvature mini-batch.
        products: with each block, the one for the warm start included.
        cap: the most CG iterations.
    """

    rows: int
    few: int = 0
    products: tuple[int, ...] = ()
    cap: int = 0

    def rounds(self, block: int, check_every: int) -> int:
        """CG iterations in which a block takes part: until somebody looks that it has stopped."""
        needed = self.products[block] - 1
        return max(needed, min(math.ceil(needed / check_every) * check_every, self.cap))


@dataclass(frozen=True)
class Prediction:
    """What an update takes.

    Attributes:
        seconds: in all.
        talking: of them, in collectives.
        traffic: the collectives of the rank to which most is said.
    """

    seconds: float
    talking: float
    traffic: tuple[Collective, ...]

    @property
    def calls(self) -> int:
        """Collectives in which such a rank takes part."""
        return sum(said.calls for said in self.traffic)

    @property
    def bytes(self) -> int:
        """Of the tensors that came out of them."""
        return sum(said.bytes for said in self.traffic)


def predicted(
    costs: Costs, sizes: Sizes, teams: Sequence[Team], device: Device, network: Network
) -> Prediction:
    """An update by all ranks of the teams. A team that is done waits for the slowest."""
    ranks = sum(len(team.ranks) for team in teams)
    alone = ranks == 1

    def everywhere(seconds: float) -> float:
        return seconds * device.stretched([seconds] * ranks)

    packing = 0.0 if alone else costs.packing.seconds(device, sum(costs.parameters))
    gradient = costs.gradient.seconds(device, _largest_share(sizes.rows, ranks))
    common = everywhere(gradient + packing + costs.step.seconds(device))
    if sizes.products and not alone:
        common += everywhere(packing)  # the solutions
    solving = [_solving(costs, sizes, team, device) for team in teams]
    stretch = device.stretched(
        [s for s, team in zip(solving, teams, strict=True) for _ in team.ranks]
    )
    said = [_said_in_team(costs, sizes, team, device.check_every) for team in teams]
    talks = [sum(network.seconds(s) for s in mine) for mine in said]
    times = [s * stretch + talk for s, talk in zip(solving, talks, strict=True)]
    slowest = times.index(max(times))
    exchange = said_by_all(costs, sizes, teams)
    talking = talks[slowest] + sum(network.seconds(s) for s in exchange)
    loudest = max(said, key=lambda mine: sum(one.bytes for one in mine))
    traffic = merged([*exchange, *loudest])
    return Prediction(common + solving[slowest] * stretch + talking, talking, traffic)


def _largest_share(rows: int, ranks: int) -> int:
    return math.ceil(rows / ranks)


def _active(sizes: Sizes, team: Team, check_every: int) -> list[list[int]]:
    """The team's blocks that take part in each round."""
    counts = {k: sizes.rounds(k, check_every) for k in team.blocks}
    return [[k for k in team.blocks if counts[k] > r] for r in range(max(counts.values()))]


def _solving(costs: Costs, sizes: Sizes, team: Team, device: Device) -> float:
    """The arithmetic of a team's rank from the gradient to the solutions."""
    if not sizes.products or not team.blocks:
        return 0.0
    cost = costs.solves[team.blocks]
    rows = _largest_share(sizes.few, len(team.ranks))

    def share(blocks: Sequence[int]) -> float:
        """Of a round of all the team's blocks."""
        alone = {k: costs.solves[k,].product.seconds(device, rows) for k in team.blocks}
        return sum(alone[k] for k in blocks) / sum(alone.values()) if len(team.blocks) > 1 else 1.0

    product, algebra = cost.product.seconds(device, rows), cost.algebra.seconds(device)
    seconds = cost.setup.seconds(device, rows) + product
    for blocks in _active(sizes, team, device.check_every):
        seconds += product * share(blocks) + algebra
        if len(team.ranks) > 1:
            packed = sum(costs.parameters[k] for k in blocks)
            seconds += costs.packing.seconds(device, packed)
    return seconds


def said_by_all(costs: Costs, sizes: Sizes, teams: Sequence[Team]) -> tuple[Collective, ...]:
    """The collectives of all ranks: the gradient with the loss, and the solutions."""
    ranks = sum(len(team.ranks) for team in teams)
    if ranks == 1:
        return ()
    numbers = sum(costs.parameters)
    gradient = Collective("all_reduce", ranks, 1, NUMBER * (numbers + 1))
    if not sizes.products:
        return (gradient,)
    solved = sum(bool(team.blocks) for team in teams)
    numbers += _SAID_OF_A_BLOCK * len(costs.parameters)
    return gradient, Collective("broadcast", ranks, solved, NUMBER * numbers)


def _said_in_team(
    costs: Costs, sizes: Sizes, team: Team, check_every: int
) -> tuple[Collective, ...]:
    """The collectives of a team: its products and its inner products."""
    count = len(team.ranks)
    if count == 1 or not sizes.products or not team.blocks:
        return ()
    rounds = [list(team.blocks), *_active(sizes, team, check_every)]  # first the warm start
    numbers = sum(costs.parameters[k] for blocks in rounds for k in blocks)
    dots = _DOTS_AT_START + _DOTS_OF_A_ROUND * (len(rounds) - 1)
    return (
        Collective("all_reduce", count, len(rounds), NUMBER * numbers),
        Collective("broadcast", count, dots, NUMBER * dots * len(team.blocks)),
    )


def said_by(
    costs: Costs, sizes: Sizes, teams: Sequence[Team], rank: int, check_every: int = 1
) -> tuple[Collective, ...]:
    """What `StepReport.traffic` of a rank should say, but for the order."""
    mine = next(team for team in teams if rank in team.ranks)
    return merged(
        [*said_by_all(costs, sizes, teams), *_said_in_team(costs, sizes, mine, check_every)]
    )


def merged(said: Sequence[Collective]) -> tuple[Collective, ...]:
    """Those of one kind and of as many ranks together."""
    found: dict[tuple[str, int], Collective] = {}
    for one in said:
        key = one.kind, one.ranks
        before = found.get(key, Collective(*key, 0, 0))
        found[key] = Collective(*key, before.calls + one.calls, before.bytes + one.bytes)
    return tuple(found.values())


def fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """``fixed + per_row · rows`` through points (rows, seconds), neither of them negative.

    By least squares of the relative errors, so that the fixed part is not lost beside the long
    times of many rows.
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * rows for w, (rows, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (rows - x) ** 2 for w, (rows, _) in zip(weights, points, strict=True))
    slope = sum(w * (r - x) * (s - y) for w, (r, s) in zip(weights, points, strict=True))
    slope = max(slope / spread, 0.0) if spread else 0.0
    if y - slope * x >= 0:
        return y - slope * x, slope
    top = sum(w * r * s for w, (r, s) in zip(weights, points, strict=True))
    return 0.0, top / sum(w * r * r for w, (r, _) in zip(weights, points, strict=True))


def network_from(points: Sequence[tuple[Collective, float]]) -> Network:
    """The latency and bandwidth that explain measured collectives, as `fitted` does.

    ``seconds = α a + n b``: each point gives its a and n by the formulas of `Network.seconds`,
    so dividing by a makes it a line in n / a.
    """
    unit = [(Network(1.0, math.inf).seconds(c), Network(0.0, 1.0).seconds(c)) for c, _ in points]
    line = [(n / a, s / a) for (a, n), (_, s) in zip(unit, points, strict=True)]
    latency, per_byte = fitted(line)
    return Network(latency, 1 / per_byte if per_byte else math.inf)
