"""Truncated conjugate gradient, for one linear system or for several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

StopReason = Literal[
    "converged", "relative progress", "iteration cap", "negative curvature", "not finite"
]

Matvec = Callable[[Tensor], Tensor]
BlockMatvec = Callable[[list[Tensor | None]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class CGResult:
    """What `conjugate_gradient` found for one system; unpacks as solution, reason, iterations.

    Attributes:
        solution: the last iterate, shaped like ``b``. Each accepted step lowers the quadratic, so
            it is the best one; zeros if even it is worse than they are and the iteration broke
            down.
        reason: why the iteration stopped (see `conjugate_gradient`).
        iterations: steps taken, not counting the product that a warm start costs.
        value: the quadratic ``½ xᵀAx - bᵀx`` at the solution.
    """

    solution: Tensor
    reason: StopReason
    iterations: int
    value: float

    def __iter__(self) -> Iterator[Any]:
        return iter((self.solution, self.reason, self.iterations))


@overload
def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    x0: Tensor | None = None,
    max_iter: int | None = None,
    tol: float = 0.0,
    residual_tol: float = 0.0,
    damping: float = 0.0,
) -> CGResult: ...


@overload
def conjugate_gradient(
    matvec: BlockMatvec,
    b: Sequence[Tensor],
    x0: Sequence[Tensor | None] | None = None,
    max_iter: int | Sequence[int | None] | None = None,
    tol: float | Sequence[float] = 0.0,
    residual_tol: float | Sequence[float] = 0.0,
    damping: float | Sequence[float] = 0.0,
) -> list[CGResult]: ...


def conjugate_gradient(
    matvec: Any,
    b: Any,
    x0: Any = None,
    max_iter: Any = None,
    tol: Any = 0.0,
    residual_tol: Any = 0.0,
    damping: Any = 0.0,
) -> Any:
    """Solve ``A x = b`` by conjugate gradient, that is, minimise ``½ xᵀAx - bᵀx``.

    With ``damping`` λ, ``A + λI`` stands for ``A`` everywhere below.

    One system or several at once: with a tensor ``b`` of any shape, ``matvec`` maps a tensor of
    that shape to ``A`` times it. With a sequence of k tensors, there are k independent systems
    (of any sizes), each with its own stop: ``matvec`` maps a list of k vectors to a list of k
    products, and an entry that is None belongs to a system that has stopped or needs no product
    now: nothing is to be computed for it, and whatever is returned there is ignored.

    It stops for the first of these reasons:

    - ``"converged"``: ``‖b - Ax‖ ≤ residual_tol · ‖b‖``, or the residual is down at rounding
      level (machine epsilon times ``‖b‖``), where further steps would be noise;
    - ``"relative progress"``: over the last ``k = max(10, i/10)`` of ``i`` iterations the
      quadratic fell by less than ``k · tol`` of its value (Martens 2010, "Deep learning via
      Hessian-free optimization", section 4.4);
    - ``"iteration cap"``: ``max_iter`` steps were taken;
    - ``"negative curvature"``: ``pᵀAp`` along the next direction is negative, or zero to rounding
      (relative to the largest curvature met so far, and below half the damping); the step is
      not taken;
    - ``"not finite"``: NaN or infinity in ``b``, in a product or in the quadratic after the next
      step; the step is not taken. A warm start that has no finite residual is replaced by zeros.

    Args:
        matvec: the product with the symmetric positive (semi)definite matrix ``A``, without the
            damping. It is called without gradient tracking, and what it is given is overwritten
            afterwards: copy it to keep it.
        b: right-hand side, or a sequence of them.
        x0: where to start (for several systems: a sequence in which an entry may be None). None
            starts from zero and saves the product that a warm start costs.
        max_iter: the most steps to take. None means ten times the number of unknowns.
        tol: Martens' ε; 0 switches this rule off.
        residual_tol: bound on the residual relative to ``‖b‖``; 0 switches this rule off.
        damping: λ, added to the diagonal.

    For several systems, the settings may be sequences too, one entry for each.

    Returns:
        A `CGResult`; for several systems, a list of them.

    Raises:
        ValueError: no stopping rule is given, a setting is out of range, or shapes differ.
    """
    if isinstance(b, Tensor):
        return _solve(
            lambda v: [matvec(v[0])], [b], [x0], [max_iter], [tol], [residual_tol], [damping]
        )[0]
    count = len(b)
    starts = [None] * count if x0 is None else x0
    settings = (_one_each(s, count) for s in (max_iter, tol, residual_tol, damping))
    return _solve(matvec, b, starts, *settings)


def _one_each(setting: Any, count: int) -> Sequence[Any]:
    return setting if isinstance(setting, Sequence) else [setting] * count


def _solve(
    matvec: BlockMatvec,
    b: Sequence[Tensor],
    x0: Sequence[Tensor | None],
    max_iter: Sequence[int | None],
    tol: Sequence[float],
    residual_tol: Sequence[float],
    damping: Sequence[float],
) -> list[CGResult]:
    columns = (b, x0, max_iter, tol, residual_tol, damping)
    lengths = set(map(len, columns))
    if len(lengths) > 1:
        raise ValueError(
            f"b, x0 and the settings describe {sorted(lengths)} systems; give one entry for each"
        )
    with torch.no_grad():
        systems = [_System(*row) for row in zip(*columns, strict=True)]
        if any(s.warm for s in systems):
            products = matvec([s.x if s.warm else None for s in systems])
            for system, product in zip(systems, products, strict=True):
                if system.warm:
                    system.start(product)
        _judge_all(systems, [system.first_scalars() for system in systems])
        while active := [s for s in systems if s.reason is None]:
            products = matvec([s.p if s.reason is None else None for s in systems])
            pairs = zip(systems, products, strict=True)
            # All steps are queued before the first scalar is read: on a GPU, one wait a round.
            _judge_all(active, [s.step(product) for s, product in pairs if s.reason is None])
    return [system.result() for system in systems]


def _judge_all(systems: Sequence[_System], scalars: Sequence[Tensor]) -> None:
    for system, row in zip(systems, scalars, strict=True):
        system.judge(*row.tolist())


class _System:
    """One linear system: iterate ``x``, residual ``r``, direction ``p``, and when to stop."""

    def __init__(
        self,
        b: Tensor,
        x0: Tensor | None,
        max_iter: int | None,
        tol: float,
        residual_tol: float,
        damping: float,
    ) -> None:
        _check_settings(b, x0, max_iter, tol, residual_tol, damping)
        self.b = b
        self.damping = damping
        self.max_iter = 10 * b.numel() if max_iter is None else max_iter
        self.tol = tol
        self.warm = x0 is not None
        self.x = torch.zeros_like(b) if x0 is None else x0.to(b.dtype, copy=True)
        self.r = b.clone()
        self.p = self.r
        self.bb = self.rr = self.pp = _dot(b, b)
        self.stiffest = torch.zeros_like(self.rr)  # the largest pᵀAp / pᵀp so far
        self.value = torch.zeros_like(self.rr)
        self.values: list[float] = []  # of the quadratic, one an iteration
        self.reason: StopReason | None = None
        # Below machine epsilon the recursive residual no longer tells anything of the true one.
        self.residual_bound = max(residual_tol, torch.finfo(b.dtype).eps) ** 2
        # Below this, relative to the largest, curvature is the rounding of a singular matrix,
        # and a step along it would be arbitrarily long.
        self.curvature_bound = 10 * torch.finfo(b.dtype).eps

    def start(self, product: Tensor | None) -> None:
        """Move from zero to the warm start, given ``A x0``."""
        self.r = self.b - self._damped(product, self.x)
        self.value = -0.5 * (_dot(self.x, self.b) + _dot(self.x, self.r))

    def first_scalars(self) -> Tensor:
        self.rr = self.pp = _dot(self.r, self.r)
        self.p = self.r.clone()
        one = torch.ones_like(self.rr)  # there was no step that could have been unusable
        return torch.stack((one, one, self.value, self.rr, self.bb))

    def start_cold(self) -> None:
        """Give up the warm start."""
        self.x = torch.zeros_like(self.b)
        self.r, self.p = self.b.clone(), self.b.clone()
        self.rr = self.pp = self.bb
        self.value = torch.zeros_like(self.bb)

    def step(self, product: Tensor | None) -> Tensor:
        """Go to the minimum along ``p``, given ``A p``; nothing here waits for the device."""
        product = self._damped(product, self.p)
        curvature = _dot(self.p, product)
        self.stiffest = torch.maximum(self.stiffest, curvature / self.pp)
        # Damping is a floor under the curvature; unless it is lost in rounding itself, half of it
        # is enough.
        bound = self.curvature_bound * self.stiffest
        bound = torch.where(self.damping > 0.01 * bound, 0.5 * self.damping, bound)
        usable = curvature > bound * self.pp
        length = self.rr / curvature
        # The fall of the quadratic over an exact step; sums of falls lose no digits, whereas
        # -½ xᵀ(b + r) would cost two more passes over the vectors.
        value = self.value - 0.5 * length * self.rr
        finite = curvature.isfinite() & ((curvature <= 0) | value.isfinite())
        usable &= finite
        length, self.value = torch.where(usable, length, 0), torch.where(usable, value, self.value)
        self.x.addcmul_(self.p, length)
        self.r.addcmul_(product, length, value=-1)
        previous, self.rr = self.rr, _dot(self.r, self.r)
        momentum = self.rr / previous
        self.pp = self.rr + momentum.square() * self.pp  # the residual is orthogonal to p
        torch.addcmul(self.r, self.p, momentum, out=self.p)
        return torch.stack((usable.to(value), finite.to(value), self.value, self.rr, self.bb))

    def judge(self, usable: float, finite: float, value: float, rr: float, bb: float) -> None:
        """Accept the step just taken, and decide whether to stop."""
        if not usable:
            self.reason = "negative curvature" if finite else "not finite"
            return
        if not self.values and not math.isfinite(rr + value):
            self.start_cold()
            rr, value = bb, 0.0
        self.values.append(value)

        iterations = len(self.values) - 1
        span = max(10, iterations // 10)
        if not math.isfinite(rr):
            self.reason = "not finite"
        elif rr <= self.residual_bound * bb:
            self.reason = "converged"
        elif (
            iterations > span
            and value < 0
            and (value - self.values[-1 - span]) / value < span * self.tol
        ):
            self.reason = "relative progress"
        elif iterations >= self.max_iter:
            self.reason = "iteration cap"

    def result(self) -> CGResult:
        assert self.reason is not None
        solution, value = self.x, self.values[-1]
        broken_down = self.reason in ("negative curvature", "not finite")
        if broken_down and value > 0:
            solution, value = torch.zeros_like(solution), 0.0
        return CGResult(solution, self.reason, len(self.values) - 1, value)

    def _damped(self, product: Tensor | None, vector: Tensor) -> Tensor:
        """The product, checked, with the damping's part added."""
        if product is None or product.shape != self.b.shape:
            shape = None if product is None else tuple(product.shape)
            raise ValueError(
                f"matvec returned {shape} for a vector of shape {tuple(self.b.shape)}; "
                "it must return a tensor of the same shape for every system still running"
            )
        return torch.add(product, vector, alpha=self.damping) if self.damping else product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _check_settings(
    b: Tensor,
    x0: Tensor | None,
    max_iter: int | None,
    tol: float,
    residual_tol: float,
    damping: float,
) -> None:
    if not b.is_floating_point():
        raise ValueError(f"b has dtype {b.dtype}; conjugate gradient needs a floating-point type")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(
            f"x0 has shape {tuple(x0.shape)} and b {tuple(b.shape)}; they must be the same"
        )
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter={max_iter}; must be 1 or more, or None")
    for name, setting in (("tol", tol), ("residual_tol", residual_tol)):
        if not 0 <= setting < math.inf:
            raise ValueError(f"{name}={setting}; must be 0 (off) or a positive number")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}; must be 0 or more and finite")
    if max_iter is None and tol == 0 and residual_tol == 0:
        raise ValueError(
            "no stopping rule: max_iter=None, tol=0, residual_tol=0; give at least one of them"
        )
