"""What a claim is judged on: the cells of a scale, its timings and its CG solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from hydra.errors import HydraException

from bdhf.config import TargetConfig
from bdhf.errors import ConfigError
from bdhf.experiment import experiment_names, shipped_hashes, target
from bdhf.record import read_table
from bdhf.report import quantities
from bdhf.report.quantities import Series
from bdhf.report.table import CellKey, Curves, read_curves, read_runs
from bdhf.summary import is_better_higher
from bdhf.training import DIVERGENCE_FACTOR

#: A value for each seed.
BySeed = dict[int, float]
#: Where a goal was met, for each seed: after the first number, by the second.
Brackets = dict[int, tuple[float, float]]

#: Adam counts as at its plateau when its training loss changed by less than this share in the
#: second half of its run.
PLATEAU = 0.05

_SIZES = ("batch_size=", "curvature_batch_size=")

#: What optimizers are called.
NAMES = {"adam": "Adam", "hf": "HF", "bdhf": "block-diagonal HF"}


class UntestedError(Exception):
    """A claim cannot be judged on what there is; the message says why."""


@dataclass(frozen=True)
class Cell:
    """All runs that differ by seed only, and what is read off their curves."""

    key: CellKey
    curves: Curves

    def __str__(self) -> str:
        key = self.key
        words = f"{NAMES.get(key.optimizer, key.optimizer)}, mini-batch {key.batch_size}"
        if key.curvature_batch_size is not None:
            words += f", curvature {key.curvature_batch_size}"
        others = [w for w in key.changed.split() if not w.startswith(_SIZES)]  # said already
        return f"{words} ({' '.join(others)})" if others else words

    @property
    def seeds(self) -> list[int]:
        """Its seeds."""
        return self.curves.seeds

    def course(self, seed: int, metric: str) -> Series:
        """A metric at ``curves.update``, the worst value from where the run diverged.

        Raises:
            ValueError: there is no such metric.
        """
        if metric not in self.curves.columns:
            known = ", ".join(self.curves.columns)
            raise ValueError(f"metric={metric}: must be one of {known}")
        k = self.curves.seeds.index(seed)
        values = self.curves.columns[metric][k].copy()
        if self.curves.diverged[k]:
            worst = -math.inf if is_better_higher(metric) else math.inf
            values[self.last_row(k) :] = worst
        return values

    def last_row(self, k: int) -> int:
        """The last evaluation of a seed: where it diverged, the one in which that was found."""
        return int(np.flatnonzero(~np.isnan(self.curves.columns["epoch"][k]))[-1])

    def drawn(self, metric: str) -> Series:
        """A metric as it is drawn, (seeds, points): losses of a run that diverged end at the limit.

        Or one such loss, of many powers of ten, would make flat lines of all others.
        """
        values = self.curves.columns[metric]
        if not metric.endswith("loss"):
            return values
        found: Series = np.minimum(values, DIVERGENCE_FACTOR * values[:, :1])
        return found

    def is_cut(self, metric: str) -> bool:
        """Whether something of a metric lies beyond what is drawn."""
        values = self.curves.columns.get(metric)
        return values is not None and bool((self.drawn(metric) < values).any())

    def final(self, metric: str) -> BySeed:
        """The median over the last tenth of the updates."""
        return self._by_seed(lambda s: quantities.final(self.update, self.course(s, metric)))

    def updates_to(self, metric: str, goals: BySeed) -> Brackets:
        """Where each seed met its goal, in updates (see `quantities.first_at`)."""
        return self._met(self.update, metric, goals)

    def updates_to_target(self, goal: TargetConfig) -> Brackets:
        """The same for one goal."""
        assert goal.metric is not None
        return self._met(self.update, goal.metric, dict.fromkeys(self.seeds, goal.value))

    def epochs_to_target(self, goal: TargetConfig) -> Brackets:
        """The same in epochs."""
        assert goal.metric is not None
        return self._met(self.epoch, goal.metric, dict.fromkeys(self.seeds, goal.value))

    def _met(self, x: Series, metric: str, goals: BySeed) -> Brackets:
        higher = is_better_higher(metric)
        return {
            seed: quantities.first_at(x, self.course(seed, metric), goal, higher)
            for seed, goal in goals.items()
            if seed in self.seeds
        }

    def total_rise(self, metric: str) -> BySeed:
        """How much the loss goes up in all, in logarithms."""
        return self._by_seed(lambda s: quantities.total_rise(self.course(s, metric)))

    def descent(self) -> BySeed:
        """By which share the training loss fell in the second half of each run."""
        return self._by_seed(
            lambda s: quantities.descent_in_second_half(self.update, self.course(s, "train_loss"))
        )

    @property
    def update(self) -> Series:
        """Where it was evaluated."""
        return self.curves.update

    @property
    def epoch(self) -> Series:
        """The same in epochs."""
        found: Series = np.nanmax(self.curves.columns["epoch"], axis=0)
        return found

    def _by_seed(self, value: Callable[[int], float]) -> BySeed:
        return {seed: value(seed) for seed in self.seeds}


def paired(ours: BySeed, theirs: BySeed, effect: Callable[[float, float], float]) -> BySeed:
    """An effect for each seed that both have."""
    return {seed: effect(ours[seed], theirs[seed]) for seed in ours if seed in theirs}


def side_by_side(
    ours: Cell, theirs: Cell, metric: str
) -> tuple[Series, dict[int, tuple[Series, Series]]]:
    """The updates at which both were evaluated, from the first on, and both courses by seed.

    A cell of which all runs diverged ends early, and counts as worst after that.

    Raises:
        UntestedError: they were evaluated at different updates.
    """
    short, long = sorted((ours, theirs), key=lambda cell: len(cell.update))
    ended = len(short.update)
    cut = ended < len(long.update) and not all(short.curves.diverged)
    if cut or list(short.update) != list(long.update[:ended]):
        raise UntestedError(f"{ours} and {theirs} were not evaluated at the same updates")
    begun = long.update > 0

    def whole(cell: Cell, seed: int) -> Series:
        found = cell.course(seed, metric)
        return np.pad(found, (0, len(begun) - len(found)), mode="edge")[begun]

    shared = [seed for seed in ours.seeds if seed in theirs.seeds]
    return long.update[begun], {s: (whole(ours, s), whole(theirs, s)) for s in shared}


def along(ours: Cell, theirs: Cell, x: str, metric: str) -> dict[int, tuple[float, float]]:
    """By which share ours is below theirs at the same ``x``: on average, and at the end.

    Between evaluations log curves are straight; the end is that of the shorter one. Seeds of which
    one diverged are left out.
    """
    found = {}
    for seed in ours.seeds:
        if seed not in theirs.seeds:
            continue
        courses = [_course_over(cell, seed, x, metric) for cell in (ours, theirs)]
        if not all(np.isfinite(values).all() for _, values in courses):
            continue
        stop = min(places[-1] for places, _ in courses)
        places = np.unique(np.concatenate([places for places, _ in courses]))
        places = places[(places > 0) & (places <= stop)]
        own, other = (np.exp(np.interp(places, at, np.log(v))) for at, v in courses)
        share = quantities.share_below_on_average(places, own, other)
        found[seed] = share, share_below(float(own[-1]), float(other[-1]))
    return found


def _course_over(cell: Cell, seed: int, x: str, metric: str) -> tuple[Series, Series]:
    values = cell.course(seed, metric)
    known = ~np.isnan(values)
    k = cell.seeds.index(seed)
    places = cell.update if x == "update" else cell.curves.columns[x][k]
    return places[known], values[known]


def share_below(ours: float, theirs: float) -> float:
    """By which share ``ours`` is below ``theirs``; worst where only ours diverged."""
    if (math.isinf(ours) and math.isinf(theirs)) or theirs == 0:
        return math.nan
    return -math.inf if math.isinf(ours) else 1.0 - ours / theirs


def difference(ours: float, theirs: float) -> float:
    """``ours - theirs``, NaN where both are infinite."""
    return ours - theirs


def times_fewer(ours: Brackets, theirs: Brackets) -> Brackets:
    """How many times fewer updates (or epochs) ours needed, by seed: at least, and at most.

    Between two evaluations, and after the end of a run, nobody knows where a goal is met.
    """
    return {
        seed: (_ratio(theirs[seed][0], ours[seed][1]), _ratio(theirs[seed][1], ours[seed][0]))
        for seed in ours
        if seed in theirs
    }


def _ratio(theirs: float, ours: float) -> float:
    if math.isinf(ours) and math.isinf(theirs):  # both diverged before
        return math.nan
    if ours == 0:
        return math.inf if theirs > 0 else math.nan
    return theirs / ours


def within_a_factor_of(limit: float, ratios: Brackets) -> Brackets:
    """An effect of 1 or more where a ratio is between ``1 / limit`` and ``limit``."""

    def effect(ratio: float) -> float:
        if math.isnan(ratio):
            return math.nan
        return limit * min(ratio, 1 / ratio) if 0 < ratio < math.inf else 0.0

    found = {}
    for seed, (low, high) in ratios.items():
        ends = sorted((effect(low), effect(high)))
        found[seed] = (ends[0], limit if low <= 1 <= high else ends[1])
    return found


@dataclass(frozen=True)
class Evidence:
    """Everything that claims are judged on.

    Attributes:
        cells: those as shipped, by experiment and optimizer, sorted by mini-batch and curvature
            mini-batch.
        others: cells of the studies, of one's own settings, and of settings that shipped once.
        times, solves: rows of ``update_times.csv`` and ``cg_solves.csv``, measured on ``cells``.
        targets: by experiment.
        planned: how many cells there should be, by experiment and optimizer.
    """

    cells: dict[tuple[str, str], list[Cell]]
    others: list[Cell] = field(default_factory=list)
    times: list[dict[str, str]] = field(default_factory=list)
    solves: list[dict[str, str]] = field(default_factory=list)
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    planned: dict[tuple[str, str], int] = field(default_factory=dict)

    def of(self, experiment: str, optimizer: str) -> list[Cell]:
        """The cells of an optimizer.

        Raises:
            UntestedError: there are none, or some of the planned ones are missing.
        """
        found = self.cells.get((experiment, optimizer), [])
        name = NAMES.get(optimizer, optimizer)
        if not found:
            raise UntestedError(f"there are no runs of {name} in experiment {experiment}")
        planned = self.planned.get((experiment, optimizer), 0)
        if len(found) < planned:
            raise UntestedError(
                f"{name} in experiment {experiment} has runs of {len(found)} of {planned} sizes"
            )
        return found

    def drawn(self, experiment: str) -> list[Cell]:
        """What its figures show: all but the studies' cells, in the order of their sizes."""
        own = [cell for key, found in self.cells.items() if key[0] == experiment for cell in found]
        more = [c for c in self.others if c.key.experiment == experiment and not c.key.study]
        return sorted(own + more, key=lambda cell: _order(cell.key))

    def goal(self, experiment: str) -> TargetConfig:
        """The target of an experiment.

        Raises:
            UntestedError: it has none at this scale.
        """
        found = self.targets.get(experiment)
        if found is None or found.metric is None:
            raise UntestedError(f"experiment {experiment} has no target at this scale")
        return found

    def pairs(self, experiment: str) -> list[tuple[Cell, Cell]]:
        """Block-diagonal HF and HF at the same mini-batches, smallest curvature first.

        Raises:
            UntestedError: there are none.
        """
        theirs = {_sizes(cell): cell for cell in self.of(experiment, "hf")}
        found = [
            (cell, theirs[_sizes(cell)])
            for cell in self.of(experiment, "bdhf")
            if _sizes(cell) in theirs
        ]
        if not found:
            raise UntestedError(
                f"no runs of HF and block-diagonal HF at the same mini-batches in {experiment}"
            )
        return found


