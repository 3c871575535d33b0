"""Handing runs to one of Hydra's launchers, and getting along with runs that die or fail."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from bdhf.config import ConfigError, checked
from bdhf.data import DataError
from bdhf.experiment import EXPERIMENTS, find_experiment
from bdhf.record import first_line
from bdhf.runner import run as make_run
from bdhf.stopping import Stopping
from bdhf.sweep.grid import CONFIG_NAME, Grid, GridRun


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
    """

    command: str
    started: float
    time_limit: float | None
    stop_file: Path
    process: int
    shown: bool

    def stopping(self) -> Stopping:
        """When to stop, for the process of the sweep that asks."""
        parent = self.process if os.getppid() == self.process else None
        return Stopping(self.time_limit, self.started, self.stop_file, parent)


def launch(grid: Grid, orders: Orders, stopping: Stopping) -> dict[Path, str]:
    """Have the grid's runs made by the launcher that its config names.

    A process that dies takes down the whole pool of some launchers. What is left is then launched
    again. Runs that were being made at two such moments come last, one by one: one whose process
    dies also when it is alone has failed.

    Returns:
        What went wrong with which folder, apart from what the folders say themselves.
    """
    task = _Task(orders)
    failed: dict[Path, str] = {}
    deaths = Counter[Path]()
    waiting, alone = list(grid.runs), list[GridRun]()
    while waiting and not stopping():
        began = time.time()
        if _launch_once(grid, waiting, task, failed) is None:
            break
        at_work = [run.folder().path for run in waiting if _was_being_made(run, began)]
        deaths.update(at_work)
        waiting = [run for run in waiting if not _ended(run, failed, began)]
        # Where no run was begun, they die on their way there, and nobody knows which.
        alone += [r for r in waiting if not at_work or deaths[r.folder().path] > 1]
        waiting = [run for run in waiting if run not in alone]
    for run in alone:
        if stopping():
            break
        word = _launch_once(grid, [run], task, failed)
        if word is not None and not stopping():
            failed[run.folder().path] = f"its process died, or never began: {word}"
    return failed


def _launch_once(
    grid: Grid, runs: Sequence[GridRun], task: _Task, failed: dict[Path, str]
) -> str | None:
    """Launch and wait; None, or, where a process died, what the launcher says of it."""
    try:
        returns = _launcher(grid, runs, task).launch([r.overrides for r in runs], 0)
        for run, job in zip(runs, returns, strict=True):
            if job.return_value is not None:
                failed[run.folder().path] = job.return_value
    except Exception as error:  # each launcher has its own for this, and names causes last
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].strip()}"
    return None


def _launcher(grid: Grid, runs: Sequence[GridRun], task: _Task) -> Launcher:
    """The launcher, as Hydra's own sweepers get theirs."""
    # What is pickled for new processes refers to the experiments' modules by name.
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]
    if str(EXPERIMENTS) not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, str(EXPERIMENTS)])
    overrides = [*grid.hydra, *runs[0].overrides]
    config = compose(CONFIG_NAME, overrides, return_hydra_config=True)
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
            # Between two runs a worker minds the stop file only; it must not die of a signal.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with orders.stopping() as stopping:
            if stopping() is not None:
                return None
            try:
                config = checked(composed)
                experiment = find_experiment(config.experiment)
                ended = make_run(experiment, config, stopping, orders.command, orders.shown)
            except (ConfigError, DataError) as error:
                return str(error)
            except Exception as error:  # the other runs go on
                return f"{type(error).__name__}: {first_line(error)}"
            if orders.shown:
                print(ended, flush=True)
            if stopping.orphaned:
                os._exit(1)  # nobody is left to hand the next run to this worker
        return None


def _was_being_made(run: GridRun, since: float) -> bool:
    """Whether it was begun since then and not ended, and no process is at work on it now."""
    folder = run.folder()
    return folder.status == "running" and folder.touched_since(since) and not folder.held()


def _ended(run: GridRun, failed: dict[Path, str], since: float) -> bool:
    folder = run.folder()
    failed_now = folder.status == "failed" and folder.touched_since(since)
    return failed_now or folder.path in failed or folder.is_done(run.config.updates)
