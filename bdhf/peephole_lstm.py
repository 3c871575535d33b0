"""Stacked LSTM layers with peephole connections, computed as a wavefront.

Layer ``l`` at time ``t`` needs layer ``l - 1`` at ``t`` and itself at ``t - 1``. So layer ``l`` at
time ``s - l`` can be computed for all layers at once, in one step ``s`` of ``time + layers - 1``,
where a plain loop takes ``time · layers``. The network is small and the loop long, so that what
counts is the number of operations issued, not their arithmetic.

`PeepholeLSTM.forward` is written for autograd. `PeepholeLSTM.linearize` brings the tangent and the
adjoint map of the same wavefront by hand, several blocks side by side: the gates are saved once,
and everything that the maps need of them is folded into coefficients, so that neither map takes
another sigmoid or tanh.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bdhf.linearization import Block, PerBlock


class PeepholeLayer(nn.Module):
    """The parameters of one layer (Gers and Schmidhuber 2000, diagonal peepholes).

    The input and forget gates see the cell state of the step before, the output gate that of the
    step itself; one bias for each gate::

        i = σ(W_i x + U_i h⁻ + b_i + p_i c⁻)        c = f c⁻ + i g
        f = σ(W_f x + U_f h⁻ + b_f + p_f c⁻)        o = σ(W_o x + U_o h⁻ + b_o + p_o c)
        g = tanh(W_g x + U_g h⁻ + b_g)              h = o tanh(c)

    Initialisation (ours): input weights Glorot uniform, recurrent weights orthogonal, both gate
    by gate; peepholes 0; forget bias 1, other biases 0.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        # Rows by gate: input, forget, cell, output.
        self.input_weight = nn.Parameter(torch.empty(4 * units, inputs))
        self.recurrent_weight = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.zeros(4 * units))
        self.peepholes = nn.Parameter(torch.zeros(3, units))  # into input, forget, output
        for gate in self.input_weight.data.chunk(4):
            nn.init.xavier_uniform_(gate)
        for gate in self.recurrent_weight.data.chunk(4):
            nn.init.orthogonal_(gate)
        self.bias.data[units : 2 * units] = 1.0


class PeepholeLSTM(nn.Module):
    """Stacked peephole LSTM layers, and a linear layer on the top one's last hidden state.

    Torch's own LSTM has no peepholes. The linear layer's weight is Glorot uniform, its bias 0.
    """

    def __init__(self, inputs: int, units: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            PeepholeLayer(units if depth else inputs, units) for depth in range(layers)
        )
        self.readout = nn.Linear(units, outputs)
        nn.init.xavier_uniform_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, sequences: Tensor) -> Tensor:
        """Outputs (batch, outputs) of sequences (batch, time, inputs)."""
        weights, (rows, time, inputs) = _Weights.of(self.layers), sequences.shape
        layers, _, units, _ = weights.peepholes.shape
        width = weights.matrix.shape[2] // 2
        sequence = pad(sequences.permute(1, 2, 0), (0, 0, 0, width - inputs)).unsqueeze(1)
        nothing = sequence.new_zeros(1, width, rows)
        h = c = sequence.new_zeros(layers, units, rows)
        for step in range(time + layers - 1):
            active = _active(step, time)
            before = pad(h, (0, 0, 0, width - units))
            below = torch.cat([sequence[step] if step < time else nothing, before[:-1]])
            moved = weights.of_layers(active).step(torch.cat([below, before], 1)[active], c[active])
            h, c = (_replaced(old, active, new) for old, new in zip((h, c), moved, strict=True))
        return self.readout(h[-1].T)

    def linearize(self, blocks: Sequence[Block], sequences: Tensor) -> LinearizedLSTM | None:
        """The maps at the present parameters (see `bdhf.linearization.Linearizable`)."""
        places = {
            parameter: _Place(depth, name)
            for depth, layer in enumerate([*self.layers, self.readout])
            for name, parameter in layer.named_parameters()
        }
        if not all(parameter in places for block in blocks for parameter in block):
            return None
        return LinearizedLSTM.of(
            _Weights.of(self.layers).detached(),
            self.readout,
            sequences,
            [[places[parameter] for parameter in block] for block in blocks],
        )


