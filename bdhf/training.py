"""The one loop that every optimizer goes through.

It knows no optimizer by name: whatever answers ``step(model, criterion, batch, curvature_batch)``
with a loss and keeps a report in ``last_step`` can be trained.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bdhf.batches import Batch, Criterion, pieces
from bdhf.data import Data
from bdhf.machine import synchronize
from bdhf.steps import StepReport
from bdhf.work import Work

#: Rows evaluated at once at most: enough to keep the device busy, few enough for its memory.
_EVALUATION_ROWS = {"cpu": 2000, "cuda": 10_000}

_CPU = torch.device("cpu")

#: A training loss above this many times the initial one counts as divergence.
DIVERGENCE_FACTOR = 10.0

Row = dict[str, float | int | None]
Status = Literal["finished", "diverged", "stopped"]
Accuracy = Callable[[Any, Tensor], Tensor]

#: The averaged weights' decay is this, but less at first (see `move_average`).
POLYAK_DECAY = 0.99


class StepOptimizer(Protocol):
    """What the loop asks of an optimizer."""

    last_step: StepReport | None

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(
        self,
        model: nn.Module,
        criterion: Criterion,
        batch: Batch,
        curvature_batch: Batch | None = None,
        *,
        micro_batch: int | None = None,
    ) -> Tensor | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Sizes:
    """How much of what (see `bdhf.config.Config`)."""

    batch_size: int
    curvature_batch_size: int | None
    updates: int
    evaluate_every: int
    evaluation_rows: int
    micro_batch: int | None = None


@dataclass(frozen=True)
class Problem:
    """What is minimised, and on which data.

    Attributes:
        model: the network, on its device.
        criterion: the loss.
        train, test: whole data sets ``(inputs, targets)``, tensors on the same device.
        accuracy: maps outputs and targets to a tensor of hits, one a row; None: no accuracy.
    """

    model: nn.Module
    criterion: Criterion
    train: Data
    test: Data
    accuracy: Accuracy | None = None


@dataclass
class Progress:
    """Where a run is: all that the loop itself needs to continue."""

    update: int = 0
    seconds: float = 0.0
    gradient_equivalents: float = 0.0
    initial_loss: float = math.nan
    evaluated: int = -1  # the last update that has a row of metrics
    divergence: str = ""  # why the run counts as diverged, once it does


@dataclass(frozen=True)
class Outcome:
    """How training ended, and the exit code a process that made nothing else should have."""

    status: Status
    reason: str
    exit_code: int = 0


@dataclass
class Training:
    """A run in the making; `Training.run` makes the updates.

    Attributes:
        problem: model, loss and data.
        optimizer: anything that answers `StepOptimizer`.
        sizes: mini-batches, updates, evaluations.
        seed: gives the order of the data, the same for all optimizers.
        work: what an update costs.
        averaged: an average of the weights, moved on after every update; None: no average.
        progress: where to begin; the loop moves it on.
    """

    problem: Problem
    optimizer: StepOptimizer
    sizes: Sizes
    seed: int
    work: Work
    averaged: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)
    _unsettled: bool = field(default=False, init=False)

    def run(
        self,
        on_row: Callable[[Row], None],
        on_update: Callable[[], None] = lambda: None,
        stop: Callable[[], Outcome | None] = lambda: None,
    ) -> Outcome:
        """Update until the budget is used up, the loss diverges or ``stop`` says so.

        Args:
            on_row: gets one row of metrics for each evaluation.
            on_update: called after every update and its evaluation (to write a checkpoint, say).
            stop: asked before every update; its answer, if any, is the outcome.
        """
        progress, sizes = self.progress, self.sizes
        if progress.evaluated < 0:  # not continued, but new
            self._add_row(on_row)
        while progress.update < sizes.updates and not progress.divergence:
            if (outcome := stop()) is not None:
                return outcome
            self.update()
            if progress.update % sizes.evaluate_every == 0 or progress.update == sizes.updates:
                self._add_row(on_row)
            on_update()
        if progress.evaluated < progress.update:
            self._add_row(on_row)
        if progress.divergence:
            return Outcome("diverged", progress.divergence)
        return Outcome("finished", f"{progress.update} updates")

    def settle(self) -> Progress:
        """Wait until the device has made the updates asked of it: that is part of their time."""
        if self._unsettled:
            started = time.perf_counter()
            synchronize(self.problem.train[0].device)
            self.progress.seconds += time.perf_counter() - started
            self._unsettled = False
        return self.progress

    def _add_row(self, on_row: Callable[[Row], None]) -> None:
        self.settle()
        row = self.metrics()
        if self.progress.evaluated < 0:
            self.progress.initial_loss = float(row["train_loss"] or 0.0)
        self.progress.evaluated = self.progress.update
        self.progress.divergence = self._divergence(row) or ""
        on_row(row)

    def evaluate(self, model: nn.Module, data: Data) -> tuple[float, float | None]:
        """Loss and accuracy, in pieces no larger than those of training."""
        rows = _EVALUATION_ROWS.get(data[0].device.type, _EVALUATION_ROWS["cpu"])
        return evaluate(self.problem, model, data, min(rows, self.sizes.micro_batch or rows))

    def metrics(self) -> Row:
        """One row of metrics at the current weights; the README says what each one means."""
        progress, problem = self.progress, self.problem
        report = self.optimizer.last_step
        test = self._subset(problem.test)
        test_loss, test_accuracy = self.evaluate(problem.model, test)
        row: Row = {
            "update": progress.update,
            "epoch": progress.update * self.sizes.batch_size / len(problem.train[0]),
            "seconds": progress.seconds,
            "gradient_equivalents": progress.gradient_equivalents / len(problem.train[0]),
            "train_loss": self.evaluate(problem.model, self._subset(problem.train))[0],
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "gradient_norm": None if report is None else float(report.gradient_norm),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        if self.averaged is not None:
            loss, accuracy = self.evaluate(self.averaged, test)
            row |= {"averaged_test_loss": loss, "averaged_test_accuracy": accuracy}
        for k in range(len(self.work.products)):
            solved = report is not None and k < len(report.blocks)
            row[f"cg_iterations_{k}"] = report.blocks[k].iterations if solved and report else None
        return row

    def update(self) -> None:
        """Make one update; its work and its time until now are added to `progress`.

        A GPU may be at work on it still (see `settle`).
        """
        progress, sizes = self.progress, self.sizes
        started = time.perf_counter()
        inputs, targets = self.problem.train
        rows = batch_indices(
            progress.update, sizes.batch_size, len(inputs), self.seed, inputs.device
        )
        batch = inputs[rows], targets[rows]
        few = sizes.curvature_batch_size
        # The first rows of the shuffled mini-batch, the same for HF and block-diagonal HF.
        curvature_batch = None if few is None else (batch[0][:few], batch[1][:few])
        self.problem.model.train()
        self.optimizer.step(
            self.problem.model,
            self.problem.criterion,
            batch,
            curvature_batch,
            micro_batch=sizes.micro_batch,
        )
        if self.averaged is not None:
            move_average(self.averaged, self.problem.model)
        progress.seconds += time.perf_counter() - started
        self._unsettled = True
        assert self.optimizer.last_step is not None
        progress.update += 1
        progress.gradient_equivalents += self.work.of_update(
            self.optimizer.last_step, sizes.batch_size, few
        )

    def _subset(self, data: Data) -> Data:
        """The rows on which training is followed."""
        inputs, targets = data
        if self.sizes.evaluation_rows >= len(inputs):
            return data
        # Drawn at random: every second row of MNIST's training set is harder than the others.
        # The same for all runs, whatever their seed.
        order = _permutation(len(inputs), "evaluation subset", 0, inputs.device)
        rows = order[: self.sizes.evaluation_rows]
        return inputs[rows], targets[rows]

    def _divergence(self, row: Row) -> str | None:
        loss, limit = row["train_loss"], DIVERGENCE_FACTOR * self.progress.initial_loss
        assert loss is not None
        if not math.isfinite(loss):
            return f"training loss {loss} at update {row['update']}"
        if loss > limit:
            return (
                f"training loss {loss:.4g} at update {row['update']}, above "
                f"{DIVERGENCE_FACTOR:g} times the initial {self.progress.initial_loss:.4g}"
            )
        return None


@torch.no_grad()
def evaluate(
    problem: Problem, model: nn.Module, data: Data, rows: int
) -> tuple[float, float | None]:
    """The loss over all of ``data``, and the share of hits (None where there is no accuracy).

    ``model`` is the problem's, or one that averages its weights; ``rows`` are evaluated at once.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=data[0].device)
    hits = torch.zeros((), device=data[0].device)
    for weight, (inputs, targets) in pieces(model, problem.criterion, data, rows):
        outputs = model(inputs)
        loss += weight * problem.criterion(outputs, targets)
        if problem.accuracy is not None:
            hits += problem.accuracy(outputs, targets).sum()
    model.train(was_training)
    accuracy = None if problem.accuracy is None else float(hits) / len(data[0])
    return float(loss), accuracy


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the class with the highest score is the right one: bool (batch,)."""
    return outputs.argmax(1) == labels


def polyak_average(model: nn.Module) -> AveragedModel:
    """An exponential average of the weights, in torch's own `AveragedModel`; see `move_average`."""
    return AveragedModel(model)


