"""How long runs will take and how much disk they need: from what was made here, or from a trial."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import median

import torch

from bdhf.config import Config, device_of, settings_hash, settings_of
from bdhf.data import stand_in
from bdhf.experiment import find_experiment
from bdhf.gradient import loss_and_gradient
from bdhf.machine import use_machine
from bdhf.record import processor
from bdhf.sweep.state import State
from bdhf.work import Work, count_work

#: Rows of the gradient that is timed where nothing was made yet; larger mini-batches are in
#: proportion.
_TRIAL_ROWS = 500

#: What evaluation, set-up and writing add to the time of the updates, where it is not known.
_BESIDES = 1.15

#: CG iterations of a method that does not say how many it may take.
_CG_ITERATIONS = 100

#: Seconds of updates below which a run that is not finished tells too little.
_TELLING = 5.0

#: What is on disk while a run is made: two checkpoints and the one being written.
_CHECKPOINTS_MEANWHILE = 3


class Estimate:
    """What a sweep still needs; measures at most one gradient for each network and mini-batch.

    Args:
        states: all of the sweep's runs.
        jobs: how many are made at once.
        trials: whether to measure where nothing was made yet; otherwise such runs are left out.
    """

    def __init__(self, states: Sequence[State], jobs: int = 1, trials: bool = True) -> None:
        self._states, self._jobs, self._by_trials = states, jobs, trials
        self._made = _seconds_an_update(states)
        self._trials: dict[tuple[object, ...], float] = {}
        self._works: dict[str, tuple[Work, int]] = {}

    def seconds(self, state: State) -> float:
        """Seconds a run still needs on this machine, all iterations of CG used."""
        left = max(state.run.config.updates - state.updates, 0)
        if not left or not state.is_open:
            return 0.0
        key = _cell(state.run.config)
        if key not in self._made and self._by_trials:
            self._made[key] = self._by_trial(state.run.config)
        return left * self._made.get(key, 0.0)

    def total(self) -> float:
        """Seconds until all is made, so many runs at once."""
        each = [self.seconds(state) for state in self._states]
        return max(sum(each) / self._jobs, max(each, default=0.0))

    def words(self) -> str:
        """As ``about 12 min``, or ``at least 12 min`` where some runs are left out."""
        missing = any(_cell(s.run.config) not in self._made for s in self._states if s.is_open)
        return f"{'at least' if missing else 'about'} {duration(self.total())}"

    def disk(self) -> tuple[int, int]:
        """Bytes that the runs' folders have now, and about those they will have."""
        now = sum(_bytes_of(state) for state in self._states)
        open_states = [state for state in self._states if state.is_open]
        kept = sum(max(self._checkpoint_bytes(s) - _bytes_of(s), 0) for s in open_states)
        meanwhile = max(map(self._checkpoint_bytes, open_states), default=0) * self._jobs
        return now, now + kept + _CHECKPOINTS_MEANWHILE * meanwhile

    def _by_trial(self, config: Config) -> float:
        work, _ = self._work(config)
        rows = min(config.batch_size, _TRIAL_ROWS)
        settings = settings_of(config)
        key = (config.experiment, str(settings["network"]), rows)
        if key not in self._trials:
            self._trials[key] = _seconds_a_gradient(config, rows) / rows
        equivalents: float = config.batch_size
        if config.optimizer.uses_curvature:
            cap: int = getattr(config.optimizer, "cg_max_iter", _CG_ITERATIONS)
            products = (cap + 1) * sum(work.products)
            equivalents += (config.curvature_batch_size or 0) * (work.linearization + products)
        return self._trials[key] * equivalents * _BESIDES

    def _work(self, config: Config) -> tuple[Work, int]:
        """What an update costs, and the bytes of a checkpoint."""
        settings = settings_of(config)
        kind = config.optimizer.name, getattr(config.optimizer, "blocks", None)
        key = f"{config.experiment} {settings['network']} {kind}"
        if key not in self._works:
            experiment = find_experiment(config.experiment)
            model = config.optimizer.prepare(experiment.network(config.network))
            blocks, _ = config.optimizer.make(model, experiment.blocks)
            sample, _ = experiment.prepare(stand_in(config.data.name, 2), config.network)
            groups = [block["params"] for block in blocks]
            work = count_work(model, experiment.criterion, sample, groups)
            # Weights, their average, and the warm start or Adam's two moments.
            copies = 1 + experiment.average_weights + (1 if blocks else 2)
            bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
            self._works[key] = work, copies * bytes_
        return self._works[key]

    def _checkpoint_bytes(self, state: State) -> int:
        return self._work(state.run.config)[1]


def _cell(config: Config) -> str:
    """The same for runs that differ by seed alone."""
    return settings_hash(settings_of(config), without=("seed",))


def _seconds_an_update(states: Iterable[State]) -> dict[str, float]:
    """By cell, from the runs that were made on a machine like this one."""
    found: dict[str, list[float]] = {}
    for state in states:
        if state.row is None or not state.updates:
            continue
        if state.standing != "finished" and float(state.row["seconds"] or 0.0) < _TELLING:
            continue
        sessions = state.folder.provenance.get("sessions", [])
        device = device_of(state.run.config)
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        machines = {(session["device"], session.get("processor")) for session in sessions}
        if machines != {(here, processor())}:
            continue
        seconds = float(state.row["seconds"] or 0.0) * _BESIDES
        if state.standing == "finished" and len(sessions) == 1:
            start, end = (datetime.fromisoformat(sessions[0][key]) for key in ("start", "end"))
            seconds = (end - start).total_seconds()
        found.setdefault(_cell(state.run.config), []).append(seconds / state.updates)
    return {key: median(values) for key, values in found.items()}


def _seconds_a_gradient(config: Config, rows: int) -> float:
    """Seconds of one gradient of the experiment's network on so many rows: the best of three."""
    use_machine(config.threads)
    device = device_of(config)
    experiment = find_experiment(config.experiment)
    model = experiment.network(config.network).to(device)
    (inputs, targets), _ = experiment.prepare(stand_in(config.data.name, rows), config.network)
    batch = inputs.to(device), targets.to(device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        loss = loss_and_gradient(model, experiment.criterion, batch, list(model.parameters()))
        float(loss)  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def _bytes_of(state: State) -> int:
    path = state.folder.path
    return sum(file.stat().st_size for file in path.glob("*")) if path.exists() else 0


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``12 min``, ``3.5 h``, ``12 days``."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.1f} {name}" if name == "h" else f"{value:.0f} {name}"
    return f"{seconds / 86400:.0f} days"
