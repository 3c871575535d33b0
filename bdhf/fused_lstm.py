"""`bdhf.peephole_lstm` on a GPU: layer after layer, a kernel for each recurrence.

On a CPU the layers go side by side as a wavefront, since there the number of operations counts. On
a GPU a kernel takes a layer through the whole sequence, and all steps' inputs are one matrix
product; the mathematics is the same.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdhf.linearization import PerBlock

#: Units whose states and weights a program of a kernel holds in the shared memory of any GPU that
#: Triton supports.
_MOST_UNITS = 32


def usable(sequences: Tensor, units: int) -> bool:
    """Whether the kernels take these: single precision, on a GPU where Triton works."""
    fitting = sequences.dtype == torch.float32 and units <= _MOST_UNITS
    return sequences.is_cuda and fitting and _works(sequences.device, units)


@functools.cache
def _works(device: torch.device, units: int) -> bool:
    """Whether the kernels run there, tried once: Triton needs a C compiler, and memory enough."""
    if importlib.util.find_spec("triton") is None:
        return False
    gates = torch.zeros(1, 2, 4 * units, 3, device=device)
    weights, peepholes = gates.new_zeros(4 * units, units), gates.new_zeros(1, 3, units)
    try:
        kernels = _kernels()
        _, cell, *slopes = kernels.forward(gates[0], weights, peepholes[0], True)
        hidden = kernels.tangent(gates, weights, peepholes, cell, tuple(slopes))
        kernels.adjoint(hidden, weights, tuple(slopes))
    except Exception as error:  # whatever a compiler says
        warnings.warn(
            f"the LSTM's kernels do not run on {device}: {error}\nIt is computed by torch's "
            "operations instead, with the same results but slower.",
            stacklevel=2,
        )
        return False
    return True


def _kernels() -> Any:
    from bdhf import peephole_kernels  # needs Triton, which is not everywhere

    return peephole_kernels


class Place(NamedTuple):
    """Which parameter of which layer; the linear layer comes last."""

    layer: int
    name: str


@dataclass(frozen=True)
class _Layer:
    """A layer at certain parameters and inputs; arrays are (steps, feature, batch)."""

    inputs: Tensor  # weights (4 units, inputs)
    recurrent: Tensor  # weights (4 units, units)
    reads: Tensor  # [x; h⁻; 1]
    cell: Tensor  # before each step and after the last
    slopes: tuple[Tensor, Tensor, Tensor]  # of gates, cell and hidden state

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """A parameter's part of a matrix (4 units, [x; h⁻; 1])."""
        inputs, units = self.inputs.shape[1], self.recurrent.shape[1]
        if name == "input_weight":
            return matrix[:, :inputs]
        return matrix[:, inputs : inputs + units] if name == "recurrent_weight" else matrix[:, -1]


