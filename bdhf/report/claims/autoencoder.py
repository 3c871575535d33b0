"""What the paper says of the autoencoder (figure 1)."""

from __future__ import annotations

from bdhf.report.claims.common import lower_all_along, updates_to_ours
from bdhf.report.evidence import (
    Evidence,
    UntestedError,
    paired,
    share_below,
    times_fewer,
    unsettled,
    within_a_factor_of,
)
from bdhf.report.verdicts import Part, claim

NAME = "autoencoder"


@claim(
    "A1",
    "Adam: the epochs needed and the final error get much worse as the mini-batch grows; the "
    "number of updates needed stays similar.",
)
def adam_needs_updates_not_epochs(evidence: Evidence) -> list[Part]:
    """Adam's largest mini-batch against its smallest. It needs at least twice the epochs to the
    target test error; with the smallest, the final test error is at least 10 % lower, both being
    at their plateau; and the updates to the target differ by at most a factor of 2."""
    adam = evidence.of(NAME, "adam")
    if len(adam) < 2:
        raise UntestedError("Adam has runs of one mini-batch size only")
    small, large = adam[0], adam[-1]
    goal = evidence.goal(NAME)
    updates = times_fewer(small.updates_to_target(goal), large.updates_to_target(goal))
    return [
        Part.between(
            "epochs to the target, largest over smallest mini-batch",
            times_fewer(small.epochs_to_target(goal), large.epochs_to_target(goal)),
            2.0,
        ),
        Part(
            "final test error, smallest below largest mini-batch",
            paired(small.final("test_loss"), large.final("test_loss"), share_below),
            least=0.1,
            untested=unsettled([small, large]),
        ),
        Part.between(
            "updates to the target within a factor of 2 (2 over the ratio)",
            within_a_factor_of(2.0, updates),
            1.0,
        ),
    ]


@claim(
    "A2",
    "Block-diagonal HF with a large mini-batch reaches about the error of Adam with a small one, "
    "in an order of magnitude fewer updates than Adam with a small or a large mini-batch.",
)
def error_of_adam_in_a_tenth_of_the_updates(evidence: Evidence) -> list[Part]:
    """Block-diagonal HF with its smallest curvature mini-batch. Its final test error is at most
    10 % above that of Adam with its smallest mini-batch, at its plateau; and Adam, at each
    mini-batch, needs at least 10 times as many updates to the final test error of block-diagonal
    HF as block-diagonal HF itself."""
    adam, ours = evidence.of(NAME, "adam"), evidence.of(NAME, "bdhf")[0]
    return [
        Part(
            "final test error below that of Adam with its smallest mini-batch, or little above",
            paired(ours.final("test_loss"), adam[0].final("test_loss"), share_below),
            least=-0.1,
            neutral=-0.1,
            untested=unsettled(adam[:1]),
        ),
        *(updates_to_ours(ours, cell, "test_loss", least=10.0) for cell in adam),
    ]


@claim(
    "A3",
    "Block-diagonal HF has a lower train and test error than HF over the entire course of "
    "training.",
)
def lower_over_the_whole_course(evidence: Evidence) -> list[Part]:
    """At the smallest curvature mini-batch, for train and test error: block-diagonal HF is below
    HF in at least 95 % of the evaluations, and by 2 % on average over the updates (of the log
    curves)."""
    return lower_all_along(*evidence.pairs(NAME)[0])


@claim("A4", "A3 holds at every curvature mini-batch size.")
def lower_at_every_curvature_size(evidence: Evidence) -> list[Part]:
    """As A3, at each of the curvature mini-batch sizes, of which there are at least two."""
    pairs = evidence.pairs(NAME)
    if len(pairs) < 2:
        raise UntestedError("there are runs of one curvature mini-batch size only")
    return [part for pair in pairs for part in lower_all_along(*pair)]
