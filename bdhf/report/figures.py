"""The paper's figures and ours, redrawn from the compact table of curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bdhf.config import FigureConfig
from bdhf.experiment import figures
from bdhf.report.blocks import blocks_of, coloured
from bdhf.report.evidence import Cell, read_evidence
from bdhf.report.table import CellKey, Curves
from bdhf.training import DIVERGENCE_FACTOR

#: Colours of Okabe and Ito (2008), which the colour-blind can tell apart.
COLORS = {"adam": "#E69F00", "hf": "#0072B2", "bdhf": "#D55E00"}
_OTHER_COLORS = ("#009E73", "#CC79A7", "#56B4E9", "#666666")
#: The smallest size first: line and marker tell the sizes apart, also in print.
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
#: What curves may be drawn against.
AXES = {
    "update": "updates",
    "epoch": "epochs (passes over the training set for gradients)",
    "gradient_equivalents": "all work, in gradients of the training set",
    "seconds": "seconds in updates",
}


def draw_figures(results: Path, scale: str) -> list[Path]:
    """Draw the figures of each experiment in ``results/<scale>/curves.csv``, as PNG and SVG.

    For each: the paper's arrangement (``figure1_autoencoder``), what a user pays (``_cost``), the
    iterations of CG (``_cg``). And ``stability`` over all of them, ``blocks`` for their study.
    """
    evidence = read_evidence(results, scale)
    drawn, everything = [], []
    for name, figure in figures().items():
        mine = evidence.drawn(name)
        if not mine:
            continue
        everything += mine
        title = f"{figure.title} ({scale} scale; {_seeds(mine)})"
        stem = results / scale / f"figure{figure.number}_{name}"
        of_losses = title + _cut(mine, figure.panels)
        drawn += save(_paper_figure(mine, figure, of_losses), stem)
        drawn += save(_cost_figure(mine, figure, of_losses), stem.with_name(f"{stem.name}_cost"))
        if any(cell.key.curvature_batch_size for cell in mine):
            drawn += save(_cg_figure(mine, title), stem.with_name(f"{stem.name}_cg"))
    if everything:
        drawn += save(_stability_figure(everything, scale), results / scale / "stability")
    if blocks := blocks_of(evidence):
        title = f"Which blocks: autoencoder\n({scale} scale; {_seeds(blocks)})"
        title += _cut(blocks, ("train_loss", "test_loss"))
        drawn += save(_blocks_figure(blocks, title), results / scale / "blocks")
    return drawn


def _paper_figure(cells: list[Cell], figure: FigureConfig, title: str) -> Figure:
    """Adam beside block-diagonal HF, and HF beside it; against updates and epochs."""
    comparisons = {"Adam, mini-batches": ("adam", "bdhf"), "HF, curvature": ("hf", "bdhf")}
    columns = [(words, x) for words in comparisons for x in ("update", "epoch")]

    def draw(axis: Axes, metric: str, column: int) -> None:
        words, x = columns[column]
        # What is neither (an optimizer of one's own) is compared with Adam.
        left_out = "hf" if words.startswith("Adam") else "adam"
        others = [c for c in cells if c.key.optimizer not in COLORS] if left_out == "hf" else []
        chosen = [c for c in cells if c.key.optimizer in comparisons[words]] + others
        for cell in chosen:
            _plot(axis, cell, cells, x, metric)
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)

    return _panels(figure.panels, [AXES[x].split(" (")[0] for _, x in columns], draw, title)


def _cost_figure(cells: list[Cell], figure: FigureConfig, title: str) -> Figure:
    """Against what a user pays."""
    columns = ("gradient_equivalents", "seconds")

    def draw(axis: Axes, metric: str, column: int) -> None:
        for cell in cells:
            _plot(axis, cell, cells, columns[column], metric)
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)

    return _panels(figure.panels, [AXES[x] for x in columns], draw, title)


def _cg_figure(cells: list[Cell], title: str) -> Figure:
    """CG iterations of each block over the updates: a panel for each block."""
    chosen = [cell for cell in cells if cell.key.curvature_batch_size is not None]
    metrics = sorted(
        {name for c in chosen for name in c.curves.columns if name.startswith("cg_iterations")}
    )
    used = [m for m in metrics if any(np.isfinite(c.curves.columns[m]).any() for c in chosen)]

    def draw(axis: Axes, _: str, column: int) -> None:
        for cell in chosen:
            _plot(axis, cell, cells, "update", used[column])
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    blocks = [f"updates (block {m.rsplit('_', 1)[1]}; HF has block 0 only)" for m in used]
    return _panels({"cg": "CG iterations"}, blocks, draw, title)


def _blocks_figure(cells: list[Cell], title: str) -> Figure:
    """Losses over the updates, by the choice of blocks."""

    def draw(axis: Axes, metric: str, _: int) -> None:
        for cell, label, color in coloured(cells):
            _draw(axis, cell, "update", metric, label, color)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    panels = {"train_loss": "training loss", "test_loss": "test loss"}
    return _panels(panels, ["updates"], draw, title)


def _stability_figure(cells: list[Cell], scale: str) -> Figure:
    """How much the training loss goes up in all: a point for each run."""
    names = sorted({cell.key.experiment for cell in cells})
    most = max(sum(cell.key.experiment == name for cell in cells) for name in names)
    size = (4.6 * len(names), 1.2 + 0.3 * most)
    figure, axes = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [cell for cell in cells if cell.key.experiment == name]
        for place, cell in enumerate(mine):
            rises = list(cell.total_rise("train_loss").values())
            color = color_of(cell.key.optimizer)
            finite = [rise for rise in rises if math.isfinite(rise)]
            axis.plot(finite, [place] * len(finite), "o", color=color, alpha=0.7)
            if lost := len(rises) - len(finite):
                where = {"xy": (0.98, place), "xycoords": ("axes fraction", "data")}
                style_ = {"ha": "right", "va": "center", "color": color, "fontsize": 8}
                axis.annotate(f"{lost} of {len(rises)} diverged", **where, **style_)
        axis.set_yticks(range(len(mine)), [_short(cell.key) for cell in mine], fontsize=8)
        axis.set_ylim(len(mine) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_title(name)
        axis.grid(True, axis="x", alpha=0.2)
        axis.set_xlabel("rises of the log training loss, summed")
    figure.suptitle(f"Stability ({scale} scale): 0 is a loss that only goes down")
    return figure


def _panels(
    rows: dict[str, str],
    columns: Sequence[str],
    draw: Callable[[Axes, str, int], None],
    title: str,
) -> Figure:
    """A panel for each metric and column, with one legend."""
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(max(4.4, 3.4 * len(columns)), 2.9 * len(rows) + 0.8),
        sharey="row", layout="constrained", squeeze=False,
    )  # fmt: skip
    handles: dict[str, Artist] = {}
    for row, (metric, label) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for column, axis in enumerate(row):
            draw(axis, metric, column)
            if metric.endswith("loss"):
                axis.set_yscale("log")
                _plain_numbers(axis.yaxis)
            axis.grid(True, which="both", alpha=0.2)
            shown: list[Artist]
            shown, names = axis.get_legend_handles_labels()
            handles = {**dict(zip(names, shown, strict=True)), **handles}
    for axis, words in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(words)
    count = 2 if len(columns) < 3 else 3
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=count, frameon=False
    )
    figure.suptitle(title)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """As PNG and SVG."""
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    # Reproducible files: text stays text, and neither ids nor dates change.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bdhf"}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=130, metadata=metadata)
    pyplot.close(figure)
    return paths


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, ..., as one would by hand."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=7)


def _plot(axis: Axes, cell: Cell, cells: list[Cell], x: str, metric: str) -> None:
    """A cell in the colour of its optimizer and the style of its place among ``cells``."""
    _draw(axis, cell, x, metric, str(cell), color_of(cell.key.optimizer), *style(cell, cells))


def _draw(
    axis: Axes,
    cell: Cell,
    x: str,
    metric: str,
    label: str,
    color: str,
    line: str = "-",
    marker: str = "o",
) -> None:
    """Mean over the seeds, with a band from the least to the greatest, as long as all go on.

    Where a seed diverged, a cross marks its end, and each seed has a thin line. The evaluation in
    which that was found is in no mean.
    """
    curves = cell.curves
    if metric not in curves.columns:
        return
    values = cell.drawn(metric)
    places = _places(curves, x)
    # A logarithmic axis has no place for the start, and a metric may have no value yet.
    shown = (places > 0) & np.isfinite(values).any(axis=0)
    if not shown.any():
        return
    lost = [seed for seed, reason in enumerate(curves.diverged) if reason]
    if lost:
        label += f"; {len(lost)} of {len(values)} diverged"
        for seed in values:
            axis.plot(places[shown], seed[shown], line, color=color, linewidth=0.7, alpha=0.7)
        for number in lost:
            known = np.flatnonzero(np.isfinite(values[number]))
            if len(known):
                axis.plot(places[known[-1]], values[number][known[-1]], "x", color=color)
    ended = np.isnan(values)
    for number in lost:
        ended[number, cell.last_row(number) :] = True
    together = shown & ~ended.any(axis=0)
    if not (lost or together.any()):
        together = shown
    axis.plot(
        places[together],
        np.nanmean(values[:, together], axis=0),
        line,
        color=color,
        marker=marker,
        markersize=3.5,
        markevery=max(1, int(together.sum()) // 8),
        label=label,
    )
    if len(values) > 1 and together.any():
        low = np.nanmin(values[:, together], axis=0)
        high = np.nanmax(values[:, together], axis=0)
        axis.fill_between(places[together], low, high, color=color, alpha=0.15, linewidth=0)


def _places(curves: Curves, x: str) -> np.ndarray:
    """One place for all seeds: where they differ (seconds), their mean."""
    if x == "update":
        return curves.update
    columns = curves.columns[x]
    return np.nanmean(columns, axis=0)


def style(cell: Cell, cells: list[Cell]) -> tuple[str, str]:
    """Line and marker: the cell's place among the sizes of its optimizer."""
    mine = [other.key for other in cells if other.key.optimizer == cell.key.optimizer]
    return _STYLES[mine.index(cell.key) % len(_STYLES)]


def color_of(optimizer: str) -> str:
    """The colour of an optimizer, always the same."""
    place = sum(map(ord, optimizer)) % len(_OTHER_COLORS)
    return COLORS.get(optimizer, _OTHER_COLORS[place])


def _short(key: CellKey) -> str:
    few = f"/{key.curvature_batch_size}" if key.curvature_batch_size is not None else ""
    return textwrap.shorten(f"{key.optimizer} {key.batch_size}{few} {key.changed}", 30)


def _cut(cells: list[Cell], metrics: Iterable[str]) -> str:
    """What a title says where losses of runs that diverged lie beyond what is drawn."""
    if not any(cell.is_cut(metric) for cell in cells for metric in metrics):
        return ""
    return f"\nlosses above {DIVERGENCE_FACTOR:g} times the initial one are drawn there"


def _seeds(cells: list[Cell]) -> str:
    counts = sorted({len(cell.seeds) for cell in cells})
    if counts == [1]:
        return "1 seed"
    return f"{' or '.join(map(str, counts))} seeds: mean, least and greatest"