@torch.no_grad()
def move_average(average: AveragedModel, model: nn.Module) -> None:
    """Take the model's weights into the average.

    After t updates the decay is ``min(0.99, (1 + t) / (10 + t))``: runs are short, and the
    start should be forgotten (ours; the paper says "Polyak averaging" and no more). The average's
    own method would copy that number to a GPU each time, and wait.
    """
    count = int(average.n_averaged)  # on the CPU
    decay = min(POLYAK_DECAY, (1 + count) / (10 + count)) if count else 0.0
    averages: list[Tensor] = list(average.module.parameters())
    weights: list[Tensor] = [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)
    for own, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        own.copy_(buffer)
    average.n_averaged += 1


def batch_indices(
    update: int,
    batch_size: int,
    rows: int,
    seed: int,
    device: torch.device = _CPU,
) -> Tensor:
    """The rows of mini-batch number ``update``: int64 (batch_size,) on ``device``.

    Epochs are shuffled one by one and read through without a gap, so a mini-batch may take the
    end of one epoch and the beginning of the next. A function of its arguments alone: resuming
    needs no state, and all optimizers see the same order at a seed.
    """
    start = update * batch_size
    parts = []
    for epoch in range(start // rows, (start + batch_size - 1) // rows + 1):
        first = max(start - epoch * rows, 0)
        last = min(start + batch_size - epoch * rows, rows)
        order = _permutation(rows, f"order of epoch {epoch}", seed, device)
        parts.append(order[first:last])
    return torch.cat(parts)


def stream_seed(name: str, seed: int) -> int:
    """The seed of a random stream of its own, for everything drawn under ``name``."""
    digest = hashlib.sha256(f"{name}, seed {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


@functools.lru_cache(maxsize=4)  # a mini-batch needs its epoch's, and at most the next one's
def _permutation(rows: int, name: str, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(name, seed))
    return torch.randperm(rows, generator=generator).to(device)
