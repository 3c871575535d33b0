"""Optimizers as files: how they are found, what they are made of, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from suite import EXPERIMENTS, TINY, config, tiny
from torch import nn

import bdhf.methods
from bdhf.errors import ConfigError
from bdhf.first_order import FirstOrder
from bdhf.methods import Method, settings_types
from bdhf.methods.adam import Adam
from bdhf.methods.hessian_free import HessianFree
from bdhf.optimizer import BlockDiagonalHF
from bdhf.random_blocks import RandomBlocks
from bdhf.record import read_metrics, read_table
from bdhf.report.table import collect
from bdhf.runner import run

#: A settings class, all that a file in the folder needs.
SGD = """
    from dataclasses import dataclass
    from typing import ClassVar

    import torch

    from bdhf.first_order import FirstOrder
    from bdhf.methods import Method, require


    @dataclass
    class Sgd(Method):
        names: ClassVar[tuple[str, ...]] = ("sgd",)
        momentum: float = 0.0

        def check(self):
            super().check()
            require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "from 0 to 1")

        def make(self, model, blocks):
            return [], FirstOrder(torch.optim.SGD(model.parameters(), **self.keywords()))
"""
SIZES = ("batch_size=60", "curvature_batch_size=null", "updates=4", "evaluate_every=2")


@pytest.fixture
def method_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes ``extra.py`` as if into ``bdhf/methods/``."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(bdhf.methods, "__path__", [*bdhf.methods.__path__, str(folder)])

    def write(text: str) -> None:
        (folder / "extra.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("bdhf.methods.extra", None)
    bdhf.methods.__dict__.pop("extra", None)
    ConfigStore.instance().repo.get("optimizer", {}).pop("types_extra.yaml", None)


# Found by their files


def test_files_in_the_folder_are_the_methods() -> None:
    assert settings_types() == {"adam": Adam, "hessian_free": HessianFree}


def test_a_file_more_is_a_method_more(method_file: Callable[[str], None]) -> None:
    method_file(SGD)
    found = settings_types()
    assert list(found) == ["adam", "hessian_free", "extra"]
    assert found["extra"].__name__ == "Sgd" and issubclass(found["extra"], Method)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("from bdhf.methods import Method\nfrom bdhf.methods.adam import Adam\n", 0),
        (textwrap.dedent(SGD) + "\n\nclass Another(Sgd):\n    pass\n", 2),
    ],
    ids=["none of its own", "two"],
)
def test_file_without_its_one_method_is_refused(
    method_file: Callable[[str], None], text: str, count: int
) -> None:
    method_file(text)
    message = rf"^bdhf.methods.extra has {count} subclasses of Method; it needs one$"
    with pytest.raises(TypeError, match=message):
        settings_types()


def test_method_that_makes_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"^Method has no method make$"):
        Method("any", 0.1).make(nn.Linear(2, 2), lambda model: [])


# What they make


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def halves(model: Any) -> list[dict[str, Any]]:
    """An experiment's own blocks, unlike the two that ``blocks=2`` makes."""
    return [{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters())}]


def made(name: str, blocks: str | None) -> tuple[nn.Module, list[list[int]], BlockDiagonalHF]:
    """The model to train, the sizes of the parameters of each block, and the optimizer."""
    method = HessianFree(name, 0.3, 0.2, 7, 0.01, 0.5, blocks)
    method.check()
    model = method.prepare(network())
    groups, optimizer = method.make(model, halves)
    assert isinstance(optimizer, BlockDiagonalHF)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p for group in groups for p in group["params"]] == given == list(model.parameters())
    return model, [[p.numel() for p in group["params"]] for group in groups], optimizer


@pytest.mark.parametrize(
    ("name", "blocks", "expected"),
    [
        ("hf", None, [[20, 5, 25, 5, 15, 3]]),
        ("bdhf", None, [[20, 5, 25, 5], [15, 3]]),
        ("bdhf", "1", [[20, 5, 25, 5, 15, 3]]),
        ("bdhf", "2", [[20, 5], [25, 5, 15, 3]]),
        ("bdhf", "3", [[20, 5], [25, 5], [15, 3]]),
        ("bdhf", "random-1", [[73]]),
        ("bdhf", "random-2", [[25], [48]]),
        ("bdhf", "random-3", [[25], [30], [18]]),
    ],
)
def test_blocks_are_the_chosen_ones(name: str, blocks: str | None, expected: Any) -> None:
    model, sizes, optimizer = made(name, blocks)
    assert sizes == expected
    assert isinstance(model, RandomBlocks) == ("random" in str(blocks))
    settings = {"lr": 0.3, "damping": 0.2, "cg_max_iter": 7, "cg_tol": 0.01, "cg_momentum": 0.5}
    assert optimizer.defaults == settings


