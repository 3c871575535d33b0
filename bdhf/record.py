"""A run's folder: everything about a run is on disk, and a run continues from what is there.

config.yaml       resolved configuration
metrics.csv       one row for each evaluation
provenance.json   how it came about, and how it ended
checkpoint.pt     weights and state, to continue from
checkpoint.older.pt   only while it is made: the one before, should that one be damaged
error.log         only after a failure: the traceback

Everything is written under a temporary name first, so a run may be killed at any moment.
"""

from __future__ import annotations

import csv
import fcntl
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
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from bdhf.config import Config, settings_hash, settings_of
from bdhf.data import DataError
from bdhf.progress import say
from bdhf.training import Row

#: Statuses of a run that is over; the others have no whole curve yet.
ENDED = ("finished", "diverged")

#: Seconds for which a run's lock is asked for: more than it takes to look whether it is held.
_PATIENCE = 0.5


class RunFolder:
    """One run's folder under ``results/runs``; see the module's docstring for what is in it."""

    def __init__(self, config: Config) -> None:
        place = config.scale, config.experiment, name(config)
        runs = Path(config.results) / "runs"
        self.path = runs.joinpath(*place)
        self._lock = _lock_file(runs, *place)
        self._rows: list[Row] = []
        self._provenance = read_provenance(self.path)

    @property
    def status(self) -> str:
        """``new``, ``running``, ``stopped``, ``finished``, ``diverged`` or ``failed``.

        A run whose process was killed is ``running`` still, and not `held`.
        """
        return str(self._provenance.get("status", "new"))

    @property
    def reason(self) -> str:
        """Why the last session ended as it did."""
        return str(self._provenance.get("reason", ""))

    @property
    def updates_done(self) -> int:
        """At which update the run's last session ended."""
        return int(self._provenance.get("updates", 0))

    @property
    def provenance(self) -> dict[str, Any]:
        """What ``provenance.json`` says; empty for a new run."""
        return self._provenance

    def is_done(self, updates: int) -> bool:
        """Whether nothing is left to do for a budget of so many updates."""
        finished = self.status == "finished" and self.updates_done >= updates
        return finished or self.status == "diverged"

    @contextmanager
    def held_alone(self) -> Iterator[bool]:
        """Keep other processes out of the run; False where one is at work on it already."""
        with _alone(self._lock) as free:
            self._provenance = read_provenance(self.path)  # others may have been here before
            yield free

    def held(self) -> bool:
        """Whether a process is at work on the run."""
        if not self._lock.exists():
            return False
        # A shared lock, so that those who look do not see each other.
        with self._lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def touched_since(self, moment: float) -> bool:
        """Whether a session began or ended since then, in seconds since the epoch."""
        file = self.path / "provenance.json"
        return file.exists() and file.stat().st_mtime >= moment

    def begin(self, config: Config, facts: dict[str, Any], command: str) -> None:
        """Open the folder for a session of training, which ``command`` asked for.

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
        for left_behind in self.path.glob(f"{_TEMPORARY}*"):  # by a process that was killed
            left_behind.unlink()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        values = OmegaConf.to_yaml(OmegaConf.create(settings_of(config)))
        _write(self.path / "config.yaml", values.encode())
        circumstances = _circumstances(facts.pop("device"), facts.pop("ranks"), command)
        session = {"start": _now(), "end": None, **circumstances}
        self._provenance.update(facts, sessions=[*self._provenance.get("sessions", []), session])
        self._conclude("running", "")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, with the metrics up to it; None: there is none.

        Raises:
            RuntimeError: there are checkpoints, and none can be read; or the metrics that belong
                to one are gone.
        """
        self._rows = []
        damaged = {}
        for path in filter(Path.exists, (self._checkpoint, self._older_checkpoint)):
            try:
                checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                damaged[path] = f"{path} cannot be read ({first_line(error)})"
                continue
            last = checkpoint["progress"]["update"]
            for file, fault in damaged.items():
                say(f"{fault}; the older checkpoint serves, of update {last}")
                file.unlink()  # or the next checkpoint would take it for a good older one
            self._keep_rows_until(last)
            return checkpoint
        if damaged:
            raise RuntimeError("; ".join(damaged.values()) + "; delete it to start this run anew")
        return None

    def _keep_rows_until(self, update: int) -> None:
        """Later rows belong to updates that will be made again."""
        rows = read_metrics(self.path)
        self._rows = [row for row in rows if int(row["update"] or 0) <= update]
        if not self._rows:
            raise RuntimeError(
                f"{self.path / 'metrics.csv'} is gone or empty, and the checkpoint is of update "
                f"{update}; delete the checkpoint to start this run anew"
            )
        if len(self._rows) < len(rows):
            write_table(self.path / "metrics.csv", self._rows)

    def drop_rows_off_the_grid(self, every: int) -> None:
        """Drop a smaller budget's last row where an evaluation was not due."""
        self._rows = [row for row in self._rows if int(row["update"] or 0) % every == 0]

    @property
    def last_row(self) -> int:
        """The update of the last row of metrics."""
        return int(self._rows[-1]["update"] or 0)

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint, all or nothing; the one before is kept until the run ends."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with _written_aside(self._checkpoint, buffer.getbuffer()) as new:
            if self._checkpoint.exists():
                os.replace(self._checkpoint, self._older_checkpoint)
            os.replace(new, self._checkpoint)

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def _older_checkpoint(self) -> Path:
        return self.path / "checkpoint.older.pt"

    def append(self, row: Row) -> None:
        """Add a row of metrics."""
        self._rows.append(row)
        write_table(self.path / "metrics.csv", self._rows)

    def end(self, status: str, reason: str, updates: int, **facts: Any) -> None:
        """Close the session and say how it ended."""
        self._provenance["sessions"][-1].update(end=_now(), peak_memory_mib=_peak_memory())
        self._provenance.update(facts, updates=updates)
        self._conclude(status, reason)
        if status != "stopped":
            self._older_checkpoint.unlink(missing_ok=True)

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Whatever is raised inside is written to the folder before it goes on its way."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # the disk may be full
                self._provenance["sessions"][-1]["end"] = _now()
                if isinstance(error, KeyboardInterrupt):
                    self._conclude("stopped", "interrupted")
                else:
                    self._conclude("failed", f"{type(error).__name__}: {first_line(error)}")
                    _write(self.error_log, traceback.format_exc().encode())
            raise
        self.error_log.unlink(missing_ok=True)

    @property
    def error_log(self) -> Path:
        """Where a failure's traceback is."""
        return self.path / "error.log"

    def _conclude(self, status: str, reason: str) -> None:
        self._provenance.update(status=status, reason=reason)
        write_json(self.path / "provenance.json", self._provenance)


