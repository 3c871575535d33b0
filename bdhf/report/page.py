"""The report of a scale: one document, written as Markdown for GitHub and as a page with charts.

It is made from the committed tables alone, so that whoever doubts it can make it again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from bdhf.record import write_table
from bdhf.report import charts, sections
from bdhf.report.devices import beyond_one_device
from bdhf.report.evidence import Evidence, read_evidence
from bdhf.report.interactive import render
from bdhf.report.sections import OUTCOMES, Chart, Picture
from bdhf.report.table import read_runs
from bdhf.report.verdicts import Verdict, claims, judge

#: A document: Markdown, charts, and pictures.
Document = list[str | Chart | Picture]


@dataclass(frozen=True)
class Report:
    """Everything that is said about a scale.

    Attributes:
        verdicts: one for each claim.
        markdown: the report for GitHub.
        html: the same as one page with interactive charts.
    """

    verdicts: list[Verdict]
    markdown: str
    html: str


def write_report(results: Path, scale: str) -> list[Path]:
    """Write ``verdicts.csv``, ``report.md`` and ``report.html`` of a scale.

    Raises:
        TableError: there is no table of curves, or it is of an older version.
    """
    report = make_report(results, scale)
    folder = results / scale
    write_table(folder / "verdicts.csv", [_row(verdict) for verdict in report.verdicts])
    (folder / "report.md").write_text(report.markdown, encoding="utf-8")
    (folder / "report.html").write_text(report.html, encoding="utf-8")
    return [folder / name for name in ("verdicts.csv", "report.md", "report.html")]


def make_report(results: Path, scale: str) -> Report:
    """The report, not written yet."""
    evidence = read_evidence(results, scale)
    verdicts = [judge(claim, evidence) for claim in claims()]
    document = _document(results, scale, evidence, verdicts)
    title = f"Block-diagonal Hessian-free optimization, replicated: {scale} scale"
    page = render(title, _as_html(document), charts.data(evidence, scale))
    return Report(verdicts, _as_markdown(document), page)


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.claim.id,
        "claim": verdict.claim.text,
        "verdict": verdict.word,
        "why": verdict.why,
        "parts": "; ".join(
            f"{judged.part.what}: {judged.numbers()}: {OUTCOMES[judged.outcome]}"
            for judged in verdict.judged
        ),
    }


def _as_markdown(document: Document) -> str:
    parts = [part if isinstance(part, str) else part.markdown() for part in document]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _as_html(document: Document) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parts = [parser.render(part) if isinstance(part, str) else part.html() for part in document]
    badges = {
        "holds": "holds",
        "holds in part": "in-part",
        "does not hold": "fails",
        "not tested at this scale": "untested",
    }

    def badge(found: re.Match[str]) -> str:
        return f'<span class="verdict {badges[found[1]]}">{found[1]}</span>'

    words = "|".join(sorted(badges, key=len, reverse=True))
    return re.sub(f"<strong>({words})</strong>", badge, "\n".join(parts))


def _document(
    results: Path, scale: str, evidence: Evidence, verdicts: Sequence[Verdict]
) -> Document:
    folder = results / scale
    runs = read_runs(folder)
    return [
        f"# Block-diagonal Hessian-free optimization, replicated: {scale} scale",
        sections.introduction(folder, runs, verdicts),
        "## Verdicts",
        sections.verdict_table(verdicts),
        *sections.figure_sections(evidence, folder),
        "## Each verdict",
        sections.rule(evidence, runs),
        *(sections.details(verdict) for verdict in verdicts),
        *sections.measurements(evidence, scale),
        *beyond_one_device(folder),
        *sections.tuning(evidence, scale),
        *sections.settings(evidence, scale),
        *sections.deviations(runs),
        *sections.circumstances(results, scale, runs),
    ]
