"""Conjugate gradient against `torch.linalg.solve`, and every way it can end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bdhf
import bdhf.cg


@pytest.fixture(autouse=True, params=[1, 3, 8])
def _check_every(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Rounds between two looks at which systems have stopped: the results are the same."""
    monkeypatch.setitem(bdhf.cg.CHECK_EVERY, "cpu", request.param)


def positive_definite(size: int, seed: int = 0, condition: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.logspace(0, -2, size).double() * condition) @ basis.T


def vector(size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


class Recorder:
    """A matvec over several matrices that keeps which systems each round asked for."""

    def __init__(self, *matrices: Tensor) -> None:
        self.matrices = matrices
        self.rounds: list[list[bool]] = []

    def __call__(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        self.rounds.append([v is not None for v in vectors])
        pairs = zip(self.matrices, vectors, strict=True)
        return [None if v is None else matrix @ v for matrix, v in pairs]


@pytest.mark.parametrize("warm", [False, True])
def test_reaches_the_solution(warm: bool) -> None:
    matrix, b = positive_definite(20), vector(20)
    x0 = vector(20, seed=5) if warm else None
    solution, reason, count = bdhf.conjugate_gradient(
        lambda v: matrix @ v, b, x0, residual_tol=1e-12
    )
    expected = torch.linalg.solve(matrix, b)
    assert reason == "converged" and 15 <= count <= 40
    assert torch.allclose(solution, expected, rtol=1e-10, atol=1e-12)


def test_shape_of_b_is_kept_and_arguments_are_not_written_to() -> None:
    matrix, b = positive_definite(6), vector(6).view(2, 3)
    x0 = torch.ones(2, 3, dtype=torch.float64)
    result = bdhf.conjugate_gradient(
        lambda v: (matrix @ v.reshape(-1)).view(2, 3), b, x0, max_iter=50
    )
    assert result.solution.shape == (2, 3)
    assert torch.allclose(
        result.solution.reshape(-1), torch.linalg.solve(matrix, b.reshape(-1)), rtol=1e-10
    )
    assert torch.equal(x0, torch.ones(2, 3)) and torch.equal(b, vector(6).view(2, 3))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("cap", [1, 3, 7])
def test_value_is_the_quadratic_at_the_solution(warm: bool, cap: int) -> None:
    matrix, b = positive_definite(20), vector(20)
    x0 = vector(20, seed=5) if warm else None
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, x0, max_iter=cap)
    x = result.solution
    assert result.reason == "iteration cap" and result.iterations == cap
    assert result.value == pytest.approx(float(0.5 * x @ matrix @ x - b @ x), rel=1e-10)


def test_several_systems_equal_each_alone_and_stopped_ones_ask_for_nothing() -> None:
    matrices = [positive_definite(5), positive_definite(30, seed=3), positive_definite(12, seed=4)]
    b = [vector(5), vector(30, seed=2), torch.zeros(12, dtype=torch.float64)]
    x0 = [None, vector(30, seed=9), None]
    matvec = Recorder(*matrices)
    caps, tolerances = [50, 8, 50], [1e-10, 0.0, 1e-10]
    together = bdhf.conjugate_gradient(matvec, b, x0, max_iter=caps, residual_tol=tolerances)
    for k, result in enumerate(together):
        alone = bdhf.conjugate_gradient(
            lambda v, k=k: matrices[k] @ v,
            b[k],
            x0[k],
            max_iter=caps[k],
            residual_tol=tolerances[k],
        )
        assert torch.equal(result.solution, alone.solution)
        assert (result.reason, result.iterations, result.value) == (
            alone.reason,
            alone.iterations,
            alone.value,
        )
    assert [r.reason for r in together] == ["converged", "iteration cap", "converged"]
    assert together[2].iterations == 0  # b = 0
    assert matvec.rounds[0] == [False, True, False]  # the product of the warm start
    for k, result in enumerate(together):
        asked = sum(round_[k] for round_ in matvec.rounds[1:])
        every = bdhf.cg.CHECK_EVERY["cpu"]  # until somebody looks, a stopped one asks still
        assert result.iterations <= asked <= result.iterations + every * (every > 1)
        assert result.products == result.iterations + (x0[k] is not None)


def test_cold_start_costs_no_product() -> None:
    matvec = Recorder(positive_definite(5))
    (result,) = bdhf.conjugate_gradient(matvec, [vector(5)], max_iter=3)
    assert len(matvec.rounds) == result.iterations == 3


def test_relative_progress_is_martens_rule() -> None:
    """Against the rule applied by hand to the values of uncapped runs."""
    # Late enough for the span over which progress is measured to have grown beyond ten.
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(0, -6, 400).double()) @ basis.T
    b, tol = vector(400), 5e-3

    def value_after(iterations: int) -> float:
        if iterations == 0:
            return 0.0
        return bdhf.conjugate_gradient(lambda v: matrix @ v, b, max_iter=iterations).value

    values = [value_after(i) for i in range(300)]
    expected = next(
        i
        for i in range(1, 300)
        for span in [max(10, i // 10)]
        if i > span and values[i] < 0 and (values[i] - values[i - span]) / values[i] < span * tol
    )
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, tol=tol)
    assert result.reason == "relative progress"
    assert result.iterations == expected > 120
    never = bdhf.conjugate_gradient(lambda v: matrix @ v, b, tol=0.0, max_iter=expected + 5)
    assert never.reason == "iteration cap"


def test_residual_tolerance_is_relative_to_b() -> None:
    matrix, b = positive_definite(50), 1e6 * vector(50)
    loose = bdhf.conjugate_gradient(lambda v: matrix @ v, b, residual_tol=1e-3)
    tight = bdhf.conjugate_gradient(lambda v: matrix @ v, b, residual_tol=1e-9)
    assert loose.iterations < tight.iterations
    for result, tolerance in ((loose, 1e-3), (tight, 1e-9)):
        residual = (b - matrix @ result.solution).norm() / b.norm()
        assert result.reason == "converged" and residual <= tolerance * 1.01


def indefinite_after(good: int) -> Tensor:
    """Positive on the first ``good`` axes, negative on the last."""
    return torch.diag(torch.tensor([2.0] * good + [-1.0], dtype=torch.float64))


def test_negative_curvature_at_once_takes_no_step() -> None:
    result = bdhf.conjugate_gradient(lambda v: -v, vector(4), max_iter=9)
    assert result.reason == "negative curvature" and result.iterations == 0
    assert torch.equal(result.solution, torch.zeros(4, dtype=torch.float64))


def test_negative_curvature_later_returns_the_last_good_iterate() -> None:
    spectrum = torch.tensor([5.0, 3.0, 1.0, -0.01], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
    result = bdhf.conjugate_gradient(lambda v: spectrum * v, b, max_iter=50)
    assert result.reason == "negative curvature" and result.iterations >= 2
    capped = bdhf.conjugate_gradient(lambda v: spectrum * v, b, max_iter=result.iterations)
    assert torch.equal(result.solution, capped.solution) and result.value == capped.value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_matrix_with_b_outside_its_range_stays_bounded(dtype: torch.dtype) -> None:
    """Curvature that is zero but for rounding must not become an enormous step."""
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    basis = basis.to(dtype)
    matrix = basis[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).to(dtype)) @ basis[:, :3].T
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, vector(8).to(dtype), max_iter=50)
    assert result.reason == "negative curvature"
    assert result.iterations == 3  # the rank; a fourth step would follow rounding errors
    assert result.solution.norm() < 1e5


