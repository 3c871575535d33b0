"""ResNet without batch normalisation on CIFAR-10 (Zhang et al. 2017, figure 3).

python experiments/resnet.py optimizer=bdhf batch_size=5000 curvature_batch_size=625 seed=1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from bdhf import blocks_from_modules
from bdhf.blocks import ParamGroup
from bdhf.commands import main
from bdhf.data import Data, Images
from bdhf.errors import require
from bdhf.experiment import Experiment
from bdhf.training import correct


@dataclass
class Settings:
    """Channels of the images, and of each residual block."""

    image_channels: int = MISSING
    channels: list[int] = MISSING

    def __post_init__(self) -> None:
        channels = self.channels
        require(
            self.image_channels >= 1, "network.image_channels", self.image_channels, "1 or more"
        )
        fits = len(channels) >= 2 and min(channels) >= 1
        require(fits, "network.channels", channels, "two or more numbers, 1 or more each")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        return torch.relu(self.shortcut(x) + self.second(torch.relu(self.first(x))))


class ResNet(nn.Module):
    """A convolution, residual blocks, global mean, linear layer; every layer has a bias.

    He normal weights for convolutions, Glorot uniform for the linear layer, zero biases (ours).
    With channels 16, 32, 64 on colour images, it has 77,706 parameters.
    """

    def __init__(self, image_channels: int, channels: list[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.blocks = nn.ModuleList(
            ResidualBlock(inputs, outputs, stride=1 if depth == 0 else 2)
            for depth, (inputs, outputs) in enumerate(zip(widths, channels, strict=False))
        )
        self.readout = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        # A layout in which convolutions are faster; nothing else changes.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (batch, classes) of images (batch, channels, height, width)."""
        x = torch.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.readout(x.mean((2, 3)))


def blocks(model: ResNet) -> list[ParamGroup]:
    """The paper's three: residual blocks, with the bottom convolution and the linear layer."""
    first, *middle, last = model.blocks
    return blocks_from_modules([model.stem, first], *middle, [last, model.readout])


def prepare(images: Images, settings: Settings) -> tuple[Data, Data]:
    """Standardise each channel by the training set's mean and standard deviation."""
    found, expected = images.train[0].shape[1], settings.image_channels
    require(found == expected, "network.image_channels", expected, f"{found}, as the images have")
    deviation, mean = torch.std_mean(images.train[0], dim=(0, 2, 3), keepdim=True)

    def standardise(pixels: Tensor, labels: Tensor) -> Data:
        return (pixels - mean) / deviation, labels

    return standardise(*images.train), standardise(*images.test)


EXPERIMENT = Experiment(
    name="resnet",
    settings=Settings,
    network=lambda settings: ResNet(settings.image_channels, list(settings.channels)),
    blocks=blocks,
    criterion=nn.CrossEntropyLoss(),
    prepare=prepare,
    accuracy=correct,
    average_weights=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
