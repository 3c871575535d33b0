"""What a user types: one run, or, with ``--multirun``, a sweep."""

from __future__ import annotations

import shlex
import signal
import sys

import hydra
from omegaconf import DictConfig

from bdhf.config import checked, register
from bdhf.data import DataError
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS, Experiment
from bdhf.mirror import mirrored
from bdhf.progress import say
from bdhf.record import RunFolder
from bdhf.runner import run
from bdhf.sweep import plan, sweep


def main(experiment: Experiment) -> None:
    """Command line of an experiment: Hydra composes the config, `run` or `sweep` does the work."""
    command = shlex.join(sys.argv)
    arguments = sys.argv[1:]
    if {"-m", "--multirun"} & set(arguments):
        overrides = [a for a in arguments if a not in ("-m", "--multirun", "--plan")]
        overrides.insert(0, f"experiment={experiment.name}")
        sys.exit(plan(overrides) if "--plan" in arguments else sweep(overrides, command))
    register(experiment.name, experiment.settings)
    exit_code = 1

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=experiment.name)
    def job(composed: DictConfig) -> None:
        nonlocal exit_code
        try:
            config = checked(composed)
            with mirrored([RunFolder(config).path], config.wandb):
                ended = run(experiment, config, command=command)
                say(str(ended))
                if ended.status == "stopped":
                    say("Repeat the command to continue.")
                exit_code = ended.exit_code
        except (ConfigError, DataError) as error:  # what the user can mend needs no traceback
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # the second Ctrl-C
            exit_code = 128 + signal.SIGINT

    job()
    sys.exit(exit_code)
