"""From finished run folders to one compact table of curves per scale.

``results/<scale>/curves.csv`` has one row for each evaluation of each run, ``runs.csv`` one row for
each run with how it came about. All that follows (figures, verdicts, the page) reads these two and
nothing else: no run folder, no GPU, no network.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from hydra.errors import HydraException
from numpy.typing import NDArray
from omegaconf import OmegaConf

from bdhf.config import changed_settings, settings_hash
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS, shipped
from bdhf.record import ENDED, number, read_metrics, read_provenance, read_table, write_table

#: What was evaluated on whole data sets when a run had ended.
_FULL_METRICS = tuple(
    f"full_{data}_{metric}"
    for data in ("train", "test", "averaged_test")
    for metric in ("loss", "accuracy")
)

Series = NDArray[np.float64]


class TableError(RuntimeError):
    """A compact table that is missing or of an older version; the message says what to do."""


@dataclass(frozen=True, order=True)
class CellKey:
    """A cell of the grid: all runs that differ by seed only.

    ``settings`` is a hash over everything else that changes a curve (`settings_hash`), ``changed``
    says in words what of it is not as shipped, and ``study`` is the study it was made for: empty
    for a figure's.
    """

    experiment: str
    optimizer: str
    batch_size: int
    curvature_batch_size: int | None
    settings: str
    changed: str = ""
    study: str = ""


@dataclass(frozen=True)
class Curves:
    """The curves of one cell.

    Attributes:
        update: (points,) where any of its seeds was evaluated.
        columns: each other metric, (seeds, points); NaN in gaps, such as after a divergence.
        seeds: the seeds, in the order of the rows.
        diverged: for each seed, why it counts as diverged; empty where it does not.
    """

    update: Series
    columns: dict[str, Series]
    seeds: list[int]
    diverged: list[str]


def collect(results: Path, scale: str) -> tuple[int, list[str]]:
    """Merge the run folders of a scale into the tables in ``results/<scale>/``.

    Runs of the tables whose folders are not here stay, as do longer runs than the folders'.

    Returns:
        How many runs went in or were renewed, and which folders were left out and why.

    Raises:
        TableError: the tables are of an older version.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    left_out = []
    for folder in sorted((results / "runs" / scale).glob("*/*/")):
        provenance = read_provenance(folder)
        status = provenance.get("status", "no provenance.json")
        if status not in ENDED:
            left_out.append(f"{folder}: {status}")
            continue
        run = _run_row(folder, provenance)
        runs.append(run)
        identity = {key: run[key] for key in _IDENTITY}
        rows += [{**identity, **row} for row in read_metrics(folder)]
    if not runs:
        return 0, left_out
    with FileLock(results / "runs" / f".{scale}.lock"):  # two sweeps may end at the same moment
        kept, changed = _merge(results / scale, runs, rows)
    left_out += [f"{run['run']}: the table has a longer one" for run in runs if run["run"] in kept]
    return changed, left_out


