"""Three-layer peephole LSTM on sequential MNIST (Zhang et al. 2017, figure 2).

python experiments/lstm.py optimizer=bdhf batch_size=6000 curvature_batch_size=750 seed=1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from bdhf import blocks_from_modules
from bdhf.blocks import ParamGroup
from bdhf.config import require
from bdhf.data import Data, Images
from bdhf.experiment import Experiment, correct, main


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


class PeepholeLSTM(nn.Module):
    """One LSTM layer with diagonal peephole connections (Gers and Schmidhuber 2000).

    The input and forget gates see the cell state of the step before, the output gate that of the
    step itself; one bias for each gate. Torch's own LSTM has no peepholes.

    Initialisation (ours): input weights Glorot uniform, recurrent weights orthogonal, both gate
    by gate; peepholes 0; forget bias 1, other biases 0.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        # Rows by gate: input, forget, cell, output.
        self.input_weight = nn.Parameter(torch.empty(4 * units, inputs))
        self.recurrent_weight = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.zeros(4 * units))
        self.peepholes = nn.Parameter(torch.zeros(3, units))  # into input, forget, output
        for gate in self.input_weight.data.chunk(4):
            nn.init.xavier_uniform_(gate)
        for gate in self.recurrent_weight.data.chunk(4):
            nn.init.orthogonal_(gate)
        self.bias.data[units : 2 * units] = 1.0

    def forward(self, sequence: Tensor) -> Tensor:
        """Hidden states (time, batch, units) of a sequence (time, batch, inputs)."""
        # The inputs' part of all gates at once; only the rest has to wait for the step before.
        driven = nn.functional.linear(sequence, self.input_weight, self.bias)
        to_input, to_forget, to_output = self.peepholes
        h = c = sequence.new_zeros(sequence.shape[1], len(to_input))
        states = []
        for step in driven:
            i, f, g, o = (step + h @ self.recurrent_weight.T).chunk(4, dim=1)
            i = torch.sigmoid(i + to_input * c)
            f = torch.sigmoid(f + to_forget * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + to_output * c) * torch.tanh(c)
            states.append(h)
        return torch.stack(states)


class SequenceClassifier(nn.Module):
    """Stacked peephole LSTMs, and a linear layer on the top layer's last hidden state.

    With three layers of 10 units that read single pixels, it has 2,360 parameters.
    """

    def __init__(self, layers: int, units: int, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            PeepholeLSTM(1 if depth == 0 else units, units) for depth in range(layers)
        )
        self.readout = nn.Linear(units, classes)
        nn.init.xavier_uniform_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class scores (batch, classes) of pixel sequences (batch, time)."""
        states = pixels.T.unsqueeze(2)
        for layer in self.layers:
            states = layer(states)
        return self.readout(states[-1])


def blocks(model: SequenceClassifier) -> list[ParamGroup]:
    """The paper's three blocks: one for each LSTM layer, the top one with the linear layer."""
    *lower, top = model.layers
    return blocks_from_modules(*lower, [top, model.readout])


def prepare(images: Images, settings: Settings) -> tuple[Data, Data]:
    """Average-pool the images and read them pixel by pixel, row after row."""
    size = min(images.train[0].shape[2:])
    require(settings.pool <= size, "network.pool", settings.pool, f"at most {size}, the image's")

    def read(pixels: Tensor, labels: Tensor) -> Data:
        return avg_pool2d(pixels, settings.pool).flatten(1), labels

    return read(*images.train), read(*images.test)


EXPERIMENT = Experiment(
    name="lstm",
    settings=Settings,
    network=lambda settings: SequenceClassifier(settings.layers, settings.units),
    blocks=blocks,
    criterion=nn.CrossEntropyLoss(),
    prepare=prepare,
    accuracy=correct,
)

if __name__ == "__main__":
    main(EXPERIMENT)
