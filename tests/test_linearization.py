"""Which way a network is linearised, and that a trace is used exactly as long as it holds."""

from __future__ import annotations

import random
from collections.abc import Callable
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
        assert path.startswith("autograd: ") and len(path) > len("autograd: ")


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
        path = is_right(model, linearizer, batch_of())
    assert path == "autograd: a new structure each time"
