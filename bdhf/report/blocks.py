"""The study of blocks (claim H1): which cells it has, and what they are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bdhf.report.evidence import Cell, Evidence

_COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#666666", "#000000")


def blocks_of(evidence: Evidence) -> list[Cell]:
    """HF, block-diagonal HF and the cells of the study of blocks; empty where it was not made."""
    others = [cell for cell in evidence.others if cell.key.study == "blocks"]
    if not others:
        return []
    first = others[0].key
    shipped = [
        cell
        for optimizer in ("hf", "bdhf")
        for cell in evidence.cells.get((first.experiment, optimizer), [])
        if cell.key.batch_size == first.batch_size
        and cell.key.curvature_batch_size == first.curvature_batch_size
    ]
    return shipped + sorted(others, key=lambda cell: cell.key.changed)


def coloured(blocks: list[Cell]) -> Iterator[tuple[Cell, str, str]]:
    """Each cell, what it is called among the blocks, and its colour."""
    for cell, color in zip(blocks, itertools.cycle(_COLORS), strict=False):
        yield cell, _called(cell), color


def _called(cell: Cell) -> str:
    changed = cell.key.changed.removeprefix("optimizer.blocks=")
    kind, _, count = changed.rpartition("-")
    if not changed:
        return "HF: 1 block" if cell.key.optimizer == "hf" else "the experiment's blocks"
    return f"{count} {kind} blocks" if kind else f"{count} blocks of layers"
