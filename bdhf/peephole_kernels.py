"""The recurrences of a peephole LSTM layer on a GPU, one kernel a pass (Triton).

A layer's pass over a sequence is one launch: each program takes some samples through all steps,
its states in registers. What is no recurrence (the layer's input, the gradients of its weights) is
one large matrix product over all steps at once, in `bdhf.fused_lstm`. Arrays have dimensions
(step, feature, batch), with a leading one over pairs of a block and this layer where several
blocks go side by side; gates are in the order input, forget, cell, output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Samples that a program takes along. A guess: no GPU has measured it yet.
_TILE = 32
_WARPS = 4


def forward(
    drive: Tensor, recurrent: Tensor, peepholes: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States before and after each step, and the slopes that the maps need.

    Args:
        drive: what inputs and bias give the gates (steps, 4 units, batch).
        recurrent: weights (4 units, units).
        peepholes: (3, units).
        slopes: whether these are wanted.

    Returns:
        Hidden and cell states (steps + 1, units, batch), first those before the first step, zeros;
        and, empty if not wanted, the slopes of gates (steps, 4 units, batch), cell, and hidden
        (steps, units, batch), as `bdhf.peephole_lstm` defines them.
    """
    steps, gates, rows = drive.shape
    units = gates // 4
    hidden, cell = (drive.new_zeros(steps + 1, units, rows) for _ in range(2))
    kept = steps if slopes else 0
    by_gates = drive.new_empty(kept, gates, rows)
    by_cell, to_hidden = (drive.new_empty(kept, units, rows) for _ in range(2))
    with torch.cuda.device_of(drive):  # where Triton launches
        _forward[_grid(rows, 1)](
            drive,
            recurrent,
            peepholes,
            hidden,
            cell,
            by_gates,
            by_cell,
            to_hidden,
            steps,
            rows,
            units,
            _padded(units),
            _TILE,
            slopes,
            num_warps=_WARPS,
        )
    return hidden, cell, by_gates, by_cell, to_hidden


