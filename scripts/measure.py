"""Measure updates and CG solves on the states in which runs ended: scripts/measure.py [SCALE].

Writes update_times.csv and cg_solves.csv in results/SCALE, from the finished runs of each
experiment's first cell. What is in these tables already is not measured again. The times are worth
something only while nothing else runs on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import signal
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bdhf.archive import MEASURED
from bdhf.config import Config
from bdhf.data import DataError, load
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS, experiment_names, find_experiment
from bdhf.machine import use_machine
from bdhf.measure import (
    STATES,
    Configs,
    MeasureError,
    cg_solves,
    find_state,
    run_name,
    update_times,
)
from bdhf.record import RunFolder, read_table, write_table
from bdhf.sweep.grid import expand

Row = dict[str, Any]

_loaded = functools.cache(load)  # two experiments share MNIST, and all seeds share everything


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each optimizer")
    parser.add_argument("--cap", type=int, default=10_000, help="the most CG iterations")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    names = experiment_names()
    parser.add_argument("--experiments", nargs="+", default=names, choices=names)
    parser.add_argument("--again", action="store_true", help="also what is in the tables already")
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings with which the runs were made, where they are not those that ship",
    )
    arguments = parser.parse_args()
    for name in ("rounds", "cap", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: must be 1 or more")
    try:
        measure(arguments)
    except (ConfigError, DataError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the tables have what was measured. Repeat the command to go on.")
        sys.exit(128 + signal.SIGINT)


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is not measured yet, and write each part as soon as it is there."""
    found = cells(arguments)
    ended = {key: configs for key, configs in found.items() if _any_finished(configs)}
    if not ended:
        chosen = " ".join(arguments.experiments)
        sys.exit(
            f"error: no finished run of HF or block-diagonal HF (cell 0) of {chosen} under "
            f"{arguments.results / 'runs' / arguments.scale}; python scripts/reproduce.py "
            f"{chosen} scale={arguments.scale} results={arguments.results} makes them"
        )
    use_machine(arguments.threads)
    folder = arguments.results / arguments.scale
    times, solves = (Table(folder / name, keys) for name, keys in MEASURED.items())
    for (name, seed), configs in found.items():
        if (name, seed) not in ended:
            print(f"left out: {name} seed {seed}: neither HF nor block-diagonal HF has finished")
            continue
        part = Part(name, seed, configs, arguments.again)
        timed = functools.partial(update_times, rounds=arguments.rounds)
        part.into(times, "hf", timed, of_times)
        if not getattr(configs["hf"].optimizer, "damping", 0.0):
            print(
                f"left out: {name} seed {seed}, CG solves: "
                "without damping its curvature mini-batch has a singular G"
            )
            continue
        for state in STATES:
            solved = functools.partial(cg_solves, name=state, cap=arguments.cap)
            part.into(solves, state, solved, of_solves)


def cells(arguments: argparse.Namespace) -> dict[tuple[str, int], dict[str, Config]]:
    """The configs of each experiment's first cell, by experiment and seed, then by optimizer."""
    overrides = [
        f"experiment={','.join(arguments.experiments)}",
        f"scale={arguments.scale}",
        "optimizer=adam,hf,bdhf",
        "cell=0",
        *arguments.overrides,
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        grid = expand(overrides)
    if grid.refused:
        raise ConfigError("; ".join(grid.refused))
    found: dict[tuple[str, int], dict[str, Config]] = {}
    for run in grid.runs:
        # Not as an override: a path may hold what Hydra's grammar does not take.
        config = dataclasses.replace(run.config, results=str(arguments.results))
        found.setdefault((config.experiment, config.seed), {})[config.optimizer.name] = config
    return found


def _any_finished(configs: Configs) -> bool:
    return any(RunFolder(configs[name]).status == "finished" for name in ("hf", "bdhf"))


@dataclasses.dataclass(frozen=True)
class Part:
    """One experiment at one seed."""

    experiment: str
    seed: int
    configs: Configs
    again: bool

    def into(
        self,
        table: Table,
        state: Any,
        function: Callable[..., Any],
        in_words: Callable[[list[Row]], str],
    ) -> None:
        """Measure by ``function`` on ``state``, unless the table has that, and say so."""
        label = f"{self.experiment} seed {self.seed}, state {state}"
        key = {"experiment": self.experiment, "seed": self.seed, "state": state}
        key["run"] = run_name(self.configs, state)
        if not self.again and table.has(key):
            print(f"{label}: in {table.path} already")
            return
        try:
            find_state(self.configs, state)  # or the data would be loaded for nothing
            data = self.configs["bdhf"].data
            images = _loaded(data.name, data.root, data.validation_rows)
            rows = list(function(find_experiment(self.experiment), self.configs, images))
        except MeasureError as error:
            print(f"left out: {label}: {error}")
            return
        table.put(rows)
        print(f"{label}: {in_words(rows)}", flush=True)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that grows by all rows of one ``key`` at a time."""

    path: Path
    key: tuple[str, ...]

    def has(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it has rows of that key, and of the same run: one of other settings is past."""
        columns = (*self.key, "run")
        sought = [str(wanted[column]) for column in columns]
        return any(sought == [row.get(c) for c in columns] for row in read_table(self.path))

    def put(self, rows: list[Row]) -> None:
        """Put rows in, in the place of those with the same key."""
        new = {self._key_of(row) for row in rows}
        old: list[Row] = list(read_table(self.path))
        kept = [row for row in old if self._key_of(row) not in new]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_table(self.path, sorted(kept + rows, key=_place))

    def _key_of(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in self.key)


def _place(row: Mapping[str, Any]) -> tuple[str, int, int]:
    state = STATES.index(row["state"]) if "state" in row else 0
    return row["experiment"], int(row["seed"]), state


def of_times(rows: list[Row]) -> str:
    """The medians, in words."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["optimizer"], []).append(row["seconds"])
    medians = sorted((statistics.median(values), name) for name, values in seconds.items())
    return "an update takes " + ", ".join(f"{name} {median:.4g} s" for median, name in medians)


def of_solves(rows: list[Row]) -> str:
    """The iterations, in words."""
    counts = [
        f"{row['solver']} {row['iterations']}"
        + ("" if row["reason"] in ("relative progress", "converged") else f" ({row['reason']})")
        for row in rows
    ]
    return f"CG takes {', '.join(counts)} iterations"


if __name__ == "__main__":
    main()
