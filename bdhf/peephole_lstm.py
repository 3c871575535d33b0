"""Stacked LSTM layers with peephole connections, computed as a wavefront.

Layer ``l`` at time ``t`` needs layer ``l - 1`` at ``t`` and itself at ``t - 1``. So layer ``l`` at
time ``s - l`` can be computed for all layers at once, in one step ``s`` of ``time + layers - 1``,
where a plain loop takes ``time · layers``. The network is small and the loop long, so that what
counts is the number of operations issued, not their arithmetic.

`PeepholeLSTM.forward` is written for autograd. `PeepholeLSTM.linearize` brings the tangent and the
adjoint map of the same wavefront by hand, several blocks side by side: the gates are saved once,
and everything that the maps need of them is folded into coefficients, so that neither map takes
another sigmoid or tanh. On a GPU, where a launch counts, `bdhf.fused_lstm` does the same by a
kernel a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bdhf import fused_lstm
from bdhf.fused_lstm import FusedLSTM, Place
from bdhf.graphs import recording
from bdhf.linearization import Block, Linearizable, PerBlock


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


class PeepholeLSTM(Linearizable):
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
        if not torch.is_grad_enabled() and self._is_as_made() and self._is_fused(sequences):
            return fused_lstm.outputs(list(self.layers), self.readout, sequences)
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

    def linearize(
        self, blocks: Sequence[Block], sequences: Tensor
    ) -> LinearizedLSTM | FusedLSTM | None:
        """The maps at the present parameters (see `bdhf.linearization.Linearizable`)."""
        if not self._is_as_made():
            return None
        places = {
            parameter: Place(depth, name)
            for depth, layer in enumerate([*self.layers, self.readout])
            for name, parameter in layer.named_parameters()
        }
        if not all(parameter in places for block in blocks for parameter in block):
            return None
        named = [[places[parameter] for parameter in block] for block in blocks]
        if self._is_fused(sequences):
            return FusedLSTM.of(list(self.layers), self.readout, sequences, named)
        weights = _Weights.of(self.layers).detached()
        return LinearizedLSTM.of(weights, self.readout, sequences, named)

    def _is_as_made(self) -> bool:
        """Whether the modules are those that the constructor made."""
        if type(self.readout) is not nn.Linear or self.readout.bias is None:
            return False
        return all(type(layer) is PeepholeLayer for layer in self.layers)

    def _is_fused(self, sequences: Tensor) -> bool:
        """Whether kernels do the work, which know nothing of torch's tracing."""
        plain = type(sequences) is Tensor and type(self.readout.weight) is nn.Parameter
        return plain and fused_lstm.usable(sequences, self.readout.in_features)


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


def _matrix(parameters: Mapping[str, Tensor], width: int) -> Tensor:
    """Input and recurrent weights side by side: (4 units, 2 width)."""
    weights = parameters["input_weight"], parameters["recurrent_weight"]
    return torch.cat([pad(weight, (0, width - weight.shape[1])) for weight in weights], 1)


