"""Sweeps: every run of a grid, made by any of Hydra's launchers, surviving anything.

A run is idempotent (`bdhf.runner.run`): finished it is skipped, unfinished continued, failed tried
again. So repeating a sweep's command is how it is resumed.

grid.py       from a command line to runs
state.py      where they stand
estimate.py   how long the rest takes
launching.py  having them made
display.py    tables of all that
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra import initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from bdhf.config import device_of
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS
from bdhf.mirror import mirrored
from bdhf.sweep.display import (
    LiveTable,
    disk_in_words,
    failure_table,
    make_console,
    plan_table,
    result_table,
)
from bdhf.sweep.estimate import Estimate, duration
from bdhf.sweep.grid import Grid, GridRun, expand
from bdhf.sweep.launching import Orders, launch
from bdhf.sweep.state import State, in_words, look
from bdhf.training import Outcome

__all__ = ["plan", "sweep"]

#: So many runs that are left are named one by one.
_NAMED = 20


def sweep(
    arguments: Sequence[str],
    command: str,
    afterwards: Callable[[Path, str], None] | None = None,
) -> int:
    """Make the runs that ``key=value,value`` arguments ask for; the exit code of the process.

    Args:
        arguments: Hydra overrides, as after ``--multirun``.
        command: what the user typed, for the runs' provenance.
        afterwards: called at the end with the results folder and each scale of the runs, unless a
            signal came.

    Returns:
        0, also where runs diverged, are made by another process or are left by ``time_limit``;
        1 where a run failed or was refused; 128 + n after signal n.
    """
    started = time.time()

    def use(grid: Grid) -> int:
        exit_code = _make(grid, command, started, make_console())
        if afterwards is not None and exit_code < 128:
            for results, scale in sorted({(r.config.results, r.config.scale) for r in grid.runs}):
                afterwards(Path(results), scale)
        return exit_code

    return _expanded(arguments, use)


def plan(arguments: Sequence[str]) -> int:
    """Show what `sweep` would do: what is done, what is left, how long that will take."""
    return _expanded(arguments, lambda grid: _show_plan(grid, make_console()))


def _expanded(arguments: Sequence[str], use: Callable[[Grid], int]) -> int:
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            _complain(f"{argument}: a sweep takes key=value and --multirun only")
            return 1
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            grid = expand(arguments)
            for message, count in grid.refused.items():
                _complain(f"{message} ({count} runs)" if count > 1 else message)
            if not grid.runs:
                if not grid.refused:
                    _complain("nothing is asked for: the study has no runs of this at this scale")
                return 1
            exit_code = use(grid)
            if grid.refused:
                _complain(f"{sum(grid.refused.values())} runs were refused, as said at the start")
            return exit_code or int(bool(grid.refused))
    except OverrideParseException as error:
        _complain(f"{error.override}: {error}")
    except (ConfigError, HydraException, OmegaConfBaseException, OSError) as error:
        _complain(str(error))
    return 1


def _complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)


def _show_plan(grid: Grid, console: Console) -> int:
    states = [look(run) for run in grid.runs]
    launcher = _launcher_config(grid)
    jobs = _at_once(launcher)
    estimate = Estimate(states, jobs)
    console.print(plan_table(states, estimate))
    console.print(in_words(states))
    at_once = f", {jobs} runs at once" if jobs > 1 else ""
    if "submitit" in launcher._target_:
        console.print("the times are this machine's; how fast the cluster is, nobody here knows")
    elif estimate.total():
        console.print(f"{estimate.words()} on this machine{at_once}, if CG uses all its iterations")
    console.print(disk_in_words(estimate, Path(grid.runs[0].config.results)))
    return 0


def _make(grid: Grid, command: str, started: float, console: Console) -> int:
    launcher = _launcher_config(grid)  # refused where it is wrong, whatever is left to do
    states = [look(run) for run in grid.runs]
    left = [state.run for state in states if state.is_open]
    failed: dict[Path, str] = {}
    outcome: Outcome | None = None
    with mirrored([run.folder().path for run in left], grid.runs[0].config.wandb):
        if left:
            console.print(in_words(states))
            failed, outcome = _launch(grid, left, launcher, command, started, console)
        if outcome is not None:
            console.print(f"stopped, {outcome.reason}")
        states = [look(run) for run in grid.runs]
        _conclude(states, failed, console)
    if outcome is not None and outcome.exit_code:
        return outcome.exit_code
    return int(bool(failed) or any(state.standing == "failed" for state in states))


def _launch(
    grid: Grid,
    left: list[GridRun],
    launcher: DictConfig,
    command: str,
    started: float,
    console: Console,
) -> tuple[dict[Path, str], Outcome | None]:
    """Make the runs that are left; what went wrong, and why it was stopped, if it was."""
    config = left[0].config
    at_once, jobs = _at_once(launcher), "submitit" in launcher._target_
    if not jobs:
        _warn_of_days([look(run) for run in left], at_once, console)
    stop_file = Path(config.results) / "runs" / ".sweep" / f"stop-{os.getpid()}-{started:.0f}"
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    shown, process = not console.is_terminal, os.getpid()
    labels = {run.folder().path: run.label for run in left}
    orders = Orders(command, started, config.time_limit, stop_file, process, shown, labels, jobs)
    try:
        with orders.stopping() as stopping, LiveTable(grid.runs, console, at_once):
            failed = launch(replace(grid, runs=left), orders, stopping, console.print)
    except KeyboardInterrupt:  # the second Ctrl-C; jobs that still wait are to find the file
        return {}, Outcome("stopped", "interrupted", 128 + signal.SIGINT)
    # A new one, since the other may have looked at the file a moment too early.
    outcome = stopping() or orders.stopping()()
    stop_file.unlink(missing_ok=True)
    return failed, outcome


def _conclude(states: Sequence[State], failed: dict[Path, str], console: Console) -> None:
    """Say what has come of it, and what there is to do."""
    if len(states) <= _NAMED and (results := result_table(states)) is not None:
        console.print(results)
    console.print(in_words(states))
    for state in states:
        if state.standing == "diverged":
            console.print(f"diverged: {state.run.label}: {state.folder.reason}")
    if (table := failure_table(states, failed)) is not None:
        console.print(table)
    running = sum(state.standing == "running" for state in states)
    if running:
        console.print(f"{running} are being made by another process")
    left = [s for s in states if s.standing == "left" and s.folder.path not in failed]
    for state in left[:_NAMED]:
        console.print(f"left: {state.run.label}, {state.reached}")
    if len(left) > _NAMED:
        console.print(f"left: {len(left) - _NAMED} more; make plan shows them all")
    if left or table is not None:
        console.print("Repeat the command to go on.")


def _warn_of_days(states: Sequence[State], jobs: int, console: Console) -> None:
    """At paper scale on a CPU."""
    config = states[0].run.config
    if config.scale == "paper" and device_of(config).type == "cpu":
        time_left = duration(Estimate(states, jobs).total())
        console.print(
            f"scale=paper is for a GPU. On this machine's CPU it takes about {time_left}. make "
            "reproduce-all SCALE=laptop (scale=laptop) is the comparison for a CPU. Going on."
        )


def _launcher_config(grid: Grid) -> DictConfig:
    launcher: DictConfig = grid.composed(grid.runs[0]).hydra.launcher
    if OmegaConf.select(launcher, "n_jobs") == 0:
        raise ConfigError("hydra.launcher.n_jobs=0: must be 1 or more, or -1 for one a core")
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError("hydra/launcher=slurm: there is no Slurm here (no srun on the PATH)")
    return launcher


def _at_once(launcher: DictConfig) -> int:
    """How many runs the launcher makes at once."""
    count = OmegaConf.select(launcher, "n_jobs") or OmegaConf.select(launcher, "array_parallelism")
    return (os.cpu_count() or 1) if count == -1 else int(count or 1)