def hidden_states(
    layer: nn.Module, x: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Hidden and cell states (steps + 1, units, batch) on ``x`` (steps, inputs, batch), slopes."""
    p = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    bias = p["bias"].view(1, -1, 1)
    drive = torch.baddbmm(bias, _spread(p["input_weight"], len(x)), x)
    hidden, cell, *found = _kernels().forward(drive, p["recurrent_weight"], p["peepholes"], slopes)
    return hidden, cell, tuple(found)


def _spread(matrix: Tensor, steps: int) -> Tensor:
    """The same matrix for each step."""
    return matrix.unsqueeze(0).expand(steps, -1, -1)


def outputs(layers: Sequence[nn.Module], readout: nn.Linear, sequences: Tensor) -> Tensor:
    """What the network returns (batch, outputs), without autograd."""
    x = sequences.permute(1, 2, 0).contiguous()
    for layer in layers:
        x = hidden_states(layer, x, slopes=False)[0][1:]
    return readout(x[-1].T)


@dataclass(frozen=True)
class FusedLSTM:
    """A `PeepholeLSTM` at certain parameters and sequences (`bdhf.linearization.Linearization`).

    Attributes:
        outputs: what the network returns (batch, outputs).
    """

    outputs: Tensor
    readout: nn.Linear
    blocks: list[list[Place]]
    layers: list[_Layer]
    top: Tensor  # the top layer's last hidden state (batch, units)

    @classmethod
    def of(
        cls,
        layers: Sequence[nn.Module],
        readout: nn.Linear,
        sequences: Tensor,
        blocks: list[list[Place]],
    ) -> FusedLSTM:
        """Run the network forward and keep what the maps need."""
        x = sequences.permute(1, 2, 0).contiguous()
        kept = []
        for layer in layers:
            hidden, cell, slopes = hidden_states(layer, x, slopes=True)
            reads = torch.cat([x, hidden[:-1], torch.ones_like(x[:, :1])], 1)
            p = dict(layer.named_parameters())
            inputs, recurrent = p["input_weight"].detach(), p["recurrent_weight"].detach()
            kept.append(_Layer(inputs, recurrent, reads, cell, slopes))
            x = hidden[1:]
        top = x[-1].T
        return cls(readout(top), readout, blocks, kept, top)

    def tangents(self, directions: PerBlock) -> PerBlock:
        """For each block with a direction, the tangent of ``outputs``."""
        given = {
            k: dict(zip(self.blocks[k], vectors, strict=True))
            for k, vectors in enumerate(directions)
            if vectors is not None
        }
        moved: dict[int, Tensor] = {}  # hidden states of the layer, by block
        for depth in range(len(self.layers)):
            pairs = [k for k in given if self._lowest(k) <= depth]
            if pairs:
                moved = self._layer_tangents(depth, pairs, given, moved)
        found = {}
        for k, direction in given.items():
            tangent = torch.zeros_like(self.outputs)
            if k in moved:
                tangent = moved[k][-1].T @ self.readout.weight.T
            for place, vector in direction.items():
                if place.layer == len(self.layers):
                    tangent = tangent + (vector if place.name == "bias" else self.top @ vector.T)
            found[k] = [tangent]
        return [found.get(k) for k in range(len(directions))]

    def _layer_tangents(
        self,
        depth: int,
        pairs: list[int],
        given: dict[int, dict[Place, Tensor]],
        below: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """Tangents of a layer's hidden states, by block, given those of the layer below."""
        layer = self.layers[depth]
        steps, features, rows = layer.reads.shape
        gates, units = layer.recurrent.shape
        drive = layer.reads.new_empty(len(pairs), steps, gates, rows)
        peepholes = layer.reads.new_zeros(len(pairs), 3, units)
        for z, into, k in zip(drive, peepholes, pairs, strict=True):
            own = {place.name: v for place, v in given[k].items() if place.layer == depth}
            if "peepholes" in own:
                into.copy_(own.pop("peepholes"))
            matrix = layer.reads.new_zeros(gates, features)
            for name, vector in own.items():
                layer.view(matrix, name).copy_(vector)
            if own or k not in below:
                torch.bmm(_spread(matrix, steps), layer.reads, out=z)
            else:
                z.zero_()
            if k in below:
                z.baddbmm_(_spread(layer.inputs, steps), below[k])
        moved = _kernels().tangent(drive, layer.recurrent, peepholes, layer.cell, layer.slopes)
        return dict(zip(pairs, moved, strict=True))

    def adjoints(self, cotangents: PerBlock) -> PerBlock:
        """For each block with a cotangent of ``outputs``, those of its parameters."""
        given = {k: u[0] for k, u in enumerate(cotangents) if u is not None}
        found: dict[tuple[int, Place], Tensor] = {}
        for k, u in given.items():
            found[k, Place(len(self.layers), "weight")] = u.T @ self.top
            found[k, Place(len(self.layers), "bias")] = u.sum(0)
        above: dict[int, Tensor] = {}  # cotangents of the layer's hidden states, by block
        for depth in reversed(range(len(self.layers))):
            pairs = [k for k in given if self._lowest(k) <= depth]
            if pairs:
                above = self._layer_adjoints(depth, pairs, given, above, found)
        return [
            [found[k, place] for place in block] if k in given else None
            for k, block in enumerate(self.blocks)
        ]

    def _layer_adjoints(
        self,
        depth: int,
        pairs: list[int],
        given: dict[int, Tensor],
        above: dict[int, Tensor],
        found: dict[tuple[int, Place], Tensor],
    ) -> dict[int, Tensor]:
        """Cotangents of what is below a layer, by block; adds those of its parameters."""
        layer = self.layers[depth]
        steps, _, rows = layer.reads.shape
        units = layer.recurrent.shape[1]
        if above:
            hidden = torch.stack([above[k] for k in pairs])
        else:  # the top layer, of which the last state alone is read
            hidden = layer.reads.new_zeros(len(pairs), steps, units, rows)
            for place, k in enumerate(pairs):
                hidden[place, -1] = (given[k] @ self.readout.weight).T
        gates = _kernels().adjoint(hidden, layer.recurrent, layer.slopes)
        below = {}
        for z, k in zip(gates, pairs, strict=True):
            own = {place.name for place in self.blocks[k] if place.layer == depth}
            if own - {"peepholes"}:
                matrix = torch.bmm(z, layer.reads.mT).sum(0)
                for name in own - {"peepholes"}:
                    found[k, Place(depth, name)] = layer.view(matrix, name)
            if "peepholes" in own:
                into_i, into_f, _, into_o = z.unflatten(1, (4, units)).unbind(1)
                pairs_of = (into_i, layer.cell[:-1]), (into_f, layer.cell[:-1])
                found[k, Place(depth, "peepholes")] = torch.stack(
                    [
                        (cotangent * cell).sum((0, 2))
                        for cotangent, cell in (*pairs_of, (into_o, layer.cell[1:]))
                    ]
                )
            if self._lowest(k) < depth:
                below[k] = torch.bmm(_spread(layer.inputs.T, steps), z)
        return below

    def _lowest(self, block: int) -> int:
        """The lowest layer with a parameter in the block."""
        return min((place.layer for place in self.blocks[block]), default=len(self.layers))
