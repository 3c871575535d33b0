"""Which way a network is linearised, and that a trace is used exactly as long as it holds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import WithMask
from torch import Tensor, nn

import bdhf
from bdhf import tracing
from bdhf.curvature import GaussNewton, flattened
from bdhf.linearization import Linearizer


class Doubling(nn.Module):
    """Changes what it does by what ``choose`` says of its inputs."""

    def __init__(self, choose: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.choose = nn.Linear(4, 3), choose

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return 2 * y if self.choose(x) else y


def is_right(model: nn.Module, linearizer: Linearizer, batch: tuple[Tensor, Tensor]) -> str:
    """Compare a product with the reference's; return the path."""
    parameters = list(model.parameters())
    vector = [torch.randn_like(p) for p in parameters]
    matrix = GaussNewton(model, nn.MSELoss(), batch, [parameters], linearizer=linearizer)
    (found,) = matrix.products([flattened(vector, torch.float64)])
    expected = bdhf.ggn_vector_product(model, nn.MSELoss(), batch, vector)
    torch.testing.assert_close(found, flattened(expected, torch.float64))
    return matrix.path


def batch_of(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.randn(rows, 3).double()


@pytest.mark.parametrize("choose", [lambda x: x.sum() > 0, lambda x: x.sum().item() > 0])
def test_branches_on_values_take_the_plain_path(choose: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, linearizer = Doubling(choose).double(), Linearizer()
    for sign in (1, -1, 1):
        inputs, targets = batch_of()
        path = is_right(model, linearizer, (sign * inputs.abs(), targets))
        assert path.startswith("autograd: it branches on the value of a tensor")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_branches_on_other_generators_take_the_plain_path(draw: Callable[[], float]) -> None:
    model = Doubling(lambda x: draw() < 0.5)
    opt = bdhf.BlockDiagonalHF(model.parameters())
    opt.step(model, nn.MSELoss(), (torch.randn(6, 4), torch.randn(6, 3)))
    assert opt.last_step is not None
    assert opt.last_step.path == "autograd: it draws from Python's or NumPy's random generator"


def test_a_trace_is_made_once_for_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    trace = tracing.trace
    monkeypatch.setattr(
        tracing, "trace", lambda *rest, **more: made.append(1) or trace(*rest, **more)
    )
    model, linearizer = WithMask().double(), Linearizer()
    for rows, traces in ((6, 1), (6, 1), (5, 2), (6, 2), (5, 2)):
        assert is_right(model, linearizer, batch_of(rows)) == "traced"
        assert len(made) == traces


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "scale", 0.2),
        lambda model: setattr(model, "mask", torch.ones(5).bool()),
        lambda model: model.mask.logical_not_(),
        lambda model: model.right.register_forward_hook(lambda *rest: rest[-1] ** 2),
        lambda model: setattr(model, "left", nn.Linear(4, 5, bias=False).double()),
    ],
)
def test_a_trace_is_not_used_when_it_does_not_hold_any_more(
    change: Callable[[nn.Module], Any],
) -> None:
    model, linearizer = WithMask().double(), Linearizer()
    for _ in range(2):
        assert is_right(model, linearizer, batch_of()) == "traced"
    change(model)
    assert is_right(model, linearizer, batch_of()) == "traced"