def _merge(
    target: Path, runs: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> tuple[set[str], int]:
    """Put runs and rows into the tables.

    Returns:
        The names of the tables' runs that stayed, and how many runs are not as they were before.
    """
    before = read_runs(target)
    kept = _not_superseded(before, runs)
    new = {run["run"] for run in runs} - kept
    known = {row["run"]: row["end"] for row in before}
    changed = sum(run["run"] in new and known.get(run["run"]) != run["end"] for run in runs)
    if new:
        target.mkdir(parents=True, exist_ok=True)
        for name, added in (("runs.csv", runs), ("curves.csv", rows)):
            old: list[dict[str, Any]] = [r for r in read_table(target / name) if r["run"] in kept]
            merged = [*old, *(row for row in added if row["run"] in new)]
            write_table(target / name, sorted(merged, key=lambda row: row["run"]))
    return kept, changed


def mixtures(results: Path, scale: str) -> list[str]:
    """Where the runs of one figure do not belong together: other code, or other data."""
    warnings = []
    runs = read_runs(results / scale)
    for experiment in sorted({run["experiment"] for run in runs}):
        mine = [run for run in runs if run["experiment"] == experiment]
        for column, what in (("git_commit", "commits"), ("data_sha256", "data")):
            values = sorted({value for run in mine for value in run[column].split()})
            if len(values) > 1:
                found = ", ".join(value[:10] for value in values)
                warnings.append(f"{experiment}: its runs are of different {what}: {found}")
        dirty = sum("True" in run["git_dirty"] for run in mine)
        if dirty:
            warnings.append(
                f"{experiment}: {dirty} of {len(mine)} runs are of code with changes not committed"
            )
    return warnings


def _not_superseded(before: list[dict[str, str]], runs: list[dict[str, Any]]) -> set[str]:
    """The table's runs that stay: those without a folder here, or with a shorter one."""
    updates = {run["run"]: run["updates"] for run in runs}
    return {row["run"] for row in before if int(row["updates"]) > updates.get(row["run"], -1)}


def read_runs(folder: Path) -> list[dict[str, str]]:
    """``runs.csv`` of a scale's folder; empty where there is none.

    Raises:
        TableError: it is of an older version.
    """
    path = folder / "runs.csv"
    rows = read_table(path)
    missing = {"settings", "changed", "study", "status"} - set(rows[0] if rows else ())
    if rows and missing:
        raise TableError(
            f"{path} has no column {', '.join(sorted(missing))}: it is of an older version. Delete "
            "it and curves.csv beside it; make collect makes both anew from the run folders"
        )
    return rows


_IDENTITY = (
    "experiment",
    "optimizer",
    "batch_size",
    "curvature_batch_size",
    "settings",
    "seed",
    "run",
)


def _run_row(folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    config = OmegaConf.load(folder / "config.yaml")
    settings: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    sessions = provenance["sessions"]

    def all_of(key: str) -> Any:
        """A session's fact; where sessions differ, each of them."""
        found = list(dict.fromkeys(session.get(key) for session in sessions))
        return found[0] if len(found) == 1 else " ".join(map(str, found))

    return {
        "experiment": config.experiment,
        "optimizer": config.optimizer.name,
        "batch_size": config.batch_size,
        "curvature_batch_size": config.curvature_batch_size,
        "settings": settings_hash(settings, without=("seed",)),
        "changed": _changed(settings),
        "study": settings.get("study"),
        "seed": config.seed,
        "run": folder.name,
        "status": provenance["status"],
        "reason": provenance["reason"],
        "updates": provenance["updates"],
        **{name: provenance.get(name) for name in _FULL_METRICS},
        "peak_memory_mib": round(max(s.get("peak_memory_mib", 0) for s in sessions)),
        "start": sessions[0]["start"],
        "end": sessions[-1]["end"],
        "sessions": len(sessions),
        "device": all_of("device"),
        "processor": all_of("processor"),
        "threads": all_of("threads"),
        "torch": all_of("torch"),
        "git_commit": all_of("git_commit"),
        "git_dirty": all_of("git_dirty"),
        "command": all_of("command"),
        "data": provenance["data"]["source"],
        "data_sha256": provenance["data"]["sha256"],
    }


def _changed(settings: dict[str, Any]) -> str:
    name = settings["optimizer"]["name"]
    try:
        known = shipped(settings["experiment"], settings["scale"], name)
    except (ConfigError, HydraException, ValueError):  # an experiment or optimizer that went away
        return ""
    return changed_settings(settings, *known)


def read_curves(results: Path, scale: str) -> dict[CellKey, Curves]:
    """The curves of all cells of a scale, from its compact table.

    Raises:
        TableError: there is no table, or it is of an older version; the message says what to do.
    """
    folder = results / scale
    for path in (folder / "curves.csv", folder / "runs.csv"):
        if not path.exists():
            raise TableError(
                f"{path} is not there; make collect SCALE={scale} writes it from run folders, "
                f"make reproduce-all SCALE={scale} makes those (SCALE: {_scales()})"
            )
    path = folder / "curves.csv"
    facts = {run["run"]: run for run in read_runs(folder)}
    # The study is outside a run's hash: a run that somebody made by hand is the study's too. One
    # as shipped is a figure's, whatever it was made for.
    studies = {r["settings"]: r["study"] for r in facts.values() if r["study"] and r["changed"]}
    runs: dict[CellKey, dict[int, list[dict[str, float | int | None]]]] = {}
    diverged: dict[tuple[CellKey, int], str] = {}
    ends = dict.fromkeys(facts, -1)
    for line, row in enumerate(_rows(path), start=2):
        try:
            if None in row or None in row.values():
                raise ValueError("not as many values as columns")
            run = facts[row["run"]]
            key, seed = _cell_of(run, studies.get(run["settings"], "")), int(row["seed"])
            metrics = {k: number(v) for k, v in row.items() if k not in _IDENTITY}
            if metrics["epoch"] is None or not ends[row["run"]] < (update := int(row["update"])):
                raise ValueError("evaluations of a run must be in order, each once")
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"{path}, line {line}: {error!r}; {_MEND}") from error
        ends[row["run"]] = update
        runs.setdefault(key, {}).setdefault(seed, []).append(metrics)
        if run["status"] == "diverged":
            diverged[key, seed] = run["reason"]
    for name, run in facts.items():
        if run["status"] == "finished" and ends[name] != int(run["updates"]):
            raise TableError(
                f"{path}: run {name} ends at update {ends[name]}, by runs.csv at {run['updates']}; "
                f"{_MEND}"
            )
    return {
        key: _aligned(by_seed, [diverged.get((key, seed), "") for seed in by_seed])
        for key, by_seed in runs.items()
    }


#: What to do about a damaged table.
_MEND = "git checkout gets it back; or delete it and runs.csv, and make collect writes both"


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return read_table(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path}: {error}; {_MEND}") from error


def _scales() -> str:
    return ", ".join(sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml")))


def _cell_of(run: dict[str, str], study: str) -> CellKey:
    few = run["curvature_batch_size"]
    return CellKey(
        run["experiment"],
        run["optimizer"],
        int(run["batch_size"]),
        int(few) if few else None,
        run["settings"],
        run["changed"],
        study,
    )


def _aligned(
    by_seed: dict[int, list[dict[str, float | int | None]]], diverged: list[str]
) -> Curves:
    """Curves over the updates that any seed has (one that diverged is shorter)."""
    rows_at = [{int(row["update"] or 0): row for row in rows} for rows in by_seed.values()]
    updates = sorted(set[int]().union(*rows_at))
    names = next(iter(by_seed.values()))[0].keys() - {"update"}

    def column(name: str) -> Series:
        values = [[rows.get(update, {}).get(name) for update in updates] for rows in rows_at]
        return np.array([[np.nan if v is None else v for v in row] for row in values], np.float64)

    columns = {name: column(name) for name in sorted(names)}
    return Curves(np.array(updates, np.float64), columns, list(by_seed), diverged)