@pytest.mark.parametrize("damping", [1e-12, 1e-9])
def test_damping_lost_in_rounding_is_no_floor(damping: float) -> None:
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    matrix = basis[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ basis[:, :3].T
    b = vector(8).float()
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, max_iter=50, damping=damping)
    assert result.reason == "negative curvature" and result.iterations == 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("good", [0, 3])
def test_not_finite_product_returns_the_last_good_iterate(poison: float, good: int) -> None:
    matrix, b = positive_definite(10), vector(10)
    calls = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        product = matrix @ v
        if calls > good:
            product[4] = poison
        return product

    result = bdhf.conjugate_gradient(matvec, b, max_iter=50)
    assert result.reason == "not finite" and result.iterations == good
    expected = torch.zeros(10, dtype=torch.float64)
    if good:
        expected = bdhf.conjugate_gradient(lambda v: matrix @ v, b, max_iter=good).solution
    assert torch.equal(result.solution, expected)


@pytest.mark.parametrize("warm", [False, True])
def test_right_hand_side_that_is_not_finite_gives_zeros(warm: bool) -> None:
    matrix, b = positive_definite(4), vector(4)
    b[1] = float("nan")
    x0 = vector(4, seed=2) if warm else None
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, x0, max_iter=5)
    assert result.reason == "not finite" and result.iterations == 0 and result.value == 0
    assert torch.equal(result.solution, torch.zeros(4, dtype=torch.float64))


