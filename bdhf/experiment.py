"""What an experiment is, and the one runner behind every ``experiments/*.py``."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from bdhf.batches import Criterion
from bdhf.blocks import ParamGroup
from bdhf.config import (
    AdamConfig,
    Config,
    ConfigError,
    HessianFreeConfig,
    check_against_data,
    checked,
    device_of,
    register,
    require,
)
from bdhf.data import Data, DataError, Images, load
from bdhf.first_order import FirstOrder
from bdhf.functional import RandomState
from bdhf.machine import use_machine
from bdhf.optimizer import BlockDiagonalHF
from bdhf.progress import ProgressDisplay
from bdhf.record import RunFolder
from bdhf.training import (
    Accuracy,
    Outcome,
    Problem,
    Progress,
    Row,
    Sizes,
    StepOptimizer,
    Training,
    correct,
    evaluate,
    polyak_average,
    stream_seed,
)
from bdhf.work import count_work

__all__ = ["CONFIGS", "Experiment", "correct", "main", "make_optimizer", "run"]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_PROCESS_START = time.monotonic()

#: Rows on which the work of an update is counted; the count is exact for any number.
_COUNTED_ROWS = 2


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper, as ``experiments/*.py`` describe it.

    Attributes:
        name: of the experiment and of its config, ``configs/<name>.yaml``.
        settings: dataclass of the config's ``network`` node.
        network: builds the network from such settings, drawing from torch's random stream.
        blocks: splits the network's parameters for block-diagonal HF.
        criterion: the loss, called as ``criterion(outputs, targets)``.
        prepare: maps images and the network's settings to training and test data, each the
            network's inputs and the loss's targets.
        accuracy: maps outputs and targets to hits; None where the experiment has no accuracy.
        average_weights: whether an average of the weights is evaluated beside the weights.
    """

    name: str
    settings: type
    network: Callable[[Any], nn.Module]
    blocks: Callable[[Any], list[ParamGroup]]
    criterion: Criterion
    prepare: Callable[[Images, Any], tuple[Data, Data]]
    accuracy: Accuracy | None = None
    average_weights: bool = False


def main(experiment: Experiment) -> None:
    """Command line of an experiment: Hydra composes the config, `run` does the work."""
    register(experiment.name, experiment.settings)
    with tempfile.TemporaryDirectory() as folder:
        # Files, since a launcher may use several processes.
        refused, stopped, starter = Path(folder) / "refused", Path(folder) / "stopped", os.getpid()

        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=experiment.name)
        def job(composed: DictConfig) -> None:
            try:
                run(experiment, checked(composed))
            except (ConfigError, DataError) as error:
                # Not raised further: in a sweep, the other runs go on.
                print(f"error: {error}", file=sys.stderr)
                refused.touch()
            except SystemExit as stop:
                if os.getpid() == starter:
                    raise
                # In a worker, whose exit would take the other workers with it.
                stopped.write_text(str(stop.code or 0))

        job()
        if stopped.exists():
            sys.exit(int(stopped.read_text()))
        if refused.exists():
            sys.exit(1)


def run(experiment: Experiment, config: Config) -> RunFolder:
    """Make one run, or continue it, or find that it is finished.

    Raises:
        DataError: the data set is missing or corrupt.
        ConfigError: the config is another experiment's, or does not fit the data set.
        SystemExit: a signal or ``time_limit`` stopped it; a checkpoint is written.
    """
    require(
        config.experiment == experiment.name,
        "experiment",
        config.experiment,
        f"{experiment.name} here; experiments/{config.experiment}.py runs another experiment",
    )
    folder = RunFolder(config)
    done = folder.status == "finished" and folder.updates_done >= config.updates
    if done or folder.status == "diverged":
        print(f"{folder.path}: {folder.status} already, with {folder.updates_done} updates")
        return folder
    use_machine(config.threads)
    check_against_data(config)
    images = load(config.data.name, config.data.root)
    training = _set_up(experiment, config, images)
    folder.begin(config, _facts(config, images, training))
    with folder.failures_recorded():
        _restore(folder, training)
        outcome = _train(folder, training, config)
        _close(folder, training, outcome)
    print(f"{folder.path}: {outcome.status}, {outcome.reason}")
    if outcome.status == "stopped":
        print(f"Repeat the command to continue from update {training.progress.update}.")
        sys.exit(outcome.exit_code)
    return folder


def _set_up(experiment: Experiment, config: Config, images: Images) -> Training:
    """Model, data and optimizer. Streams of their own keep weights and data order apart."""
    device = device_of(config)
    torch.manual_seed(stream_seed("initialisation", config.seed))
    model = experiment.network(config.network).to(device)
    torch.manual_seed(stream_seed("training", config.seed))

    train, test = (
        (inputs.to(device), targets.to(device))
        for inputs, targets in experiment.prepare(images, config.network)
    )
    problem = Problem(model, experiment.criterion, train, test, experiment.accuracy)
    blocks, optimizer = make_optimizer(config.optimizer, model, experiment.blocks)
    sample = problem.train[0][:_COUNTED_ROWS], problem.train[1][:_COUNTED_ROWS]
    work = count_work(model, problem.criterion, sample, [block["params"] for block in blocks])
    sizes = Sizes(
        config.batch_size,
        config.curvature_batch_size,
        config.updates,
        config.evaluate_every,
        config.evaluation_rows,
        config.micro_batch,
    )
    averaged = polyak_average(model) if experiment.average_weights else None
    return Training(problem, optimizer, sizes, config.seed, work, averaged)


