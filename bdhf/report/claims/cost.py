"""What the paper says of the time that an update takes.

From measurements on one state at a time (`make measure`), since runs that were made side by side
get in each other's way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, median

from bdhf.report.claims.common import EXPERIMENTS
from bdhf.report.evidence import BySeed, Evidence, UntestedError, paired
from bdhf.report.verdicts import Part, claim

Rows = list[dict[str, str]]

#: Experiments in which CG has a solution to come to.
_DAMPED = ("lstm", "resnet")

_MEASURE = "nothing was measured: make measure does"


@claim(
    "T1",
    "HF and block-diagonal HF take about the same time per update; an update costs several times "
    "one of Adam's at the same mini-batch.",
)
def time_of_an_update(evidence: Evidence) -> list[Part]:
    """In each experiment, on the same weights and mini-batches, in turn, medians over the rounds:
    block-diagonal HF takes at most 1.25 times as long as HF and at least 1 / 1.25 of it, and at
    least 3 times as long as Adam with the mini-batch of HF. (How many times the paper says is
    lost.)"""
    if not evidence.times:
        raise UntestedError(_MEASURE)
    parts = []
    for experiment in EXPERIMENTS:
        if all(row["experiment"] != experiment for row in evidence.times):
            raise UntestedError(f"updates of experiment {experiment} were not timed")
        adam, hf, ours = (_seconds(evidence, experiment, name) for name in ("adam", "hf", "bdhf"))
        parts += [
            Part(
                f"{experiment}: block-diagonal HF within a factor of 1.25 of HF "
                "(1.25 over the ratio)",
                paired(ours, hf, lambda a, b: 1.25 / max(a / b, b / a)),
                least=1.0,
                unit="times",
                neutral=1.0,
            ),
            Part(
                f"{experiment}: time of a block-diagonal HF update over Adam's",
                paired(ours, adam, lambda a, b: a / b),
                least=3.0,
                unit="times",
                neutral=1.0,
            ),
        ]
    return parts


def _seconds(evidence: Evidence, experiment: str, optimizer: str) -> BySeed:
    found: dict[int, list[float]] = {}
    for row in evidence.times:
        if (row["experiment"], row["optimizer"]) == (experiment, optimizer):
            found.setdefault(int(row["seed"]), []).append(float(row["seconds"]))
    return {seed: median(values) for seed, values in found.items()}


@claim(
    "T2",
    "A block's smaller problem needs fewer CG iterations; solved in parallel, the blocks could "
    "give up to a B-fold speed-up.",
)
def fewer_iterations(evidence: Evidence) -> list[Part]:
    """In each experiment that has damping, at the weights that HF and block-diagonal HF ended with,
    CG without a cap and with the experiment's stopping rule: the block that needs the most
    iterations needs at least 10 % fewer than the whole matrix (mean of the two states; a run that
    diverged has none); and the
    work of all blocks one after another is at least half of B times that of the dearest block,
    where the blocks would be solved at the same time. (Without damping, as in the autoencoder, the
    curvature of few rows is singular: CG without a cap has no solution to come to.)"""
    rows = [row for row in evidence.solves if row["state"] != "initial"]
    if not rows:
        raise UntestedError(_MEASURE)
    parts = []
    for experiment in _DAMPED:
        mine = [row for row in rows if row["experiment"] == experiment]
        if not mine:
            raise UntestedError(f"CG of experiment {experiment} was not measured")
        seeds = sorted({int(row["seed"]) for row in mine})
        blocks = len({row["solver"] for row in mine} - {"whole"})
        parts += [
            Part(
                f"{experiment}: iterations of the slowest block below those of the whole matrix",
                {seed: _over_states(mine, seed, _iterations_saved) for seed in seeds},
                least=0.1,
            ),
            Part(
                f"{experiment}: work of {blocks} blocks in turn over that of the dearest",
                {seed: _over_states(mine, seed, _speed_up) for seed in seeds},
                least=blocks / 2,
                unit="times",
                neutral=1.0,
            ),
        ]
    return parts


def _over_states(rows: Rows, seed: int, value: Callable[[Rows], float]) -> float:
    mine = [row for row in rows if int(row["seed"]) == seed]
    states = dict.fromkeys(row["state"] for row in mine)
    found = [value([row for row in mine if row["state"] == state]) for state in states]
    return mean(found) if found else math.nan


def _settled(rows: Rows) -> bool:
    """Whether the stopping rule ended all solves, and nothing else."""
    return all(row["reason"] in ("relative progress", "converged") for row in rows)


def _iterations_saved(rows: Rows) -> float:
    if not _settled(rows):
        return math.nan
    counts = {row["solver"]: int(row["iterations"]) for row in rows}
    whole = counts.pop("whole", 0)
    return 1 - max(counts.values()) / whole if whole and counts else math.nan


def _speed_up(rows: Rows) -> float:
    if not _settled(rows):
        return math.nan
    works = [
        int(row["iterations"]) * float(row["products_work"])
        for row in rows
        if row["solver"] != "whole"
    ]
    return sum(works) / max(works) if any(works) else math.nan
