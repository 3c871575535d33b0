"""Deep autoencoder on MNIST (Zhang et al. 2017, figure 1).

python experiments/autoencoder.py optimizer=bdhf batch_size=6000 curvature_batch_size=750 seed=1
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from omegaconf import MISSING
from torch import Tensor, nn

from bdhf import blocks_from_modules
from bdhf.blocks import ParamGroup
from bdhf.commands import main
from bdhf.data import Data, Images
from bdhf.errors import require
from bdhf.experiment import Experiment


@dataclass
class Settings:
    """Widths from the input to the code; the decoder is the mirror image."""

    widths: list[int] = MISSING

    def __post_init__(self) -> None:
        fits = len(self.widths) >= 2 and min(self.widths) >= 1
        require(fits, "network.widths", self.widths, "two or more numbers, 1 or more each")


class Autoencoder(nn.Module):
    """Encoder and decoder of tanh layers; the code and the output are linear.

    Glorot uniform weights, zero biases (ours). With widths 784-1000-500-250-30, the classic deep
    autoencoder of Hinton and Salakhutdinov (2006), it has 2,837,314 parameters.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.encoder = _tanh_layers(widths)
        self.decoder = _tanh_layers(widths[::-1])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images: (batch, pixels) to (batch, pixels)."""
        return self.decoder(self.encoder(images))


def _tanh_layers(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class ReconstructionError(nn.Module):
    """Squared error summed over pixels, mean over images."""

    reduction = "mean"  # over images: what micro-batches and evaluation need to know

    def forward(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        """A scalar from two tensors (batch, pixels)."""
        return (reconstructed - images).square().sum() / len(images)


def blocks(model: Autoencoder) -> list[ParamGroup]:
    """The paper's two blocks: the encoder and the decoder."""
    return blocks_from_modules(model.encoder, model.decoder)


def prepare(images: Images, settings: Settings) -> tuple[Data, Data]:
    """Images are their own targets."""
    train, test = images.train[0].flatten(1), images.test[0].flatten(1)
    pixels, widths = train.shape[1], settings.widths
    require(widths[0] == pixels, "network.widths", widths, f"from {pixels} on, an image's pixels")
    return (train, train), (test, test)


EXPERIMENT = Experiment(
    name="autoencoder",
    settings=Settings,
    network=lambda settings: Autoencoder(settings.widths),
    blocks=blocks,
    criterion=ReconstructionError(),
    prepare=prepare,
)

if __name__ == "__main__":
    main(EXPERIMENT)
