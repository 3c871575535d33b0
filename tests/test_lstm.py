"""The LSTM experiment: its cell, its size, its blocks, its sequences."""

from __future__ import annotations

import torch
from lstm import EXPERIMENT, PeepholeLSTM, SequenceClassifier, Settings, blocks, prepare
from torch import Tensor, nn

from bdhf.data import Images


def test_network_is_the_papers() -> None:
    model = SequenceClassifier(layers=3, units=10)
    assert sum(p.numel() for p in model.parameters()) == 2_360
    sizes = [sum(p.numel() for p in group["params"]) for group in blocks(model)]
    assert sizes == [510, 870, 870 + 110]
    assert model(torch.rand(4, 49)).shape == (4, 10)


def test_without_peepholes_it_is_torchs_lstm() -> None:
    torch.manual_seed(0)
    layer, other = PeepholeLSTM(3, 5).double(), nn.LSTM(3, 5).double()
    with torch.no_grad():
        other.weight_ih_l0.copy_(layer.input_weight)  # torch's gates are in the same order
        other.weight_hh_l0.copy_(layer.recurrent_weight)
        other.bias_ih_l0.copy_(layer.bias)
        other.bias_hh_l0.zero_()
    sequence = torch.randn(7, 2, 3).double()
    assert torch.allclose(layer(sequence), other(sequence)[0], rtol=1e-12, atol=1e-14)


def test_peepholes_see_the_cell_states_of_the_definition() -> None:
    """Against the equations of Gers and Schmidhuber, one sample and one unit at a time."""
    torch.manual_seed(0)
    layer = PeepholeLSTM(2, 3).double()
    nn.init.normal_(layer.peepholes)
    nn.init.normal_(layer.bias)
    sequence = torch.randn(4, 1, 2).double()

    def gate(number: int, x: Tensor, h: Tensor) -> Tensor:
        rows = slice(3 * number, 3 * number + 3)
        return layer.input_weight[rows] @ x + layer.recurrent_weight[rows] @ h + layer.bias[rows]

    h = c = torch.zeros(3).double()
    expected = []
    for step in sequence[:, 0]:
        before, last = c, h
        i = torch.sigmoid(gate(0, step, last) + layer.peepholes[0] * before)
        f = torch.sigmoid(gate(1, step, last) + layer.peepholes[1] * before)
        c = f * before + i * torch.tanh(gate(2, step, last))
        o = torch.sigmoid(gate(3, step, last) + layer.peepholes[2] * c)
        h = o * torch.tanh(c)
        expected.append(h)
    assert torch.allclose(layer(sequence)[:, 0], torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = PeepholeLSTM(4, 10)
    for gate in layer.recurrent_weight.chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(10), atol=1e-5)
    for gate in layer.input_weight.chunk(4):
        bound = (6 / 14) ** 0.5
        assert 0.8 * bound < gate.abs().max() <= bound
    assert (layer.peepholes == 0).all()
    assert layer.bias.tolist() == 10 * [0.0] + 10 * [1.0] + 20 * [0.0]


def test_images_are_pooled_and_read_row_by_row() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    images = Images((pixels, torch.tensor([3])), (pixels, torch.tensor([4])), "", "")
    (sequence, label), (_, other) = prepare(images, Settings(3, 10, pool=2))
    assert sequence.tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert (label.item(), other.item()) == (3, 4)
    assert EXPERIMENT.accuracy is not None and not EXPERIMENT.average_weights
