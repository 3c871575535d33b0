"""How tests compose configs and make runs: as the command line does, in this process."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import autoencoder
import lstm
import numpy as np
import pytest
import resnet
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bdhf.config import Config, checked, register
from bdhf.experiment import CONFIGS, Experiment
from bdhf.training import Row

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (autoencoder, lstm, resnet)
}

_SMALL = {
    "autoencoder": ("network.widths=[64,12,6]",),
    "lstm": ("network.units=4", "network.layers=2"),
    "resnet": ("network.channels=[2,4]",),
}
_FEW = ("scale=demo", "updates=4", "evaluate_every=2", "batch_size=60")
_HF = ("curvature_batch_size=20", "optimizer.cg_max_iter=5")

#: Overrides for the autoencoder, small enough for a run in a second: Adam's, and HF's.
TINY = (*_FEW, *_SMALL["autoencoder"])
TINY_HF = (*TINY, *_HF)


def tiny(experiment: str, optimizer: str, *overrides: str) -> Config:
    """A run of a second of any experiment with any optimizer."""
    sizes = (*_FEW, *_SMALL[experiment], *(() if optimizer == "adam" else _HF))
    return config(experiment, *sizes, f"optimizer={optimizer}", *overrides)


def composed(experiment: str, *overrides: str) -> DictConfig:
    register(experiment, EXPERIMENTS[experiment].settings)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(experiment, list(overrides))


def config(experiment: str, *overrides: str) -> Config:
    return checked(composed(experiment, *overrides))


def without_clocks(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def data_folder(*needed: str) -> str:
    """Where real data lies; the test is skipped where one of ``needed`` does not."""
    folder = os.environ.get("BDHF_DATA", "")
    for pattern in needed:
        if not folder or not list(Path(folder).glob(pattern)):
            pytest.skip(f"BDHF_DATA={folder or 'not set'}: no folder with {pattern}")
    return folder


def write_idx(path: Path, values: np.ndarray) -> bytes:
    """Write unsigned bytes in the idx format, gzipped where the name says so; returns the idx."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content
