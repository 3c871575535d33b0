"""benchmarks/gpu.py on the CPU, at tiny sizes: what it calls its rows, and their units."""

from __future__ import annotations

import importlib
import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import tape
import torch
from torch import Tensor, nn

import bdhf.cg
import bdhf.graphs
from bdhf.work import multiply_adds

CPU = torch.device("cpu")


class Branching(nn.Module):
    """A network that reads a value back, which no recording can."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs) if float(inputs.sum()) < math.inf else inputs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine that has a stand-in for CUDA graphs."""
    monkeypatch.syspath_prepend(str(importlib.import_module("suite").CONFIGS.parent / "benchmarks"))
    monkeypatch.setattr(bdhf.graphs, "available", lambda device: True)
    monkeypatch.setattr(bdhf.graphs, "record", tape.record)
    monkeypatch.setitem(bdhf.cg.CHECK_EVERY, "cpu", 8)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "_peer", lambda *arguments: None)
    return module


def tiny(gpu: ModuleType, branching: bool = False, rows: int = 32) -> Any:
    torch.manual_seed(0)
    sizes = [8, 12, 12, 8]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    model: nn.Module = nn.Sequential(*layers)
    blocks = [list(layers[0].parameters()), list(nn.Sequential(*layers[1:]).parameters())]
    if branching:
        model = Branching(model)
    data = torch.randn(rows, 8)
    return gpu.Problem("tiny", model, model, nn.MSELoss(), data, data, blocks, 8)


def table(gpu: ModuleType, problem: Any) -> dict[tuple[str, str], list[str]]:
    """The other cells of each row, by its title and path."""
    timed = gpu.timed_rows(problem, 4, gpu.graphs.available(CPU))
    seconds = gpu.in_turn({**timed}, 1, gpu.graphs.WARM_UP + 2, CPU)
    seconds = {title: [float(place + 1)] for place, title in enumerate(seconds)}
    needed = {title: gpu.Cost(2e12, 1e9) for title in timed}
    found = {gpu._RATE: 4.0, gpu._BANDWIDTH: 1.0}
    lines = gpu.table(problem, timed, seconds, needed, found).splitlines()[4:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len({(title, path) for title, path, *_ in cells}) == len(timed)
    return {(title, path): more for title, path, *more in cells}


UPDATES = ("HF update", "block-diagonal HF update")
STEPS = ("Adam update", "Adam update, smallest mini-batch")


def test_rows_are_called_what_the_updates_say_of_themselves(gpu: ModuleType) -> None:
    rows = table(gpu, tiny(gpu))
    for path in ("traced", "traced, replayed"):
        assert all((title, path) in rows for title in UPDATES)
    # On a CPU torch's Adam counts its steps where no recording can.
    for title in STEPS:
        plain, asked = (path for name, path in rows if name == title)
        assert plain == "gradient" and asked.startswith("gradient, not replayed: ")


def test_what_could_not_be_replayed_is_not_called_so(gpu: ModuleType) -> None:
    rows = table(gpu, tiny(gpu, branching=True))
    paths = {title: {path for name, path in rows if name == title} for title in (*UPDATES, *STEPS)}
    for title, found in paths.items():
        assert len(found) == 2 and not any(path.endswith(", replayed") for path in found), title
        assert sum(", not replayed: " in path for path in found) == 1, title


def test_the_unit_is_a_gradient_of_the_same_mini_batch(gpu: ModuleType) -> None:
    problem = tiny(gpu)
    timed = gpu.timed_rows(problem, 4, cuda_graphs=False)
    work = {title: multiply_adds(row) for title, row in timed.items()}
    units = ("gradient", "gradient, curvature mini-batch", "gradient, smallest mini-batch")
    assert [work[unit] / work["gradient"] for unit in units] == [1, 8 / 32, 4 / 32]
    for title, row in timed.items():
        if title.startswith("Adam"):  # a gradient, and nothing that multiplies matrices
            assert work[title] == work[row.unit]
    assert {timed[title].unit for title in ("product", "all blocks", "set-up")} == {units[1]}
    # The places of the rows stand in for seconds.
    rows = table(gpu, problem)
    place = list(timed).index(STEPS[1]) + 1
    assert rows[STEPS[1], "gradient"] == [
        f"{1000 * place}.000",
        f"{place / 3:.2f}",
        f"{1 / place:.0%}",
        "memory",
    ]


def test_costs_at_large_sizes_come_from_small_ones(gpu: ModuleType) -> None:
    def made(rows: int) -> Any:
        return tiny(gpu, rows=rows)

    found = gpu.costs(made, (64, 24, 4))
    problem = gpu.replace(made(64), curvature_rows=24)
    for title, row in gpu.timed_rows(problem, 4, cuda_graphs=False).items():
        counted = gpu.cost_of(row)
        assert found[title].flop == pytest.approx(counted.flop), title
        assert found[title].moved == pytest.approx(counted.moved, rel=0.01), title