def _sizes(cell: Cell) -> tuple[int, int | None]:
    return cell.key.batch_size, cell.key.curvature_batch_size


def unsettled(cells: Iterable[Cell]) -> str:
    """Why these Adam runs are not at their plateau; empty where they are."""
    words = []
    for cell in cells:
        # A run that diverged will not come to one, and counts as worse than any.
        changes = [change for change in cell.descent().values() if not math.isinf(change)]
        if not all(abs(change) < PLATEAU for change in changes):
            shown = ", ".join(_change_in_words(change) for change in changes)
            words.append(f"{cell}: {shown}")
    if not words:
        return ""
    change = "training loss in the second half of its runs"
    return f"Adam is not at its plateau: {change}, {'; '.join(words)}"


def _change_in_words(descent: float) -> str:
    return "unknown" if math.isnan(descent) else f"{-descent:+.0%}"


#: Cells by experiment and optimizer.
Cells = dict[tuple[str, str], list[Cell]]


def gather(curves: dict[CellKey, Curves]) -> Cells:
    """Cells by experiment and optimizer, in the order of their sizes."""
    found: Cells = {}
    for key in sorted(curves, key=_order):
        found.setdefault((key.experiment, key.optimizer), []).append(Cell(key, curves[key]))
    return found


def _order(key: CellKey) -> tuple[str, int, int, CellKey]:
    return key.optimizer, key.batch_size, key.curvature_batch_size or 0, key


