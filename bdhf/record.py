"""A run's folder: everything about a run is on disk, and a run continues from what is there.

config.yaml       resolved configuration
metrics.csv       one row for each evaluation
provenance.json   how it came about, and how it ended
checkpoint.pt     weights and state, to continue from
error.log         only after a failure: the traceback
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bdhf.config import Config, settings_hash, settings_of
from bdhf.data import DataError
from bdhf.training import Row


class RunFolder:
    """One run's folder under ``results/runs``; see the module's docstring for what is in it."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.results) / "runs" / config.scale / config.experiment / name(config)
        self._rows: list[Row] = []
        self._provenance = self._read_provenance()

    @property
    def status(self) -> str:
        """``new``, ``running``, ``stopped``, ``finished``, ``diverged`` or ``failed``."""
        return str(self._provenance.get("status", "new"))

    @property
    def updates_done(self) -> int:
        """At which update the run's last session ended."""
        return int(self._provenance.get("updates", 0))

    def begin(self, config: Config, facts: dict[str, Any]) -> None:
        """Open the folder for a session of training.

        Raises:
            DataError: the run was begun on other data.
        """
        before, now = self._provenance.get("data"), facts["data"]
        if before is not None and before["sha256"] != now["sha256"]:
            raise DataError(
                f"{self.path} was begun on other data ({before['source']}) than data.root has now "
                f"({now['source']}); name the first one's folder, or another results=FOLDER"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        values = OmegaConf.to_yaml(OmegaConf.create(settings_of(config)))
        _write(self.path / "config.yaml", values.encode())
        session = {"start": _now(), "end": None, **_circumstances(facts.pop("device"))}
        self._provenance.update(facts, sessions=[*self._provenance.get("sessions", []), session])
        self._conclude("running", "")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, with the metrics up to it; None where there is none."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RuntimeError(
                f"{path} cannot be read ({error}); delete it to start this run anew"
            ) from error
        # Rows after the checkpoint belong to updates that will be made again.
        last = checkpoint["progress"]["update"]
        self._rows = [row for row in read_metrics(self.path) if int(row["update"] or 0) <= last]
        return checkpoint

    def drop_rows_off_the_grid(self, every: int) -> None:
        """Drop a smaller budget's last row where an evaluation was not due."""
        self._rows = [row for row in self._rows if int(row["update"] or 0) % every == 0]

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint, all or nothing."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        _write(self.path / "checkpoint.pt", buffer.getbuffer())

    def append(self, row: Row) -> None:
        """Add a row of metrics."""
        self._rows.append(row)
        write_table(self.path / "metrics.csv", self._rows)

    def end(self, status: str, reason: str, updates: int, **facts: Any) -> None:
        """Close the session and say how it ended."""
        self._provenance["sessions"][-1].update(end=_now(), peak_memory_mib=_peak_memory())
        self._provenance.update(facts, updates=updates)
        self._conclude(status, reason)

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Whatever is raised inside is written to the folder before it goes on its way."""
        try:
            yield
        except BaseException as error:  # also an exit: a display whose pipe is closed ends so
            _write(self.path / "error.log", traceback.format_exc().encode())
            self._provenance["sessions"][-1]["end"] = _now()
            self._conclude("failed", f"{type(error).__name__}: {error}")
            raise
        (self.path / "error.log").unlink(missing_ok=True)

    def _conclude(self, status: str, reason: str) -> None:
        self._provenance.update(status=status, reason=reason)
        text = json.dumps(_finite(self._provenance), indent=2) + "\n"
        _write(self.path / "provenance.json", text.encode())

    def _read_provenance(self) -> dict[str, Any]:
        path = self.path / "provenance.json"
        if not path.exists():
            return {}
        provenance: dict[str, Any] = json.loads(path.read_text())
        return provenance


def name(config: Config) -> str:
    """The name of a run's folder: what one looks for, and a hash over all that counts."""
    curvature = config.curvature_batch_size
    sizes = f"b{config.batch_size}" + ("" if curvature is None else f"-c{curvature}")
    return f"{config.optimizer.name}-{sizes}-seed{config.seed}-{settings_hash(settings_of(config))}"


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run's ``metrics.csv``; whole numbers come back as int, gaps as None."""
    rows = read_table(folder / "metrics.csv")
    return [{key: number(value) for key, value in row.items()} for row in rows]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write_table` wrote, as text; none where there is no table."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with a column for every key that any of them has; None leaves a gap."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def number(text: str) -> float | int | None:
    """A value of a table: an int, a float, or None for a gap."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write under a temporary name, then rename: readers and crashes see all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _circumstances(device: str) -> dict[str, Any]:
    """What may matter for telling two sessions apart, and is nobody's setting."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _peak_memory() -> float:
    """The peak memory in MiB of the session on a GPU, else that of the process so far."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinity as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
