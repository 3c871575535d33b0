"""A sweep's tables: what is left to do, what is being done, what went wrong."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bdhf.progress import LastingConsole, described
from bdhf.sweep.estimate import Estimate, duration
from bdhf.sweep.grid import GridRun
from bdhf.sweep.state import State, counted, in_words, look

#: Columns where the output is no terminal, so that paths stay on one line.
_WIDE = 160

#: Seconds between two looks at the run folders: they cost a run in the same process some time.
_REFRESH = 5.0


def make_console() -> Console:
    """Standard output, wide where it is a file."""
    console = LastingConsole(highlight=False)
    return console if console.is_terminal else LastingConsole(highlight=False, width=_WIDE)


def plan_table(states: Sequence[State], estimate: Estimate) -> Table:
    """One row for each cell: where its seeds stand, and how long the rest will take."""
    table = _table("cell", "updates", "seeds", "time left")
    cells: dict[tuple[str, str], list[State]] = {}
    for state in states:
        name = state.run.label.replace(f" seed {state.run.config.seed}", "")
        cells.setdefault((name, str(state.run.config.updates)), []).append(state)
    for cell, seeds in sorted(cells.items(), key=lambda item: item[0][0].split()[0]):
        left = sum(map(estimate.seconds, seeds))
        words = ", ".join(f"{count} {word}" for word, count in counted(seeds).items())
        table.add_row(*cell, words, duration(left) if left else "")
    return table


def result_table(states: Sequence[State]) -> Table | None:
    """What the runs that ended came to; None where none did."""
    table = _table("run", "", "train loss", "test loss", "test accuracy")
    for state in states:
        if not state.is_open and state.row is not None:
            values = [state.row.get(key) for key in ("train_loss", "test_loss", "test_accuracy")]
            texts = ("" if value is None else f"{value:.4g}" for value in values)
            table.add_row(state.run.label, state.standing, *texts)
    return table if table.row_count else None


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def disk_in_words(estimate: Estimate, results: Path) -> str:
    """As ``12 MB on disk, about 500 MB at most; 80 GB free``."""
    now, later = estimate.disk()
    there = next(p for p in (results, *results.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    words = f"{_size(now)} on disk now, about {_size(later)} at most; {_size(free)} free"
    return words + (": NOT ENOUGH" if later - now > free else "")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class LiveTable:
    """The runs being made, drawn anew while a sweep lasts; nothing where there is no terminal.

    Read from the run folders by a thread, so it is the same for every launcher.
    """

    def __init__(self, runs: Sequence[GridRun], console: Console, jobs: int) -> None:
        self._states, self._jobs = [look(run) for run in runs], jobs
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._shown = console.is_terminal

    def __enter__(self) -> LiveTable:
        if self._shown:
            self._live.start()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._shown:
            self._thread.join()
            self._live.stop()

    def _watch(self) -> None:
        while True:
            self._live.update(live_view(self._states, self._jobs), refresh=True)
            if self._over.wait(_REFRESH):
                return
            self._states = [look(state.run) if state.is_open else state for state in self._states]


def live_view(states: Sequence[State], jobs: int) -> Group:
    """The counts, a row for each run at work, and how long the rest takes, as far as is known."""
    estimate = Estimate(states, jobs, trials=False)
    table = Table("running", "update", "", box=None)
    for state in states:
        if state.standing == "running":
            metrics = "" if state.row is None else described(state.row)
            config = state.run.config
            table.add_row(state.run.label, f"{state.updates}/{config.updates}", metrics)
    left = f"{estimate.words()} left, {jobs} at once"
    return Group(Text(in_words(states)), table, Text(left))


def failure_table(states: Sequence[State], failed: dict[Path, str]) -> Table | None:
    """Which runs failed, why, and the log of each; None where none did."""
    rows = []
    for state in states:
        folder = state.folder
        recorded = state.standing == "failed"
        if recorded or folder.path in failed:
            reason = folder.reason if recorded else failed[folder.path]
            log = str(folder.error_log) if recorded and folder.error_log.exists() else ""
            rows.append((state.run.label, reason, log))
    if not rows:
        return None
    logs = any(log for _, _, log in rows)
    table = Table("failed", "reason", *(["log"] if logs else []), box=None)
    for column in table.columns:
        column.overflow = "fold"
    before = None
    for label, reason, log in rows:
        cells = [Text(label), Text("the same" if reason == before else reason), Text(log)]
        table.add_row(*(cells if logs else cells[:2]))
        before = reason
    return table
