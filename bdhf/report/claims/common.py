"""Parts that several claims have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from bdhf.report.evidence import (
    BySeed,
    Cell,
    Evidence,
    UntestedError,
    difference,
    paired,
    share_below,
    side_by_side,
    times_fewer,
    unsettled,
)
from bdhf.report.quantities import share_below_on_average, share_lower
from bdhf.report.verdicts import Part

T = TypeVar("T")

#: The experiments of the paper; claims about all experiments are about these.
EXPERIMENTS = ("autoencoder", "lstm", "resnet")


def lower_all_along(ours: Cell, theirs: Cell) -> list[Part]:
    """Train and test loss of ``ours`` below those of ``theirs``, over the whole course."""
    at = f"curvature {ours.key.curvature_batch_size}"
    parts = []
    for metric, name in (("train_loss", "train error"), ("test_loss", "test error")):
        updates, courses = side_by_side(ours, theirs, metric)
        parts += [
            Part(
                f"{name}, {at}: share of evaluations below HF",
                {seed: share_lower(*pair) for seed, pair in courses.items()},
                least=0.95,
                neutral=0.5,
            ),
            Part(
                f"{name}, {at}: below HF on average over the updates",
                {s: share_below_on_average(updates, *pair) for s, pair in courses.items()},
                least=0.02,
            ),
        ]
    return parts


def better_at_the_end(
    ours: Cell, theirs: Cell, accuracy: str, loss_share: float, points: float
) -> list[Part]:
    """A final training loss below HF's, and a final test accuracy above it."""
    at = f"curvature {ours.key.curvature_batch_size}"
    losses = ours.final("train_loss"), theirs.final("train_loss")
    hits = ours.final(accuracy), theirs.final(accuracy)
    return [
        Part(f"final training loss below HF's, {at}", paired(*losses, share_below), loss_share),
        Part(
            f"final test accuracy above HF's, {at}",
            paired(*hits, difference),
            least=points,
            unit="points",
        ),
    ]


def updates_to_ours(ours: Cell, theirs: Cell, metric: str, least: float) -> Part:
    """How many times more updates ``theirs`` needs to the final value of ``ours``."""
    goals = ours.final(metric)
    lost = {seed: (math.inf, math.inf) for seed, goal in goals.items() if math.isinf(goal)}
    return Part.between(
        f"updates to the final {metric.replace('_', ' ')} of block-diagonal HF, {theirs} "
        "over block-diagonal HF",
        times_fewer(ours.updates_to(metric, goals) | lost, theirs.updates_to(metric, goals)),
        least,
    )


def better_than_adam(evidence: Evidence, experiment: str, accuracy: str) -> list[Part]:
    """Fewer updates, a lower training loss and a better test accuracy than Adam's best."""
    adam, ours = evidence.of(experiment, "adam"), evidence.of(experiment, "bdhf")[0]
    goal = evidence.goal(experiment)
    settled = unsettled(adam)
    needed = [cell.updates_to_target(goal) for cell in adam]
    fewest = {
        seed: (min(low for low, _ in found), min(high for _, high in found))
        for seed, found in _by_seed(needed).items()
    }
    losses = [cell.final("train_loss") for cell in adam]
    hits = [cell.final(accuracy) for cell in adam]
    return [
        Part.between(
            "updates to the target, Adam's fewest over block-diagonal HF's",
            times_fewer(ours.updates_to_target(goal), fewest),
            1.5,
        ),
        Part(
            "final training loss below Adam's lowest",
            paired(ours.final("train_loss"), _best(losses, min), share_below),
            least=0.05,
            untested=settled,
        ),
        Part(
            "final test accuracy above Adam's highest",
            paired(ours.final(accuracy), _best(hits, max), difference),
            least=0.005,
            unit="points",
            untested=settled,
        ),
    ]


def _best(values: list[BySeed], choose: Callable[[Iterable[float]], float]) -> BySeed:
    """The best of several cells, seed by seed."""
    return {seed: choose(found) for seed, found in _by_seed(values).items()}


def _by_seed(values: list[dict[int, T]]) -> dict[int, list[T]]:
    """The values of several cells for each seed that all have."""
    shared = set.intersection(*(set(cell) for cell in values))
    return {seed: [cell[seed] for cell in values] for seed in sorted(shared)}


def loses_less_as_curvature_shrinks(
    evidence: Evidence, experiment: str, accuracy: str
) -> list[Part]:
    """From the largest to the smallest curvature mini-batch, block-diagonal HF loses less."""
    pairs = evidence.pairs(experiment)
    if len(pairs) < 2:
        raise UntestedError("there are runs of one curvature mini-batch size only")
    (small, small_hf), *_, (large, large_hf) = pairs

    def lost(few: Cell, many: Cell) -> BySeed:
        return paired(few.final(accuracy), many.final(accuracy), lambda a, b: _grown(-a, -b, b - a))

    def raised(few: Cell, many: Cell) -> BySeed:
        losses = few.final("train_loss"), many.final("train_loss")
        return paired(*losses, lambda a, b: _grown(a, b, a / b - 1))

    return [
        Part(
            "loss of final test accuracy, HF's minus block-diagonal HF's",
            paired(lost(small_hf, large_hf), lost(small, large), difference),
            least=0.002,
            unit="points",
        ),
        Part(
            "rise of the final training loss, HF's minus block-diagonal HF's",
            paired(raised(small_hf, large_hf), raised(small, large), difference),
            least=0.02,
        ),
    ]


def _grown(few: float, many: float, growth: float) -> float:
    """What is lost with few rows of curvature; everything where a run diverged, with many too."""
    return math.inf if math.isinf(few) or math.isinf(many) else growth
