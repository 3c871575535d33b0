"""The curves in the form that the page's charts take."""

from __future__ import annotations

from typing import Any

from bdhf.experiment import figures
from bdhf.report.blocks import blocks_of, coloured
from bdhf.report.evidence import NAMES, Cell, Evidence
from bdhf.report.figures import AXES, color_of, style

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def data(evidence: Evidence, scale: str) -> dict[str, Any]:
    """All curves of the page, as ``assets/page.js`` takes them."""
    experiments = []
    for name, figure in figures().items():
        cells = evidence.drawn(name)
        if cells:
            drawn = [
                _cell(cell, color_of(cell.key.optimizer), _dash(cell, cells)) for cell in cells
            ]
            title = f"Figure {figure.number}: {figure.title}"
            experiments.append(_experiment(name, title, figure.panels, cells, drawn))
    if blocks := blocks_of(evidence):
        drawn = [
            {**_cell(cell, color, "solid"), "size": words, "label": words}
            for cell, words, color in coloured(blocks)
        ]
        panels = {"train_loss": "training loss", "test_loss": "test loss"}
        experiments.append(_experiment("blocks", "Which blocks", panels, blocks, drawn))
    return {"scale": scale, "experiments": experiments}


def _experiment(
    name: str, title: str, panels: dict[str, str], cells: list[Cell], drawn: list[dict[str, Any]]
) -> dict[str, Any]:
    metrics = {**panels}
    for extra in ("test_loss", "test_accuracy", "gradient_norm"):
        metrics.setdefault(extra, extra.replace("_", " "))
    counts = {k for c in cells for k in c.curves.columns if k.startswith("cg_iterations_")}
    for key in sorted(counts):
        metrics[key] = f"CG iterations, block {key.rsplit('_', 1)[1]}"
    return {
        "name": name,
        "title": title,
        "metrics": [
            {"key": key, "label": label, "log": key.endswith(("loss", "norm"))}
            for key, label in metrics.items()
        ],
        "axes": [{"key": key, "label": label.split(" (")[0]} for key, label in AXES.items()],
        "cells": drawn,
    }


def _cell(cell: Cell, color: str, dash: str) -> dict[str, Any]:
    key = cell.key
    words = str(cell).partition(", ")[2]
    return {
        "id": f"{key.optimizer}-{key.batch_size}-{key.curvature_batch_size}-{key.settings}",
        "label": str(cell),
        "optimizer": NAMES.get(key.optimizer, key.optimizer),
        "size": words,
        "color": color,
        "dash": dash,
        "seeds": [_seed(cell, place) for place in range(len(cell.seeds))],
    }


def _seed(cell: Cell, place: int) -> dict[str, Any]:
    curves = cell.curves
    columns = {name: cell.drawn(name)[place] for name in curves.columns}
    there = ~_all_gaps(columns)
    return {
        "seed": curves.seeds[place],
        "status": "diverged" if curves.diverged[place] else "finished",
        "reason": curves.diverged[place],
        "axes": {
            "update": curves.update[there].tolist(),
            **{axis: columns[axis][there].tolist() for axis in AXES if axis != "update"},
        },
        "metrics": {
            name: values[there].tolist()
            for name, values in columns.items()
            if name not in AXES and name != "learning_rate"
        },
    }


def _all_gaps(columns: dict[str, Any]) -> Any:
    """Where a seed was not evaluated: every evaluation has its epoch."""
    epochs = columns["epoch"]
    return epochs != epochs  # NaN


def _dash(cell: Cell, cells: list[Cell]) -> str:
    return _DASHES[style(cell, cells)[0]]
