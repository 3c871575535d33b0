"""What an update takes on many devices: python scripts/scaling.py [SCALE].

Measures the parts of an update, and whole updates by one, two and four processes of this machine
(scaling_measured.csv in results/SCALE; skipped where it is there); compares the model's predictions
with the latter (scaling_check.csv); and extrapolates to 1024 devices (scaling.csv, scaling.png).
What devices and network are like there is assumed, and can be said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from hydra.errors import HydraException
from measure import cells
from omegaconf.errors import OmegaConfBaseException

from bdhf.data import DataError
from bdhf.errors import ConfigError
from bdhf.experiment import experiment_names, find_experiment
from bdhf.machine import use_machine
from bdhf.processes import launched, leave
from bdhf.record import read_table, write_table
from bdhf.report.devices import draw_scaling
from bdhf.report.evidence import read_evidence
from bdhf.report.scaling import Assumed, checked, extrapolated
from bdhf.report.table import TableError
from bdhf.scaling.parts import PROCESSES, measure


def main() -> None:
    """Command line."""
    usual = Assumed()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each part")
    parser.add_argument("--again", action="store_true", help="measure, also where that was done")
    names = experiment_names()
    parser.add_argument("--experiments", nargs="+", default=names, choices=names)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE")
    for name, what in (
        ("latency", "seconds until a message begins to arrive"),
        ("bandwidth", "bytes a second"),
        ("speed", "a device's, in cores of the machine that was measured"),
        ("launch", "seconds that an operation takes beside its arithmetic"),
    ):
        default = getattr(usual, name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what} ({default:g})")
    arguments = parser.parse_args()
    for name in ("rounds", "bandwidth", "speed"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name}={getattr(arguments, name)}: must be above 0")
    for name in ("latency", "launch"):
        if not getattr(arguments, name) >= 0:
            parser.error(f"--{name}={getattr(arguments, name)}: must be 0 or more")
    try:
        if launched():
            measured_here(arguments)
        else:
            work(arguments)
    except (ConfigError, DataError, HydraException, OmegaConfBaseException, TableError) as error:
        sys.exit(f"error: {error}")


def work(arguments: argparse.Namespace) -> None:
    """Measure, unless that was done; check; extrapolate; draw."""
    folder = arguments.results / arguments.scale
    measured = folder / "scaling_measured.csv"
    evidence = read_evidence(arguments.results, arguments.scale)  # before anything takes long
    if arguments.again or not measured.exists():
        launch()
    else:
        print(f"{measured} is there; --again measures anew")
    rows = read_table(measured)
    names = ("latency", "bandwidth", "speed", "launch")
    assumed = Assumed(**{name: getattr(arguments, name) for name in names})
    found = extrapolated(rows, evidence, arguments.scale, assumed)
    if not found:
        sys.exit(f"error: no run with the settings that ship in {folder / 'curves.csv'}")
    write_table(folder / "scaling_check.csv", checked(rows))
    write_table(folder / "scaling.csv", found)
    for path in (folder / "scaling_check.csv", folder / "scaling.csv", *draw_scaling(folder)):
        print(path)


def launch() -> None:
    """This script again, by several processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(max(PROCESSES)), *sys.argv]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, env=one_thread, check=False).returncode:
        sys.exit("error: nothing was measured")


def measured_here(arguments: argparse.Namespace) -> None:
    """One of the processes that measure; the first one writes the table."""
    dist.init_process_group("gloo")
    use_machine(threads=1)
    rows: list[dict[str, object]] = []
    done: set[str] = set()
    for (name, _), configs in cells(arguments).items():
        if name not in done:  # one seed does
            done.add(name)
            rows += measure(find_experiment(name), configs, arguments.rounds)
            if dist.get_rank() == 0:
                print(f"{name}: measured; others kept {rows[-1]['others']} cores busy", flush=True)
    if dist.get_rank() == 0:
        path = arguments.results / arguments.scale / "scaling_measured.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_table(path) if row["experiment"] not in done]
        write_table(path, sorted([*kept, *rows], key=lambda row: str(row["experiment"])))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
