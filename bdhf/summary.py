"""What a curve comes to: its best and its final value, and when it met a target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bdhf.config import TargetConfig
from bdhf.report import quantities
from bdhf.training import Row


def values_of(rows: Sequence[Row], metric: str) -> list[tuple[int, float]]:
    """Pairs of update and value, gaps left out."""
    pairs = ((int(row["update"] or 0), row.get(metric)) for row in rows)
    return [(update, float(value)) for update, value in pairs if value is not None]


def is_better_higher(metric: str) -> bool:
    """Whether one wants more of it: accuracies, but not losses."""
    return metric.endswith("accuracy")


def best(rows: Sequence[Row], metric: str) -> float | None:
    """The best value of the whole course; None where there is none."""
    values = [value for _, value in values_of(rows, metric) if not math.isnan(value)]
    if not values:
        return None
    return max(values) if is_better_higher(metric) else min(values)


def final(rows: Sequence[Row], metric: str) -> float | None:
    """`quantities.final`, since runs jump; None where the last value is not finite."""
    pairs = values_of(rows, metric)
    if not pairs or not math.isfinite(pairs[-1][1]):
        return None
    updates, values = np.array(pairs, np.float64).T
    return quantities.final(updates, values)


def updates_to(rows: Sequence[Row], target: TargetConfig) -> int | None:
    """The first evaluated update that meets the target; None where none does, or none is set."""
    if target.metric is None:
        return None
    higher = is_better_higher(target.metric)
    for update, value in values_of(rows, target.metric):
        if value >= target.value if higher else value <= target.value:
            return update
    return None