@dataclass(frozen=True)
class LinearizedLSTM:
    """A `PeepholeLSTM` at certain parameters and sequences.

    Arrays over the wavefront have dimensions (step, layer, feature, batch), and are zero where a
    layer is not active.

    Attributes:
        outputs: what the network returns (batch, outputs).
    """

    outputs: Tensor
    readout: nn.Linear
    blocks: list[list[Place]]
    layout: _Layout
    matrix: Tensor  # of `_Weights`
    reads: Tensor  # what the layers read: [x; h⁻; 1], filled up as in `_Weights`
    cell: Tensor  # (steps + 1, layers, units, batch), before each step and after the last
    slopes: _Slopes
    top: Tensor  # the top layer's last hidden state (batch, units)
    stacks: dict[tuple[int, ...], _Stack] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        weights: _Weights,
        readout: nn.Linear,
        sequences: Tensor,
        blocks: list[list[Place]],
    ) -> LinearizedLSTM:
        """Run the network forward and keep what the maps need."""
        matrix, bias, peepholes = weights
        (depth, _, units, _), (rows, time, inputs) = peepholes.shape, sequences.shape
        steps, layout = time + depth - 1, _Layout(inputs, units, matrix.shape[2] // 2)
        reads = matrix.new_zeros(steps + 1, depth, 2 * layout.width + 1, rows)
        below, before, one = reads.split((layout.width, layout.width, 1), 2)
        below[:time, 0, :inputs] = sequences.permute(1, 2, 0)
        cell = matrix.new_zeros(steps + 1, depth, units, rows)
        gates = matrix.new_zeros(steps, depth, 4 * units, rows)
        squashed = matrix.new_zeros(steps, depth, units, rows)
        for step in range(steps):
            active = _active(step, time)
            one[step, active].fill_(1)
            z, read, c = gates[step, active], reads[step, active, :-1], cell[step + 1, active]
            torch.baddbmm(bias[active], matrix[active], read, out=z)
            early, g, late = z.unflatten(1, (4, units)).split((2, 1, 1), 1)
            early.addcmul_(peepholes[active, :2], cell[step, active].unsqueeze(1)).sigmoid_()
            torch.mul(early[:, 1], cell[step, active], out=c)
            c.addcmul_(early[:, 0], g.squeeze(1).tanh_())
            o = late.squeeze(1).addcmul_(peepholes[active, 2], c).sigmoid_()
            h = o * torch.tanh(c, out=squashed[step, active])
            before[step + 1, active, :units] = h
            above = below[step + 1, active.start + 1 : active.stop + 1, :units]
            above.copy_(h[: len(above)])
        slopes = _Slopes.of(gates, cell[:-1], squashed, peepholes)
        top = before[-1, -1, :units].T
        return cls(readout(top), readout, blocks, layout, matrix, reads[:-1], cell, slopes, top)

    def tangents(self, directions: PerBlock) -> PerBlock:
        """For each block with a direction, the tangent of ``outputs``."""
        stack, depth = self._stack(directions), len(self.matrix)
        drive = stack.no_drive()
        tangents: dict[int, Tensor] = {}
        for k in stack.live:
            tangents[k] = torch.zeros_like(self.outputs)
            for place, vector in zip(self.blocks[k], directions[k] or (), strict=True):
                if place.layer < depth:
                    self.layout.view(drive, stack.pairs[k, place.layer], place).copy_(vector)
                else:
                    tangents[k] += vector if place.name == "bias" else self.top @ vector.T
        for k, moved in stack.tangent(drive).items():
            tangents[k] += moved.T @ self.readout.weight.T
        return [[tangents[k]] if k in tangents else None for k in range(len(directions))]

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        """For each block with a cotangent of ``outputs``, those of its parameters."""
        stack, depth = self._stack(cotangents), len(self.matrix)
        given = {k: u[0] for k, u in enumerate(cotangents) if u is not None}
        drive = stack.adjoint({k: (u @ self.readout.weight).T for k, u in given.items()})

        def of_parameter(k: int, place: Place) -> Tensor:
            if place.layer < depth:
                return self.layout.view(drive, stack.pairs[k, place.layer], place)
            return given[k].sum(0) if place.name == "bias" else given[k].T @ self.top

        return [
            [of_parameter(k, place) for place in block] if k in given else None
            for k, block in enumerate(self.blocks)
        ]

    def _stack(self, asked: PerBlock) -> _Stack:
        """The blocks that are asked for; which ones changes only when a block's CG has stopped."""
        live = tuple(k for k, vectors in enumerate(asked) if vectors is not None)
        if recording():  # a replay has to make it anew, since it holds slopes
            return _Stack.of(self, live)
        if live not in self.stacks:
            self.stacks.clear()
            self.stacks[live] = _Stack.of(self, live)
        return self.stacks[live]


class _Drive(NamedTuple):
    """What directions of the parameters give the gates, as factors of what the layers read."""

    matrices: Tensor  # (pairs, 4 units, 2 width + 1)
    peepholes: Tensor  # (pairs, 3, units)


class _Layout(NamedTuple):
    """Where a layer's parameters are in a `_Drive`."""

    inputs: int
    units: int
    width: int

    def view(self, drive: _Drive, pair: int, place: Place) -> Tensor:
        """A parameter's part, in its shape."""
        matrix = drive.matrices[pair]
        if place.name == "input_weight":
            return matrix[:, : self.units if place.layer else self.inputs]
        if place.name == "recurrent_weight":
            return matrix[:, self.width : self.width + self.units]
        return matrix[:, -1] if place.name == "bias" else drive.peepholes[pair]


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
    """What the maps need of one step; each but the first has the pair as its first dimension."""

    reads: tuple[Tensor, ...]  # (2 width + 1, batch) of each layer
    gates: Tensor  # the slopes of the gates (4 units, batch), in two parts:
    early: Tensor  # (3, units, batch), of those that act on the cell
    late: Tensor  # (units, batch), of the output gate
    along: Tensor  # the slope of the cell by the cell before
    out: Tensor  # the slope of the hidden state by the cell
    before: Tensor  # cell states (1, units, batch)
    after: Tensor  # (units, batch)


@dataclass(frozen=True)
class _Stack:
    """The maps of several blocks side by side.

    A block moves its lowest layer and those above it. All these pairs of a block and a layer,
    block after block, take the place of the layers in a wavefront of their own. The matrix is cut
    off below each block's lowest layer, so that no block sees its neighbour.
    """

    live: Sequence[int]
    pairs: dict[tuple[int, int], int]  # places of (block, layer)
    driven: list[tuple[int, int]]  # places, with layers, of those with parameters in the block
    tops: dict[int, int]  # each block's pair with the top layer
    matrix: Tensor  # (pairs, 4 units, 2 width)
    rows: int  # of the batch
    steps: list[_Step]  # those in which a layer of these blocks is active

    @classmethod
    def of(cls, at: LinearizedLSTM, live: Sequence[int]) -> _Stack:
        depth, width = len(at.matrix), at.layout.width
        own = {k: {place.layer for place in at.blocks[k] if place.layer < depth} for k in live}
        order = [(k, layer) for k in live for layer in range(min(own[k], default=depth), depth)]
        layers = [layer for _, layer in order]
        matrix, slopes, cell = _picked(at.matrix, layers, 0), at.slopes, at.cell
        for place, (k, layer) in enumerate(order):
            if layer == min(own[k]):
                matrix[place, :, :width].fill_(0)
        if layers != list(range(depth)):
            slopes = _Slopes(*(_picked(slope, layers, 1) for slope in slopes))
            cell = _picked(cell, layers, 1)
        early, late = slopes.gates.unflatten(2, (4, -1)).split((3, 1), 2)
        rows = zip(
            (read.unbind() for read in at.reads),
            slopes.gates,
            early,
            late.squeeze(2),
            slopes.cell,
            slopes.hidden,
            cell[:-1].unsqueeze(2),
            cell[1:],
            strict=True,
        )
        steps = list(map(_Step._make, rows))[min(layers, default=len(at.reads)) :]
        return cls(
            live,
            {pair: place for place, pair in enumerate(order)},
            [(place, layer) for place, (k, layer) in enumerate(order) if layer in own[k]],
            {k: place for place, (k, layer) in enumerate(order) if layer == depth - 1},
            matrix,
            at.reads.shape[3],
            steps,
        )

    def no_drive(self) -> _Drive:
        """Zeros."""
        pairs, gates, features = self.matrix.shape
        return _Drive(
            self.matrix.new_zeros(pairs, gates, features + 1),
            self.matrix.new_zeros(pairs, 3, gates // 4),
        )

    def tangent(self, drive: _Drive) -> dict[int, Tensor]:
        """For each block, the tangent of the top layer's last hidden state (units, batch)."""
        hidden, z, early, late = self._states(slots=1 + len(self.matrix))
        reads, h = _neighbours(hidden), hidden[1:, : late.shape[1]]
        c = torch.zeros_like(h)
        into_early, into_late = drive.peepholes.unsqueeze(3).split((2, 1), 1)
        into_late = into_late.squeeze(1)
        driven = [(drive.matrices[place], z[place], layer) for place, layer in self.driven]
        for step in self.steps:
            if len(driven) < len(z):
                z.zero_()
            for matrix, gates, layer in driven:
                torch.mm(matrix, step.reads[layer], out=gates)
            early[:, :2].addcmul_(into_early, step.before)
            late.addcmul_(into_late, step.after)
            z.baddbmm_(self.matrix, reads).mul_(step.gates)
            torch.addcmul(early.sum(1), step.along, c, out=c)
            torch.addcmul(late, step.out, c, out=h)
        return {k: h[place] for k, place in self.tops.items()}

    def adjoint(self, cotangents: dict[int, Tensor]) -> _Drive:
        """The transpose of `tangent`."""
        hidden, z, early, late = self._states(slots=len(self.matrix))
        width, units = hidden.shape[1], late.shape[1]
        h = hidden[:, :units]
        c = torch.zeros_like(h)
        for k, place in self.tops.items():
            h[place] = cotangents[k]
        transposed = self.matrix.mT.contiguous()
        matrices, peepholes = self.no_drive()
        matrices = matrices.mT.contiguous()  # as (reads, gates), which multiplies faster
        peepholes = peepholes.unsqueeze(3).repeat(1, 1, 1, self.rows)  # summed at the end
        into_early, into_late = peepholes[:, :2], peepholes[:, 2]
        driven = [(matrices[place], z[place], layer) for place, layer in self.driven]
        for step in reversed(self.steps):
            c.addcmul_(step.out, h)
            torch.mul(step.early, c.unsqueeze(1), out=early)
            torch.mul(step.late, h, out=late)
            c.mul_(step.along)
            for matrix, gates, layer in driven:
                matrix.addmm_(step.reads[layer], gates.T)
            into_early.addcmul_(early[:, :2], step.before)
            into_late.addcmul_(late, step.after)
            below, before = torch.bmm(transposed, z).split(width, 1)
            h = before[:, :units]
            h[:-1].add_(below[1:, :units])
        return _Drive(matrices.mT, peepholes.sum(3))

    def _states(self, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Zeros for hidden states and for the gates, these also in two parts as in `_Step`."""
        pairs, gates, features = self.matrix.shape
        hidden = self.matrix.new_zeros(slots, features // 2, self.rows)
        z = self.matrix.new_zeros(pairs, gates, self.rows)
        early, late = z.unflatten(1, (4, -1)).split((3, 1), 1)
        return hidden, z, early, late.squeeze(1)


def _picked(tensor: Tensor, places: Sequence[int], dim: int) -> Tensor:
    """Copies, without an index that would have to be copied to the device."""
    if not places:
        return tensor.narrow(dim, 0, 0).clone()
    return torch.stack([tensor.select(dim, place) for place in places], dim)


def _neighbours(states: Tensor) -> Tensor:
    """Each layer beside the next: (n, width, batch) as (n - 1, 2 width, batch)."""
    layers, width, rows = states.shape
    return states.as_strided((layers - 1, 2 * width, rows), states.stride())
