"""Small networks of every kind the mathematics is tested on, and dense matrices for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class PeepholeLSTM(nn.Module):
    """One peephole layer over a sequence (batch, time, features), read out at the last step."""

    def __init__(self, inputs: int = 2, units: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.units = units
        self.input = nn.Linear(inputs, 4 * units)
        self.recurrent = nn.Linear(units, 4 * units, bias=False)
        self.peepholes = nn.Parameter(0.3 * torch.randn(3, units))
        self.readout = nn.Linear(units, classes)

    def forward(self, sequence: Tensor) -> Tensor:
        h = c = sequence.new_zeros(sequence.shape[0], self.units)
        for x in sequence.unbind(1):
            i, f, g, o = (self.input(x) + self.recurrent(h)).chunk(4, dim=1)
            i = torch.sigmoid(i + self.peepholes[0] * c)
            f = torch.sigmoid(f + self.peepholes[1] * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + self.peepholes[2] * c) * torch.tanh(c)
        return self.readout(h)


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.project = nn.Conv2d(3, 4, 1, stride=2)
        self.readout = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = torch.relu(x + self.first(torch.relu(x)))
        x = torch.relu(self.project(x) + self.second(x))
        return self.readout(x.mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; ``embed`` is one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.randn(4))
        self.embed = nn.Linear(4, 4, bias=False)
        self.again = self.embed

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(torch.tanh(self.embed(x))))
        return self.again(code @ self.encoder.weight + self.bias)


class TwoHeads(nn.Module):
    """Takes keyword inputs, returns a dict, and has a parameter that reaches no output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 2)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        h = torch.tanh(self.left(x))
        return {"class": h, "value": self.right(torch.tanh(y)) * h[:, :1], "rows": len(x)}


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """A convex loss that torch does not have."""
    return (outputs - targets).cosh().log().sum() / outputs.shape[0]


def two_losses(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    fit = F.cross_entropy(outputs["class"], targets[0])
    return fit + (outputs["value"] - targets[1]).square().sum() + outputs["value"].sum()


def hinge_free_linear(outputs: Tensor, targets: Tensor) -> Tensor:
    """Linear in the outputs, so that its curvature is zero."""
    return (outputs * targets).mean()


@dataclass
class Case:
    """A network with its loss and data, and a split into blocks."""

    model: nn.Module
    criterion: Any
    batch: tuple[Any, Any]
    blocks: list[list[nn.Parameter]]


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def _halves(model: nn.Module) -> list[list[nn.Parameter]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    middle = len(trainable) // 2
    return [trainable[:middle], trainable[middle:]]


def _simple(model: nn.Module, criterion: Any, inputs: Any, targets: Any) -> Case:
    return Case(model, criterion, (inputs, targets), _halves(model))


def _frozen() -> Case:
    model = _mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return _simple(model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3))


def _dropout() -> Case:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return _simple(model, nn.CrossEntropyLoss(), torch.randn(6, 4), torch.randint(3, (6,)))


def _batch_norm() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return _simple(model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3))


def _some_parameters() -> Case:
    """The middle layer is in no block: it stays fixed."""
    model = _mlp()
    case = _simple(model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3))
    case.blocks = [list(model[4].parameters()), list(model[0].parameters())]
    return case


def _with_ignored() -> Case:
    targets = torch.tensor([0, 1, -100, 2, -100, 1])
    return _simple(_mlp(), nn.CrossEntropyLoss(), torch.randn(6, 4), targets)


def _attention() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return _simple(layer, nn.MSELoss(), torch.randn(3, 5, 4), torch.randn(3, 5, 4))


def _classes(criterion: Any) -> Callable[[], Case]:
    return lambda: _simple(
        _mlp(), copy.deepcopy(criterion), torch.randn(6, 4), torch.randint(3, (6,))
    )


def _values(criterion: Any) -> Callable[[], Case]:
    return lambda: _simple(_mlp(), copy.deepcopy(criterion), torch.randn(6, 4), torch.randn(6, 3))


def _bits(criterion: Any) -> Callable[[], Case]:
    return lambda: _simple(
        _mlp(), copy.deepcopy(criterion), torch.randn(6, 4), (torch.rand(6, 3) > 0.5) * 1.0
    )