def make_optimizer(
    settings: Any, model: nn.Module, blocks: Callable[[Any], list[ParamGroup]]
) -> tuple[list[ParamGroup], StepOptimizer]:
    """The optimizer that ``settings`` describe, and the blocks it solves (none for Adam).

    Raises:
        ConfigError: there is no such optimizer.
    """
    values = asdict(settings)
    name = values.pop("name")
    if isinstance(settings, AdamConfig):
        return [], FirstOrder(torch.optim.Adam(model.parameters(), **values))
    if isinstance(settings, HessianFreeConfig):
        groups = blocks(model) if name == "bdhf" else [{"params": list(model.parameters())}]
        return groups, BlockDiagonalHF(groups, **values)
    raise ConfigError(f"optimizer.name={name}: must be adam, hf or bdhf")


def _facts(config: Config, images: Images, training: Training) -> dict[str, Any]:
    device = device_of(config)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    return {
        "device": gpu or str(device),
        "data": {"name": config.data.name, "source": images.source, "sha256": images.sha256},
        "seed": config.seed,
        "parameters": sum(p.numel() for p in parameters),
        "work": asdict(training.work),
    }


def _restore(folder: RunFolder, training: Training) -> None:
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return
    training.problem.model.load_state_dict(checkpoint["model"])
    training.optimizer.load_state_dict(checkpoint["optimizer"])
    if training.averaged is not None:
        training.averaged.load_state_dict(checkpoint["averaged"])
    training.progress = Progress(**checkpoint["progress"])
    torch.set_rng_state(checkpoint["random_state"])
    if checkpoint["cuda_random_state"] is not None and torch.cuda.is_available():
        device = next(training.problem.model.parameters()).device
        torch.cuda.set_rng_state(checkpoint["cuda_random_state"], device)
    if training.progress.update < training.sizes.updates:
        folder.drop_rows_off_the_grid(training.sizes.evaluate_every)


def _checkpoint(training: Training) -> dict[str, Any]:
    random_state = RandomState.capture(list(training.problem.model.parameters()))
    return {
        "model": training.problem.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "averaged": None if training.averaged is None else training.averaged.state_dict(),
        "progress": asdict(training.progress),
        "random_state": random_state.cpu,
        "cuda_random_state": random_state.of_device,
    }


def _train(folder: RunFolder, training: Training, config: Config) -> Outcome:
    curvature = config.curvature_batch_size
    title = f"{config.experiment} {config.optimizer.name} b{config.batch_size}"
    title += ("" if curvature is None else f" c{curvature}") + f" seed {config.seed}"
    last_saved = time.monotonic()

    with (
        ProgressDisplay(title, config.updates, training.progress.update) as display,
        _signals_caught() as caught,
    ):

        def on_row(row: Row) -> None:
            folder.append(row)
            display.row(row)

        def on_update() -> None:
            nonlocal last_saved
            display.update(training.progress.update)
            if time.monotonic() - last_saved >= config.checkpoint_seconds:
                folder.save_checkpoint(_checkpoint(training))
                last_saved = time.monotonic()

        def stop() -> Outcome | None:
            if caught:  # the exit code is the one with which shells report a signal
                number = signal.Signals(caught[0])
                return Outcome("stopped", f"signal {number.name}", 128 + number)
            limit = config.time_limit
            if limit is not None and time.monotonic() - _PROCESS_START >= limit:
                return Outcome("stopped", f"time_limit={limit:g} seconds")
            return None

        outcome = training.run(on_row, on_update, stop)
    # Kept for good, so that a larger budget can continue from here.
    folder.save_checkpoint(_checkpoint(training))
    return outcome


def _close(folder: RunFolder, training: Training, outcome: Outcome) -> None:
    facts: dict[str, Any] = {}
    if outcome.status == "finished":
        problem = training.problem
        for name, data in (("train", problem.train), ("test", problem.test)):
            loss, accuracy = evaluate(problem, problem.model, data)
            facts |= {f"full_{name}_loss": loss, f"full_{name}_accuracy": accuracy}
        if training.averaged is not None:
            loss, accuracy = evaluate(problem, training.averaged, problem.test)
            facts |= {"full_averaged_test_loss": loss, "full_averaged_test_accuracy": accuracy}
    folder.end(outcome.status, outcome.reason, training.progress.update, **facts)


@contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that training can stop after the current update.

    A second SIGINT interrupts at once.
    """
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number in caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {
        number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
