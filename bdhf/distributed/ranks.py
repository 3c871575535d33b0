"""The ranks of `torch.distributed` that make updates together, and what is said between them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bdhf.distributed.placement import Placement, Team, balanced_blocks, balanced_teams, check_teams
from bdhf.steps import Collective


class RankLostError(RuntimeError):
    """Another rank is gone, or was silent for longer than the process group's time-out."""


class Ranks:
    """The ranks that make updates together.

    Args:
        process_group: the ranks, or a mesh of them; the rows of a mesh of two dimensions are teams.
        placement: who solves which blocks (`bdhf.distributed.placement`), or the teams.
        sharded: whether each rank is given rows of its own; False: all are given the same
            mini-batches, and each takes its part.

    Attributes:
        rank, size: this rank's place, and how many there are.
        sharded: as above.
        compared: whether weights and state were found to be the same on all.

    Raises:
        ValueError: an argument is of no use; the message says which.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | DeviceMesh,
        placement: Placement | Sequence[Team] = "counted",
        sharded: bool = True,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "process_group is given, and torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() first, in a script started by torchrun"
            )
        self._rows: list[tuple[int, ...]] = []  # of a mesh
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if isinstance(process_group, DeviceMesh):
            group = self._of_mesh(process_group)
        else:
            group = process_group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not hold this process; give one that does")
        self._group, self._placement, self.sharded = group, placement, sharded
        self._groups[tuple(range(self.size))] = group
        self._check_placement()
        self.compared = False
        self._teams: dict[Any, list[Team]] = {}  # by the blocks' shapes
        self._said: dict[tuple[str, int], tuple[int, int]] = {}

    def _of_mesh(self, mesh: DeviceMesh) -> dist.ProcessGroup:
        """All ranks of the mesh; with two dimensions, its rows are teams that have their groups."""
        if mesh.ndim == 1:
            return mesh.get_group()
        if mesh.ndim != 2:
            raise ValueError(
                f"process_group is a mesh of {mesh.ndim} dimensions; it must have one, or two: "
                "teams of ranks, and the ranks of a team"
            )
        rows: list[list[int]] = mesh.mesh.tolist()
        group = dist.group.WORLD
        if sorted(rank for row in rows for rank in row) != list(range(dist.get_world_size())):
            raise ValueError(
                f"process_group is a mesh of ranks {rows}; with two dimensions it must hold all "
                f"{dist.get_world_size()} processes"
            )
        assert group is not None
        for row in rows:
            places = tuple(dist.get_group_rank(group, rank) for rank in row)
            self._rows.append(places)
            if dist.get_rank() in row:
                self._groups[places] = mesh.get_group(1)
        return group

    def _check_placement(self) -> None:
        names = get_args(Placement)
        if isinstance(self._placement, str):
            if self._placement not in names:
                raise ValueError(
                    f"placement={self._placement!r}; must be one of {', '.join(names)}, or a list "
                    "of bdhf.Team"
                )
            if self._rows and self._placement == "data":
                raise ValueError(
                    "placement='data' puts all ranks in one team, and process_group is a mesh of "
                    f"{len(self._rows)} teams; give a mesh of one dimension"
                )
        else:
            check_teams(self._placement, self.size)
            if self._rows and {team.ranks for team in self._placement} != set(self._rows):
                raise ValueError(
                    f"placement has teams other than the rows of the mesh, {self._rows}; give a "
                    "mesh of one dimension, or placement='counted'"
                )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    # Who does what.

    def teams(
        self,
        blocks: Sequence[Sequence[nn.Parameter]],
        costs: Callable[[bool], list[float]],
        judge: int,
    ) -> list[Team]:
        """The teams for these blocks, the same on all ranks.

        Args:
            blocks: the blocks.
            costs: called by rank ``judge`` alone, when blocks of these shapes are first met; it
                gets whether they are to be measured.
            judge: a rank that has rows.

        Raises:
            ValueError: the teams that were given do not fit the blocks.
        """
        key = tuple(tuple(p.shape for p in block) for block in blocks)
        if key not in self._teams:
            if isinstance(self._placement, str):
                teams = self._balanced(blocks, costs, judge)
            else:
                teams = list(self._placement)
                check_teams(teams, self.size, len(blocks))
            self._connect(teams)
            self._teams[key] = teams
        return self._teams[key]

    def _balanced(
        self,
        blocks: Sequence[Sequence[nn.Parameter]],
        costs: Callable[[bool], list[float]],
        judge: int,
    ) -> list[Team]:
        everyone = tuple(range(self.size))
        if not self._rows and (self._placement == "data" or len(blocks) == 1):
            return [Team(tuple(range(len(blocks))), everyone)]
        device = blocks[0][0].device
        found = torch.full((len(blocks),), torch.nan, dtype=torch.float64, device=device)
        fault = None
        if self.rank == judge:
            try:
                found.copy_(torch.tensor(costs(self._placement == "measured")))
            except Exception as error:  # of whatever kind a network's operations raise
                fault = error
        self.broadcast(found, judge)
        if bool(found.isnan().any()):
            raise ValueError(
                f"placement={self._placement!r}: rank {judge} could not tell what products cost; "
                "give placement='data', or a list of bdhf.Team"
            ) from fault
        if not self._rows:
            return balanced_teams(found.tolist(), self.size)
        packed = balanced_blocks(found.tolist(), len(self._rows))
        return [Team(mine, ranks) for mine, ranks in zip(packed, self._rows, strict=True)]

    def _connect(self, teams: Sequence[Team]) -> None:
        """Make the groups of teams of several ranks."""
        for team in teams:
            if len(team.ranks) == 1 or self._known(team):
                continue
            # All processes take part in making a group. (A local one that torch offers leaves them
            # with different names for the next; torch 2.14.)
            if self.size != dist.get_world_size():
                raise ValueError(
                    f"placement puts ranks {team.ranks} in a team, and process_group holds some of "
                    "the processes only, which cannot make teams of several; give "
                    "torch.distributed.group.WORLD, or placement='data'"
                )
            everywhere = [dist.get_global_rank(self._group, rank) for rank in team.ranks]
            made: Any = dist.new_group(everywhere, timeout=self._time_out())
            self._groups[team.ranks] = made

    def _known(self, team: Team) -> bool:
        """Whether the team has a group; a mesh has made those of its rows."""
        return team.ranks in self._groups or team.ranks in self._rows

    def _time_out(self) -> datetime.timedelta | None:
        """The process group's own, where torch tells it; None: the backend's default."""
        with suppress(AttributeError, RuntimeError):
            kind = "cuda" if "nccl" in dist.get_backend(self._group) else "cpu"
            backend: Any = self._group._get_backend(torch.device(kind))
            found: datetime.timedelta = backend.options._timeout
            return found
        return None

    def mine(self, teams: Sequence[Team]) -> Team:
        """The team that this rank is in."""
        return next(team for team in teams if self.rank in team.ranks)

    def compare_once(self, weights: Sequence[Tensor]) -> None:
        """Look at first whether all ranks have the same weights, or they would never find out.

        Raises:
            ValueError: they have not.
        """
        if not self.compared and not self.have_the_same(_squares(weights)):
            raise ValueError(
                "the ranks have different weights; build the model from the same seed on each, or "
                "load the same state, or wrap it in DDP, which copies those of rank 0"
            )

    def compare_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Look whether all ranks have the same gradients.

        Raises:
            ValueError: they have not.
        """
        if not self.have_the_same(_squares(gradients)):
            raise ValueError(
                "batch=None uses the gradients in p.grad, and the ranks have different ones; "
                "reduce them first, as DDP's backward pass does, or pass a batch"
            )

    def have_the_same(self, numbers: Tensor) -> bool:
        """Whether all ranks have these numbers, to rounding, and as many."""
        lengths = self.all_gather(torch.tensor([len(numbers)], device=numbers.device))
        if len({int(length) for length in lengths}) > 1:
            return False
        found = self.all_gather(numbers)
        return all(
            torch.allclose(found[0], other, rtol=1e-6, atol=0, equal_nan=True) for other in found
        )

    # What is said.

    def all_reduce(self, tensor: Tensor, team: Team | None = None) -> None:
        """Sum over the ranks of a team, or over all, in place."""
        group = self._group_of(team)
        with self._said_in("all_reduce", group, tensor):
            dist.all_reduce(tensor, group=group)

    def broadcast(self, tensor: Tensor, source: int, team: Team | None = None) -> None:
        """Give rank ``source``'s values to the others of a team, or to all, in place."""
        self.exchange([(tensor, source)], team)

    def exchange(self, tensors: Sequence[tuple[Tensor, int]], team: Team | None = None) -> None:
        """`broadcast` several tensors at once, each from a rank of its own."""
        group = self._group_of(team)
        under_way = []
        for tensor, source in tensors:
            place = dist.get_global_rank(self._group, source)
            with self._said_in("broadcast", group, tensor):
                under_way.append(dist.broadcast(tensor, place, group, async_op=True))
        with failures_named(str(self)):
            for work in under_way:
                if work is not None:
                    work.wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._said_in("all_gather", self._group, *found):
            dist.all_gather(found, tensor, group=self._group)
        return found

    def _group_of(self, team: Team | None) -> dist.ProcessGroup:
        return self._group if team is None else self._groups[team.ranks]

    @contextmanager
    def _said_in(self, kind: str, group: dist.ProcessGroup, *tensors: Tensor) -> Iterator[None]:
        with failures_named(str(self)):
            yield
        key = kind, dist.get_world_size(group)
        calls, size = self._said.get(key, (0, 0))
        self._said[key] = calls + 1, size + sum(x.numel() * x.element_size() for x in tensors)

    def traffic(self) -> tuple[Collective, ...]:
        """The collectives since this was asked last."""
        said, self._said = self._said, {}
        return tuple(Collective(*key, *counts) for key, counts in said.items())


#: What gloo, NCCL and torch's store speak of where a rank is gone or silent.
_LOST = ("gloo/transport", "connection", "timed out", "timeout", "socket", "nccl")


@contextmanager
def failures_named(rank: str) -> Iterator[None]:
    """A collective inside that fails for want of another rank says so, as `RankLostError`."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        why, _, _ = first.partition(". ")  # gloo goes on with advice
        raise RankLostError(
            f"{rank}: another rank is gone, or did not answer in time: {why}"
        ) from error


def ranks_of(
    process_group: dist.ProcessGroup | DeviceMesh | None,
    placement: Placement | Sequence[Team] = "counted",
    sharded: bool = True,
) -> Ranks | None:
    """The ranks of a group as `Ranks` takes it; None: this process is alone."""
    if process_group is None:
        return None
    ranks = Ranks(process_group, placement, sharded)
    return ranks if ranks.size > 1 else None


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.detach().double().square().sum() for x in tensors])
