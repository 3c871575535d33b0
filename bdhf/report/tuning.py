"""What the tuning study says: the best of each factor, and how the claims come out with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

from bdhf.experiment import figures
from bdhf.report.evidence import NAMES, Cell, Evidence, UntestedError
from bdhf.report.verdicts import Claim, claims, preview
from bdhf.summary import is_better_higher

STUDY = "tuning"


@dataclass(frozen=True)
class Trials:
    """The trials of one optimizer in one experiment.

    Attributes:
        metric: what is compared, on the validation split: the figure's last panel.
        cells: the trials.
    """

    experiment: str
    optimizer: str
    metric: str
    cells: list[Cell]

    def score(self, cell: Cell) -> float:
        """The final value on the validation split, the median over the seeds."""
        return median(cell.final(self.metric).values())

    @property
    def best(self) -> Cell:
        """The trial with the best score."""
        sign = -1 if is_better_higher(self.metric) else 1

        def place(cell: Cell) -> float:
            score = sign * self.score(cell)
            return math.inf if math.isnan(score) else score

        return min(self.cells, key=place)

    @property
    def shipped(self) -> Cell | None:
        """The trial with the settings that ship, if it was made."""
        return next((cell for cell in self.cells if not changes(cell)), None)


def changes(cell: Cell) -> str:
    """What a trial changed, without the split and the budget, which all trials have."""
    return changes_of(cell.key.changed)


def changes_of(changed: str) -> str:
    """The same of a run's ``changed``."""
    common = ("data.validation_rows=", "updates=")
    words = [w for w in changed.split() if not w.startswith(common)]
    return " ".join(word.removeprefix("optimizer.") for word in words)


def trials(evidence: Evidence) -> list[Trials]:
    """The study's trials, by experiment and optimizer."""
    metrics = {name: list(figure.panels)[-1] for name, figure in figures().items()}
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in evidence.others:
        if cell.key.study == STUDY and cell.key.experiment in metrics:
            found.setdefault((cell.key.experiment, cell.key.optimizer), []).append(cell)
    order = list(NAMES)

    def place(key: tuple[str, str]) -> tuple[int, int, str]:
        experiment, optimizer = key
        known = order.index(optimizer) if optimizer in order else len(order)
        return list(metrics).index(experiment), known, optimizer

    ordered = sorted(found, key=place)
    return [
        Trials(*key, metrics[key[0]], sorted(found[key], key=lambda c: c.key.changed))
        for key in ordered
    ]


def moved_verdicts(evidence: Evidence) -> Iterator[tuple[Claim, list[str]]]:
    """For each claim that the trials bear on: parts that hold as shipped, with Adam's best, with
    the best of all three. One seed, half the budget, no plateau asked for: no verdicts."""
    known = trials(evidence)
    if not known:
        return
    shipped = {(t.experiment, t.optimizer): t.shipped for t in known}
    best = {(t.experiment, t.optimizer): t.best for t in known}
    choices: list[dict[tuple[str, str], Cell | None]] = [
        shipped,
        {key: best[key] if key[1] == "adam" else shipped[key] for key in best},
        {**best},
    ]
    for claim in claims():
        counts = []
        for chosen in choices:
            cells = {key: [cell] for key, cell in chosen.items() if cell is not None}
            alone = replace(evidence, cells=cells, others=[], planned={})
            counts.append(_parts_that_hold(claim, alone))
        if any(counts):
            yield claim, counts


def _parts_that_hold(claim: Claim, evidence: Evidence) -> str:
    evidence = replace(evidence, times=[], solves=[])
    try:
        outcomes = [preview(part) for part in claim.parts(evidence)]
    except UntestedError:
        return ""
    if not outcomes:
        return ""
    open_ = sum(outcome == "untested" for outcome in outcomes)
    words = f"{sum(outcome == 'holds' for outcome in outcomes)} of {len(outcomes)}"
    return f"{words}, {open_} undecided" if open_ else words
