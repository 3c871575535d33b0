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


#: A final value is a median over the last tenth of the updates, but of so many values at least.
FINAL_VALUES = 3


def final(x: Series, values: Series) -> float:
    """The median over the last tenth of a course, and over its last three values at least.

    Runs jump, so the last value alone misleads. Infinite for a run that has diverged, NaN where
    there is no value.
    """
    known = ~np.isnan(values)
    if not known.any():
        return math.nan
    x, values = x[known], values[known]
    count = max(int((x >= 0.9 * x[-1]).sum()), FINAL_VALUES)
    return float(values[-1] if np.isinf(values[-1]) else np.median(values[-count:]))


#: A target is met where the median of so many values from there on meets it.
LASTING_VALUES = 3


def first_at(x: Series, values: Series, target: float, higher: bool = False) -> tuple[float, float]:
    """Where the target is first met, not by a jump: after the first of these two, by the second.

    The second is the first evaluation that meets it as does the median of it and the two after it;
    the first is the evaluation before. Where none does, they are the end of the run and infinity,
    since a longer run might have; both are infinite where the run diverged before.
    """
    known = ~np.isnan(values)
    x, values = x[known], values[known]
    lasting = [np.median(values[k : k + LASTING_VALUES]) for k in range(len(values))]
    worst = np.minimum(values, lasting) if higher else np.maximum(values, lasting)
    met = worst >= target if higher else worst <= target
    if met.any():
        place = int(np.argmax(met))
        return float(x[max(place - 1, 0)]), float(x[place])
    if not len(x) or np.isinf(values[-1]):
        return math.inf, math.inf
    return float(x[-1]), math.inf


def share_lower(ours: Series, theirs: Series) -> float:
    """The share of points at which ``ours`` is below ``theirs``; a tie counts half."""
    known = ~(np.isnan(ours) | np.isnan(theirs))
    if not known.any():
        return math.nan
    ours, theirs = ours[known], theirs[known]
    with np.errstate(invalid="ignore"):
        return float(np.mean((ours < theirs) + 0.5 * (ours == theirs)))


def share_below_on_average(x: Series, ours: Series, theirs: Series) -> float:
    """By which share ``ours`` is below ``theirs``, averaged over ``x``: of the area between the
    log curves.

    1 where only theirs diverged, minus infinite where only ours did, NaN where both did.
    """
    known = ~(np.isnan(ours) | np.isnan(theirs))
    we_lost, they_lost = bool(np.isinf(ours[known]).any()), bool(np.isinf(theirs[known]).any())
    if (we_lost and they_lost) or known.sum() < 2:
        return math.nan
    if we_lost or they_lost:
        return -math.inf if we_lost else 1.0
    gaps = np.log(theirs[known] / ours[known])
    width = x[known][-1] - x[known][0]
    return -math.expm1(-float(trapezoid(gaps, x[known]) / width))


def total_rise(values: Series) -> float:
    """By how much a curve of losses goes up in all, in logarithms: 0 where it only goes down.

    A loss that doubles once and comes back adds log 2. Infinite where the run diverged.
    """
    known = values[~np.isnan(values)]
    if np.isinf(known).any():
        return math.inf
    return float(np.maximum(np.diff(np.log(known)), 0.0).sum())


def descent_in_second_half(x: Series, values: Series) -> float:
    """By which share a loss went down between half of its course and its final value.

    From the median over the tenth before the half. Negative where it went up, minus infinite where
    the run diverged, NaN where nothing was evaluated in that tenth.
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
    end = final(x, values)
    return -math.inf if math.isinf(end) else 1.0 - end / float(np.median(values[half]))
