"""What is read off curves to judge a claim, as pure functions of arrays.

A curve is a pair of arrays, ``x`` and ``values``, of one run; gaps are NaN. A run that diverged is
worse than any other from its end on: infinite loss, minus infinite accuracy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

Series = NDArray[np.float64]


def final(x: Series, values: Series, end: float | None = None) -> float:
    """The median over the last tenth of a course that ends at ``end``, since runs jump.

    ``end`` is the last x unless it is given. Where no value lies in that tenth, the last before it.
    Infinite for a run that has diverged by then, however late it did.
    """
    known = np.isfinite(x) & ~np.isnan(values)
    if not known.any():
        return math.nan
    stop = float(x[known][-1]) if end is None else end
    before = known & (x <= stop)
    if not before.any():
        return math.nan
    last, inside = float(values[before][-1]), before & (x >= 0.9 * stop)
    return last if math.isinf(last) or not inside.any() else float(np.median(values[inside]))


def first_at(x: Series, values: Series, target: float, higher: bool = False) -> float:
    """The first x at which the target is met, infinite where it never is."""
    with np.errstate(invalid="ignore"):
        met = values >= target if higher else values <= target
    return float(x[met][0]) if met.any() else math.inf


def share_lower(ours: Series, theirs: Series) -> float:
    """The share of points at which ``ours`` is below ``theirs``; a tie counts half."""
    known = ~(np.isnan(ours) | np.isnan(theirs))
    if not known.any():
        return math.nan
    ours, theirs = ours[known], theirs[known]
    with np.errstate(invalid="ignore"):
        return float(np.mean((ours < theirs) + 0.5 * (ours == theirs)))


def log_area_between(x: Series, ours: Series, theirs: Series) -> float:
    """The mean over ``x`` of log(theirs / ours): how far apart two log curves lie, on average.

    0.1 means about ten per cent. Infinite where one of the two diverged, NaN where both did.
    """
    known = ~(np.isnan(ours) | np.isnan(theirs))
    we_lost, they_lost = bool(np.isinf(ours[known]).any()), bool(np.isinf(theirs[known]).any())
    if (we_lost and they_lost) or known.sum() < 2:
        return math.nan
    if we_lost or they_lost:
        return -math.inf if we_lost else math.inf
    gaps = np.log(theirs[known] / ours[known])
    width = x[known][-1] - x[known][0]
    return float(trapezoid(gaps, x[known]) / width)


def total_rise(values: Series) -> float:
    """By how much a curve of losses goes up in all, in logarithms: 0 where it only goes down.

    A loss that doubles once and comes back adds log 2. Infinite where the run diverged.
    """
    known = values[~np.isnan(values)]
    if np.isinf(known).any():
        return math.inf
    return float(np.maximum(np.diff(np.log(known)), 0.0).sum())


def descent_in_second_half(x: Series, values: Series) -> float:
    """By which share a loss went down between half of its course and the end.

    From the median over the tenth before the half to that over the last tenth. A run that diverged
    does not go down any more: minus infinite.
    """
    known = ~np.isnan(values)
    if not known.any():
        return math.nan
    if np.isinf(values[known]).any():
        return -math.inf
    stop = float(x[known][-1])
    half = known & (x >= 0.4 * stop) & (x <= 0.5 * stop)
    if not half.any():
        return math.nan
    return 1.0 - final(x, values) / float(np.median(values[half]))
