"""Where the runs of a sweep stand, read from their folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bdhf.record import RunFolder, read_metrics
from bdhf.sweep.grid import GridRun
from bdhf.training import Row

Standing = Literal["finished", "diverged", "running", "failed", "left"]
STANDINGS: tuple[Standing, ...] = ("finished", "diverged", "running", "failed", "left")


@dataclass(frozen=True)
class State:
    """Where one run stands.

    Attributes:
        run: which one.
        folder: its folder at that moment.
        standing: ``running`` only while a process is at work on it; ``left`` is what was never
            begun, was stopped or was killed.
        row: its last row of metrics; None before the first.
    """

    run: GridRun
    folder: RunFolder
    standing: Standing
    row: Row | None

    @property
    def is_open(self) -> bool:
        """Whether something is left to do."""
        return self.standing not in ("finished", "diverged")

    @property
    def reached(self) -> str:
        """How far it is, in words."""
        if self.folder.status == "stopped":
            return f"stopped at update {self.folder.updates_done} of {self.run.config.updates}"
        if self.row is None:
            return "not begun"
        return f"last seen at update {self.updates} of {self.run.config.updates}"

    @property
    def updates(self) -> int:
        """Updates that need not be made again, at least up to the last evaluation."""
        return 0 if self.row is None else int(self.row["update"] or 0)


def look(run: GridRun) -> State:
    """Where a run stands now."""
    folder = run.folder()
    rows = read_metrics(folder.path)
    return State(run, folder, _standing(folder, run.config.updates), rows[-1] if rows else None)


def _standing(folder: RunFolder, updates: int) -> Standing:
    if folder.is_done(updates):
        return "diverged" if folder.status == "diverged" else "finished"
    if folder.held():
        return "running"
    return "failed" if folder.status == "failed" else "left"


def counted(states: Iterable[State]) -> dict[Standing, int]:
    """How many runs stand where, in the order of `STANDINGS`; what is zero stays out."""
    found = Counter(state.standing for state in states)
    return {standing: found[standing] for standing in STANDINGS if found[standing]}


def in_words(states: Iterable[State]) -> str:
    """As ``18 runs: 12 finished, 6 left``."""
    counts = counted(states)
    return f"{sum(counts.values())} runs: " + ", ".join(f"{n} {word}" for word, n in counts.items())
