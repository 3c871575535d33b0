"""What the report says and draws of an update beyond one device, from committed tables alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bdhf.experiment import figures
from bdhf.record import read_table
from bdhf.report.evidence import NAMES
from bdhf.report.figures import COLORS, save
from bdhf.report.scaling import Assumed
from bdhf.report.sections import Picture, table

Row = Mapping[str, str]

#: Numbers of devices in the table.
_SHOWN = ("8", "64", "1024")

#: Lines by what is said and on what: data-parallel or in teams, a small or a large mini-batch.
_LINES = {"data": ("-", "o"), "counted": ("--", "s"), "small": (":", "^")}

_PANELS = {
    "seconds": "seconds an update",
    "seconds_to_target": "seconds to the target",
    "bytes_to_target": "MB a device receives\nto the target",
}

#: What the columns are multiplied by.
_UNITS = {"bytes_to_target": 1e-6}


def draw_scaling(folder: Path) -> list[Path]:
    """Draw ``scaling.png`` and ``scaling.svg`` from ``scaling.csv``, where that is there."""
    rows = read_table(folder / "scaling.csv")
    return save(_figure(rows, folder.name), folder / "scaling") if rows else []


def _figure(rows: Sequence[Row], scale: str) -> Figure:
    names = [name for name in figures() if any(row["experiment"] == name for row in rows)]
    size = (3.6 * len(names) + 0.6, 2.5 * len(_PANELS) + 2.0)
    figure, axes = pyplot.subplots(
        len(_PANELS), len(names), figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    for column, name in enumerate(names):
        mine = [row for row in rows if row["experiment"] == name]
        axes[0][column].set_title(name)
        for axis, metric in zip(axes[:, column], _PANELS, strict=True):
            _draw(axis, mine, metric)
        axes[-1][column].set_xlabel("devices")
    for row, words in zip(axes, _PANELS.values(), strict=True):
        row[0].set_ylabel(words)
    handles: dict[str, Artist] = {}
    for axis in axes[0]:
        found: list[Artist]
        found, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    words = "\n".join(textwrap.wrap(f"Assumed: {_assumed(rows[0])}", 45 * len(names)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False,
        title=words, title_fontsize=8,
    )  # fmt: skip
    figure.suptitle(f"Beyond one device: a model, not a measurement ({scale} scale)")
    return figure


def _draw(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    for key, mine in _methods(rows).items():
        points = [(int(r["devices"]), float(r[metric])) for r in mine if r[metric]]
        points = [(x, y * _UNITS.get(metric, 1)) for x, y in points if y > 0]
        if not points and metric != "seconds":
            continue
        line, marker = _LINES[key[1]]
        x, y = zip(*points, strict=True)
        axis.plot(
            x, y, line, marker=marker, markersize=3.5, color=COLORS[key[0]], label=_called(mine[0])
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator([1, 8, 64, 1024]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    axis.grid(True, alpha=0.2)


def _methods(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by optimizer, kind of line and mini-batch."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        sizes.setdefault(row["optimizer"], set()).add(int(row["batch_size"]))
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        small = int(row["batch_size"]) < max(sizes[row["optimizer"]])
        kind = "small" if small else row["placement"]
        found.setdefault((row["optimizer"], kind, row["batch_size"]), []).append(row)
    return found


def _called(row: Row) -> str:
    """A method in words; only Adam has several sizes."""
    how = "in teams" if row["placement"] == "counted" else "data-parallel"
    size = f", mini-batch {row['batch_size']}" if row["optimizer"] == "adam" else ""
    return f"{NAMES[row['optimizer']]}{size}, {how}"


def _assumed(row: Row) -> str:
    """Devices and network, in words."""
    speed, launch, latency = (float(row[k]) for k in ("speed", "launch", "latency"))
    why = " (as an H100 at 30 % of its 67 TFLOP/s in single precision would be, beside 0.1)"
    return (
        f"a device is {speed:g} times as fast as the core that was measured"
        f"{why if speed == Assumed.speed else ''}, and each operation takes {1e6 * launch:g} µs "
        f"more; any two devices are connected at {1e6 * latency:g} µs and "
        f"{float(row['bandwidth']) / 1e9:g} GB/s. Mini-batches stay those of the runs."
    )


def beyond_one_device(folder: Path) -> Iterator[str | Picture]:
    """The section; nothing where there is no ``scaling.csv``."""
    rows, check = (read_table(folder / name) for name in ("scaling.csv", "scaling_check.csv"))
    if not rows:
        return
    yield "## Beyond one device"
    yield (
        "What an update would take on many devices, and what it would take to get to the target: a "
        "model fitted to this machine ([model.py](../../bdhf/scaling/model.py) has the formulas), "
        "**not measured on any GPU**. Arithmetic is measured here by parts; collectives are "
        f"counted, and are those that updates make. `make scaling SCALE={folder.name}`."
    )
    if (folder / "scaling.png").exists():
        yield Picture("Seconds and bytes against the number of devices", folder / "scaling.png")
    yield f"Assumed: {_assumed(rows[0])}"
    yield "\n".join(f"- {line}" for line in _ASSUMPTIONS)
    yield from _findings(rows)
    yield (
        f"On {', '.join(_SHOWN[:-1])} and {_SHOWN[-1]} devices. Collectives and bytes are those "
        "of the rank to which most is said (bytes: of the tensors that come out). "
        "Updates to the target: median over the seeds; empty where most of them miss it."
    )
    yield _counts(rows)
    yield from _checks(check)


_ASSUMPTIONS = (
    "Strong scaling: more devices share the same mini-batch, of which each gets rows down to one. "
    "At 1024 devices there are fewer rows of curvature than devices, and the rest are idle.",
    "CG takes as many iterations as in the runs (median over evaluations and seeds), and on such "
    "devices is looked at every eighth.",
    "Operations are counted as a CPU makes them. The LSTM's passes are a kernel a layer on a GPU: "
    "its seconds here are nearly all launches that it would not have, and say little.",
    "Nothing overlaps: no collective is hidden behind arithmetic, as DDP hides much of the "
    "gradient's. No rank is late, and networks do not get crowded.",
    "The single device replays no CUDA graphs here, as several do not.",
    "Counted where all ranks are given the same mini-batches, as the experiments are; ranks with "
    "rows of their own also gather their numbers, and teams the curvature mini-batch. The word "
    "before each update, of one byte, is not counted.",
    "Of the collectives in a team of several ranks two thirds are inner products of a few bytes, "
    "which keep its ranks together; they could ride with the products.",
)


def _findings(rows: Sequence[Row]) -> Iterator[str]:
    """Who comes out first, by experiment and number of devices."""
    lines = []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        for metric, what, unit, few in (
            ("seconds_to_target", "soonest at the target", "s", ("1", "2")),
            ("bytes_to_target", "fewest bytes to it", "MB", ("2",)),
        ):
            found = []
            for devices in (*few, *_SHOWN):
                mine = [
                    r
                    for r in rows
                    if (r["experiment"], r["devices"]) == (name, devices) and r.get(metric)
                ]
                if mine:
                    best = min(mine, key=lambda row: float(row[metric]))
                    value = float(best[metric]) * _UNITS.get(metric, 1)
                    many = "device" if devices == "1" else "devices"
                    found.append(f"{devices} {many}: {_called(best)} ({value:.3g} {unit})")
            if found:
                lines.append(f"- {name}, {what}: {'; '.join(found)}.")
    yield "\n".join(lines)
    yield _gains(rows)


def _gains(rows: Sequence[Row]) -> str:
    """What solving the blocks in teams brings, and what an update's time goes to."""

    def row(name: str, placement: str, devices: str) -> Row | None:
        wanted = {"experiment": name, "optimizer": "bdhf", "placement": placement}
        wanted["devices"] = devices
        return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)

    gains, shares, dearest = [], [], []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        pairs = [(row(name, "data", n), row(name, "counted", n)) for n in ("1", *_SHOWN)]
        found = [(float(a["seconds"]), b) for a, b in pairs if a and b]
        if not found:
            continue
        (alone, _), *many = found
        both = [f"{data / float(b['seconds']):.2f} ({alone / float(b['seconds']):.2f})"
                for data, b in many]  # fmt: skip
        gains.append(f"{name} {', '.join(both)}")
        parts = [f"{float(b['launching']) / float(b['seconds']):.0%} and "
                 f"{float(b['talking']) / float(b['seconds']):.0%}" for _, b in many]  # fmt: skip
        shares.append(f"{name} {', '.join(parts)}")
        dearest.append(f"{name} {float(many[0][1]['dearest']):.0%}")
    where = f"{', '.join(_SHOWN[:-1])} and {_SHOWN[-1]} devices"
    return (
        "An update of block-diagonal HF in teams is faster than data-parallel (than on one device) "
        f"by these factors on {where}: {'; '.join(gains)}. (The dearest block has these shares of "
        f"a round's counted work, which bounds what blocks apart can bring: {'; '.join(dearest)}.) "
        "Launches and collectives are these "
        f"shares of it: {'; '.join(shares)}. At these sizes a fast device has hardly any "
        "arithmetic to do, and more of them bring little, whatever the method."
    )