@contextmanager
def alone_with(runs: Path, scale: str, experiment: str, name: str) -> Iterator[bool]:
    """Keep processes out of a run in the folder ``runs``; False where one is at work on it."""
    with _alone(_lock_file(runs, scale, experiment, name)) as free:
        yield free


def _lock_file(runs: Path, scale: str, experiment: str, name: str) -> Path:
    return runs / ".locks" / f"{scale}-{experiment}-{name}"


@contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Hold a lock, which the kernel frees with this process, however it ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file).acquire(timeout=_PATIENCE)
    except Timeout:
        yield False
        return
    with lock:
        yield True


def name(config: Config) -> str:
    """The name of a run's folder: what one looks for, and a hash over all that counts."""
    sizes = sizes_in_short(config.batch_size, config.curvature_batch_size)
    return f"{config.optimizer.name}-{sizes}-seed{config.seed}-{settings_hash(settings_of(config))}"


def sizes_in_short(batch_size: int, curvature_batch_size: int | None) -> str:
    """As ``b2000-c250``, or ``b125`` without a curvature mini-batch."""
    few = "" if curvature_batch_size is None else f"-c{curvature_batch_size}"
    return f"b{batch_size}{few}"


def read_provenance(folder: Path) -> dict[str, Any]:
    """A run's ``provenance.json``: empty for a new run, a failed run's where it is damaged."""
    path = folder / "provenance.json"
    if not path.exists():
        return {}
    try:
        provenance: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        return {"status": "failed", "reason": f"{path} cannot be read ({error})"}
    return provenance


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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary as JSON; NaN and infinity become text, since JSON has no such numbers."""
    _write(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def number(text: str) -> float | int | None:
    """A value of a table: an int, a float, or None for a gap."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


#: How the names of files begin that are being written.
_TEMPORARY = ".writing-"


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write under a temporary name, then rename: readers and crashes see all of it or nothing."""
    with _written_aside(path, content) as new:
        os.replace(new, path)


@contextmanager
def _written_aside(path: Path, content: bytes | memoryview) -> Iterator[str]:
    """The content in a file beside ``path``, on the disk for good, to be given its name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_TEMPORARY}{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def first_line(error: BaseException) -> str:
    """What an error says first; some of torch's go on for a page."""
    return next(iter(str(error).strip().splitlines()), "")


def _circumstances(device: str, ranks: int, command: str) -> dict[str, Any]:
    """What may matter for telling two sessions apart, and is nobody's setting."""
    return {
        **version(),
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "ranks": ranks,
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def version() -> dict[str, Any]:
    """The commit of the code, and whether it was changed."""
    packed = (Path(__file__).parent / "commit.txt").read_text().strip()
    if not packed.startswith("$"):  # git writes it into archives of the repository
        return {"git_commit": packed, "git_describe": packed[:7], "git_dirty": False}
    changes = _git("status", "--porcelain", "--", *_CODE)
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_describe": _git("describe", "--always", "--tags"),
        "git_dirty": None if changes is None else bool(changes),
    }


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


#: What a run's curve depends on; tables and figures of other runs do not count as changes.
_CODE = ("bdhf", "experiments", "configs", "scripts")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
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