class WithMask(nn.Module):
    """Has a tensor that is neither a parameter nor a buffer, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3)
        self.mask, self.scale = (torch.arange(5) % 2).bool(), 0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.scale * torch.tanh(self.left(x)).masked_fill(self.mask, 0.3))


def _images(*layers: nn.Module) -> Case:
    images = torch.randn(4, 2, 8, 8)
    return _simple(nn.Sequential(*layers), nn.CrossEntropyLoss(), images, torch.randint(3, (4,)))


def _in_place() -> Case:
    return _images(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, 3),
    )


def _channels_last() -> Case:
    layers = nn.Conv2d(2, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    case = _images(*layers)
    case.model.to(memory_format=torch.channels_last)
    return case


def _embedding() -> Case:
    layers = nn.Embedding(7, 4), nn.LayerNorm(4), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3)
    words = torch.randint(7, (5, 3))
    return _simple(nn.Sequential(*layers), nn.CrossEntropyLoss(), words, torch.randint(3, (5,)))


CASES: dict[str, Callable[[], Case]] = {
    "tanh MLP, MSE mean": _values(nn.MSELoss()),
    "tanh MLP, MSE sum": _values(nn.MSELoss(reduction="sum")),
    "tanh MLP, F.mse_loss": _values(F.mse_loss),
    "cross-entropy mean": _classes(nn.CrossEntropyLoss()),
    "cross-entropy sum, smoothed": _classes(
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    ),
    "cross-entropy, class weights": _classes(nn.CrossEntropyLoss(weight=torch.rand(3))),
    "cross-entropy, ignored targets": _with_ignored,
    "BCE with logits mean": _bits(nn.BCEWithLogitsLoss()),
    "BCE with logits sum, weighted": _bits(
        nn.BCEWithLogitsLoss(reduction="sum", pos_weight=torch.rand(3))
    ),
    "convex loss of one's own": _values(log_cosh),
    "loss linear in the outputs": _values(hinge_free_linear),
    "peephole LSTM": lambda: _simple(
        PeepholeLSTM(), nn.CrossEntropyLoss(), torch.randn(5, 4, 2), torch.randint(3, (5,))
    ),
    "residual CNN": lambda: _simple(
        ResidualCNN(), nn.CrossEntropyLoss(), torch.randn(4, 2, 6, 6), torch.randint(3, (4,))
    ),
    "segmentation (spatial targets)": lambda: _simple(
        nn.Conv2d(2, 3, 3),
        nn.CrossEntropyLoss(),
        torch.randn(4, 2, 5, 5),
        torch.ones(4, 3, 3).long(),
    ),
    "tied parameters": lambda: _simple(
        TiedAutoencoder(), nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 4)
    ),
    "frozen parameters": _frozen,
    "dropout": _dropout,
    "batch norm": _batch_norm,
    "parameters in no block": _some_parameters,
    "attention": _attention,
    "operations in place, dropout": _in_place,
    "channels-last": _channels_last,
    "embedding and layer norm": _embedding,
    "a tensor that is no buffer": lambda: _simple(
        WithMask(), nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3)
    ),
    "several inputs and outputs": lambda: _simple(
        TwoHeads(),
        two_losses,
        {"x": torch.randn(6, 4), "y": torch.randn(6, 2)},
        (torch.randint(3, (6,)), torch.randn(6, 2)),
    ),
}


def make_case(name: str, dtype: torch.dtype, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    case = CASES[name]()
    case.model.to(dtype)
    if isinstance(case.criterion, nn.Module):
        case.criterion.to(dtype)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        return tuple(cast(item) for item in value)

    case.batch = cast(case.batch)
    return case


def dense_ggn(case: Case, mask_seed: int) -> Tensor:
    """``Jᵀ H_L J`` over the trainable parameters, from a dense Jacobian and a dense Hessian.

    ``mask_seed`` seeds torch before the one forward pass, which draws the dropout masks.
    """
    model = copy.deepcopy(case.model)  # whose buffers may move
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs, targets = case.batch
    torch.manual_seed(mask_seed)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    tensors = {"": outputs} if isinstance(outputs, Tensor) else outputs
    tensors = {key: o for key, o in tensors.items() if isinstance(o, Tensor)}
    flat = torch.cat([o.reshape(-1) for o in tensors.values()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([o.numel() for o in tensors.values()])
        shaped = {key: v.view_as(o) for (key, o), v in zip(tensors.items(), parts, strict=True)}
        return case.criterion(shaped.get("", shaped), targets)

    def row(output: Tensor) -> Tensor:
        slopes = torch.autograd.grad(output, trainable, retain_graph=True, materialize_grads=True)
        return torch.cat([slope.reshape(-1) for slope in slopes])

    jacobian = torch.stack([row(output) for output in flat])
    matrix = jacobian.T @ torch.autograd.functional.hessian(loss, flat.detach()) @ jacobian
    return matrix.detach()  # torch 2.9 materializes zeros that require a gradient


def block_diagonal(matrix: Tensor, case: Case) -> Tensor:
    """``matrix`` with zeros outside the case's blocks, in the order of ``model.parameters()``."""
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    block_of = {id(p): k for k, block in enumerate(case.blocks) for p in block}
    labels = torch.cat([torch.full((p.numel(),), block_of.get(id(p), -1)) for p in trainable])
    inside = (labels[:, None] == labels[None, :]) & (labels[:, None] >= 0)
    return matrix * inside