@pytest.mark.parametrize(
    "layer", [nn.LSTM(4, 3, batch_first=True), nn.GRU(4, 3, batch_first=True)], ids=["LSTM", "GRU"]
)
def test_recurrent_networks_of_torch_are_traced_once(layer: nn.Module) -> None:
    """They keep their parameters in a list besides, and parameters change at every update."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    model = Reader()
    opt = bdhf.BlockDiagonalHF(model.parameters(), damping=0.1)
    for _ in range(3):
        opt.step(model, nn.MSELoss(), (torch.randn(6, 5, 4), torch.randn(6, 3)))
        assert opt.last_step is not None and opt.last_step.path == "traced"
    assert len(opt._linearizer._traced) == 1
    # And the model is still whole: torch's functional calls leave their values in that list.
    inputs, fresh = torch.randn(6, 5, 4), copy.deepcopy(model)
    fresh.layer = type(layer)(4, 3, batch_first=True)
    fresh.load_state_dict(model.state_dict())
    for one, other in zip(
        torch.autograd.grad(model(inputs).sum(), list(model.parameters())),
        torch.autograd.grad(fresh(inputs).sum(), list(fresh.parameters())),
        strict=True,
    ):
        assert torch.equal(one, other) and one.abs().sum() > 0


def test_attributes_of_attributes_and_wiring_are_part_of_the_structure() -> None:
    class Wired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.settings = SimpleNamespace(scale=1.0, power=np.ones(1))
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
            self.again = self.layers[0]

        def forward(self, x: Tensor) -> Tensor:
            h = self.again(torch.tanh(self.layers[0](x)))
            scale = self.settings.scale + float(self.settings.power[0])
            return scale * self.layers[2](torch.tanh(self.layers[1](h)))

    model, linearizer = Wired().double(), Linearizer()
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: setattr(model.settings, "scale", 3.0),
        lambda: model.settings.power.fill(2.0),
        lambda: setattr(model, "again", model.layers[1]),
        lambda: setattr(model.layers[0], "weight", model.layers[1].weight),
    ]
    for change in changes:
        change()
        assert is_right(model, linearizer, batch_of()) == "traced"


def test_layouts_of_outputs_and_of_their_cotangents() -> None:
    """A loss may transpose, and a network may return what is not contiguous."""

    class Transposed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets)

    words, labels = torch.randn(2, 5, 4).double(), torch.randint(3, (2, 5))
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
    for kind, criterion in ((nn.Sequential, loss), (Transposed, nn.CrossEntropyLoss())):
        model = kind(*layers).double()
        opt = bdhf.BlockDiagonalHF(model.parameters(), damping=0.1)
        vector = [torch.randn_like(p) for p in model.parameters()]
        expected = bdhf.ggn_vector_product(model, criterion, (words, labels), vector)
        matrix = GaussNewton(model, criterion, (words, labels), [list(model.parameters())])
        (found,) = matrix.products([flattened(vector, torch.float64)])
        torch.testing.assert_close(found, flattened(expected, torch.float64))
        opt.step(model, criterion, (words, labels))
        assert opt.last_step is not None and opt.last_step.path == "traced"


def test_forward_passes_that_leave_something_behind() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last, self.calls = nn.Linear(4, 3), torch.zeros(3).double(), 0

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x)) + self.last
            self.last, self.calls = h.detach().mean(0), self.calls + 1
            return h

    model, linearizer = Remembering().double(), Linearizer()
    for update in range(1, 4):
        matrix = GaussNewton(
            model, nn.MSELoss(), batch_of(), [list(model.parameters())], linearizer=linearizer
        )
        assert matrix.path == "autograd: its forward pass changes attributes of its modules"
        assert model.calls == update and float(model.last.sum()) == pytest.approx(
            sum(model.last.tolist())
        )


def test_other_random_generators_go_on_as_if_nothing_had_been_traced() -> None:
    model = Doubling(lambda x: random.random() + np.random.rand() < 0.5)
    batch = torch.randn(6, 4), torch.randn(6, 3)
    random.seed(0)
    np.random.seed(0)
    model(batch[0])
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    GaussNewton(model, nn.MSELoss(), batch, [list(model.parameters())])
    assert (random.random(), np.random.rand()) == expected


def test_inputs_that_cannot_be_told_apart_are_not_traced() -> None:
    class Pair:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Opened(nn.Linear):
        def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
            return super().forward(pair.x)

    model, linearizer = Opened(4, 3), Linearizer()
    batch = Pair(torch.randn(6, 4)), torch.randn(6, 3)
    matrix = GaussNewton(
        model, nn.MSELoss(), batch, [list(model.parameters())], linearizer=linearizer
    )
    assert matrix.path == "autograd: inputs hold a Pair" and not linearizer._traced


@pytest.mark.parametrize("wrong", ["tangent", "adjoint"])
def test_a_trace_whose_maps_do_not_fit_is_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(tracing.TracedMaps, wrong)

    def bent(*arguments: Any) -> list[Tensor]:
        return [1.01 * tensor for tensor in right(*arguments)]

    monkeypatch.setattr(tracing.TracedMaps, wrong, bent)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    path = is_right(model, Linearizer(), batch_of())
    assert path == "autograd: tangent and adjoint maps of block 0 do not fit"


def test_linear_graphs_leave_their_arguments_and_residuals_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    parameters = list(model.parameters())
    linearization, _ = Linearizer()(model, [parameters], torch.randn(6, 4).double())
    direction = [torch.randn_like(p) for p in parameters]
    cotangents = [torch.randn(6, 3).double()]
    first = linearization.tangents([direction]), linearization.adjoints([cotangents])
    again = linearization.tangents([direction]), linearization.adjoints([cotangents])
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_out_of_memory_is_no_reason_for_another_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(tracing, "trace", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        is_right(nn.Linear(4, 3).double(), Linearizer(), batch_of())


def test_parts_of_a_batch_are_traced_again_and_again() -> None:
    """Torch's cache of fake tensors would refuse the second trace on a slice."""
    for _ in range(3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(56, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(12, 7, 8).double(), torch.randn(12, 3).double()
        for part in (slice(0, 6), slice(3, 9)):
            assert is_right(model, Linearizer(), (x[part], y[part])) == "traced"


class Scaled(bdhf.Linearizable):
    """Brings maps that are right if both factors are 1."""

    def __init__(self, forth: float, back: float) -> None:
        super().__init__()
        self.weight, self.factors = nn.Parameter(torch.randn(3, 4)), (forth, back)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def linearize(self, blocks: Any, x: Tensor) -> Any:
        forth, back = self.factors
        return SimpleNamespace(
            outputs=self.forward(x),
            tangents=lambda d: [None if v is None else [forth * x @ v[0].T] for v in d],
            adjoints=lambda u: [None if c is None else [back * c[0].T @ x] for c in u],
        )


@pytest.mark.parametrize(
    ("factors", "wrong"), [((1, 1), ""), ((2, 1), "tangents"), ((1, 3), "adjoints")]
)
def test_own_maps_are_compared_once(factors: tuple[float, float], wrong: str) -> None:
    model = Scaled(*factors).double()
    if wrong:
        message = rf"^the {wrong} that Scaled.linearize brings are not autograd's: "
        with pytest.raises(ValueError, match=message):
            is_right(model, Linearizer(), batch_of())
    else:
        assert is_right(model, Linearizer(), batch_of()) == "brought by the network"


def test_modes_have_traces_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    linearizer = Linearizer()
    for training in (True, False, True):
        assert is_right(model.train(training), linearizer, batch_of()) == "traced"


def test_tensors_that_come_and_go_are_never_taken_for_each_other() -> None:
    """A freed tensor's identity may be given to the next one."""
    model, linearizer = WithMask().double(), Linearizer()
    for _ in range(Linearizer.most + 4):
        model.mask = torch.rand(5) > 0.5
        assert is_right(model, linearizer, batch_of()) == "traced"
    assert len(linearizer._traced) == Linearizer.most  # and no more are kept
