"""What the paper says of the LSTM (figure 2)."""

from __future__ import annotations

from bdhf.report.claims.common import (
    better_at_the_end,
    better_than_adam,
    loses_less_as_curvature_shrinks,
)
from bdhf.report.evidence import Evidence, times_fewer
from bdhf.report.verdicts import Part, claim

NAME = "lstm"


@claim(
    "L1",
    "Block-diagonal HF with a large mini-batch needs fewer updates, reaches a lower training loss "
    "and a better test accuracy than Adam at any mini-batch size.",
)
def better_than_any_adam(evidence: Evidence) -> list[Part]:
    """Block-diagonal HF with its smallest curvature mini-batch against, seed by seed, the best of
    Adam over its mini-batches: at least 1.5 times fewer updates to the target accuracy, a final
    training loss at least 5 % lower and a final test accuracy at least 0.5 points higher, Adam
    being at its plateau."""
    return better_than_adam(evidence, NAME, "test_accuracy")


@claim("L2", "Against HF it needs fewer updates and reaches better minima.")
def better_than_hf(evidence: Evidence) -> list[Part]:
    """At each curvature mini-batch: at least 1.1 times fewer updates to the target accuracy than
    HF, and, with as many updates, a final training loss at least 2 % lower and a final test
    accuracy at least 0.2 points higher."""
    goal = evidence.goal(NAME)
    parts = []
    for ours, theirs in evidence.pairs(NAME):
        at = f"curvature {ours.key.curvature_batch_size}"
        updates = ours.updates_to_target(goal), theirs.updates_to_target(goal)
        parts += [
            Part.between(
                f"updates to the target, {at}: HF's over block-diagonal HF's",
                times_fewer(*updates),
                1.1,
            ),
            *better_at_the_end(ours, theirs, "test_accuracy", 0.02, 0.002),
        ]
    return parts


@claim("L3", "It loses less than HF does as the curvature mini-batch shrinks.")
def loses_less(evidence: Evidence) -> list[Part]:
    """From the largest to the smallest curvature mini-batch: HF's loss of final test accuracy is
    larger than block-diagonal HF's by at least 0.2 points, the rise of its final training loss, in
    per cent of the loss at the largest, by at least 2 percentage points. One that diverged at any
    of the two sizes lost everything."""
    return loses_less_as_curvature_shrinks(evidence, NAME, "test_accuracy")
