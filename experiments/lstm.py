"""Three-layer peephole LSTM on sequential MNIST (Zhang et al. 2017, figure 2).

python experiments/lstm.py optimizer=bdhf batch_size=6000 curvature_batch_size=750 seed=1
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from bdhf import blocks_from_modules
from bdhf.blocks import ParamGroup
from bdhf.commands import main
from bdhf.data import Data, Images
from bdhf.errors import require
from bdhf.experiment import Experiment
from bdhf.peephole_lstm import PeepholeLSTM
from bdhf.training import correct


@dataclass
class Settings:
    """Sizes of the network, and how much the images are pooled before they are read."""

    layers: int = MISSING
    units: int = MISSING
    pool: int = MISSING

    def __post_init__(self) -> None:
        for name in ("layers", "units", "pool"):
            value = getattr(self, name)
            require(value >= 1, f"network.{name}", value, "1 or more")


def blocks(model: PeepholeLSTM) -> list[ParamGroup]:
    """The paper's three blocks: one for each LSTM layer, the top one with the linear layer."""
    *lower, top = model.layers
    return blocks_from_modules(*lower, [top, model.readout])


def prepare(images: Images, settings: Settings) -> tuple[Data, Data]:
    """Average-pool the images and read them pixel by pixel, row after row."""
    size = min(images.train[0].shape[2:])
    require(settings.pool <= size, "network.pool", settings.pool, f"at most {size}, the image's")

    def read(pixels: Tensor, labels: Tensor) -> Data:
        return avg_pool2d(pixels, settings.pool).flatten(1).unsqueeze(2), labels

    return read(*images.train), read(*images.test)


EXPERIMENT = Experiment(
    name="lstm",
    settings=Settings,
    network=lambda settings: PeepholeLSTM(1, settings.units, settings.layers, outputs=10),
    blocks=blocks,
    criterion=nn.CrossEntropyLoss(),
    prepare=prepare,
    accuracy=correct,
)

if __name__ == "__main__":
    main(EXPERIMENT)
