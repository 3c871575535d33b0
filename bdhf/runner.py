"""The one runner behind every experiment: it makes a run, or continues it, or leaves it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bdhf.config import Config, check_against_data, device_of
from bdhf.data import Images, load, stand_in
from bdhf.errors import require
from bdhf.experiment import Experiment
from bdhf.functional import RandomState
from bdhf.machine import release_memory, use_machine
from bdhf.processes import ALONE, Processes, first_of_machine
from bdhf.progress import ProgressDisplay, say
from bdhf.record import RunFolder, sizes_in_short
from bdhf.steps import BlockStep, Collective, StepReport
from bdhf.stopping import Stopping
from bdhf.training import (
    Outcome,
    Problem,
    Progress,
    Row,
    Sizes,
    Training,
    polyak_average,
    stream_seed,
)
from bdhf.work import count_work

#: Rows on which the work of an update is counted; the count is exact for any number.
_COUNTED_ROWS = 2

#: A checkpoint is written at most so often that writing takes this share of the time.
_CHECKPOINT_SHARE = 0.02


@dataclass(frozen=True)
class Ended:
    """How an attempt at a run ended.

    Attributes:
        folder: the run's folder.
        status: ``finished`` or ``diverged``, now or before; ``stopped``, to be continued;
            ``elsewhere``, since another process is at work on it.
        reason: why, in words.
        exit_code: that of a process that did nothing else.
    """

    folder: RunFolder
    status: Literal["finished", "diverged", "stopped", "elsewhere"]
    reason: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.folder.path}: {self.status}, {self.reason}"


def run(
    experiment: Experiment,
    config: Config,
    stopping: Stopping | None = None,
    command: str = "",
    shown: bool = True,
    label: str | None = None,
    load_images: Callable[[str, str, int | None], Images] | None = None,
    processes: Processes = ALONE,
) -> Ended:
    """Make one run, or continue it, or find that it is finished.

    Args:
        experiment: what is trained.
        config: how, with sizes and seed.
        stopping: asked before every update; None: catch signals and mind ``config.time_limit``.
        command: what the user typed, for the run's provenance.
        shown: whether its progress is displayed.
        label: the run in a few words, for that display; None: its `title`.
        load_images: stands in for `bdhf.data.load`, for a process that makes several runs.
        processes: this one and those that `follow` it.

    Raises:
        DataError: the data set is missing or corrupt.
        ConfigError: the config is another experiment's, or does not fit the data set.
        RankLostError: another process is gone.
    """
    require(
        config.experiment == experiment.name,
        "experiment",
        config.experiment,
        f"{experiment.name} here; experiments/{config.experiment}.py runs another experiment",
    )
    folder = RunFolder(config)
    elsewhere = Ended(folder, "elsewhere", "another process is at work on it")
    if (done := _done_before(folder, config)) is not None:
        return done
    if folder.held():
        return elsewhere
    use_machine(config.threads, config.tf32)
    check_against_data(config)
    _check_network(experiment, config)
    images = (load_images or load)(config.data.name, config.data.root, config.data.validation_rows)
    # From here on, after all that may be refused, something is written.
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(folder.held_alone()):
            return elsewhere
        if (done := _done_before(folder, config)) is not None:  # by another process, just now
            return done
        if stopping is None:
            stopping = stack.enter_context(Stopping(config.time_limit))
        display = functools.partial(ProgressDisplay, label or title(config), shown=shown)
        ended = _make(experiment, config, images, folder, stopping, command, display, processes)
    release_memory(device_of(config))  # for the next run of this process
    return ended


def _done_before(folder: RunFolder, config: Config) -> Ended | None:
    if not folder.is_done(config.updates):
        return None
    status: Any = folder.status
    return Ended(folder, status, f"already, with {folder.updates_done} updates")


def _check_network(experiment: Experiment, config: Config) -> None:
    """Refuse a network that does not fit the data or the optimizer; no data need be loaded."""
    model = config.optimizer.prepare(experiment.network(config.network))
    config.optimizer.make(model, experiment.blocks)
    experiment.prepare(stand_in(config.data.name, _COUNTED_ROWS), config.network)


def _make(
    experiment: Experiment,
    config: Config,
    images: Images,
    folder: RunFolder,
    stopping: Stopping,
    command: str,
    display: Callable[[int, int], ProgressDisplay],
    processes: Processes,
) -> Ended:
    training = set_up(experiment, config, images, processes)
    folder.begin(config, _facts(config, images, training, processes), command)
    with folder.failures_recorded():
        while True:
            _restore(folder, training)
            if not processes.alone:
                # Each process takes it to its own device.
                processes.tell(tree_map_only(Tensor, Tensor.cpu, _checkpoint(training)))
            outcome = _train(folder, training, config, stopping, display, processes)
            if outcome is not None:
                break
            # Out of memory. A smaller piece gives the same gradient and products, to rounding.
            config = dataclasses.replace(config, micro_batch=_smaller_piece(config))
            say(
                f"{folder.path}: out of GPU memory; goes on from its last checkpoint with "
                f"micro_batch={config.micro_batch}, with equal results"
            )
            del training  # the only reference to what fills the memory
            release_memory(device_of(config))
            training = set_up(experiment, config, images)
        _close(folder, training, outcome, config)
    reason = outcome.reason
    if outcome.status == "stopped":
        reason += f"; continues from update {training.progress.update}"
    return Ended(folder, outcome.status, reason, outcome.exit_code)


def follow(experiment: Experiment, config: Config, processes: Processes) -> int:
    """Make the updates of a run that another process leads (see `run`).

    Returns:
        The exit code that the leader asks for.

    Raises:
        RankLostError: another process is gone.
    """
    use_machine(config.threads, config.tf32)
    if first_of_machine():
        say(f"{processes}: follows rank 0, which has the run's folder and says how it goes")
    word = processes.hear()
    while not isinstance(word, int):
        images = load(config.data.name, config.data.root, config.data.validation_rows)
        training = set_up(experiment, config, images, processes)
        _load(training, word)
        while processes.goes_on():
            training.update()
        word = processes.hear()
    return word


def _smaller_piece(config: Config) -> int:
    return -(-(config.micro_batch or config.batch_size) // 2)


def set_up(
    experiment: Experiment, config: Config, images: Images, processes: Processes = ALONE
) -> Training:
    """Model, data and optimizer. Streams of their own keep weights and data order apart.

    Raises:
        ConfigError: the optimizer knows nothing of several processes, and there are.
    """
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(stream_seed("initialisation", config.seed))
    model = config.optimizer.prepare(experiment.network(config.network)).to(device)
    torch.manual_seed(stream_seed("training", config.seed))

    train, test = (
        (inputs.to(device), targets.to(device))
        for inputs, targets in experiment.prepare(images, config.network)
    )
    problem = Problem(model, experiment.criterion, train, test, experiment.accuracy)
    blocks, optimizer = config.optimizer.make(model, experiment.blocks)
    if hasattr(optimizer, "cuda_graphs"):
        optimizer.cuda_graphs = config.cuda_graphs
    if not processes.alone:
        name, allowed = config.optimizer.name, "adam, hf or bdhf under torchrun"
        require(hasattr(optimizer, "ranks"), "optimizer.name", name, allowed)
        shared: Any = optimizer
        shared.ranks = processes.ranks(config.placement)
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


def _facts(
    config: Config, images: Images, training: Training, processes: Processes
) -> dict[str, Any]:
    device = device_of(config)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    return {
        "device": gpu or str(device),
        "data": {"name": config.data.name, "source": images.source, "sha256": images.sha256},
        "seed": config.seed,
        "ranks": processes.count,
        "parameters": sum(p.numel() for p in parameters),
        "work": asdict(training.work),
    }


def _restore(folder: RunFolder, training: Training) -> None:
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return
    _load(training, checkpoint)
    training.progress.evaluated = folder.last_row
    if training.progress.update < training.sizes.updates:
        folder.drop_rows_off_the_grid(training.sizes.evaluate_every)


def _load(training: Training, checkpoint: dict[str, Any]) -> None:
    """Go on from what `_checkpoint` returned."""
    training.problem.model.load_state_dict(checkpoint["model"])
    training.optimizer.load_state_dict(checkpoint["optimizer"])
    if training.averaged is not None:
        training.averaged.load_state_dict(checkpoint["averaged"])
    training.progress = Progress(**checkpoint["progress"])
    training.optimizer.last_step = _report(checkpoint["last_step"])
    torch.set_rng_state(checkpoint["random_state"])
    if checkpoint["cuda_random_state"] is not None and torch.cuda.is_available():
        device = next(training.problem.model.parameters()).device
        torch.cuda.set_rng_state(checkpoint["cuda_random_state"], device)


def _report(saved: dict[str, Any] | None) -> StepReport | None:
    """What the last update did, for a row of metrics that is yet to be made."""
    if saved is None:
        return None
    blocks = [BlockStep(**block) for block in saved["blocks"]]
    traffic = tuple(Collective(**said) for said in saved.get("traffic", ()))
    return StepReport(**{**saved, "blocks": blocks, "traffic": traffic})


def _checkpoint(training: Training) -> dict[str, Any]:
    random_state = RandomState.capture(list(training.problem.model.parameters()))
    report = training.optimizer.last_step
    progress = training.settle()
    return {
        "model": training.problem.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "averaged": None if training.averaged is None else training.averaged.state_dict(),
        "progress": asdict(progress),
        "last_step": None if report is None else asdict(report),
        "random_state": random_state.cpu,
        "cuda_random_state": random_state.of_device,
    }


def _train(
    folder: RunFolder,
    training: Training,
    config: Config,
    stopping: Stopping,
    make_display: Callable[[int, int], ProgressDisplay],
    processes: Processes,
) -> Outcome | None:
    """Train; None where the GPU's memory ran out and a smaller `_smaller_piece` may do."""
    writer = _CheckpointWriter(folder, training, config.checkpoint_seconds)
    with make_display(config.updates, training.progress.update) as display:

        def on_row(row: Row) -> None:
            folder.append(row)
            display.row(row)

        said = False

        def on_update() -> None:
            nonlocal said
            report = training.optimizer.last_step
            if not said and report is not None and "not replayed" in report.path:
                say(f"{folder.path}: updates are made one by one on the GPU: {report.path}")
                said = True
            display.update(training.progress.update)
            writer.write_if_due()

        def stop() -> Outcome | None:
            outcome = stopping()
            processes.goes_on(outcome is None)
            return outcome

        try:
            outcome = training.run(on_row, on_update, stop)
        except torch.OutOfMemoryError as error:
            if not processes.alone:  # the others may have had enough
                hint = f"micro_batch={_smaller_piece(config)} needs less, with equal results"
                raise RuntimeError(f"out of GPU memory; {hint}") from error
            if config.micro_batch == 1:
                raise
            return None
    # Kept for good, so that a larger budget can continue from here.
    writer.write()
    if outcome.status != "stopped":
        processes.goes_on(False)
    return outcome


