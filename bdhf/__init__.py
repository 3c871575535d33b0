"""Block-diagonal Hessian-free optimization for PyTorch, and the suite that replicates its paper.

The library is what this module exports; it needs torch alone. The suite's parts (`bdhf.training`,
`bdhf.record`, `bdhf.report`, ...) are imported by name and need the ``suite`` extra.
"""

from bdhf.blocks import blocks_from_modules, split_into_blocks
from bdhf.cg import CGResult, conjugate_gradient
from bdhf.curvature import ggn_vector_product
from bdhf.distributed.placement import Team, balanced_teams
from bdhf.distributed.ranks import RankLostError
from bdhf.linearization import Linearizable
from bdhf.optimizer import BlockDiagonalHF
from bdhf.steps import BlockStep, Collective, StepReport

__version__ = "0.1.0"

__all__ = [
    "BlockDiagonalHF",
    "BlockStep",
    "CGResult",
    "Collective",
    "Linearizable",
    "RankLostError",
    "StepReport",
    "Team",
    "balanced_teams",
    "blocks_from_modules",
    "conjugate_gradient",
    "ggn_vector_product",
    "split_into_blocks",
]