def test_warm_start_that_is_not_finite_is_given_up() -> None:
    matrix, b, x0 = positive_definite(6), vector(6), vector(6, seed=2)
    x0[1] = float("inf")
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, x0, max_iter=4)
    cold = bdhf.conjugate_gradient(lambda v: matrix @ v, b, max_iter=4)
    assert torch.equal(result.solution, cold.solution)
    assert (result.reason, result.iterations, result.value) == (
        cold.reason,
        cold.iterations,
        cold.value,
    )


def test_breaking_down_above_zero_gives_zeros() -> None:
    b, x0 = torch.ones(4, dtype=torch.float64), torch.full((4,), -100.0, dtype=torch.float64)
    result = bdhf.conjugate_gradient(torch.zeros_like, b, x0, max_iter=5)
    assert result.reason == "negative curvature" and result.value == 0
    assert torch.equal(result.solution, torch.zeros(4, dtype=torch.float64))


def test_step_that_overflows_is_not_taken() -> None:
    b = torch.full((4,), 1e15)
    result = bdhf.conjugate_gradient(lambda v: 1e-25 * v, b, max_iter=5)
    assert result.reason == "not finite" and torch.equal(result.solution, torch.zeros(4))


@pytest.mark.parametrize("warm", [False, True])
def test_damping_is_added_to_the_diagonal(warm: bool) -> None:
    matrix, b = positive_definite(15), vector(15)
    x0 = vector(15, seed=3) if warm else None
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, x0, residual_tol=1e-12, damping=0.7)
    damped = matrix + 0.7 * torch.eye(15, dtype=torch.float64)
    assert torch.allclose(result.solution, torch.linalg.solve(damped, b), rtol=1e-10)
    x = result.solution
    assert result.value == pytest.approx(float(0.5 * x @ damped @ x - b @ x), rel=1e-9)


def test_damping_is_a_floor_under_curvature_that_would_count_as_rounding() -> None:
    """One direction is ten million times stiffer than the damping that holds the others."""
    spectrum = torch.tensor([1e5, 0, 0, 0, 0])
    result = bdhf.conjugate_gradient(
        lambda v: spectrum * v, torch.ones(5), max_iter=9, damping=0.01
    )
    assert result.reason == "converged"
    assert torch.allclose(result.solution[1:], torch.full((4,), 100.0), rtol=1e-3)


def test_float32_converges_to_rounding_and_says_so() -> None:
    matrix, b = positive_definite(20).float(), vector(20).float()
    result = bdhf.conjugate_gradient(lambda v: matrix @ v, b, max_iter=1000)
    assert result.reason == "converged" and result.iterations < 60
    error = (matrix @ result.solution - b).norm() / b.norm()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"no stopping rule: max_iter=None, tol=0, residual_tol=0; give at least one"),
        ({"max_iter": 0}, r"max_iter=0; must be 1 or more, or None"),
        ({"tol": -1.0}, r"tol=-1.0; must be 0 \(off\) or a positive number"),
        ({"residual_tol": float("nan")}, r"residual_tol=nan; must be 0 \(off\) or a positive"),
        ({"damping": -1.0, "max_iter": 1}, r"damping=-1.0; must be 0 or more and finite"),
        ({"x0": torch.zeros(3), "max_iter": 1}, r"x0 has shape \(3,\) and b \(4,\)"),
        ({"b": torch.ones(4, dtype=torch.int64), "max_iter": 1}, r"b has dtype torch.int64"),
        ({"matvec": lambda v: v[:2], "max_iter": 1}, r"matvec returned \(2,\) for a vector of"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    call = {"matvec": lambda v: v, "b": torch.ones(4), **arguments}
    with pytest.raises(ValueError, match=message):
        bdhf.conjugate_gradient(**call)


def test_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"describe \[1, 2\] systems"):
        bdhf.conjugate_gradient(lambda v: v, [torch.ones(2)] * 2, [None], max_iter=1)