class _CheckpointWriter:
    """Writes a checkpoint every so many seconds, but no more often than it can afford."""

    def __init__(self, folder: RunFolder, training: Training, pause: float) -> None:
        self._folder, self._training, self._pause = folder, training, pause
        self._due = time.monotonic() + pause

    def write_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        started = time.monotonic()
        self._folder.save_checkpoint(_checkpoint(self._training))
        ended = time.monotonic()
        self._due = ended + max(self._pause, (ended - started) / _CHECKPOINT_SHARE)


def title(config: Config) -> str:
    """A run in a few words, for people."""
    sizes = sizes_in_short(config.batch_size, config.curvature_batch_size).replace("-", " ")
    return f"{config.experiment} {config.optimizer.name} {sizes} seed {config.seed}"


def _close(folder: RunFolder, training: Training, outcome: Outcome, config: Config) -> None:
    report = training.optimizer.last_step
    facts: dict[str, Any] = {
        "micro_batch": config.micro_batch,
        "path": None if report is None else report.path,
        "traffic": [] if report is None else [asdict(said) for said in report.traffic],
    }
    if outcome.status == "finished":
        problem = training.problem
        for name, data in (("train", problem.train), ("test", problem.test)):
            loss, accuracy = training.evaluate(problem.model, data)
            facts |= {f"full_{name}_loss": loss, f"full_{name}_accuracy": accuracy}
        if training.averaged is not None:
            loss, accuracy = training.evaluate(training.averaged, problem.test)
            facts |= {"full_averaged_test_loss": loss, "full_averaged_test_accuracy": accuracy}
    folder.end(outcome.status, outcome.reason, training.progress.update, **facts)