def read_evidence(results: Path, scale: str) -> Evidence:
    """The evidence of a scale, from its committed tables.

    Raises:
        TableError: there is no table of curves, or it is of an older version.
    """
    curves = read_curves(results, scale)
    planned = {
        key: planned_cells(*key, scale) for key in {(k.experiment, k.optimizer) for k in curves}
    }
    own, others = {}, []
    for key, value in curves.items():
        hashes = planned[key.experiment, key.optimizer]
        if key.changed or key.study:
            others.append(Cell(key, value))
        elif hashes and key.settings not in hashes:
            past = replace(key, changed=f"settings-before={key.settings}")
            others.append(Cell(past, value))
        else:
            own[key] = value
    folder = results / scale
    settings = {key.settings for key in own}
    made = {run["run"] for run in read_runs(folder) if run["settings"] in settings}
    times, solves = (
        [row for row in read_table(folder / name) if row.get("run") in made]
        for name in ("update_times.csv", "cg_solves.csv")
    )
    targets = {name: target(name, scale) for name in experiment_names()}
    counts = {key: len(hashes) for key, hashes in planned.items()}
    return Evidence(gather(own), others, times, solves, targets, counts)


def planned_cells(experiment: str, optimizer: str, scale: str) -> set[str]:
    """Hashes of the cells that the configs have; empty where they do not say."""
    try:
        return shipped_hashes(experiment, scale, optimizer)
    except (ConfigError, ValueError, HydraException):  # something that went away
        return set()
