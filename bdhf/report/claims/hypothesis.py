"""The hypothesis behind it all."""

from __future__ import annotations

from bdhf.report.evidence import (
    BySeed,
    Cell,
    Evidence,
    UntestedError,
    paired,
    share_below,
    side_by_side,
)
from bdhf.report.quantities import share_below_on_average
from bdhf.report.verdicts import Part, claim

NAME = "autoencoder"


@claim(
    "H1",
    "Curvature within a layer or block matters more than curvature across blocks.",
)
def structure_matters(evidence: Evidence) -> list[Part]:
    """On the autoencoder, at the smallest curvature mini-batch. With 2, 4 and 8 blocks, layers
    have a lower training error than blocks of the same sizes drawn at random, scalar by scalar (one
    draw for all seeds): by at least 5 % on average over the updates (of the log curves). And
    what is across blocks can be left out: with 2, 4 and 8 blocks of layers the final training error
    is at most 5 % above that of the whole matrix (HF)."""
    ours, whole = evidence.pairs(NAME)[0]
    sizes = ours.key.batch_size, ours.key.curvature_batch_size
    others = {
        cell.key.changed.removeprefix("optimizer.blocks="): cell
        for cell in evidence.others
        if cell.key.experiment == NAME
        and cell.key.changed.startswith("optimizer.blocks=")
        and " " not in cell.key.changed
        and (cell.key.batch_size, cell.key.curvature_batch_size) == sizes
    }
    missing = [
        name for name in ("4", "8", "random-2", "random-4", "random-8") if name not in others
    ]
    if missing:
        raise UntestedError(f"no runs with blocks {', '.join(missing)}: study=blocks makes them")
    return [
        *(
            Part(
                f"training error with {count} blocks of layers, below {count} random blocks, "
                "on average over the updates",
                _lower(layers, others[f"random-{count}"]),
                least=0.05,
            )
            for count, layers in ((2, ours), (4, others["4"]), (8, others["8"]))
        ),
        *(
            Part(
                f"final training error with {count} blocks below that with one, or little above",
                paired(layers.final("train_loss"), whole.final("train_loss"), share_below),
                least=-0.05,
                neutral=-0.05,
            )
            for count, layers in ((2, ours), (4, others["4"]), (8, others["8"]))
        ),
    ]


def _lower(ours: Cell, theirs: Cell) -> BySeed:
    updates, courses = side_by_side(ours, theirs, "train_loss")
    return {seed: share_below_on_average(updates, *pair) for seed, pair in courses.items()}
