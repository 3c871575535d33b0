"""Truncated conjugate gradient, for one linear system or for several side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

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
        products: products with ``A`` that it took: one an iteration, one for a warm start, one
            for a step that was not taken.
    """

    solution: Tensor
    reason: StopReason
    iterations: int
    value: float
    products: int

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
    check_every: int | None = None,
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
    check_every: int | None = None,
) -> list[CGResult]: ...


def conjugate_gradient(
    matvec: Any,
    b: Any,
    x0: Any = None,
    max_iter: Any = None,
    tol: Any = 0.0,
    residual_tol: Any = 0.0,
    damping: Any = 0.0,
    check_every: int | None = None,
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
        check_every: iterations between two looks at which systems have stopped, since a look
            waits for the device; a system that stops in between gets steps of zero until then.
            None: 1 on a CPU, 8 on a GPU. The results are the same.

    For several systems, the settings but for ``check_every`` may be sequences too, one entry for
    each.

    Returns:
        A `CGResult`; for several systems, a list of them.

    Raises:
        ValueError: no stopping rule is given, a setting is out of range, or shapes differ.
    """
    if isinstance(b, Tensor):
        return conjugate_gradient(
            lambda v: [matvec(v[0])],
            [b],
            [x0],
            [max_iter],
            [tol],
            [residual_tol],
            [damping],
            check_every,
        )[0]
    if not b:
        return []
    systems = Systems(b, x0, max_iter, tol, residual_tol, damping, check_every)
    systems.start(matvec)
    systems.run(lambda active: systems.round(matvec, active))
    return systems.results()


#: Rounds between two looks at which systems have stopped, by device.
CHECK_EVERY = {"cpu": 1, "cuda": 8}

REASONS: tuple[StopReason, ...] = get_args(StopReason)
_RUNNING, _CONVERGED, _PROGRESS, _CAP, _NEGATIVE, _NOT_FINITE = range(-1, len(REASONS))


class Systems:
    """Linear systems side by side, iterated together.

    Every number that decides anything stays on the device, in one tensor with an entry for each
    system, and everything keeps its place in memory: `start` and `round` wait for nothing, and
    can be recorded and replayed (`bdhf.graphs`). `run` and `results` read what came of it.

    Args:
        b, x0, max_iter, tol, residual_tol, damping, check_every: see `conjugate_gradient`; at
            least one system.
        agree: gets the inner products, one a system, and may write others there. Processes that
            iterate the same systems have to take the same ones, or they would drift apart: a sum
            may differ in its last digit with the place of a vector in memory.
    """

    def __init__(
        self,
        b: Sequence[Tensor],
        x0: Sequence[Tensor | None] | None = None,
        max_iter: int | Sequence[int | None] | None = None,
        tol: float | Sequence[float] = 0.0,
        residual_tol: float | Sequence[float] = 0.0,
        damping: float | Sequence[float] = 0.0,
        check_every: int | None = None,
        agree: Callable[[Tensor], None] = lambda dots: None,
    ) -> None:
        given = (_one_each(s, len(b)) for s in (max_iter, tol, residual_tol, damping))
        columns = (b, [None] * len(b) if x0 is None else x0, *given)
        lengths = set(map(len, columns))
        if len(lengths) > 1:
            raise ValueError(
                f"b, x0 and the settings describe {sorted(lengths)} systems; give one entry for "
                "each"
            )
        self._rows = rows = [_System(*row) for row in zip(*columns, strict=True)]
        self._device = rows[0].b.device
        if check_every is None:
            check_every = CHECK_EVERY.get(self._device.type, 1)
        if check_every < 1:
            raise ValueError(f"check_every={check_every}; must be 1 or more, or None")
        self._check_every, self._agree = check_every, agree
        self._dtype = functools.reduce(torch.promote_types, [s.b.dtype for s in rows], torch.bool)
        self._cap = max(s.max_iter for s in rows)

    @torch.no_grad()
    def start(self, matvec: BlockMatvec) -> None:
        """Set everything to its beginning, with a product for each warm start."""
        rows = self._rows
        self._b = [s.b for s in rows]
        self._x = [torch.zeros_like(s.b) if s.x0 is None else s.x0.to(s.b, copy=True) for s in rows]
        self._r = [s.b.clone() for s in rows]
        self._bb = self._dots(self._b, self._b)
        warm = [k for k, s in enumerate(rows) if s.x0 is not None]
        self._value = torch.zeros_like(self._bb)
        if warm:
            for k, product in self._products(matvec, self._x, warm).items():
                self._r[k].sub_(product)
            inside = [self._dots(self._x, of) for of in (self._b, self._r)]
            self._value = -0.5 * (inside[0] + inside[1])
        self._rr = self._dots(self._r, self._r)
        lost = ~(self._rr + self._value).isfinite()  # a warm start that is of no use
        for k in warm:
            useless = lost[k].to(self._b[k].device)
            self._x[k].masked_fill_(useless, 0)
            self._r[k].copy_(torch.where(useless, self._b[k], self._r[k]))
        self._rr = torch.where(lost, self._bb, self._rr)
        self._value = self._value.masked_fill(lost, 0)
        self._p = [r.clone() for r in self._r]
        self._pp = self._rr.clone()
        self._stiffest = torch.zeros_like(self._rr)  # the largest pᵀAp / pᵀp so far
        self._floor = self._row([0.5 * s.damping for s in rows], self._dtype)
        epsilon = [torch.finfo(s.b.dtype).eps for s in rows]
        # Below this, relative to the largest, curvature is the rounding of a singular matrix,
        # and a step along it would be arbitrarily long.
        self._curvature_bound = self._row([10 * eps for eps in epsilon], self._dtype)
        # Below machine epsilon the recursive residual no longer tells anything of the true one.
        bounds = [max(s.residual_tol, e) ** 2 for s, e in zip(rows, epsilon, strict=True)]
        self._residual_bound = self._row(bounds, torch.float64)
        self._caps = self._row([s.max_iter for s in rows], torch.int64)
        self._tol = self._row([s.tol for s in rows], torch.float64)

        self._iteration = torch.zeros((), dtype=torch.int64, device=self._device)
        self._code = self._row([_RUNNING] * len(rows), torch.int64)
        self._taken = torch.zeros_like(self._code)
        self._asked = self._row([s.x0 is not None for s in rows], torch.int64)
        # Of the quadratic, as far back as the rule of relative progress looks.
        self._values = self._value.new_empty(
            (max(10, self._cap // 10) + 1, len(rows)), dtype=torch.float64
        )
        self._values[0] = self._value
        self._judge()
        self._halt(range(len(rows)))

    @torch.no_grad()
    def round(self, matvec: BlockMatvec, active: Sequence[int]) -> None:
        """Go to the minimum along ``p`` in each of the ``active`` systems that still runs."""
        running = self._code == _RUNNING
        products = self._products(matvec, self._p, active)
        curvature = self._dots(self._p, products)
        torch.maximum(self._stiffest, curvature / self._pp, out=self._stiffest)
        # Damping is a floor under the curvature; unless it is lost in rounding itself, half of it
        # is enough.
        bound = self._curvature_bound * self._stiffest
        bound = torch.where(self._floor > 0.005 * bound, self._floor, bound)
        length = self._rr / curvature
        # The fall of the quadratic over an exact step; sums of falls lose no digits, whereas
        # -½ xᵀ(b + r) would cost two more passes over the vectors.
        value = torch.addcmul(self._value, length, self._rr, value=-0.5)
        finite = curvature.isfinite() & ((curvature <= 0) | value.isfinite())
        usable = running & finite & (curvature > bound * self._pp)
        length = length.masked_fill(~usable, 0)
        self._value.copy_(torch.where(usable, value, self._value))
        for k, product in products.items():
            step = length[k].to(self._p[k])
            self._x[k].addcmul_(self._p[k], step)
            self._r[k].addcmul_(product, step, value=-1)
        squared = self._dots(self._r, {k: self._r[k] for k in active})
        momentum = squared / self._rr
        self._pp.mul_(momentum.square()).add_(squared)  # the residual is orthogonal to p
        self._rr.copy_(squared)
        self._asked += running
        self._taken += usable
        self._iteration += 1
        place = (self._iteration % len(self._values)).view(1)
        self._values.index_copy_(0, place, self._value.double().unsqueeze(0))
        self._judge(running & ~usable, finite)
        for k in active:
            torch.addcmul(self._r[k], self._p[k], momentum[k].to(self._p[k]), out=self._p[k])
        self._halt(active)

    def _halt(self, systems: Sequence[int]) -> None:
        """No further step in those that have stopped, also where numbers are not finite.

        Needed only where nobody looks before the next round.
        """
        if self._check_every > 1:
            stopped = self._code != _RUNNING
            for k in systems:
                self._p[k].masked_fill_(stopped[k].to(self._p[k].device), 0)

    def _judge(self, refused: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Decide which systems stop after this iteration, and why; a later reason goes first."""
        at, value, squared = self._iteration, self._value.double(), self._rr.double()
        span = (at // 10).clamp(min=10)
        place = ((at - span) % len(self._values)).view(1)
        fall = value - self._values.index_select(0, place).squeeze(0)
        slow = (at > span) & (value < 0) & (fall / value < span * self._tol)
        code = torch.where(at >= self._caps, _CAP, _RUNNING)
        code = code.masked_fill(slow, _PROGRESS)
        code = code.masked_fill(squared <= self._residual_bound * self._bb.double(), _CONVERGED)
        code = code.masked_fill(~squared.isfinite(), _NOT_FINITE)
        if refused is not None and finite is not None:
            broken = torch.where(finite, _NEGATIVE, _NOT_FINITE)
            code = torch.where(refused, broken, code)
        self._code.copy_(torch.where(self._code == _RUNNING, code, self._code))

    def run(self, make_round: Callable[[list[int]], None]) -> None:
        """Call ``make_round`` with the systems that run, until none does."""
        made = 0
        # What has stopped at its start is found by the first look, at once where that is free.
        active = self._running() if self._check_every == 1 else list(range(len(self._rows)))
        while active:
            for _ in range(min(self._check_every, self._cap - made)):
                make_round(active)
                made += 1
            active = self._running()

    def _running(self) -> list[int]:
        return [k for k, code in enumerate(self._code.tolist()) if code == _RUNNING]

    def results(self) -> list[CGResult]:
        """What was found, in the memory that the next `start` uses again."""
        counts = torch.stack((self._code, self._taken, self._asked), 1).tolist()
        values = self._value.tolist()
        return [
            _result(x, REASONS[code], taken, value, asked)
            for x, (code, taken, asked), value in zip(self._x, counts, values, strict=True)
        ]

    def _products(
        self, matvec: BlockMatvec, vectors: Sequence[Tensor], asked: Sequence[int]
    ) -> dict[int, Tensor]:
        """``(A + λI) v`` by system, for those that are asked."""
        found = matvec([v if k in asked else None for k, v in enumerate(vectors)])
        products = {}
        for k, (product, row) in enumerate(zip(found, self._rows, strict=True)):
            if k not in asked:
                continue
            if product is None or product.shape != row.b.shape:
                shape = None if product is None else tuple(product.shape)
                raise ValueError(
                    f"matvec returned {shape} for a vector of shape {tuple(row.b.shape)}; "
                    "it must return a tensor of the same shape for every system still running"
                )
            if row.damping:
                product = torch.add(product, vectors[k], alpha=row.damping)
            products[k] = product
        return products

    def _dots(self, one: Sequence[Tensor], other: Sequence[Tensor] | dict[int, Tensor]) -> Tensor:
        """Inner products by system; 1 for one that has stopped, where nothing asks for it."""
        pairs = other if isinstance(other, dict) else dict(enumerate(other))
        filler = torch.ones((), dtype=self._dtype, device=self._device)
        dots = torch.stack(
            [
                torch.dot(v.reshape(-1), pairs[k].reshape(-1)).to(filler) if k in pairs else filler
                for k, v in enumerate(one)
            ]
        )
        self._agree(dots)
        return dots

    def _row(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """A number for each system. Filled, not copied from the host, which waits."""
        return torch.stack([torch.full((), v, dtype=dtype, device=self._device) for v in values])


def _result(x: Tensor, reason: StopReason, taken: int, value: float, asked: int) -> CGResult:
    if reason in ("negative curvature", "not finite") and value > 0:
        x, value = torch.zeros_like(x), 0.0
    return CGResult(x, reason, taken, value, asked)


def _one_each(setting: Any, count: int) -> Sequence[Any]:
    return setting if isinstance(setting, Sequence) else [setting] * count


@dataclass
class _System:
    """One system as it was given."""

    b: Tensor
    x0: Tensor | None
    max_iter: Any  # int, once checked
    tol: float
    residual_tol: float
    damping: float

    def __post_init__(self) -> None:
        b, x0, max_iter, damping = self.b, self.x0, self.max_iter, self.damping
        if not b.is_floating_point():
            raise ValueError(
                f"b has dtype {b.dtype}; conjugate gradient needs a floating-point type"
            )
        if x0 is not None and x0.shape != b.shape:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)} and b {tuple(b.shape)}; they must be the same"
            )
        if max_iter is not None and max_iter < 1:
            raise ValueError(f"max_iter={max_iter}; must be 1 or more, or None")
        for name, setting in (("tol", self.tol), ("residual_tol", self.residual_tol)):
            if not 0 <= setting < math.inf:
                raise ValueError(f"{name}={setting}; must be 0 (off) or a positive number")
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping={damping}; must be 0 or more and finite")
        if max_iter is None and self.tol == 0 and self.residual_tol == 0:
            raise ValueError(
                "no stopping rule: max_iter=None, tol=0, residual_tol=0; give at least one of them"
            )
        if max_iter is None:
            self.max_iter = 10 * b.numel()
