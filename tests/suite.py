"""How tests compose configs and make runs: as the command line does, in this process."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import autoencoder
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bdhf.config import Config, checked, register
from bdhf.experiment import CONFIGS, Experiment

EXPERIMENTS: dict[str, Experiment] = {"autoencoder": autoencoder.EXPERIMENT}

#: Small enough for a run in a second.
TINY = (
    "scale=demo",
    "network.widths=[64,12,6]",
    "updates=4",
    "evaluate_every=2",
    "batch_size=60",
)
TINY_HF = (*TINY, "curvature_batch_size=20", "optimizer.cg_max_iter=5")


def composed(experiment: str, *overrides: str) -> DictConfig:
    register(experiment, EXPERIMENTS[experiment].settings)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(experiment, list(overrides))


def config(experiment: str, *overrides: str) -> Config:
    return checked(composed(experiment, *overrides))


def mnist_folder() -> str:
    """Where real MNIST lies; the test is skipped where it does not."""
    folder = os.environ.get("BDHF_DATA", "")
    if not (Path(folder) / "mnist").is_dir():
        pytest.skip("BDHF_DATA names no folder with real MNIST")
    return folder


def write_idx(path: Path, values: np.ndarray) -> bytes:
    """Write unsigned bytes in the idx format, gzipped where the name says so; returns the idx."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content
