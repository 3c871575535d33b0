"""Mini-batches split over ranks, and the gradient of one."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bdhf.batches import Batch, Criterion, cut, is_mean_over_rows, row_count
from bdhf.curvature import flattened, unflattened, wide_dtype
from bdhf.distributed.placement import Team
from bdhf.distributed.ranks import Ranks
from bdhf.functional import without_ddp
from bdhf.gradient import loss_and_gradient

#: The mini-batches of an update, as its caller knows them.
_NAMES = ("batch", "curvature_batch")


@dataclass(frozen=True)
class Share:
    """This rank's rows of a mini-batch.

    Attributes:
        batch: its inputs and targets, which may be empty.
        rows: how many they are.
        weight: with it, the losses of all shares add up to the loss of the mini-batch.
    """

    batch: Batch
    rows: int
    weight: float


@dataclass(frozen=True)
class Split:
    """How the mini-batches of an update are split; `split` makes it.

    Attributes:
        ranks: over whom.
        counts: for each mini-batch the rows of each rank, all zero where there is none.
        mean: whether a loss is the mean of its rows', or their sum.
        alike: for each mini-batch, whether its tensors differ between ranks in their rows alone.
    """

    ranks: Ranks
    counts: list[list[int]]
    mean: bool
    alike: list[bool]

    def share(self, number: int, batch: Batch) -> Share:
        """This rank's rows of a mini-batch that all ranks share; ``number`` is its place."""
        counts, rank = self.counts[number], self.ranks.rank
        if not self.ranks.sharded:
            first = sum(counts[:rank])
            batch = cut(batch, first, first + counts[rank])
        return self._weighted(batch, counts[rank], sum(counts))

    def share_in_team(self, number: int, batch: Batch, team: Team) -> Share:
        """This rank's rows of a mini-batch that each team has as a whole, and shares."""
        if len(team.ranks) == self.ranks.size:
            return self.share(number, batch)
        counts = self.counts[number]
        if self.ranks.sharded:
            if not self.alike[number]:
                raise ValueError(
                    f"{_NAMES[number]}: several teams need all ranks' rows, and its tensors differ "
                    "between ranks in more than their number; give placement='data'"
                )
            batch = tree_map_only(Tensor, lambda leaf: self._whole(leaf, counts), batch)
        place = team.ranks.index(self.ranks.rank)
        start, stop = _bounds(sum(counts), len(team.ranks))[place : place + 2]
        return self._weighted(cut(batch, start, stop), stop - start, sum(counts))

    def _weighted(self, batch: Batch, rows: int, total: int) -> Share:
        return Share(batch, rows, rows / total if self.mean else 1.0)

    def _whole(self, leaf: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows, one after the other; a tensor that has no rows stays as it is."""
        if not leaf.ndim or leaf.shape[0] != counts[self.ranks.rank]:
            return leaf
        padded = leaf.new_zeros(max(counts), *leaf.shape[1:])  # since backends want equal sizes
        padded[: len(leaf)] = leaf
        parts = zip(self.ranks.all_gather(padded), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])


def split(ranks: Ranks, model: nn.Module, criterion: Criterion, *batches: Batch | None) -> Split:
    """Look at an update's mini-batches: for the gradient (or None), and for curvature.

    Raises:
        ValueError: one is empty, or cannot be shared (see `is_mean_over_rows`), here or at another
            rank; or, at first, the ranks have different weights. All ranks raise it, so that none
            waits for another.
    """
    ranks.traffic()  # of an update that failed
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"process_group with parameters on {len(devices)} devices; give them one")
    ranks.compare_once(parameters)
    rows, mean, fault = [0] * len(batches), False, None
    try:
        for number, batch in enumerate(batches):
            if batch is not None:
                rows[number] = row_count(batch)
                _check_rows(_NAMES[number], batch, rows[number])
                mean = is_mean_over_rows(model, criterion, batch[1], "process_group")
    except ValueError as error:
        fault = error
    (device,) = devices
    alike = [True] * len(batches)
    if ranks.sharded:
        forms = [0 if batch is None else _form(batch) for batch in batches]
        mine = torch.tensor([*rows, *forms, fault is not None], dtype=torch.int64, device=device)
        *found, faults = torch.stack(ranks.all_gather(mine), 1).tolist()
        counts = found[: len(batches)]
        alike = [len(set(of_ranks)) == 1 for of_ranks in found[len(batches) :]]
        if fault is None and any(faults):
            raise ValueError(f"rank {faults.index(1)} refuses its rows, and says itself why")
    else:
        bounds = [_bounds(count, ranks.size) for count in rows]
        counts = [[stop - start for start, stop in itertools.pairwise(b)] for b in bounds]
        if not ranks.compared and fault is None:
            _check_the_same(ranks, batches, rows, device)
    if fault is not None:
        raise fault
    for name, batch, of_ranks in zip(_NAMES, batches, counts, strict=False):
        if batch is not None and not any(of_ranks):
            raise ValueError(f"{name} is empty on all ranks; give at least one row")
    ranks.compared = True
    return Split(ranks, counts, mean, alike)


def _check_rows(name: str, batch: Batch, rows: int) -> None:
    """Refuse inputs that are cut along another dimension than the targets."""
    targets = [leaf for leaf in tree_leaves(batch[1]) if isinstance(leaf, Tensor) and leaf.ndim]
    if targets and all(len(leaf) != rows for leaf in targets):
        raise ValueError(
            f"process_group cuts mini-batches along the first dimension, and {name} has "
            f"{rows} rows of inputs and {len(targets[0])} of targets; put the samples first"
        )


def _check_the_same(
    ranks: Ranks, batches: Sequence[Batch | None], rows: Sequence[int], device: torch.device
) -> None:
    """Refuse ranks that are to share mini-batches and have different ones."""
    sums = [0.0 if batch is None else _sum(batch) for batch in batches]
    if not ranks.have_the_same(torch.tensor([*rows, *sums], dtype=torch.float64, device=device)):
        raise ValueError(
            "the ranks were given different mini-batches with sharded=False; give all the same, or "
            "each its own rows with sharded=True"
        )


def _form(batch: Batch) -> int:
    """A number that says what the tensors of a batch are like, but for how many rows there are."""
    rows = row_count(batch)
    forms = [
        (str(leaf.dtype), leaf.ndim > 0 and len(leaf) == rows, tuple(leaf.shape[1:]))
        if isinstance(leaf, Tensor)
        else type(leaf).__name__
        for leaf in tree_leaves(batch)
    ]
    return zlib.crc32(repr(forms).encode())


def _sum(batch: Batch) -> float:
    """Of the inputs' numbers, to tell one mini-batch from another."""
    leaves = [leaf for leaf in tree_leaves(batch[0]) if isinstance(leaf, Tensor)]
    return sum(float(leaf.double().sum()) for leaf in leaves if not leaf.is_complex())


def shared_loss_and_gradient(
    ranks: Ranks,
    model: nn.Module,
    criterion: Criterion,
    share: Share,
    parameters: list[nn.Parameter],
    micro_batch: int | None = None,
) -> Tensor:
    """As `bdhf.gradient.loss_and_gradient`, of a mini-batch that all ranks share."""
    loss = torch.zeros((), device=parameters[0].device)
    gradients: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    if share.rows:
        # Without DDP's hooks, which wait for a backward pass of their own.
        network = without_ddp(model)
        loss = loss_and_gradient(network, criterion, share.batch, parameters, micro_batch)
        gradients = [p.grad for p in parameters if p.grad is not None]
    summed = flattened([*gradients, loss], wide_dtype(parameters)).mul_(share.weight)
    ranks.all_reduce(summed)
    for p, gradient in zip(parameters, unflattened(summed[:-1], parameters), strict=True):
        p.grad = gradient
    return summed[-1].clone()


def _bounds(rows: int, parts: int) -> list[int]:
    """Where parts of so many rows begin, and the last one ends; sizes differ by one at most."""
    return [rows * part // parts for part in range(parts + 1)]