def _counts(rows: Sequence[Row]) -> str:
    lines = []
    by_method: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = row["experiment"], row["optimizer"], row["placement"], row["batch_size"]
        by_method.setdefault(key, {})[row["devices"]] = row
    for (name, *_), found in by_method.items():
        shown = [found[devices] for devices in _SHOWN]

        def each(metric: str, form: Callable[[float], str], of: list[Row] = shown) -> str:
            values = [form(float(r[metric])) for r in of if r[metric]]
            return values[0] if len(set(values)) == 1 else " / ".join(values)

        mega = lambda value: f"{value / 1e6:.3g}"  # noqa: E731
        count, three = (lambda value: f"{value:.0f}"), (lambda value: f"{value:.3g}")
        met = shown[0]["met"]
        lines.append(
            [
                name, _called(shown[0]),
                each("collectives", count), each("bytes", mega), each("seconds", three),
                f"{shown[0]['updates_to_target']} ({met})",
                each("collectives_to_target", count), each("bytes_to_target", mega),
                each("seconds_to_target", three),
            ]
        )  # fmt: skip
    heads = ("experiment", "", "collectives an update", "MB", "seconds", "updates to the target "
             "(seeds that met it)", "collectives", "MB", "seconds")  # fmt: skip
    return table(heads, lines)


