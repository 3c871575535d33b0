"""What is read off curves, on arrays small enough to work out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bdhf.report.evidence import difference, share_below, times_fewer, within_a_factor_of
from bdhf.report.quantities import (
    descent_in_second_half,
    final,
    first_at,
    share_below_on_average,
    share_lower,
    total_rise,
)

INF, NAN = math.inf, math.nan
TENS = np.arange(0.0, 101.0, 10.0)


def array(*values: float) -> np.ndarray:
    return np.array(values)


def same(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("x", "values", "expected"),
    [
        ([0, 89, 90, 92, 95, 100], [9, 8, 4, 1, 2, 3], 2.5),  # the median of the four from 90 on
        ([0, 88, 89, 92, 95, 100], [9, 8, 4, 1, 2, 3], 2),
        ([0, 50, 90, 100], [9, 5, 3, 1], 3),  # of three at least
        ([0, 50, 60, 100], [9, 5, 4, 1], 4),
        ([0, 100], [9, 1], 5),  # there are but two
        ([0, 90, 95, 100], [9, 3, NAN, 1], 3),
        ([0, 80, 81, 84, 87, 90, 100], [9, 9, 4, 3, 2, 1, NAN], 2.5),  # ends where its values do
        ([0, 10], [NAN, NAN], NAN),
        ([0, 90, 95, 100], [9, 3, 1, INF], INF),  # diverged at the very end
        ([0, 10, 20, 100], [9, 1, -INF, -INF], -INF),
        ([0, 10, 20, 100], [9, 1, INF, NAN], INF),
    ],
)
def test_final_is_the_median_of_the_last_tenth(
    x: list[float], values: list[float], expected: float
) -> None:
    same(final(array(*x), array(*values)), expected)


@pytest.mark.parametrize(
    ("values", "target", "higher", "expected"),
    [
        ([9, 5, 3, 3], 3, False, (10, 20)),  # met exactly counts
        ([9, 2, 9, 2], 3, False, (0, 10)),  # a later jump does not
        ([9, 2, 9, 9], 3, False, (30, INF)),  # nor does a jump to the goal
        ([9, 5, 3, 4], 3, False, (30, INF)),
        ([9, 5, 4, 3], 3, False, (20, 30)),
        ([9, 5, 3, 4], 5, False, (0, 10)),
        ([9, 5, 3, 4], 9, False, (0, 0)),
        ([9, 5, 3, 4], 2.9, False, (30, INF)),
        ([9, 5, 3, NAN], 2.9, False, (20, INF)),  # a longer run might have
        ([0.1, NAN, 0.5, 0.4], 0.3, True, (0, 20)),
        ([0.1, 0.2, 0.5, 0.5], 0.5, True, (10, 20)),
        ([0.1, 0.2, 0.5, 0.4], 0.5, True, (30, INF)),
        ([0.1, 0.2, 0.5, 0.4], 0.6, True, (30, INF)),
        ([9, 9, INF, INF], 9, False, (0, 0)),
        ([9, INF, INF, INF], 9, False, (INF, INF)),
        ([9, 8, 7, INF], 8, False, (0, 10)),
        ([9, 8, INF, NAN], 7, False, (INF, INF)),
        ([0.1, -INF, -INF, -INF], 0.2, True, (INF, INF)),
        ([NAN, NAN, NAN, NAN], 7, False, (INF, INF)),
    ],
)
def test_first_at_is_between_the_last_that_misses_and_the_first_that_meets(
    values: list[float], target: float, higher: bool, expected: tuple[float, float]
) -> None:
    assert first_at(TENS[:4], array(*values), target, higher) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1, 2, 3, 4], [2, 3, 4, 3], 3 / 4),
        ([1, 2, 3, 4], [1, 3, 4, 3], 2.5 / 4),  # a tie is half
        ([1, NAN, 3, 4], [2, 1, NAN, 4], 1.5 / 2),  # of the points that both have
        ([1, INF, INF, 1], [2, INF, 1, INF], 2.5 / 4),
        ([NAN, 1], [1, NAN], NAN),
    ],
)
def test_share_lower(ours: list[float], theirs: list[float], expected: float) -> None:
    same(share_lower(array(*ours), array(*theirs)), expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1, 1, 1], [2, 2, 2], 0.5),
        ([2, 2, 2], [1, 1, 1], -1),
        # At 0, 10 and 40: (10 (0 + 1) / 2 + 30 (1 + 3) / 2) / 40, and not the mean of 0, 1 and 3.
        ([1, 1, 1], [1, math.e, math.e**3], 1 - math.exp(-65 / 40)),
        ([1, NAN, 1], [1, math.e, math.e**3], 1 - math.exp(-1.5)),
        ([1, INF, INF], [1, 1, 1], -INF),
        ([1, 1, 1], [1, 1, INF], 1),
        ([1, 1, INF], [1, INF, INF], NAN),
        ([1, NAN, NAN], [2, 2, 2], NAN),
        ([1, 1, NAN], [1, 4, INF], 0.5),  # what only one of them has does not count
    ],
)
def test_share_below_on_average(ours: list[float], theirs: list[float], expected: float) -> None:
    same(share_below_on_average(array(0, 10, 40), array(*ours), array(*theirs)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([8, 4, 2, 2], 0),
        ([8, 4, 8, 2], math.log(2)),
        ([2, 4, 3, 6, 1], math.log(4)),
        ([2, NAN, 4, 1], math.log(2)),
        ([8, 4, INF, INF], INF),
    ],
)
def test_total_rise(values: list[float], expected: float) -> None:
    same(total_rise(array(*values)), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({90: 6, 100: 6}, 0.25),
        ({90: 6, 100: 4}, 0.25),  # the median of 80, 90 and 100 is 6
        ({90: 9, 100: 9}, -0.125),
        ({0: 90, 30: 90, 60: 90, 70: 90}, 0),  # neither the tenth nor the end
        ({40: 10, 50: 14, 90: 6, 100: 6}, 0.5),  # the median of 40 and 50 is 12
        ({40: 12, 50: NAN, 80: 6, 90: 6, 100: NAN}, 0.5),  # ends at 90: from 36 to 45
        ({40: NAN, 50: NAN}, NAN),
        ({100: INF}, -INF),
        (dict.fromkeys((30, 40, 50, 60, 70, 80, 90, 100), INF), -INF),
        (dict.fromkeys(range(0, 101, 10), NAN), NAN),
    ],
)
def test_descent_in_second_half(changes: dict[int, float], expected: float) -> None:
    values = np.full(11, 8.0)
    for x, value in changes.items():
        values[x // 10] = value
    same(descent_in_second_half(TENS, values), expected)


@pytest.mark.parametrize(
    ("effect", "ours", "theirs", "expected"),
    [
        (share_below, 3, 4, 0.25),
        (share_below, 5, 4, -0.25),
        (share_below, INF, 4, -INF),
        (share_below, 3, INF, 1),
        (share_below, INF, INF, NAN),
        (difference, 0.9, 0.4, 0.5),
        (difference, -INF, 0.4, -INF),
        (difference, 0.9, -INF, INF),
        (difference, -INF, -INF, NAN),
    ],
)
def test_effects(
    effect: Callable[[float, float], float], ours: float, theirs: float, expected: float
) -> None:
    same(effect(ours, theirs), expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((10, 10), (40, 40), (4, 4)),
        ((8, 10), (30, 40), (3, 5)),
        ((8, 10), (100, INF), (10, INF)),  # theirs ended at 100 without
        ((100, INF), (80, 90), (0, 0.9)),
        ((100, INF), (100, INF), (0, INF)),
        ((INF, INF), (80, 90), (0, 0)),  # ours diverged before
        ((INF, INF), (INF, INF), (NAN, NAN)),
        ((0, 2), (0, 4), (0, INF)),  # theirs may have been there at once
        ((0, 0), (2, 4), (INF, INF)),
        ((0, 0), (0, 0), (NAN, NAN)),
    ],
)
def test_times_fewer_is_known_to_lie_between(
    ours: tuple[float, float], theirs: tuple[float, float], expected: tuple[float, float]
) -> None:
    found = times_fewer({0: ours, 1: ours}, {0: theirs, 2: theirs})
    assert list(found) == [0]
    for value, wanted in zip(found[0], expected, strict=True):
        same(value, wanted)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((1.6, 1.6), (1.25, 1.25)),
        ((0.625, 0.625), (1.25, 1.25)),
        ((4, 8), (0.25, 0.5)),
        ((0.5, 1.6), (1, 2)),  # it may be 1
        ((0, 3), (0, 2)),
        ((3, INF), (0, 2 / 3)),
        ((NAN, NAN), (NAN, NAN)),
    ],
)
def test_within_a_factor(ratio: tuple[float, float], expected: tuple[float, float]) -> None:
    for value, wanted in zip(within_a_factor_of(2, {0: ratio})[0], expected, strict=True):
        same(value, wanted)
