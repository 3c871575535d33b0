"""What an experiment is, and where the experiments are."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from bdhf.batches import Criterion
from bdhf.blocks import ParamGroup
from bdhf.config import (
    FigureConfig,
    TargetConfig,
    checked,
    register,
    settings_hash,
    settings_of,
)
from bdhf.data import Data, Images
from bdhf.training import Accuracy

_ROOT = Path(__file__).resolve().parent.parent
CONFIGS = _ROOT / "configs"
EXPERIMENTS = _ROOT / "experiments"


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper, as ``experiments/*.py`` describe it.

    Attributes:
        name: of the experiment, its file and its config, ``configs/experiment/<name>.yaml``.
        settings: dataclass of the config's ``network`` node.
        network: builds the network from such settings, drawing from torch's random stream.
        blocks: splits the network's parameters for block-diagonal HF.
        criterion: the loss, called as ``criterion(outputs, targets)``.
        prepare: maps images and the network's settings to training and test data, each the
            network's inputs and the loss's targets.
        accuracy: maps outputs and targets to hits; None where the experiment has no accuracy.
        average_weights: whether an average of the weights is evaluated beside the weights.
    """

    name: str
    settings: type
    network: Callable[[Any], nn.Module]
    blocks: Callable[[Any], list[ParamGroup]]
    criterion: Criterion
    prepare: Callable[[Images, Any], tuple[Data, Data]]
    accuracy: Accuracy | None = None
    average_weights: bool = False


def experiment_names() -> list[str]:
    """The files in ``experiments/``, in alphabetical order."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.py"))


def find_experiment(name: str) -> Experiment:
    """What ``experiments/<name>.py`` describes.

    Raises:
        ValueError: there is no such file.
    """
    if name not in experiment_names():
        raise ValueError(f"experiment={name}: must be one of {', '.join(experiment_names())}")
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    found: Experiment = importlib.import_module(name).EXPERIMENT
    return found


def figures() -> dict[str, FigureConfig]:
    """How each experiment is drawn, in the order of the figures; those that say so only."""
    found = {}
    for name in experiment_names():
        path = CONFIGS / "experiment" / f"{name}.yaml"
        if (values := _read(path).get("figure")) is not None:
            found[name] = FigureConfig(**values)
    return dict(sorted(found.items(), key=lambda pair: pair[1].number))


def target(name: str, scale: str) -> TargetConfig:
    """What runs of an experiment should reach at a scale, by its config."""
    folder = CONFIGS / "experiment"
    of_scale, of_all = _read(folder / name / f"{scale}.yaml"), _read(folder / f"{name}.yaml")
    return TargetConfig(**(of_scale.get("target") or of_all.get("target") or {}))


@functools.cache
def shipped(experiment: str, scale: str, optimizer: str) -> tuple[dict[str, Any], list[Any]]:
    """The settings that an optimizer's runs have unless one changes them, and its cells.

    Raises:
        ConfigError, HydraException: there is no such config, or its cells do not fit together.
    """
    register(experiment, find_experiment(experiment).settings)
    overrides = [f"experiment={experiment}", f"scale={scale}", f"optimizer={optimizer}"]
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # by a sweep
            stack.enter_context(initialize_config_dir(str(CONFIGS), version_base="1.3"))
        composed = compose("run", overrides)
        tables: Any = OmegaConf.to_container(composed.cells)
        cells = tables.get(optimizer, [])
        if not cells:  # then any sizes do: nothing is compared with them
            kind: Any = OmegaConf.get_type(composed, "optimizer")
            few = 1 if kind.uses_curvature else "null"
            sizes = ["batch_size=2", f"curvature_batch_size={few}", "updates=1", "evaluate_every=1"]
            composed = compose("run", [*overrides, *sizes])
        config = checked(composed)
    return settings_of(config), cells


def shipped_hashes(experiment: str, scale: str, optimizer: str) -> set[str]:
    """`settings_hash`, but for the seed, of each cell with the settings that ship.

    Empty where the configs have no cells.

    Raises:
        ConfigError, HydraException, ValueError: as `shipped` and `find_experiment` do.
    """
    values, cells = shipped(experiment, scale, optimizer)
    return {settings_hash({**values, **cell}, without=("seed",)) for cell in cells}


def _read(path: Path) -> dict[str, Any]:
    """A config's own values, nothing composed or resolved; empty where there is none."""
    found: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return found
