"""Build the W&B report of a scale: figures, verdicts, comparison of runs.

python scripts/wandb_dashboard.py laptop --entity me            # saves it, and prints its address
python scripts/wandb_dashboard.py laptop --entity me --outline  # shows what it holds, no network

The runs are those of `make wandb-sync`; the report only refers to them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr

from bdhf.config import WandbConfig
from bdhf.experiment import figures
from bdhf.mirror import AXES
from bdhf.record import first_line, read_table

#: Of each figure, as in the paper: which runs, and what is compared.
COMPARISONS = {
    "Adam and block-diagonal HF, by mini-batch": ("adam", "bdhf"),
    "HF and block-diagonal HF, by curvature mini-batch": ("hf", "bdhf"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("--project", default=WandbConfig.project, help="the W&B project")
    parser.add_argument("--entity", required=True, help="whose project")
    parser.add_argument("--outline", action="store_true", help="show what it holds, save nothing")
    arguments = parser.parse_args()
    report = build(arguments.results, arguments.scale, arguments.entity, arguments.project)
    if arguments.outline:
        print("\n".join(outline(report)))
        return
    try:
        report.save()
    except Exception as error:  # no key, no network, no such project
        sys.exit(f"error: the report cannot be saved: {first_line(error)}")
    print(report.url)


def build(results: Path, scale: str, entity: str, project: str) -> wr.Report:
    """The report, not saved yet; nothing here needs a network."""
    blocks: list[Any] = [
        wr.MarkdownBlock(
            text=f"Runs at scale `{scale}`, grouped by experiment, optimizer and mini-batches; "
            "lines are means over seeds, bands from the least to the greatest. The tables in "
            f"`results/{scale}` of the repository are the reference; this mirrors them."
        ),
        wr.H1(text="Verdicts"),
        wr.MarkdownBlock(text=verdicts(results, scale)),
    ]
    for experiment, figure in figures().items():
        blocks.append(wr.H1(text=f"Figure {figure.number}: {figure.title}"))
        for title, optimizers in COMPARISONS.items():
            chosen = f"Config('scale') = '{scale}' and Config('experiment') = '{experiment}'"
            either = ", ".join(f"'{name}'" for name in optimizers)
            runset = wr.Runset(
                entity=entity,
                project=project,
                name=title,
                filters=f"{chosen} and Config('optimizer.name') in [{either}]",
                groupby=["group", "config.settings_hash"],  # other settings are other curves
            )
            plots = [_plot(axis, y) for axis in AXES for y in figure.panels]
            blocks += [wr.H2(text=title), wr.PanelGrid(runsets=[runset], panels=plots)]
    everything = wr.Runset(
        entity=entity, project=project, name=scale, filters=f"Config('scale') = '{scale}'"
    )
    comparison = [wr.RunComparer(diff_only=True), _plot("update", "gradient_norm")]
    blocks += [wr.H1(text="All runs"), wr.PanelGrid(runsets=[everything], panels=comparison)]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Block-diagonal Hessian-free optimization, replicated ({scale})",
        description="Adam, Hessian-free and block-diagonal Hessian-free optimization.",
        blocks=blocks,
    )


def verdicts(results: Path, scale: str) -> str:
    """The table of verdicts in Markdown, as far as there is one."""
    rows = read_table(results / scale / "verdicts.csv")
    if not rows:
        return f"There is no `results/{scale}/verdicts.csv` yet."
    columns: list[str] = [key for key in ("id", "claim", "verdict") if key in rows[0]]
    cells = [columns, ["---"] * len(columns)]
    cells += [[row[key] for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def outline(report: wr.Report) -> list[str]:
    """The report's blocks in words, a line each."""
    lines = [report.title]
    for block in report.blocks:
        if isinstance(block, wr.PanelGrid):
            for runset in block.runsets:
                lines.append(f"    runs: {runset.filters}")
            for panel in block.panels:
                axes = f": {', '.join(panel.y)} against {panel.x}" if hasattr(panel, "y") else ""
                lines.append(f"      {type(panel).__name__}{axes}")
        else:
            lines += [f"  {line}" for line in str(block.text).splitlines()]
    return lines


def _plot(x: str, y: str) -> Any:
    return wr.LinePlot(
        title=f"{y} against {x}",
        x=x,
        y=[y],
        log_y=y == "train_loss",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


if __name__ == "__main__":
    main()
