"""What is measured: the paper's three networks at paper size, and two of other kinds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdhf import blocks_from_modules, split_into_blocks
from bdhf.blocks import ParamGroup
from bdhf.peephole_lstm import PeepholeLSTM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import autoencoder
import lstm
import resnet

Blocks = list[list[nn.Parameter]]


@dataclass(frozen=True)
class Problem:
    """A network with loss and mini-batch.

    Attributes:
        plain: the same function as a user would write it, with the same parameters: what one
            gradient, the unit ``g``, is measured with.
        curvature_rows: the first so many rows are the curvature mini-batch; None: all.
    """

    name: str
    model: nn.Module
    plain: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor
    blocks: Blocks
    curvature_rows: int | None = None

    @property
    def curvature_batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs[: self.curvature_rows], self.targets[: self.curvature_rows]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for block in self.blocks for p in block]


class CellLoop(nn.Module):
    """The peephole LSTM as a plain loop of cells, time by time and layer by layer."""

    def __init__(self, network: PeepholeLSTM) -> None:
        super().__init__()
        self.network = network

    def forward(self, sequences: Tensor) -> Tensor:
        layers: list[Any] = list(self.network.layers)
        units = layers[0].recurrent_weight.shape[1]
        h = [sequences.new_zeros(len(sequences), units) for _ in layers]
        c = list(h)
        for x in sequences.unbind(1):
            for k, layer in enumerate(layers):
                gates = x @ layer.input_weight.T + h[k] @ layer.recurrent_weight.T + layer.bias
                i, f, g, o = gates.chunk(4, 1)
                into_i, into_f, into_o = layer.peepholes
                i, f = torch.sigmoid(i + into_i * c[k]), torch.sigmoid(f + into_f * c[k])
                c[k] = f * c[k] + i * torch.tanh(g)
                h[k] = torch.sigmoid(o + into_o * c[k]) * torch.tanh(c[k])
                x = h[k]
        return self.network.readout(x)


class ImageTransformer(nn.Module):
    """Patches of 4x4 pixels, two of torch's encoder layers, mean over patches, linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.readout = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT + self.place
        return self.readout(self.encoder(patches).mean(1))


def vgg_like() -> nn.Sequential:
    """Pairs of 3x3 convolutions with pooling between, two linear layers; ReLUs act in place."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(inplace=True), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def _groups(groups: list[ParamGroup]) -> Blocks:
    return [list(group["params"]) for group in groups]


def autoencoder_problem(rows: int = 500) -> Problem:
    model = autoencoder.Autoencoder([784, 1000, 500, 250, 30])
    images = torch.rand(rows, 784)
    # torch's own loss, which the peers know; its cost is that of the experiment's.
    criterion = nn.MSELoss(reduction="sum")
    blocks = _groups(autoencoder.blocks(model))
    return Problem("autoencoder", model, model, criterion, images, images, blocks)


def lstm_problem(rows: int = 500) -> Problem:
    model = PeepholeLSTM(1, 10, 3, outputs=10)
    for name, parameter in model.named_parameters():
        if name.endswith("peepholes"):
            nn.init.normal_(parameter, std=0.1)
    inputs, targets = torch.rand(rows, 49, 1), torch.randint(10, (rows,))
    blocks = _groups(lstm.blocks(model))
    return Problem("LSTM", model, CellLoop(model), nn.CrossEntropyLoss(), inputs, targets, blocks)


def resnet_problem(rows: int = 128) -> Problem:
    """As the experiment runs it, in channels-last; the plain gradient is in the usual layout."""
    model = resnet.ResNet(3, [16, 32, 64])
    plain = resnet.ResNet(3, [16, 32, 64]).to(memory_format=torch.contiguous_format)
    plain.load_state_dict(model.state_dict())
    inputs, targets = torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))
    blocks = _groups(resnet.blocks(model))
    return Problem("ResNet", model, plain, nn.CrossEntropyLoss(), inputs, targets, blocks)


def resnet_contiguous_problem(rows: int = 128) -> Problem:
    problem = resnet_problem(rows)
    model = problem.plain
    blocks = _groups(resnet.blocks(model))  # type: ignore[arg-type]
    return Problem(
        "ResNet, usual layout",
        model,
        model,
        problem.criterion,
        problem.inputs,
        problem.targets,
        blocks,
    )


def vgg_problem(rows: int = 64) -> Problem:
    model = vgg_like()
    inputs, targets = torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))
    blocks = _groups(split_into_blocks(model, 2))
    return Problem("VGG-like CNN", model, model, nn.CrossEntropyLoss(), inputs, targets, blocks)


def transformer_problem(rows: int = 64) -> Problem:
    model = ImageTransformer()
    inputs, targets = torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))
    first, second = model.encoder.layers
    bottom, top = _groups(blocks_from_modules([model.patches, first], [second, model.readout]))
    blocks = [[model.place, *bottom], top]
    return Problem(
        "small transformer", model, model, nn.CrossEntropyLoss(), inputs, targets, blocks
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "autoencoder": autoencoder_problem,
    "resnet": resnet_problem,
    "resnet_contiguous": resnet_contiguous_problem,
    "lstm": lstm_problem,
    "vgg": vgg_problem,
    "transformer": transformer_problem,
}
