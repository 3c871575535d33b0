"""The results in the README, made from the committed tables like everything else."""

from __future__ import annotations

from pathlib import Path

from bdhf.experiment import figures
from bdhf.report.evidence import read_evidence
from bdhf.report.sections import verdict_table
from bdhf.report.verdicts import claims, judge

README = Path(__file__).resolve().parents[2] / "README.md"

_BEGIN, _END = "<!-- results: written by make report -->", "<!-- end of results -->"


def with_results(text: str, results: Path, scale: str) -> str:
    """The README with the results of a scale between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, found, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not (found and ended):
        raise ValueError(f"README.md has no {_BEGIN} with {_END} after it")
    return f"{before}{_BEGIN}\n\n{_results(results, scale)}\n\n{_END}{after}"


def _results(results: Path, scale: str) -> str:
    evidence = read_evidence(results, scale)
    name, figure = next(iter(figures().items()))
    folder = f"results/{scale}"
    seeds = max(len(cell.seeds) for cells in evidence.cells.values() for cell in cells)
    table = verdict_table(judge(claim, evidence) for claim in claims())
    return "\n\n".join(
        [
            f"![{figure.title}]({folder}/figure{figure.number}_{name}.png)",
            f"*{figure.title} at {scale} scale, {seeds} seeds; all figures, the numbers behind "
            f"each verdict, deviations, tuning: [{folder}/report.md]({folder}/report.md), or "
            f"`{folder}/report.html`, the same with charts that answer to the mouse.*",
            table,
        ]
    )
