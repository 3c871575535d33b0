"""What the paper says of the ResNet (figure 3).

Final accuracies are those of the averaged weights; a target is met by the weights themselves.
"""

from __future__ import annotations

import math

from bdhf.report.claims.common import (
    better_at_the_end,
    better_than_adam,
    loses_less_as_curvature_shrinks,
)
from bdhf.report.evidence import (
    Evidence,
    difference,
    paired,
    share_below,
    side_by_side,
    unsettled,
)
from bdhf.report.verdicts import Part, claim

NAME = "resnet"
ACCURACY = "averaged_test_accuracy"


@claim(
    "R1",
    "Block-diagonal HF with a large mini-batch gets a test accuracy comparable to Adam with a "
    "small one.",
)
def accuracy_of_adam(evidence: Evidence) -> list[Part]:
    """Block-diagonal HF with its smallest curvature mini-batch: its final test accuracy is at most
    2 points below that of Adam with its smallest mini-batch, in every seed, Adam being at its
    plateau."""
    adam, ours = evidence.of(NAME, "adam")[0], evidence.of(NAME, "bdhf")[0]
    return [
        Part(
            "final test accuracy minus that of Adam with its smallest mini-batch",
            paired(ours.final(ACCURACY), adam.final(ACCURACY), difference),
            least=-0.02,
            unit="points",
            neutral=-0.02,
            untested=unsettled([adam]),
        )
    ]


@claim(
    "R2",
    "It gets a slightly lower training loss and a higher test accuracy than HF at three curvature "
    "mini-batch sizes.",
)
def better_than_hf(evidence: Evidence) -> list[Part]:
    """At each curvature mini-batch: a final training loss at least 1 % lower than HF's, and a
    final test accuracy at least 0.5 points higher. (The paper has three sizes, the laptop scale
    two.)"""
    return [
        part
        for ours, theirs in evidence.pairs(NAME)
        for part in better_at_the_end(ours, theirs, ACCURACY, 0.01, 0.005)
    ]


@claim("R3", "Its training is substantially more stable than HF's.")
def more_stable(evidence: Evidence) -> list[Part]:
    """At each curvature mini-batch, evaluated at the same updates: all that the log of the training
    loss goes up between evaluations, summed over the course (infinite where a run diverges), is at
    most half of HF's. Where neither loss goes up by 2 % in all there is nothing to compare."""
    parts = []
    for ours, theirs in evidence.pairs(NAME):
        side_by_side(ours, theirs, "train_loss")  # what lies between evaluations is not seen
        rises = ours.total_rise("train_loss"), theirs.total_rise("train_loss")
        parts.append(
            Part(
                f"total rise of the training loss below HF's, "
                f"curvature {ours.key.curvature_batch_size}",
                paired(*rises, _calmer),
                least=0.5,
            )
        )
    return parts


def _calmer(ours: float, theirs: float) -> float:
    """By which share ours rises less; NaN where neither rises by 2 %."""
    if max(ours, theirs) < math.log(1.02):
        return math.nan
    return share_below(ours, theirs) if theirs > 0 else -math.inf


@claim(
    "R4",
    "Block-diagonal HF with a large mini-batch needs fewer updates, reaches a lower training loss "
    "and a better test accuracy than Adam at any mini-batch size (L1, word for word).",
)
def better_than_any_adam(evidence: Evidence) -> list[Part]:
    """As L1, for the ResNet; the target is met by the weights themselves, final accuracies are
    those of the averaged weights."""
    return better_than_adam(evidence, NAME, ACCURACY)


@claim("R5", "It loses less than HF does as the curvature mini-batch shrinks (L3, word for word).")
def loses_less(evidence: Evidence) -> list[Part]:
    """As L3, for the ResNet."""
    return loses_less_as_curvature_shrinks(evidence, NAME, ACCURACY)
