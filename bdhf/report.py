"""From finished run folders to one compact table of curves per scale.

``results/<scale>/curves.csv`` has one row for each evaluation of each run, ``runs.csv`` one row for
each run with how it came about. All that follows (figures, verdicts, the page) reads these two and
nothing else: no run folder, no GPU, no network.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from bdhf.record import number, read_metrics, write_table

#: Runs that ended, whichever way; the others have no curve to show yet.
_ENDED = ("finished", "diverged")

Series = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class CellKey:
    """A cell of the grid: all runs that differ by seed only."""

    experiment: str
    optimizer: str
    batch_size: int
    curvature_batch_size: int | None


@dataclass(frozen=True)
class Curves:
    """The curves of one cell, cut to the updates that all its seeds have.

    Attributes:
        update: (points,) where the cell was evaluated.
        columns: each other metric, (seeds, points); gaps are NaN.
        seeds: the seeds, in the order of the rows.
    """

    update: Series
    columns: dict[str, Series]
    seeds: list[int]


def collect(results: Path, scale: str) -> tuple[int, list[str]]:
    """Merge the run folders of a scale into ``results/<scale>/``.

    Returns:
        How many runs went in, and which were left out and why.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    left_out = []
    for folder in sorted((results / "runs" / scale).glob("*/*/")):
        provenance_file = folder / "provenance.json"
        if not provenance_file.exists():
            left_out.append(f"{folder}: no provenance.json")
            continue
        provenance = json.loads(provenance_file.read_text())
        if provenance["status"] not in _ENDED:
            left_out.append(f"{folder}: {provenance['status']}")
            continue
        run = _run_row(folder, provenance)
        runs.append(run)
        identity = {key: run[key] for key in _IDENTITY}
        rows += [{**identity, **row} for row in read_metrics(folder)]
    if runs:
        target = results / scale
        target.mkdir(parents=True, exist_ok=True)
        write_table(target / "runs.csv", runs)
        write_table(target / "curves.csv", rows)
    return len(runs), left_out


_IDENTITY = ("experiment", "optimizer", "batch_size", "curvature_batch_size", "seed", "run")


def _run_row(folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    config = OmegaConf.load(folder / "config.yaml")
    sessions = provenance["sessions"]
    return {
        "experiment": config.experiment,
        "optimizer": config.optimizer.name,
        "batch_size": config.batch_size,
        "curvature_batch_size": config.curvature_batch_size,
        "seed": config.seed,
        "run": folder.name,
        "status": provenance["status"],
        "reason": provenance["reason"],
        "updates": provenance["updates"],
        "full_train_loss": provenance.get("full_train_loss"),
        "full_train_accuracy": provenance.get("full_train_accuracy"),
        "peak_memory_mib": round(provenance["peak_memory_mib"]),
        "start": sessions[0]["start"],
        "end": sessions[-1]["end"],
        "sessions": len(sessions),
        "device": provenance["device"],
        "threads": provenance["threads"],
        "torch": provenance["torch"],
        "git_commit": provenance["git_commit"],
        "git_dirty": provenance["git_dirty"],
        "data": provenance["data"]["source"],
        "data_sha256": provenance["data"]["sha256"],
    }


def read_curves(results: Path, scale: str) -> dict[CellKey, Curves]:
    """The curves of all cells of a scale, from its compact table.

    Raises:
        FileNotFoundError: there is no table; the message says how to make it.
    """
    path = results / scale / "curves.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; make collect SCALE={scale} writes it")
    runs: dict[CellKey, dict[int, list[dict[str, float | int | None]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            few = row["curvature_batch_size"]
            key = CellKey(
                row["experiment"],
                row["optimizer"],
                int(row["batch_size"]),
                int(few) if few else None,
            )
            metrics = {k: number(v) for k, v in row.items() if k not in _IDENTITY}
            runs.setdefault(key, {}).setdefault(int(row["seed"]), []).append(metrics)
    return {key: _aligned(by_seed) for key, by_seed in runs.items()}


def _aligned(by_seed: dict[int, list[dict[str, float | int | None]]]) -> Curves:
    """Curves over the updates that all seeds have (one that diverged is shorter)."""
    shared = set.intersection(*({row["update"] for row in rows} for rows in by_seed.values()))
    kept = {
        seed: [row for row in rows if row["update"] in shared] for seed, rows in by_seed.items()
    }
    names = next(iter(kept.values()))[0].keys() - {"update"}
    columns = {name: _array([r[name] for r in rows] for rows in kept.values()) for name in names}
    update = np.array(sorted(u for u in shared if u is not None), dtype=np.float64)
    return Curves(update, columns, list(kept))


def _array(rows: Iterable[list[float | int | None]]) -> Series:
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)
