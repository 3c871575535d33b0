"""What a user types: one run, or, with ``--multirun``, a sweep."""

from __future__ import annotations

import shlex
import signal
import sys

import hydra
from omegaconf import DictConfig

from bdhf.config import Config, checked, register
from bdhf.data import DataError
from bdhf.distributed.ranks import RankLostError
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS, Experiment
from bdhf.mirror import mirrored
from bdhf.processes import (
    Processes,
    first_of_machine,
    joined,
    launched,
    leading,
    leave,
    with_own_device,
)
from bdhf.progress import say
from bdhf.record import RunFolder
from bdhf.runner import follow, run
from bdhf.sweep import plan, sweep


def main(experiment: Experiment) -> None:
    """Command line of an experiment: Hydra composes the config, `run` or `sweep` does the work."""
    command = shlex.join(sys.argv)
    arguments = sys.argv[1:]
    if {"-m", "--multirun"} & set(arguments):
        if launched():
            word = "torchrun makes one run with all its processes; --multirun places runs itself"
            sys.exit(f"error: {word}: leave one of them out" if leading() else 1)
        overrides = [a for a in arguments if a not in ("-m", "--multirun", "--plan")]
        overrides.insert(0, f"experiment={experiment.name}")
        sys.exit(plan(overrides) if "--plan" in arguments else sweep(overrides, command))
    register(experiment.name, experiment.settings)
    exit_code = 1

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=experiment.name)
    def job(composed: DictConfig) -> None:
        nonlocal exit_code
        try:
            config = with_own_device(checked(composed))
        except ConfigError as error:
            if first_of_machine():  # all of a machine find the same
                print(f"error: {error}", file=sys.stderr)
            return
        try:
            with joined(config) as processes:
                part = _lead if processes.leads else follow
                exit_code = part(experiment, config, processes)
        except (ConfigError, DataError) as error:  # what the user can mend needs no traceback
            print(f"error: {error}", file=sys.stderr)
        except RankLostError as error:
            print(f"error: {error}. Repeat the command to continue.", file=sys.stderr)
        except KeyboardInterrupt:  # the second Ctrl-C
            exit_code = 128 + signal.SIGINT

    job()
    leave(exit_code)


def _lead(experiment: Experiment, config: Config, processes: Processes) -> int:
    """Make the run, with the processes that follow; the exit code."""
    command = shlex.join(sys.argv)
    try:
        with mirrored([RunFolder(config).path], config.wandb):
            ended = run(experiment, config, command=command, processes=processes)
            say(str(ended))
            if ended.status == "stopped":
                say("Repeat the command to continue.")
    except (ConfigError, DataError):  # nothing was begun
        processes.tell(1)
        processes.meet()
        raise
    processes.tell(ended.exit_code)
    return ended.exit_code