class _Place(NamedTuple):
    """Which parameter of which layer; the linear layer comes last."""

    layer: int
    name: str


def _active(step: int, time: int) -> slice:
    """The layers that a step of the wavefront moves."""
    return slice(max(0, step - time + 1), step + 1)


def _replaced(old: Tensor, active: slice, new: Tensor) -> Tensor:
    if len(new) == len(old):
        return new
    return torch.cat([old[: active.start], new, old[active.stop :]])


class _Weights(NamedTuple):
    """The layers' parameters stacked; the first dimension of each is the layer.

    A layer reads what is below it (the sequence, or the layer below) and its own hidden state
    before; both are filled up with zeros to ``width``, the larger of inputs and units.
    """

    matrix: Tensor  # (layers, 4 units, 2 width)
    bias: Tensor  # (layers, 4 units, 1)
    peepholes: Tensor  # (layers, 3, units, 1)

    @classmethod
    def of(cls, layers: Iterable[nn.Module]) -> _Weights:
        parts = [dict(layer.named_parameters()) for layer in layers]
        width = max(parts[0]["recurrent_weight"].shape[1], parts[0]["input_weight"].shape[1])
        return cls(
            torch.stack([_matrix(part, width) for part in parts]),
            torch.stack([part["bias"] for part in parts]).unsqueeze(2),
            torch.stack([part["peepholes"] for part in parts]).unsqueeze(3),
        )

    def detached(self) -> _Weights:
        return _Weights(*(part.detach() for part in self))

    def of_layers(self, active: slice) -> _Weights:
        return _Weights(*(part[active] for part in self))

    def step(self, reads: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden and cell states (layers, units, batch) after one step."""
        units = c.shape[1]
        gates = torch.baddbmm(self.bias, self.matrix, reads).unflatten(1, (4, units))
        early = torch.addcmul(gates[:, :2], self.peepholes[:, :2], c.unsqueeze(1))
        i, f = early.sigmoid().unbind(1)
        c = torch.addcmul(f * c, i, gates[:, 2].tanh())
        o = torch.addcmul(gates[:, 3], self.peepholes[:, 2], c).sigmoid()
        return o * c.tanh(), c


_MATRICES = ("input_weight", "recurrent_weight")


def _matrix(parameters: Mapping[str, Tensor], width: int) -> Tensor:
    """Input and recurrent weights (or their tangents) side by side: (4 units, 2 width)."""
    weights = [parameters[name] for name in _MATRICES]
    return torch.cat([pad(weight, (0, width - weight.shape[1])) for weight in weights], 1)


@dataclass(frozen=True)
class LinearizedLSTM:
    """A `PeepholeLSTM` at certain parameters and a sequence.

    Arrays over the wavefront have dimensions (step, layer, feature, batch) and are zero where a
    layer is not active. Among the hidden states, the sequence itself stands below the bottom
    layer, so that what a layer reads is a view of two neighbours.

    Attributes:
        outputs: what the network returns (batch, outputs).
    """

    outputs: Tensor
    readout: nn.Linear
    blocks: list[list[_Place]]
    inputs: int
    time: int
    matrix: Tensor  # of `_Weights`
    hidden: Tensor  # (steps + 1, 1 + layers, width, batch), before each step and after the last
    cell: Tensor  # (steps + 1, layers, units, batch)
    slopes: _Slopes
    stacks: dict[tuple[int, ...], _Stack] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        weights: _Weights,
        readout: nn.Linear,
        sequences: Tensor,
        blocks: list[list[_Place]],
    ) -> LinearizedLSTM:
        """Run the network forward and keep what the maps need."""
        matrix, bias, peepholes = weights
        (depth, _, units, _), (rows, time, inputs) = peepholes.shape, sequences.shape
        steps, width = time + depth - 1, matrix.shape[2] // 2
        gates = matrix.new_zeros(steps, depth, 4 * units, rows)
        for layer in range(depth):
            gates[layer : layer + time, layer] = bias[layer]
        hidden = matrix.new_zeros(steps + 1, 1 + depth, width, rows)
        hidden[:time, 0, :inputs] = sequences.permute(1, 2, 0)
        cell = matrix.new_zeros(steps + 1, depth, units, rows)
        squashed = torch.zeros_like(cell)
        reads = _neighbours(hidden)
        for step in range(steps):
            active = _active(step, time)
            z, before, c = gates[step, active], cell[step, active], cell[step + 1, active]
            z.baddbmm_(matrix[active], reads[step, active])
            early, g, late = z.unflatten(1, (4, units)).split((2, 1, 1), 1)
            early.addcmul_(peepholes[active, :2], before.unsqueeze(1)).sigmoid_()
            torch.mul(early[:, 1], before, out=c).addcmul_(early[:, 0], g.squeeze(1).tanh_())
            o = late.squeeze(1).addcmul_(peepholes[active, 2], c).sigmoid_()
            tanh = torch.tanh(c, out=squashed[step + 1, active])
            torch.mul(o, tanh, out=hidden[step + 1, 1:, :units][active])
        slopes = _Slopes.of(gates, cell[:-1], squashed[1:], peepholes)
        outputs = readout(hidden[-1, -1, :units].T)
        return cls(outputs, readout, blocks, inputs, time, matrix, hidden, cell, slopes)

    def tangents(self, directions: PerBlock) -> PerBlock:
        """For each block with a direction, the tangent of ``outputs``."""
        stack = self._stack(directions)
        named = [
            {} if direction is None else dict(zip(block, direction, strict=True))
            for block, direction in zip(self.blocks, directions, strict=True)
        ]
        for (k, layer), place in stack.pairs.items():
            self._drive(
                layer,
                stack.gates(place, layer),
                {place.name: vector for place, vector in named[k].items() if place.layer == layer},
            )
        moved, depth = stack.tangent(), len(self.matrix)
        results: list[list[Tensor] | None] = [None] * len(directions)
        for k in stack.live:
            tangent = torch.zeros_like(self.outputs)
            if (k, depth - 1) in stack.pairs:
                tangent += moved[stack.pairs[k, depth - 1]].T @ self.readout.weight.T
            if (weight := named[k].get(_Place(depth, "weight"))) is not None:
                tangent += self._top() @ weight.T
            if (bias := named[k].get(_Place(depth, "bias"))) is not None:
                tangent += bias
            results[k] = [tangent]
        return results

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        """For each block with a cotangent of ``outputs``, those of its parameters."""
        stack, depth = self._stack(cotangents), len(self.matrix)
        given = {k: u[0] for k, u in enumerate(cotangents) if u is not None}
        stack.adjoint({k: (u @ self.readout.weight).T for k, u in given.items()})
        found: dict[tuple[int, _Place], Tensor] = {}
        for (k, layer), place in stack.pairs.items():
            names = {p.name for p in self.blocks[k] if p.layer == layer}
            for name, cotangent in self._gather(layer, stack.gates(place, layer), names).items():
                found[k, _Place(layer, name)] = cotangent
        for k, u in given.items():
            found[k, _Place(depth, "weight")] = u.T @ self._top()
            found[k, _Place(depth, "bias")] = u.sum(0)
        return [
            [found[k, place] for place in block] if k in given else None
            for k, block in enumerate(self.blocks)
        ]

    def _top(self) -> Tensor:
        """What the linear layer reads: (batch, units)."""
        return self.hidden[-1, -1, : self.cell.shape[2]].T

    def _stack(self, asked: PerBlock) -> _Stack:
        """The blocks that are asked for; which ones changes only when a block's CG has stopped."""
        live = tuple(k for k, vectors in enumerate(asked) if vectors is not None)
        if live not in self.stacks:
            self.stacks.clear()
            self.stacks[live] = _Stack.of(self.matrix, self.slopes, self.blocks, live)
        return self.stacks[live]

    def _drive(self, layer: int, gates: Tensor, tangents: dict[str, Tensor]) -> None:
        """Set a layer's gates (time, 4 units, batch) to what its parameters' tangents give them."""
        total = tangents["bias"].unsqueeze(1) if "bias" in tangents else gates.new_zeros(())
        if not tangents.keys().isdisjoint(_MATRICES):
            units = self.cell.shape[2]
            nothing = {
                "input_weight": gates.new_zeros(4 * units, units if layer else self.inputs),
                "recurrent_weight": gates.new_zeros(4 * units, units),
            }
            matrix = _matrix(nothing | tangents, self.hidden.shape[2])
            # Repeated: a batch of one and the same matrix would be multiplied piece by piece.
            total = torch.baddbmm(total, matrix.repeat(self.time, 1, 1), self._read(layer))
        gates.copy_(total)
        if "peepholes" in tangents:
            i, f, o = tangents["peepholes"].unsqueeze(2)
            into_i, into_f, _, into_o = gates.chunk(4, 1)
            before, after = self._cells(layer)
            into_i.addcmul_(i, before)
            into_f.addcmul_(f, before)
            into_o.addcmul_(o, after)

    def _gather(self, layer: int, gates: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The transpose of `_drive`."""
        found = {}
        if "bias" in names:
            found["bias"] = gates.sum((0, 2))
        if "peepholes" in names:
            i, f, _, o = gates.chunk(4, 1)
            before, after = self._cells(layer)
            products = i * before, f * before, o * after
            found["peepholes"] = torch.stack([product.sum((0, 2)) for product in products])
        if not set(names).isdisjoint(_MATRICES):
            below, before = torch.bmm(self._read(layer), gates.mT).sum(0).T.chunk(2, 1)
            units = self.cell.shape[2]
            found["input_weight"] = below[:, : units if layer else self.inputs]
            found["recurrent_weight"] = before[:, :units]
        return found

    def _cells(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's cell states (time, units, batch), before and after each step."""
        cells = self.cell[layer : layer + self.time + 1, layer]
        return cells[:-1], cells[1:]

    def _read(self, layer: int) -> Tensor:
        """What a layer reads: (time, 2 width, batch)."""
        return _neighbours(self.hidden)[layer : layer + self.time, layer]


class _Slopes(NamedTuple):
    """Derivatives of a step, over the wavefront.

    A step's tangent is ``dc = cell · dc⁻ + Σ gates · dz`` over input, forget and cell gate, and
    ``dh = gates · dz + hidden · dc`` with the output gate, where ``z`` is what the weights give
    the gates; the peepholes are folded in.
    """

    gates: Tensor  # (steps, layers, 4 units, batch)
    cell: Tensor  # (steps, layers, units, batch)
    hidden: Tensor  # (steps, layers, units, batch)

    @classmethod
    def of(cls, gates: Tensor, before: Tensor, squashed: Tensor, peepholes: Tensor) -> _Slopes:
        """From the values of the gates, of ``c⁻`` and of ``tanh(c)``; overwrites ``gates``."""
        i, f, g, o = gates.chunk(4, 2)
        into_i, into_f, into_o = peepholes.unbind(1)
        by_i, by_f = g * i * (1 - i), before * f * (1 - f)
        by_g, by_o = i * (1 - g * g), squashed * o * (1 - o)
        cell = f + by_i * into_i + by_f * into_f
        hidden = o * (1 - squashed * squashed) + by_o * into_o
        for gate, slope in zip((i, f, g, o), (by_i, by_f, by_g, by_o), strict=True):
            gate.copy_(slope)
        return cls(gates, cell, hidden)


class _Step(NamedTuple):
    """Views of one step in the arrays of a `_Stack`."""

    gates: Tensor  # (pairs, 4 units, batch), as the slopes after it
    early: Tensor  # (pairs, 3, units, batch), a part of the gates: all that act on the cell
    late: Tensor  # (pairs, units, batch), the output gate
    slopes: Tensor
    early_slopes: Tensor
    late_slopes: Tensor
    cell: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class _Stack:
    """The maps of several blocks side by side.

    A block moves its lowest layer and those above it. All these pairs of a block and a layer,
    block after block, take the place of the layers in a wavefront of their own. The matrix is cut
    off below each block's lowest layer, so that no block sees its neighbour.
    """

    live: Sequence[int]
    pairs: dict[tuple[int, int], int]  # places of (block, layer)
    time: int
    matrix: Tensor  # (pairs, 4 units, 2 width)
    work: Tensor  # (steps, pairs, 4 units, batch): what the gates get, forward or backward
    steps: list[_Step]  # those in which a layer of these blocks is active

    @classmethod
    def of(
        cls, matrix: Tensor, slopes: _Slopes, blocks: list[list[_Place]], live: Sequence[int]
    ) -> _Stack:
        depth, width = len(matrix), matrix.shape[2] // 2
        lowest = {k: min(place.layer for place in blocks[k]) for k in live}
        pairs = [(k, layer) for k in live for layer in range(lowest[k], depth)]
        layers = [layer for _, layer in pairs]
        matrix = matrix[layers]
        for place, (k, layer) in enumerate(pairs):
            if layer == lowest[k]:
                matrix[place, :, :width] = 0
        if layers != list(range(depth)):
            slopes = _Slopes(*(slope[:, layers] for slope in slopes))
        work = torch.zeros_like(slopes.gates)
        parts = [x.unflatten(2, (4, -1)).split((3, 1), 2) for x in (work, slopes.gates)]
        (early, late), (early_slopes, late_slopes) = parts
        steps = zip(
            work,
            early,
            late.squeeze(2),
            slopes.gates,
            early_slopes,
            late_slopes.squeeze(2),
            slopes.cell,
            slopes.hidden,
            strict=True,
        )
        places = {pair: place for place, pair in enumerate(pairs)}
        moving = list(map(_Step._make, steps))[min(layers, default=len(work)) :]
        return cls(live, places, len(work) - depth + 1, matrix, work, moving)

    def gates(self, place: int, layer: int) -> Tensor:
        """A pair's part of ``work`` while its layer is active: (time, 4 units, batch)."""
        return self.work[layer : layer + self.time, place]

    def tangent(self) -> Tensor:
        """Tangents of the last hidden states (pairs, units, batch); uses ``work`` up."""
        _, pairs, gates, rows = self.work.shape
        units = gates // 4
        hidden = self.matrix.new_zeros(1 + pairs, self.matrix.shape[2] // 2, rows)
        reads, h = _neighbours(hidden), hidden[1:, :units]
        c = torch.zeros_like(h)
        for step in self.steps:
            step.gates.baddbmm_(self.matrix, reads).mul_(step.slopes)
            torch.addcmul(step.early.sum(1), step.cell, c, out=c)
            torch.addcmul(step.late, step.hidden, c, out=h)
        return h

    def adjoint(self, cotangents: dict[int, Tensor]) -> None:
        """Fill ``work`` with the gates' cotangents, given those of blocks' top layers."""
        _, pairs, gates, rows = self.work.shape
        units, width = gates // 4, self.matrix.shape[2] // 2
        transposed = self.matrix.mT.contiguous()
        h = self.matrix.new_zeros(pairs, units, rows)
        c = torch.zeros_like(h)
        for (k, layer), place in self.pairs.items():
            if (k, layer + 1) not in self.pairs:
                h[place] = cotangents[k]
        for step in reversed(self.steps):
            c.addcmul_(step.hidden, h)
            torch.mul(step.early_slopes, c.unsqueeze(1), out=step.early)
            torch.mul(step.late_slopes, h, out=step.late)
            c.mul_(step.cell)
            back = torch.bmm(transposed, step.gates)
            h = back[:, width : width + units]
            h[:-1].add_(back[1:, :units])


def _neighbours(states: Tensor) -> Tensor:
    """Each layer beside the next: (..., n, width, batch) as (..., n - 1, 2 width, batch)."""
    *outer, layers, width, rows = states.shape
    return states.as_strided((*outer, layers - 1, 2 * width, rows), states.stride())
