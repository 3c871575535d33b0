"""The autoencoder experiment: its network, its blocks, its loss."""

from __future__ import annotations

import pytest
import torch
from autoencoder import EXPERIMENT, Autoencoder, ReconstructionError, Settings, blocks, prepare
from suite import config
from torch import nn

from bdhf.data import Images


def test_network_is_the_papers() -> None:
    model = Autoencoder(config("autoencoder", "scale=paper").network.widths)
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [
        (1000, 784),
        (500, 1000),
        (250, 500),
        (30, 250),
        (250, 30),
        (500, 250),
        (1000, 500),
        (784, 1000),
    ]
    kinds = [type(m) for part in (model.encoder, model.decoder) for m in part]
    assert kinds == 2 * [*(3 * [nn.Linear, nn.Tanh]), nn.Linear]  # code and output are linear


def test_initialisation_is_glorot_uniform_with_zero_biases() -> None:
    torch.manual_seed(0)
    model = Autoencoder([784, 1000, 30])
    weight = model.encoder[0].weight
    bound = (6 / 1784) ** 0.5
    assert weight.abs().max() <= bound and weight.abs().max() > 0.999 * bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert all((p == 0).all() for p in model.parameters() if p.ndim == 1)


def test_blocks_are_encoder_and_decoder() -> None:
    model = Autoencoder([8, 4, 2])
    groups = blocks(model)
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(p) for p in model.encoder.parameters()],
        [id(p) for p in model.decoder.parameters()],
    ]


def test_loss_is_summed_over_pixels_and_averaged_over_images() -> None:
    loss = ReconstructionError()(torch.zeros(2, 3), torch.tensor([[1.0, 2, 0], [0, 0, 3]]))
    assert loss == (1 + 4 + 9) / 2


def test_images_are_their_own_targets() -> None:
    pixels = torch.rand(5, 1, 4, 4)
    images = Images((pixels, torch.zeros(5)), (pixels[:2], torch.zeros(2)), "", "")
    (inputs, targets), (test_inputs, _) = prepare(images, Settings([16, 2]))
    assert torch.equal(inputs, pixels.view(5, 16)) and torch.equal(targets, inputs)
    assert torch.equal(test_inputs, inputs[:2])
    assert EXPERIMENT.accuracy is None
