"""Run folders from another machine: an archive of its ``results/runs``, or a folder like it."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from bdhf.record import (
    ENDED,
    alone_with,
    read_metrics,
    read_provenance,
    read_table,
    write_table,
)

#: Tables that `scripts/measure.py` writes, and what tells their rows apart.
MEASURED = {
    "update_times.csv": ("experiment", "seed"),
    "cg_solves.csv": ("experiment", "seed", "state"),
}


class ArchiveError(ValueError):
    """An archive that cannot be used; the message names it and what is expected."""


def bring_in(source: Path, results: Path) -> list[str]:
    """Copy the run folders of ``source`` to ``results/runs``, where they can be continued too.

    A run that is here already is replaced only by one that went further.

    Args:
        source: a tar archive, compressed or not, or a folder; with
            ``<scale>/<experiment>/<run>/`` in it at any depth.
        results: the results folder, made where it is not there.

    Returns:
        What was done with each run, in words.

    Raises:
        ArchiveError: there is no such file, it is no tar, or there is no run in it.
    """
    runs = results / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=runs, prefix=".incoming-") as scratch,
        _opened(source, Path(scratch) / "archive") as folder,
    ):
        found = sorted(path.parent for path in folder.rglob("provenance.json"))
        if not found:
            raise ArchiveError(
                f"{source}: no run in it; expected <scale>/<experiment>/<run>/provenance.json, as "
                "in an archive of results/runs"
            )
        said = [_take(run, runs, Path(scratch)) for run in found]
        return said + [line for table in MEASURED for line in _take_tables(folder, table, results)]


@contextmanager
def _opened(source: Path, folder: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
        return
    if not hasattr(tarfile, "data_filter"):
        raise ArchiveError(f"{source}: reading archives safely needs Python 3.10.12 or newer")
    try:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")  # nothing outside the folder, no devices
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ArchiveError(f"{source}: cannot be read as a tar archive ({error})") from error
    yield folder


def _take(theirs: Path, runs: Path, scratch: Path) -> str:
    scale, experiment, name = theirs.resolve().parts[-3:]
    try:
        config = OmegaConf.load(theirs / "config.yaml")
        belongs = (config.scale, config.experiment) == (scale, experiment)
    except Exception as error:  # whatever is wrong with it
        return f"{name}: left out, its config.yaml cannot be read ({error})"
    if not belongs:
        return f"{name}: left out, its config is of {config.scale}/{config.experiment}"
    ours = runs / scale / experiment / name
    with alone_with(runs, scale, experiment, name) as free:
        if not free:
            return f"{name}: left out, a process is at work on it here"
        if ours.exists() and _how_far(ours) >= _how_far(theirs):
            return f"{name}: the one here went as far"
        copy = scratch / "copy" / name
        shutil.copytree(theirs, copy)
        ours.parent.mkdir(parents=True, exist_ok=True)
        if ours.exists():
            os.replace(ours, scratch / f"replaced-{name}")
        os.replace(copy, ours)
    return f"{name}: brought in, {_how_far(ours)[0]} updates"


def _take_tables(folder: Path, name: str, results: Path) -> list[str]:
    """What was measured on runs there; what was measured here stays."""
    said = []
    for path in sorted(folder.rglob(name)):
        keys = MEASURED[name]
        target = results / path.parent.name / name
        ours = read_table(target) if target.exists() else []
        known = {tuple(row[key] for key in keys) for row in ours}
        new = [row for row in read_table(path) if tuple(row[key] for key in keys) not in known]
        if new:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_table(target, [*ours, *new])
            said.append(f"{target}: {len(new)} rows brought in")
    return said


def _how_far(folder: Path) -> tuple[int, bool]:
    """A run's last update with a row of metrics, and whether the run is over."""
    rows = read_metrics(folder)
    over = read_provenance(folder).get("status") in ENDED
    return int(rows[-1]["update"] or 0) if rows else -1, over
