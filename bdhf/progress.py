"""Live progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bdhf.training import Row


class LastingConsole(Console):
    """A console that falls silent where nobody reads any more (``... | head``); work goes on."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on, ``print`` too, and do not exit as rich does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print a line, for people."""
    LastingConsole(highlight=False).print(text, markup=False, soft_wrap=True)


class ProgressDisplay:
    """Shows one run's updates and latest metrics, unless not ``shown``; a context manager."""

    def __init__(
        self,
        title: str,
        updates: int,
        done: int = 0,
        shown: bool = True,
        console: Console | None = None,
    ) -> None:
        self._title, self._updates = title, updates
        self._console = console or LastingConsole(highlight=False, quiet=not shown)
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and shown:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=updates, completed=done, metrics="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """``done`` updates are made."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def row(self, row: Row) -> None:
        """Show a row of metrics."""
        if self._bar is not None:
            self._bar.update(self._task, metrics=described(row))
            return
        passed = time.monotonic() - self._started
        self._console.print(
            f"{self._title}  update {row['update']}/{self._updates}  {described(row)}"
            f"  [{passed:.0f} s]",
            markup=False,
            soft_wrap=True,
        )


def described(row: Row) -> str:
    """The metrics of a row that one watches, in one line."""
    parts = [f"train {row['train_loss']:.4g}", f"test {row['test_loss']:.4g}"]
    if row["test_accuracy"] is not None:
        parts.append(f"accuracy {100 * row['test_accuracy']:.1f} %")
    iterations = [v for k, v in row.items() if k.startswith("cg_iterations") and v is not None]
    if iterations:
        parts.append("CG " + "+".join(str(i) for i in iterations))
    return "  ".join(parts)
