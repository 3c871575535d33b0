"""The paper's figures, redrawn from the compact table of curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bdhf.report import CellKey, Curves, read_curves

#: Colours of Okabe and Ito (2008), which the colour-blind can tell apart.
_COLORS = {"adam": "#E69F00", "hf": "#0072B2", "bdhf": "#D55E00"}
_NAMES = {"adam": "Adam", "hf": "HF", "bdhf": "Block-diagonal HF"}
#: The smallest size first: line and marker tell the sizes apart, also in print.
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))

#: For each experiment: number and title of its figure, and what its rows of panels show.
FIGURES: dict[str, tuple[int, str, dict[str, str]]] = {
    "autoencoder": (
        1,
        "Deep autoencoder",
        {
            "train_loss": "train error (squared, per image)",
            "test_loss": "test error (squared, per image)",
        },
    ),
    "lstm": (
        2,
        "Peephole LSTM",
        {"train_loss": "training loss", "test_accuracy": "test accuracy"},
    ),
    "resnet": (
        3,
        "ResNet without batch normalisation",
        {
            "train_loss": "training loss",
            "averaged_test_accuracy": "test accuracy (averaged weights)",
        },
    ),
}


def draw_figures(results: Path, scale: str) -> list[Path]:
    """Draw a figure for each experiment in ``results/<scale>/curves.csv``, as PNG and SVG."""
    curves = read_curves(results, scale)
    paths = []
    for experiment, (number, title, panels) in FIGURES.items():
        cells = {key: value for key, value in curves.items() if key.experiment == experiment}
        if cells:
            stem = results / scale / f"figure{number}_{experiment}"
            paths += _draw(cells, f"{title} ({scale} scale)", panels, stem)
    return paths


def _draw(
    cells: dict[CellKey, Curves], title: str, panels: dict[str, str], stem: Path
) -> list[Path]:
    # Reproducible files: text stays text, and neither ids nor dates change.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bdhf", "font.size": 9}):
        figure, axes = pyplot.subplots(
            len(panels), 2, figsize=(9, 3.2 * len(panels)), sharey="row", layout="constrained"
        )
        for row, (metric, label) in zip(axes, panels.items(), strict=True):
            row[0].set_ylabel(label)
            for axis, x in zip(row, ("update", "epoch"), strict=True):
                for key in sorted(cells, key=_order):
                    label, style = _label(key, cells), _style_number(key, cells)
                    _plot(axis, cells[key], x, metric, key.optimizer, label, style)
                axis.set_xscale("log")
                _plain_numbers(axis.xaxis)
                if metric.endswith("loss"):
                    axis.set_yscale("log")
                    _plain_numbers(axis.yaxis)
                axis.grid(True, which="both", alpha=0.2)
        axes[-1][0].set_xlabel("updates")
        axes[-1][1].set_xlabel("epochs (passes over the training set for gradients)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"{title}; {_seeds(cells)}")
        paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)
        pyplot.close(figure)
    return paths


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, ..., as one would by hand."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plot(
    axis: Axes, curves: Curves, x: str, metric: str, optimizer: str, label: str, style: int
) -> None:
    """Mean over the seeds, with a band from the least to the greatest, as long as all go on.

    Where a seed ended early (it diverged), a cross marks its end, and each seed has a thin line.
    """
    values = curves.columns[metric]
    places = curves.update if x == "update" else np.nanmax(curves.columns[x], axis=0)
    # A logarithmic axis has no place for the start, and a metric may have no value yet.
    shown = (places > 0) & np.isfinite(values).any(axis=0)
    if not shown.any():
        return
    line, marker = _STYLES[style % len(_STYLES)]
    color = _COLORS.get(optimizer)
    ended = [seed for seed in values if np.isnan(seed[shown][-1])]
    if ended:
        label += f"; {len(ended)} of {len(values)} ended early"
        for seed in values:
            axis.plot(places[shown], seed[shown], line, color=color, linewidth=0.7, alpha=0.7)
        for seed in ended:
            last = np.flatnonzero(np.isfinite(seed))[-1]
            axis.plot(places[last], seed[last], "x", color=color)
        shown &= np.isfinite(values).all(axis=0)
    axis.plot(
        places[shown],
        values[:, shown].mean(axis=0),
        line,
        color=color,
        marker=marker,
        markersize=3.5,
        markevery=max(1, int(shown.sum()) // 8),
        label=label,
    )
    if len(values) > 1:
        low, high = values[:, shown].min(axis=0), values[:, shown].max(axis=0)
        axis.fill_between(places[shown], low, high, color=color, alpha=0.15, linewidth=0)


def _label(key: CellKey, cells: dict[CellKey, Curves]) -> str:
    label = f"{_NAMES.get(key.optimizer, key.optimizer)}, mini-batch {key.batch_size}"
    if key.curvature_batch_size is not None:
        label += f", curvature {key.curvature_batch_size}"
    if sum(replace(other, settings=key.settings) == key for other in cells) > 1:
        label += f" (settings {key.settings})"  # the table has runs with other settings too
    return label


def _order(key: CellKey) -> tuple[int, int, int, str]:
    optimizers = list(_COLORS)
    place = optimizers.index(key.optimizer) if key.optimizer in optimizers else len(optimizers)
    return place, key.batch_size, key.curvature_batch_size or 0, key.settings


def _style_number(key: CellKey, cells: dict[CellKey, Curves]) -> int:
    """The cell's place among the sizes of its optimizer."""
    return sorted((c for c in cells if c.optimizer == key.optimizer), key=_order).index(key)


def _seeds(cells: dict[CellKey, Curves]) -> str:
    counts = sorted({len(curves.seeds) for curves in cells.values()})
    if counts == [1]:
        return "1 seed"
    return f"{' or '.join(map(str, counts))} seeds: mean, least and greatest"
