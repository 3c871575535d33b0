"""An update of `BlockDiagonalHF` that several ranks make together.

1. The gradient mini-batch is split over all ranks, and the gradient summed.
2. Each team solves its blocks: alone, or, where it has several ranks, on parts of the curvature
   mini-batch, with products summed over the team.
3. All ranks get all solutions, and take the same step. Weights and state are the same everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bdhf.batches import Batch
from bdhf.cg import REASONS, CGResult, Systems
from bdhf.curvature import GaussNewton, flattened, wide_dtype
from bdhf.distributed.placement import Team, product_costs
from bdhf.distributed.ranks import Ranks
from bdhf.distributed.shares import Share, shared_loss_and_gradient, split
from bdhf.functional import RandomState
from bdhf.update import Update

#: Numbers of a `CGResult` beside its solution.
_NUMBERS = 4


@dataclass
class SharedUpdate(Update):
    """The parts of an update as one rank makes them.

    Attributes:
        ranks: who makes the update.
    """

    ranks: Ranks

    def begin(self) -> None:
        """Compute the gradient, linearise, and start the systems."""
        batches = self.batch, self.curvature_batch
        if not self.ranks.compared:
            self._compare_state()
        self._split = split(self.ranks, self.model, self.criterion, *batches)
        if self.batch is None:
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self.ranks.compare_gradients(found)
        super().begin()

    def _compare_state(self) -> None:
        """Refuse ranks that start from different solutions: they would wait for each other."""
        last = [self._last_solution(p) for p in self.parameters]
        found = [-1.0 if x is None else float(x.double().square().sum()) for x in last]
        numbers = torch.tensor(found, dtype=torch.float64, device=self.parameters[0].device)
        if not self.ranks.have_the_same(numbers):
            raise ValueError(
                "the ranks have different optimizer states, or parameters; load the same on all"
            )

    def loss_and_gradient(self, batch: Batch) -> Tensor:
        share = self._split.share(0, batch)
        what = self.model, self.criterion, share, self.parameters, self.micro_batch
        return shared_loss_and_gradient(self.ranks, *what)

    def start(self, descents: list[Tensor], random_state: RandomState) -> None:
        self._teams = self.ranks.teams(self.blocks, self._costs, self._judge())
        self._team = self.ranks.mine(self._teams)
        share = self._split.share_in_team(1, self.curvature_batch, self._team)
        self._weight = share.weight
        self._matrix = self._linearized(share, random_state)
        self._systems: Systems | None = None
        if self._team.blocks:
            alone = len(self._team.ranks) == 1
            agree = {} if alone else {"agree": self._agree}
            self._systems = self.systems_of(self._team.blocks, descents, **agree)
            self._systems.start(self._products)

    def _judge(self) -> int:
        """The rank that says what blocks cost: the first that has rows."""
        return next(rank for rank, count in enumerate(self._split.counts[1]) if count)

    def _costs(self, measured: bool) -> list[float]:
        return product_costs(
            self.model, self.criterion, self.curvature_batch, self.blocks, measured
        )

    def _linearized(self, share: Share, random_state: RandomState) -> GaussNewton | None:
        """The curvature of the team's blocks on this rank's rows; None: there are none."""
        blocks = [self.blocks[k] for k in self._team.blocks]
        if not (blocks and share.rows):
            return None
        return self.linearized(share.batch, blocks, random_state)

    def _agree(self, dots: Tensor) -> None:
        self.ranks.broadcast(dots, self._team.ranks[0], self._team)

    def _products(self, vectors: list[Tensor | None]) -> list[Tensor | None]:
        """Products with the team's blocks, on the whole curvature mini-batch."""
        asked = {k: v for k, v in enumerate(vectors) if v is not None}
        if self._matrix is None:
            found = {k: torch.zeros_like(v) for k, v in asked.items()}
        else:
            products = self._matrix.products(vectors)
            found = {k: p for k in asked if (p := products[k]) is not None}
        if len(self._team.ranks) > 1:
            summed = torch.cat(list(found.values())).mul_(self._weight)
            self.ranks.all_reduce(summed, self._team)
            parts = summed.split([len(product) for product in found.values()])
            found = {k: part.to(asked[k].dtype) for k, part in zip(found, parts, strict=True)}
        return [found.get(k) for k in range(len(vectors))]

    def make(self) -> None:
        self.begin()
        if self._systems is not None:
            self._systems.run(functools.partial(self._systems.round, self._products))
        self.is_made = True

    @property
    def path(self) -> str:
        own = "no product" if self._matrix is None else self._matrix.path
        return f"{own}, {self.ranks}"

    def solved(self) -> list[CGResult]:
        """What all teams found."""
        found = {}
        if self._systems is not None:
            found = dict(zip(self._team.blocks, self._systems.results(), strict=True))
        messages = {team: self._message(team, found) for team in self._teams if team.blocks}
        self.ranks.exchange([(message, team.ranks[0]) for team, message in messages.items()])
        for team, message in messages.items():
            found.update(self._read(team, message))
        return [found[k] for k in range(len(self.blocks))]

    def _message(self, team: Team, found: dict[int, CGResult]) -> Tensor:
        """A team's results in one vector; without them, room for them."""
        parameters = [p for k in team.blocks for p in self.blocks[k]]
        dtype, device = wide_dtype(parameters), parameters[0].device
        if team is not self._team:
            length = sum(p.numel() for p in parameters) + _NUMBERS * len(team.blocks)
            return torch.empty(length, dtype=dtype, device=device)
        results = [found[k] for k in team.blocks]
        rows = [[r.iterations, REASONS.index(r.reason), r.value, r.products] for r in results]
        numbers = torch.tensor(rows, dtype=dtype, device=device)
        return flattened([*(result.solution for result in results), numbers], dtype)

    def _read(self, team: Team, message: Tensor) -> dict[int, CGResult]:
        sizes = [sum(p.numel() for p in self.blocks[k]) for k in team.blocks]
        *solutions, numbers = message.split([*sizes, _NUMBERS * len(sizes)])
        found = {}
        rows = numbers.view(-1, _NUMBERS).tolist()
        for k, solution, row in zip(team.blocks, solutions, rows, strict=True):
            iterations, reason, value, products = row
            solution = solution.to(wide_dtype(self.blocks[k]))
            found[k] = CGResult(
                solution, REASONS[int(reason)], int(iterations), value, int(products)
            )
        return found
