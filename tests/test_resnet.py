"""The ResNet experiment: its network, its blocks, its data, its averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resnet import EXPERIMENT, ResidualBlock, ResNet, Settings, blocks, prepare
from suite import tiny
from torch import nn

from bdhf.data import Images
from bdhf.record import read_metrics
from bdhf.runner import run
from bdhf.training import move_average, polyak_average


def test_network_is_the_papers() -> None:
    model = ResNet(3, [16, 32, 64])
    assert sum(p.numel() for p in model.parameters()) == 77_706
    sizes = [sum(p.numel() for p in group["params"]) for group in blocks(model)]
    assert sizes == [448 + 4_640, 14_432, 57_536 + 650]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_strides_and_shortcuts() -> None:
    model = ResNet(3, [16, 32, 64])
    x = torch.rand(1, 16, 32, 32)
    shapes = []
    for block in model.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert isinstance(model.blocks[0].shortcut, nn.Identity)
    assert [b.shortcut.kernel_size for b in list(model.blocks)[1:]] == [(1, 1)] * 2


def test_block_adds_its_input() -> None:
    block = ResidualBlock(4, 4, 1)
    for p in block.parameters():
        nn.init.zeros_(p)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_initialisation_is_he_normal() -> None:
    torch.manual_seed(0)
    model = ResNet(3, [16, 32, 64])
    weight = model.blocks[2].second.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model.readout.weight.abs().max() <= (6 / 74) ** 0.5
    assert all((p == 0).all() for p in model.parameters() if p.ndim == 1)


def test_channels_are_standardised_by_the_training_set() -> None:
    torch.manual_seed(0)
    train = torch.rand(50, 3, 4, 4) * torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    test = torch.rand(9, 3, 4, 4)
    labels = torch.arange(50)
    images = Images((train, labels), (test, labels[:9]), "", "")
    (inputs, targets), (others, _) = prepare(images, Settings(3, [16, 32]))
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(inputs.std((0, 2, 3)), torch.ones(3), rtol=1e-5)
    assert torch.equal(targets, labels)
    expected = (test[:, 1] - train[:, 1].mean()) / train[:, 1].std()
    assert torch.allclose(others[:, 1], expected, atol=1e-5)


def test_polyak_average_is_the_exponential_one_with_a_warm_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaged = polyak_average(model)
    expected = None
    for t in range(400):
        with torch.no_grad():
            model.weight.fill_(float(t % 7))
        move_average(averaged, model)
        weight = float(t % 7)
        decay = min(0.99, (1 + t) / (10 + t))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "hf", "bdhf"])
def test_raw_and_averaged_accuracy_are_logged_for_all_optimizers(
    tmp_path: Path, optimizer: str
) -> None:
    assert EXPERIMENT.average_weights
    values = tiny("resnet", optimizer)
    values.results = str(tmp_path)
    rows = read_metrics(run(EXPERIMENT, values).folder.path)
    raw, averaged = ([row[key] for row in rows] for key in ("test_loss", "averaged_test_loss"))
    assert raw[0] == averaged[0]  # nothing to average yet
    assert raw[-1] != averaged[-1]
    assert all(0 <= (row["averaged_test_accuracy"] or 0) <= 1 for row in rows)