def test_adam_is_torchs_with_its_settings() -> None:
    method = Adam("adam", 0.02, (0.8, 0.9), 1e-3)
    method.check()
    model = network()
    assert method.prepare(model) is model and not method.uses_curvature
    groups, optimizer = method.make(model, halves)
    assert groups == [] and isinstance(optimizer, FirstOrder)
    assert type(optimizer.optimizer) is torch.optim.Adam
    defaults = optimizer.optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.02, (0.8, 0.9), 1e-3)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


# Refusals


@pytest.mark.parametrize("blocks", ["0", "random-", "random-0", "-2", "1.5", "random", "two", ""])
def test_blocks_that_are_no_number_are_refused_by_name(blocks: str) -> None:
    method = HessianFree("bdhf", 0.1, 0.0, 30, 5e-4, 0.95, blocks)
    message = rf"^optimizer.blocks={blocks}: must be a number, random-NUMBER, or null for the exp"
    with pytest.raises(ConfigError, match=message):
        method.check()


@pytest.mark.parametrize("blocks", ["1", "2", "random-2"])
def test_blocks_of_hf_are_refused(blocks: str) -> None:
    method = HessianFree("hf", 0.1, 0.0, 30, 5e-4, 0.95, blocks)
    message = rf"^optimizer.blocks={blocks}: must be null for optimizer=hf, which has one block; "
    with pytest.raises(ConfigError, match=message):
        method.check()


def test_blocks_are_refused_on_the_command_line_too() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer.blocks=random-0: must be a number, random"):
        tiny("autoencoder", "bdhf", "optimizer.blocks=random-0")


# An optimizer of one's own


@functools.cache
def _own_config(folder: Path) -> str:
    path = folder / "configs" / "optimizer" / "sgd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults:\n  - types_extra\n  - _self_\n\nname: sgd\nlr: 0.01\n")
    return f"hydra.searchpath=[file://{folder}/configs]"


def test_optimizer_of_ones_own_composes_and_runs_where_the_sizes_are_given(
    tmp_path: Path, method_file: Callable[[str], None]
) -> None:
    """As the README has it: one file, one config, and sizes."""
    method_file(SGD)
    chosen = (*TINY[:1], TINY[-1], _own_config(tmp_path), "optimizer=sgd")
    values = config("autoencoder", *chosen, *SIZES, "optimizer.momentum=0.5")
    ended = run(EXPERIMENTS["autoencoder"], dataclasses.replace(values, results=str(tmp_path)))
    assert ended.status == "finished" and ended.folder.path.name.startswith("sgd-b60-seed0-")
    rows = read_metrics(ended.folder.path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    # Nothing is shipped to compare it with.
    assert collect(tmp_path, "demo") == (1, [])
    (row,) = read_table(tmp_path / "demo" / "runs.csv")
    assert (row["optimizer"], row["changed"], row["study"]) == ("sgd", "", "")


@pytest.mark.parametrize("missing", [(0, 1, 2, 3), (1,)], ids=["no size", "one size missing"])
def test_optimizer_of_ones_own_without_sizes_is_refused_with_what_to_give(
    tmp_path: Path, method_file: Callable[[str], None], missing: tuple[int, ...]
) -> None:
    method_file(SGD)
    sizes = [size for place, size in enumerate(SIZES) if place not in missing]
    message = (
        r"^optimizer.name=sgd: must be one of adam, hf, bdhf, which have sizes in autoencoder at "
        r"scale=demo; for another one give batch_size, curvature_batch_size, updates, evaluate_e"
    )
    with pytest.raises(ConfigError, match=message):
        config("autoencoder", "scale=demo", _own_config(tmp_path), "optimizer=sgd", *sizes)


def test_settings_of_ones_own_are_checked(
    tmp_path: Path, method_file: Callable[[str], None]
) -> None:
    method_file(SGD)
    with pytest.raises(ConfigError, match=r"^optimizer.momentum=1.0: must be from 0 to 1$"):
        config(
            *("autoencoder", "scale=demo", _own_config(tmp_path), "optimizer=sgd", *SIZES),
            "optimizer.momentum=1",
        )
