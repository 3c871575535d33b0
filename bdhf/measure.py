"""What an update takes and what its systems need, measured on states in which runs ended.

The seconds in a run's metrics depend on what else the machine did at that time, and the iterations
on the cap. Here all optimizers take turns on the same weights and mini-batches, and conjugate
gradient goes on until its own rule stops it. Set-up, mini-batches and clock are those of training.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bdhf import graphs
from bdhf.config import Config, device_of
from bdhf.data import Images
from bdhf.experiment import Experiment
from bdhf.machine import synchronize
from bdhf.record import RunFolder, processor
from bdhf.runner import set_up
from bdhf.steps import StepReport
from bdhf.training import Progress, Training

#: Where the systems are solved: at a seed's first weights, and where HF and block-diagonal HF
#: ended.
STATES: tuple[StateName, ...] = ("initial", "hf", "bdhf")

StateName = Literal["initial", "hf", "bdhf"]

#: The configs of one cell and one seed, by the optimizers' names.
Configs = Mapping[str, Config]


class MeasureError(Exception):
    """There is no state to measure on; the message names the run and says why."""


@dataclass(frozen=True)
class State:
    """Weights on which something is measured.

    Attributes:
        name: where they are from.
        run: the folder's name of the run that ended there; for the initial weights, of the
            block-diagonal one that started there.
        update: how many updates led there: the number of the mini-batch that is next.
        weights: the model's ``state_dict``; None: as it was initialised.
    """

    name: StateName
    run: str
    update: int = 0
    weights: dict[str, Tensor] | None = None


def find_state(configs: Configs, name: StateName) -> State:
    """The initial weights, or those that a finished run has left in its folder.

    Raises:
        MeasureError: the run is not finished, or its checkpoint is gone or damaged.
    """
    if name == "initial":
        return State(name, run_name(configs, name))
    config = configs[name]
    folder = RunFolder(config)
    if folder.status == "new":
        raise MeasureError(f"{folder.path}: there is no such run")
    if folder.status == "diverged":
        raise MeasureError(f"{folder.path}: diverged, {folder.reason}")
    if not folder.is_done(config.updates):
        reached = f"{folder.updates_done} of {config.updates} updates"
        raise MeasureError(f"{folder.path}: {folder.status}, {reached}")
    try:
        checkpoint = folder.load_checkpoint()
    except RuntimeError as error:
        raise MeasureError(str(error)) from error
    if checkpoint is None:
        raise MeasureError(f"{folder.path}: its checkpoint.pt is gone")
    update = checkpoint["progress"]["update"]
    return State(name, folder.path.name, update, checkpoint["model"])


def run_name(configs: Configs, state: StateName) -> str:
    """`State.run`, without looking for the run."""
    return RunFolder(configs["bdhf" if state == "initial" else state]).path.name


def update_times(
    experiment: Experiment, configs: Configs, images: Images, rounds: int = 5
) -> Iterator[dict[str, Any]]:
    """What an update of each optimizer takes where HF ended.

    In each round every optimizer makes one update of the same weights, on the same mini-batch and
    curvature mini-batch: those of block-diagonal HF's config. The next round goes back to these
    weights, has the next mini-batch, and begins with another optimizer. Conjugate gradient starts
    from the last round's solution, as in training. A first round, in which networks are traced
    and there is no such solution, is not counted.

    Yields:
        A row for each update, in the order in which they were made.

    Raises:
        MeasureError: HF's run is not finished, or its checkpoint is gone.
    """
    state = find_state(configs, "hf")
    trainings = _side_by_side(experiment, configs, images)
    names = list(trainings)
    # On a GPU an update is recorded after some of its kind, and replayed from then on.
    uncounted = 1 if device_of(configs["bdhf"]).type == "cpu" else graphs.WARM_UP + 2
    for number in range(uncounted + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            training = trainings[name]
            report = _update(training, state, number)
            if number < uncounted:
                continue
            sizes, solved = training.sizes, report.blocks
            yield {
                "experiment": experiment.name,
                "seed": training.seed,
                "run": state.run,
                "update": state.update,
                "optimizer": name,
                "batch_size": sizes.batch_size,
                "curvature_batch_size": sizes.curvature_batch_size if solved else None,
                "round": number - uncounted + 1,
                "seconds": round(training.progress.seconds, 6),
                "cg_iterations": "+".join(str(block.iterations) for block in solved),
                **_machine(training),
            }


def cg_solves(
    experiment: Experiment, configs: Configs, images: Images, name: StateName, cap: int = 10_000
) -> Iterator[dict[str, Any]]:
    """How many iterations the systems ``(G + λI) x = -g`` of one update take.

    From zero, with the experiment's damping, until its rule of relative progress stops them:
    once with the whole matrix, and once with each block. ``cap`` is there for what would never
    stop; ``reason`` says where it, or anything else but the rule, made an end. Without damping
    ``G`` is singular and ``g``, of more samples, has parts that it cannot reach: then the steps
    grow until rounding ends them as ``negative curvature``.

    Yields:
        A row for the whole matrix, then one for each block.

    Raises:
        MeasureError: the run that led to that state is not finished, or its checkpoint is gone.
    """
    state = find_state(configs, name)
    for optimizer in ("hf", "bdhf"):
        settings: Any = configs[optimizer].optimizer
        # With lr=0 the weights stay, and with cg_momentum=0 there is no warm start.
        uncapped = dataclasses.replace(settings, lr=0.0, cg_max_iter=cap, cg_momentum=0.0)
        config = dataclasses.replace(configs[optimizer], optimizer=uncapped)
        training = _bare(set_up(experiment, config, images))
        report = _update(training, state)
        few = training.sizes.curvature_batch_size
        assert few is not None
        for k, (block, cost) in enumerate(zip(report.blocks, training.work.products, strict=True)):
            yield {
                "experiment": experiment.name,
                "seed": training.seed,
                "run": state.run,
                "update": state.update,
                "state": name,
                "solver": "whole" if optimizer == "hf" else f"block {k}",
                "iterations": block.iterations,
                "reason": block.reason,
                "products_work": cost * few,
                "curvature_batch_size": few,
                "damping": settings.damping,
                "tol": settings.cg_tol,
            }


def _side_by_side(experiment: Experiment, configs: Configs, images: Images) -> dict[str, Training]:
    """Each optimizer with a model of its own, all at the sizes of block-diagonal HF."""
    main = _bare(set_up(experiment, configs["bdhf"], images))
    trainings = {}
    for name, config in configs.items():
        training = main if name == "bdhf" else _bare(set_up(experiment, config, images))
        # One copy of the data serves all.
        data = dataclasses.replace(
            training.problem, train=main.problem.train, test=main.problem.test
        )
        trainings[name] = dataclasses.replace(training, problem=data, sizes=main.sizes)
    return trainings


def _bare(training: Training) -> Training:
    """Without averaged weights, which are the experiment's and no part of an optimizer's update."""
    return dataclasses.replace(training, averaged=None)


def _update(training: Training, state: State, later: int = 0) -> StepReport:
    """One update from ``state``, on the mini-batch so many ``later``; the weights are put back.

    The time it took is in ``training.progress.seconds``.
    """
    model = training.problem.model
    if state.weights is not None:
        model.load_state_dict(state.weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training.progress = Progress(update=state.update + later)
    synchronize(training.problem.train[0].device)
    training.update()
    training.settle()
    model.load_state_dict(before)
    report = training.optimizer.last_step
    assert report is not None
    return report


def _machine(training: Training) -> dict[str, Any]:
    device = training.problem.train[0].device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "threads": torch.get_num_threads(),
        "device": gpu or str(device),
        "processor": processor(),
        # Above 1 for each thread, others were at work too, and the times are too long.
        "load": round(os.getloadavg()[0], 2),
    }
