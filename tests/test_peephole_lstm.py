"""The peephole LSTM: its equations, and its own maps against autograd's, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import bdhf
from bdhf.linearization import AutogradLinearization
from bdhf.peephole_lstm import PeepholeLSTM

Blocks = list[list[nn.Parameter]]


def network(inputs: int, units: int, layers: int) -> PeepholeLSTM:
    torch.manual_seed(0)
    model = PeepholeLSTM(inputs, units, layers, outputs=4).double()
    for layer in model.layers:
        nn.init.normal_(layer.peepholes)
        nn.init.normal_(layer.bias)
    return model


def plain_loop(model: PeepholeLSTM, sequence: Tensor) -> Tensor:
    """The equations of Gers and Schmidhuber, one sample (time, inputs), layer and time at once."""
    units = model.layers[0].recurrent_weight.shape[1]
    for layer in model.layers:
        h = c = torch.zeros(units).double()
        states = []
        for x in sequence:
            z = layer.input_weight @ x + layer.recurrent_weight @ h + layer.bias
            zi, zf, zg, zo = z.split(units)
            i = torch.sigmoid(zi + layer.peepholes[0] * c)
            f = torch.sigmoid(zf + layer.peepholes[1] * c)
            c = f * c + i * torch.tanh(zg)
            o = torch.sigmoid(zo + layer.peepholes[2] * c)
            h = o * torch.tanh(c)
            states.append(h)
        sequence = torch.stack(states)
    return model.readout(sequence[-1])


#: Inputs fewer and more than units; as many steps as layers, more, and fewer.
SHAPES = [(1, 4, 3, 7), (5, 3, 2, 2), (3, 3, 1, 4), (2, 3, 4, 2)]


@pytest.mark.parametrize(("inputs", "units", "layers", "time"), SHAPES)
def test_wavefront_is_the_plain_loop(inputs: int, units: int, layers: int, time: int) -> None:
    model = network(inputs, units, layers)
    sequences = torch.randn(5, time, inputs).double()
    expected = torch.stack([plain_loop(model, sequence) for sequence in sequences])
    for found in (model(sequences), model.linearize([], sequences).outputs):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_without_peepholes_it_is_torchs_lstm() -> None:
    model = network(3, 5, 2)
    other = nn.LSTM(3, 5, num_layers=2, batch_first=True).double()
    with torch.no_grad():
        for depth, layer in enumerate(model.layers):  # torch's gates are in the same order
            layer.peepholes.zero_()
            getattr(other, f"weight_ih_l{depth}").copy_(layer.input_weight)
            getattr(other, f"weight_hh_l{depth}").copy_(layer.recurrent_weight)
            getattr(other, f"bias_ih_l{depth}").copy_(layer.bias)
            getattr(other, f"bias_hh_l{depth}").zero_()
    sequences = torch.randn(2, 7, 3).double()
    expected = model.readout(other(sequences)[0][:, -1])
    assert torch.allclose(model(sequences), expected, rtol=1e-12, atol=1e-14)


def layers_apart(model: PeepholeLSTM) -> Blocks:
    *lower, top = model.layers
    return [
        *[list(x.parameters()) for x in lower],
        [*top.parameters(), *model.readout.parameters()],
    ]


BLOCKS = {
    "one": lambda model: [list(model.parameters())],
    "by layer": layers_apart,
    "top down": lambda model: layers_apart(model)[::-1],
    "scattered": lambda model: [
        [model.layers[1].peepholes, model.layers[0].bias, model.readout.bias],
        [model.layers[2].input_weight, model.layers[0].input_weight],
        [model.layers[1].recurrent_weight],
    ],
    "linear layer alone": lambda model: [[model.readout.weight], [model.layers[2].bias]],
    "nothing below": lambda model: [[model.readout.bias, model.readout.weight]],
}


@pytest.mark.parametrize(("inputs", "units"), [(1, 4), (5, 3)])
@pytest.mark.parametrize("name", BLOCKS)
def test_own_maps_are_those_of_autograd(name: str, inputs: int, units: int) -> None:
    model = network(inputs, units, layers=3)
    blocks = BLOCKS[name](model)
    sequences = torch.randn(6, 5, inputs).double()
    with torch.no_grad():
        own = model.linearize(blocks, sequences)
    reference = AutogradLinearization.of(model, blocks, sequences)
    torch.testing.assert_close(own.outputs, reference.outputs)
    # All blocks, then without the first, as when its CG has stopped; then all of them again.
    for stopped in (None, 0, None):
        directions = [[torch.randn_like(p) for p in block] for block in blocks]
        cotangents = [[torch.randn_like(own.outputs)] for _ in blocks]
        if stopped is not None:
            directions[stopped] = cotangents[stopped] = None
        with torch.no_grad():
            found = [own.tangents(directions), own.adjoints(cotangents)]
        expected = [reference.tangents(directions), reference.adjoints(cotangents)]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_optimizer_takes_the_own_maps_for_gradient_and_curvature() -> None:
    model = network(1, 4, 3)
    batch = torch.randn(6, 5, 1).double(), torch.randint(4, (6,))
    opt = bdhf.BlockDiagonalHF([{"params": block} for block in layers_apart(model)])
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = opt.step(model, nn.CrossEntropyLoss(), batch)
    torch.testing.assert_close(found, loss.detach())
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert opt.last_step is not None and opt.last_step.path == "brought by the network"


def test_own_maps_are_not_taken_where_they_would_not_hold() -> None:
    """A subclass with another forward, half precision, and blocks it does not know."""

    class Doubled(PeepholeLSTM):
        def forward(self, sequences: Tensor) -> Tensor:
            return 2 * super().forward(sequences)

    batch = torch.randn(6, 5, 1), torch.randint(4, (6,))
    doubled = Doubled(1, 4, 2, outputs=4)
    half = PeepholeLSTM(1, 4, 2, outputs=4).bfloat16()
    tempered = PeepholeLSTM(1, 4, 2, outputs=4)
    tempered.temperature = nn.Parameter(torch.ones(()))
    for model in (doubled, half, tempered):
        opt = bdhf.BlockDiagonalHF(model.parameters())
        inputs = batch[0].to(next(model.parameters()).dtype)
        expected = nn.functional.cross_entropy(model(inputs), batch[1])
        assert torch.equal(opt.step(model, nn.CrossEntropyLoss(), (inputs, batch[1])), expected)
        assert opt.last_step is not None and opt.last_step.path == "traced"


@pytest.mark.parametrize(
    "alter",
    [
        lambda model: model.register_forward_hook(lambda module, inputs, outputs: 5 * outputs),
        lambda model: setattr(
            model, "forward", lambda x: x.mean(1) @ model.readout.weight[:, :1].T
        ),
        lambda model: register_parametrization(model.readout, "weight", nn.Softplus()),
        lambda model: setattr(model, "readout", nn.Sequential(model.readout, nn.Tanh())),
        lambda model: setattr(model, "readout", nn.Linear(4, 4, bias=False).double()),
    ],
)
def test_own_maps_are_not_taken_from_an_altered_network(alter: Callable[[nn.Module], Any]) -> None:
    model = network(1, 4, 2)
    alter(model)
    batch = torch.randn(6, 5, 1).double(), torch.randint(4, (6,))
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    opt = bdhf.BlockDiagonalHF(model.parameters())
    assert torch.equal(opt.step(model, nn.CrossEntropyLoss(), batch), loss)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    assert opt.last_step is not None and opt.last_step.path == "traced"
