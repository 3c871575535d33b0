"""What the paper says of large mini-batches."""

from __future__ import annotations

from bdhf.report.claims.common import EXPERIMENTS
from bdhf.report.evidence import Evidence, UntestedError, times_fewer
from bdhf.report.verdicts import Part, claim


@claim("S1", "Block-diagonal HF scales better to large mini-batches than first-order methods.")
def scales_better(evidence: Evidence) -> list[Part]:
    """In each experiment: from its smallest to its largest mini-batch Adam needs at least 1.5 times
    the epochs to the target; and block-diagonal HF, with its large mini-batch and smallest
    curvature mini-batch, needs at least 1.5 times fewer epochs to it than Adam with its largest
    mini-batch, which is no larger. (Epochs count gradients only, as in the paper's figures. Of
    block-diagonal HF the grid has one mini-batch, so its own slowing down is not measured.)"""
    parts = []
    for experiment in EXPERIMENTS:
        goal = evidence.goal(experiment)
        small, *rest = evidence.of(experiment, "adam")
        if not rest:
            raise UntestedError(f"Adam has runs of one mini-batch size only in {experiment}")
        ours, large = evidence.of(experiment, "bdhf")[0], rest[-1]
        if large.key.batch_size > ours.key.batch_size:
            raise UntestedError(f"Adam's largest mini-batch is larger than HF's in {experiment}")
        parts += [
            Part.between(
                f"{experiment}: epochs to the target, Adam's largest over its smallest mini-batch",
                times_fewer(small.epochs_to_target(goal), large.epochs_to_target(goal)),
                1.5,
            ),
            Part.between(
                f"{experiment}: epochs to the target, {large} over block-diagonal HF, "
                f"mini-batch {ours.key.batch_size}",
                times_fewer(ours.epochs_to_target(goal), large.epochs_to_target(goal)),
                1.5,
            ),
        ]
    return parts
