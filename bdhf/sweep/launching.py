"""Handing runs to one of Hydra's launchers, and getting along with runs that die or fail."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from bdhf.config import checked
from bdhf.data import DataError, load
from bdhf.errors import ConfigError
from bdhf.experiment import EXPERIMENTS, find_experiment
from bdhf.progress import say
from bdhf.record import RunFolder, first_line
from bdhf.runner import run as make_run
from bdhf.stopping import Stopping
from bdhf.sweep.grid import Grid, GridRun

#: A process makes many runs, most on the same data as the one before.
_loaded = functools.lru_cache(maxsize=1)(load)

#: Seconds between two looks at what other processes are at.
_PAUSE = 1.0

#: Held by a process while it makes a run.
_at_work = threading.Lock()


@dataclass(frozen=True)
class Orders:
    """What a sweep tells the processes that make its runs.

    Attributes:
        command: what the user typed.
        started: when the sweep began, in seconds since the epoch; the time limit counts from here.
        time_limit: seconds, or None.
        stop_file: where there is such a file, the sweep is to stop.
        process: the sweep's own.
        shown: whether each run displays its progress.
        labels: what the runs are called there, by folder.
        jobs: whether the runs are jobs of a cluster: they outlive the sweep's process, and the
            cluster's signals are about one of them.
    """

    command: str
    started: float
    time_limit: float | None
    stop_file: Path
    process: int
    shown: bool
    labels: dict[Path, str]
    jobs: bool = False

    def stopping(self) -> Stopping:
        """When to stop, for the process of the sweep that asks."""
        common = self.time_limit, self.started, self.stop_file
        if os.getpid() == self.process:
            return Stopping(*common)
        if self.jobs:
            # Before its time is over submitit's job gets this; submitit then queues it again. It
            # has a handler of its own for SIGTERM too, which must stay.
            return Stopping(*common, signals=(signal.SIGUSR2,))
        return Stopping(*common, parent=self.process)


def launch(
    grid: Grid, orders: Orders, stopping: Stopping, note: Callable[[str], None] = say
) -> dict[Path, str]:
    """Have the grid's runs made by the launcher that its config names, until none is open.

    A process that dies takes down the whole pool of some launchers. What is open is then launched
    again. Runs whose process died twice come last, one by one: one whose process dies also when it
    is alone has failed. Runs that other processes are at work on are waited for, and taken over
    where those stop.

    Args:
        grid: the runs, and Hydra's overrides.
        orders: for the processes that make them.
        stopping: when to stop.
        note: gets a line to show where there is something to say.

    Returns:
        What went wrong with which folder, apart from what the folders say themselves.
    """
    task = _Task(orders)
    failed: dict[Path, str] = {}
    deaths = Counter[Path]()
    waited = False
    while (
        left := [r for r in grid.runs if _is_open(r, failed, orders.started)]
    ) and not stopping():
        free = [run for run in left if not run.folder().held()]
        if not free:
            if not waited:
                note(f"waiting for {len(left)} runs that another process is at work on")
            waited = True
            _pause()
            continue
        batch = [run for run in free if deaths[run.folder().path] < 2] or free[:1]
        began = time.time()
        word = _launch_once(grid, batch, task, failed)
        if word is None:
            continue
        if not stopping():
            note(f"a process died, or never began, and the others with it; going on. {word}")
        # Where none was begun, they die on their way there, and nobody knows which.
        died = [run.folder().path for run in batch if _was_being_made(run, began)]
        deaths.update(died or [run.folder().path for run in batch])
        path = batch[0].folder().path
        if len(batch) == 1 and deaths[path] > 1 and not stopping():
            failed[path] = f"its process died, or never began: {word}"
    return failed


def _pause() -> None:
    time.sleep(_PAUSE)


def _launch_once(
    grid: Grid, runs: Sequence[GridRun], task: _Task, failed: dict[Path, str]
) -> str | None:
    """Launch and wait; None, or, where a process died, what the launcher says of it."""
    try:
        returns = _launcher(grid, runs, task).launch([r.overrides for r in runs], 0)
        for run, job in zip(runs, returns, strict=True):
            if job.return_value is not None:
                failed[run.folder().path] = job.return_value
    except Exception as error:  # each launcher has its own for this
        lines = str(error).strip().splitlines() or [""]
        telling = [line for line in lines if "exit code" in line] or lines[-1:]
        return f"{type(error).__name__}: {telling[0].strip()}"
    return None


def _launcher(grid: Grid, runs: Sequence[GridRun], task: _Task) -> Launcher:
    """The launcher, as Hydra's own sweepers get theirs."""
    # What is pickled for new processes refers to the experiments' modules by name.
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]
    if str(EXPERIMENTS) not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, str(EXPERIMENTS)])
    config = grid.composed(runs[0])
    loader = GlobalHydra.instance().config_loader()
    context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
    return Plugins.instance().instantiate_launcher(context, task, config)


@dataclass(frozen=True)
class _Task:
    """What a launcher calls in each of its processes, once a run."""

    orders: Orders

    def __call__(self, composed: DictConfig) -> str | None:
        """Make the run; what went wrong before it had a folder to say so, if anything did."""
        orders = self.orders
        if os.getpid() != orders.process:
            # Between two runs a worker minds the stop file only: its death would end the others.
            # A cluster's SIGTERM is submitit's.
            for number in (signal.SIGINT,) if orders.jobs else (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            if not orders.jobs:
                _end_with(orders.process)
        with _at_work, orders.stopping() as stopping:
            word = self._make(composed, stopping) if stopping() is None else None
            if stopping.orphaned:
                os._exit(1)  # nobody is left to hand the next run to this worker
        if orders.jobs:
            stopping.pass_on()
        return word

    def _make(self, composed: DictConfig, stopping: Stopping) -> str | None:
        try:
            config = checked(composed)
            experiment = find_experiment(config.experiment)
            orders = self.orders
            label = orders.labels.get(RunFolder(config).path)
            ended = make_run(
                experiment, config, stopping, orders.command, orders.shown, label, _loaded
            )
            if orders.shown:
                say(str(ended))
        except (ConfigError, DataError) as error:
            return str(error)
        except Exception as error:  # the other runs go on
            return f"{type(error).__name__}: {first_line(error)}"
        return None


@functools.cache
def _end_with(parent: int) -> None:
    """Have this worker end when the sweep's process has gone, though nobody wakes it for that.

    A run at work stops by itself. Between runs a worker waits for the next one, for minutes, or,
    where its parent died while it was telling what to do next, for ever.
    """

    never = threading.Event()

    def wait() -> None:
        while os.getppid() == parent:
            never.wait(_PAUSE)
        with _at_work:
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _is_open(run: GridRun, failed: dict[Path, str], since: float) -> bool:
    """Whether it is not done, and has not failed since then."""
    folder = run.folder()
    failed_now = folder.status == "failed" and folder.touched_since(since)
    return not (failed_now or folder.path in failed or folder.is_done(run.config.updates))


def _was_being_made(run: GridRun, since: float) -> bool:
    """Whether it was begun since then and not ended."""
    folder = run.folder()
    return folder.status == "running" and folder.touched_since(since)