def tangent(
    drive: Tensor,
    recurrent: Tensor,
    peepholes: Tensor,
    cell: Tensor,
    slopes: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Tangents of the hidden states after each step (pairs, steps, units, batch).

    Args:
        drive: what directions and the layer below give the gates (pairs, steps, 4 units, batch).
        recurrent: weights (4 units, units).
        peepholes: their directions (pairs, 3, units).
        cell, slopes: as `forward` returned them.
    """
    pairs, steps, gates, rows = drive.shape
    units = gates // 4
    moved = drive.new_empty(pairs, steps, units, rows)
    with torch.cuda.device_of(drive):  # where Triton launches
        _tangent[_grid(rows, pairs)](
            drive,
            recurrent,
            peepholes,
            cell,
            *slopes,
            moved,
            steps,
            rows,
            units,
            _padded(units),
            _TILE,
            num_warps=_WARPS,
        )
    return moved


def adjoint(cotangents: Tensor, recurrent: Tensor, slopes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cotangents of the gates (pairs, steps, 4 units, batch): the transpose of `tangent`.

    Args:
        cotangents: of the hidden states after each step (pairs, steps, units, batch).
        recurrent, slopes: as for `tangent`.
    """
    pairs, steps, units, rows = cotangents.shape
    found = cotangents.new_empty(pairs, steps, 4 * units, rows)
    with torch.cuda.device_of(cotangents):  # where Triton launches
        _adjoint[_grid(rows, pairs)](
            cotangents,
            recurrent,
            *slopes,
            found,
            steps,
            rows,
            units,
            _padded(units),
            _TILE,
            num_warps=_WARPS,
        )
    return found


def _grid(rows: int, pairs: int) -> tuple[int, int]:
    return triton.cdiv(rows, _TILE), pairs


def _padded(units: int) -> int:
    """A size that matrix products in a kernel can have."""
    return max(16, triton.next_power_of_2(units))


@triton.jit
def _tanh(x):
    """With all digits near zero too, where the exponential's would cancel."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    power = tl.exp(-2 * tl.abs(x))
    whole = (1 - power) / (1 + power)
    return tl.where(square < 0.01, series, tl.where(x < 0, -whole, whole))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _slab(rows, units: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr):
    """Places of this program's samples in (units, batch), and which of them there are."""
    unit = tl.arange(0, padded)[:, None]
    row = (tl.program_id(0) * tile + tl.arange(0, tile))[None, :]
    return unit * rows + row, (unit < units) & (row < rows)


@triton.jit
def _weights(recurrent, gate: tl.constexpr, units: tl.constexpr, padded: tl.constexpr):
    """A gate's recurrent weights, filled up with zeros."""
    one, other = tl.arange(0, padded)[:, None], tl.arange(0, padded)[None, :]
    places = (gate * units + one) * units + other
    return tl.load(recurrent + places, mask=(one < units) & (other < units), other=0.0)


@triton.jit
def _column(peepholes, gate: tl.constexpr, units: tl.constexpr, padded: tl.constexpr):
    unit = tl.arange(0, padded)[:, None]
    return tl.load(peepholes + gate * units + unit, mask=unit < units, other=0.0)


@triton.jit
def _times(weights, states):
    return tl.dot(weights, states, input_precision="ieee", out_dtype=weights.dtype)


@triton.jit
def _forward(
    drive,
    recurrent,
    peepholes,
    hidden,
    cell,
    by_gates,
    by_cell,
    to_hidden,
    steps,
    rows,
    units: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    slopes: tl.constexpr,
):
    at, there = _slab(rows, units, padded, tile)
    r_i, r_f = _weights(recurrent, 0, units, padded), _weights(recurrent, 1, units, padded)
    r_g, r_o = _weights(recurrent, 2, units, padded), _weights(recurrent, 3, units, padded)
    p_i, p_f = _column(peepholes, 0, units, padded), _column(peepholes, 1, units, padded)
    p_o = _column(peepholes, 2, units, padded)
    h = tl.zeros((padded, tile), dtype=r_i.dtype)
    c = tl.zeros((padded, tile), dtype=r_i.dtype)
    slab = units * rows
    for _ in range(steps):
        z_i = tl.load(drive + at, mask=there, other=0.0) + _times(r_i, h) + p_i * c
        z_f = tl.load(drive + slab + at, mask=there, other=0.0) + _times(r_f, h) + p_f * c
        z_g = tl.load(drive + 2 * slab + at, mask=there, other=0.0) + _times(r_g, h)
        z_o = tl.load(drive + 3 * slab + at, mask=there, other=0.0) + _times(r_o, h)
        i, f, g = _sigmoid(z_i), _sigmoid(z_f), _tanh(z_g)
        before = c
        c = f * before + i * g
        o = _sigmoid(z_o + p_o * c)
        squashed = _tanh(c)
        h = o * squashed
        hidden += slab
        cell += slab
        tl.store(hidden + at, h, mask=there)
        tl.store(cell + at, c, mask=there)
        drive += 4 * slab
        if slopes:
            by_i, by_f = g * i * (1 - i), before * f * (1 - f)
            by_o = squashed * o * (1 - o)
            tl.store(by_gates + at, by_i, mask=there)
            tl.store(by_gates + slab + at, by_f, mask=there)
            tl.store(by_gates + 2 * slab + at, i * (1 - g * g), mask=there)
            tl.store(by_gates + 3 * slab + at, by_o, mask=there)
            tl.store(by_cell + at, f + by_i * p_i + by_f * p_f, mask=there)
            tl.store(to_hidden + at, o * (1 - squashed * squashed) + by_o * p_o, mask=there)
            by_gates += 4 * slab
            by_cell += slab
            to_hidden += slab


@triton.jit
def _tangent(
    drive,
    recurrent,
    peepholes,
    cell,
    by_gates,
    by_cell,
    to_hidden,
    moved,
    steps,
    rows,
    units: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
):
    at, there = _slab(rows, units, padded, tile)
    slab = units * rows
    pair = tl.program_id(1).to(tl.int64)
    drive += pair * steps * 4 * slab
    moved += pair * steps * slab
    peepholes += pair * 3 * units
    r_i, r_f = _weights(recurrent, 0, units, padded), _weights(recurrent, 1, units, padded)
    r_g, r_o = _weights(recurrent, 2, units, padded), _weights(recurrent, 3, units, padded)
    d_i, d_f = _column(peepholes, 0, units, padded), _column(peepholes, 1, units, padded)
    d_o = _column(peepholes, 2, units, padded)
    h = tl.zeros((padded, tile), dtype=r_i.dtype)
    c = tl.zeros((padded, tile), dtype=r_i.dtype)
    before = tl.load(cell + at, mask=there, other=0.0)
    for _ in range(steps):
        cell += slab
        after = tl.load(cell + at, mask=there, other=0.0)
        z_i = tl.load(drive + at, mask=there, other=0.0) + _times(r_i, h) + d_i * before
        z_f = tl.load(drive + slab + at, mask=there, other=0.0) + _times(r_f, h) + d_f * before
        z_g = tl.load(drive + 2 * slab + at, mask=there, other=0.0) + _times(r_g, h)
        z_o = tl.load(drive + 3 * slab + at, mask=there, other=0.0) + _times(r_o, h) + d_o * after
        c = (
            tl.load(by_cell + at, mask=there, other=0.0) * c
            + tl.load(by_gates + at, mask=there, other=0.0) * z_i
            + tl.load(by_gates + slab + at, mask=there, other=0.0) * z_f
            + tl.load(by_gates + 2 * slab + at, mask=there, other=0.0) * z_g
        )
        h = (
            tl.load(by_gates + 3 * slab + at, mask=there, other=0.0) * z_o
            + tl.load(to_hidden + at, mask=there, other=0.0) * c
        )
        tl.store(moved + at, h, mask=there)
        before = after
        drive += 4 * slab
        by_gates += 4 * slab
        by_cell += slab
        to_hidden += slab
        moved += slab


@triton.jit
def _adjoint(
    cotangents,
    recurrent,
    by_gates,
    by_cell,
    to_hidden,
    found,
    steps,
    rows,
    units: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
):
    at, there = _slab(rows, units, padded, tile)
    slab = units * rows
    pair = tl.program_id(1).to(tl.int64)
    last = pair * 0 + steps - 1  # as wide
    cotangents += (pair * steps + last) * slab
    found += (pair * steps + last) * 4 * slab
    by_gates += last * 4 * slab
    by_cell += last * slab
    to_hidden += last * slab
    r_i = tl.trans(_weights(recurrent, 0, units, padded))
    r_f = tl.trans(_weights(recurrent, 1, units, padded))
    r_g = tl.trans(_weights(recurrent, 2, units, padded))
    r_o = tl.trans(_weights(recurrent, 3, units, padded))
    carried = tl.zeros((padded, tile), dtype=r_i.dtype)
    c = tl.zeros((padded, tile), dtype=r_i.dtype)
    for _ in range(steps):
        h = carried + tl.load(cotangents + at, mask=there, other=0.0)
        c += tl.load(to_hidden + at, mask=there, other=0.0) * h
        z_i = tl.load(by_gates + at, mask=there, other=0.0) * c
        z_f = tl.load(by_gates + slab + at, mask=there, other=0.0) * c
        z_g = tl.load(by_gates + 2 * slab + at, mask=there, other=0.0) * c
        z_o = tl.load(by_gates + 3 * slab + at, mask=there, other=0.0) * h
        tl.store(found + at, z_i, mask=there)
        tl.store(found + slab + at, z_f, mask=there)
        tl.store(found + 2 * slab + at, z_g, mask=there)
        tl.store(found + 3 * slab + at, z_o, mask=there)
        c *= tl.load(by_cell + at, mask=there, other=0.0)
        carried = _times(r_i, z_i) + _times(r_f, z_f) + _times(r_g, z_g) + _times(r_o, z_o)
        cotangents -= slab
        found -= 4 * slab
        by_gates -= 4 * slab
        by_cell -= slab
        to_hidden -= slab