def _checks(check: Sequence[Row]) -> Iterator[str]:
    """Predicted beside measured."""
    if not check:
        return
    ratios = sorted(float(row["ratio"]) for row in check)
    least, *_, most = sorted((row["others"] for row in check), key=float)
    shared = sorted(float(row["ratio"]) for row in check if row["processes"] != "1")
    yield (
        "How good the model is, on this machine's cores: predicted over measured seconds of an "
        "update by 1, 2 and 4 of its processes (gloo), the fastest of the rounds, while other work "
        f"kept {least} to {most} cores busy. Over all from {ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"median {statistics.median(ratios):.2f}; by several processes median "
        f"{statistics.median(shared):.2f}. Rank 0's collectives and bytes are equal in every case. "
        "(These updates take the CG iterations of one mini-batch, fewer than the runs' medians "
        "above on the LSTM and the ResNet.)"
    )
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in check:
        key = row["experiment"], row["optimizer"], row["placement"]
        found.setdefault(key, {})[row["processes"]] = row
    lines = []
    for (name, optimizer, placement), mine in found.items():
        how = "in teams" if placement == "counted" else "data-parallel"
        cells = [
            f"{float(mine[n]['predicted']):.3g} / {float(mine[n]['measured']):.3g} = "
            f"{float(mine[n]['ratio']):.2f}"
            if n in mine
            else ""
            for n in ("1", "2", "4")
        ]
        lines.append([name, f"{NAMES[optimizer]}, {how}", *cells])
    yield table(("experiment", "", "1 process", "2", "4"), lines)
