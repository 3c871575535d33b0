"""The LSTM experiment: its cell, its size, its blocks, its sequences."""

from __future__ import annotations

import torch
from lstm import EXPERIMENT, Settings, blocks, prepare

from bdhf.data import Images
from bdhf.peephole_lstm import PeepholeLayer


def test_network_is_the_papers() -> None:
    model = EXPERIMENT.network(Settings(layers=3, units=10, pool=4))
    assert sum(p.numel() for p in model.parameters()) == 2_360
    sizes = [sum(p.numel() for p in group["params"]) for group in blocks(model)]
    assert sizes == [510, 870, 870 + 110]
    assert model(torch.rand(4, 49, 1)).shape == (4, 10)


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = PeepholeLayer(4, 10)
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
    assert sequence.tolist() == [[[2.5], [4.5], [10.5], [12.5]]]
    assert (label.item(), other.item()) == (3, 4)
    assert EXPERIMENT.accuracy is not None and not EXPERIMENT.average_weights
