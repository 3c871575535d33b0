"""The report of a scale: one document, written as Markdown for GitHub and as a page with charts.

It is made from the committed tables alone, so that whoever doubts it can make it again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from bdhf.experiment import figures
from bdhf.record import read_table, write_table
from bdhf.report import charts
from bdhf.report import verdicts as verdicts_module
from bdhf.report.evidence import NAMES, Cell, Evidence, read_evidence
from bdhf.report.interactive import render
from bdhf.report.table import mixtures
from bdhf.report.tuning import changes, moved_verdicts, trials
from bdhf.report.verdicts import Judged, Verdict, claims, judge

_DEVIATIONS = Path(__file__).parent / "assets" / "deviations.md"
#: Said with the rule, since a rule that follows the results proves nothing.
_FIXED = (
    "When it was fixed: definitions and thresholds were committed (`git log bdhf/report/claims`) "
    "when, of laptop scale, the first and part of the second of three seeds were there, and of "
    "paper scale nothing."
)
_OUTCOMES = {"holds": "holds", "fails": "does not hold", "untested": "not tested"}


@dataclass(frozen=True)
class Chart:
    """Where the page has an interactive chart, and GitHub a picture and links to more."""

    name: str
    words: str
    picture: str = ""
    more: str = ""

    def markdown(self) -> str:
        """What GitHub shows."""
        picture = f"![{self.words}]({self.picture})" if self.picture else ""
        return "\n\n".join(filter(None, (picture, self.more)))


#: A document: Markdown, and charts.
Document = list[str | Chart]


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
        FileNotFoundError: there is no table of curves; the message says how to make it.
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
            f"{judged.part.what}: {judged.numbers()}: {_OUTCOMES[judged.outcome]}"
            for judged in verdict.judged
        ),
    }


def _as_markdown(document: Document) -> str:
    parts = [part.markdown() if isinstance(part, Chart) else part for part in document]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _as_html(document: Document) -> str:
    parser = MarkdownIt("commonmark").enable("table")
    parts = [
        f'<div class="chart" data-experiment="{part.name}"></div>'
        if isinstance(part, Chart)
        else parser.render(part)
        for part in document
    ]
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
    runs = read_table(results / scale / "runs.csv")
    return [
        f"# Block-diagonal Hessian-free optimization, replicated: {scale} scale",
        _introduction(scale, runs, verdicts),
        "## Verdicts",
        verdict_table(verdicts),
        *_figures(evidence, scale),
        "## Each verdict",
        _rule(),
        *(_details(verdict) for verdict in verdicts),
        *_measurements(evidence, scale),
        *_tuning(evidence, scale),
        "## Where this departs from the paper, or had to choose",
        "Our copy of the paper's text has lost nearly all its numbers. Every value here is ours.",
        _DEVIATIONS.read_text(encoding="utf-8"),
        *_circumstances(results, scale, runs),
    ]


def _introduction(scale: str, runs: Sequence[dict[str, str]], verdicts: Sequence[Verdict]) -> str:
    words = ("holds", "holds in part", "does not hold", "not tested at this scale")
    found = [(sum(verdict.word == word for verdict in verdicts), word) for word in words]
    counts = [f"**{count}** {word}" for count, word in found if count]
    seeds = sorted({int(run["seed"]) for run in runs if not run["study"]})
    devices = sorted({f"{run['device']} ({run['processor']})" for run in runs})
    return (
        f"Verdicts on the {len(verdicts)} claims of *Block-diagonal Hessian-free Optimization for "
        f"Training Neural Networks* (Zhang, Xiong, Bradbury, Socher 2017): {', '.join(counts)}. "
        f"{len(runs)} runs, {len(seeds)} seeds, on {', '.join(devices)}. Everything below is made "
        f"from the tables in `results/{scale}` by `make figures report SCALE={scale}`; the runs by "
        f"`make reproduce-all SCALE={scale}`."
    )


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a table in Markdown."""
    rows = [(verdict.claim.id, verdict.claim.text, f"**{verdict.word}**") for verdict in verdicts]
    return _table(("", "claim", "verdict"), rows)


def _rule() -> str:
    """The rule as its module has it, with when it was fixed."""
    rule = (verdicts_module.__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " ")
    return f"{rule}\n\n{_FIXED}"


def _details(verdict: Verdict) -> str:
    claim = verdict.claim
    text = [
        f"### {claim.id}: {verdict.word}",
        f"*{claim.text}*",
        f"Taken to mean: {claim.definition}",
    ]
    if verdict.why:
        text.append(f"**{verdict.word}**: {verdict.why}.")
    if verdict.judged:
        rows = [_part_row(judged) for judged in verdict.judged]
        text.append(_table(("part", "effect by seed", "needs", "comes out"), rows))
    return "\n\n".join(text)


def _part_row(judged: Judged) -> tuple[str, str, str, str]:
    part = judged.part
    values = ", ".join(part.shown(part.effects[seed]) for seed in sorted(part.effects)) or "none"
    outcome = _OUTCOMES[judged.outcome]
    reason = f": {judged.why}" if judged.outcome == "fails" else ""
    return part.what, values, part.shown(part.least), outcome + reason


def _figures(evidence: Evidence, scale: str) -> Iterator[str | Chart]:
    for name, figure in figures().items():
        cells = [c for (experiment, _), found in evidence.cells.items() if experiment == name
                 for c in found]  # fmt: skip
        if not cells:
            continue
        stem = f"figure{figure.number}_{name}"
        yield f"## Figure {figure.number}: {figure.title}"
        links = {
            "seconds and gradient equivalents": f"{stem}_cost.png",
            "CG iterations": f"{stem}_cg.png",
            "how much losses jump": "stability.png",
        }
        more = "; ".join(f"[{words}]({path})" for words, path in links.items())
        words = f"{figure.title}: curves by optimizer and mini-batch"
        yield Chart(name, words, f"{stem}.png", f"More of it: {more}.")
        yield (
            f"Runs: `make reproduce-{name} SCALE={scale}`. Figures: `make figures SCALE={scale}`. "
            "Below: final values (medians over the last tenth of the updates), mean over the seeds "
            "(least to greatest); accuracies in per cent. Seconds are of runs made side by side; "
            "what an update takes is measured separately."
        )
        yield _final_values(cells, list(figure.panels))


def _final_values(cells: Sequence[Cell], panels: Sequence[str]) -> str:
    columns = ["train_loss", "test_loss", *(p for p in panels if p.endswith("accuracy"))]
    rows = []
    for cell in cells:
        row = [str(cell), f"{cell.update[-1]:.0f}"]
        for metric in ("epoch", "gradient_equivalents", "seconds"):
            row.append(
                _spread([float(np.nanmax(v)) for v in cell.curves.columns[metric]], "{:.3g}")
            )
        for metric in columns:
            values = [value for value in cell.final(metric).values() if math.isfinite(value)]
            percent = metric.endswith("accuracy")
            shown = "{:.1f}" if percent else "{:.4g}"
            row.append(_spread([100 * v for v in values] if percent else values, shown))
        lost = sum(map(bool, cell.curves.diverged))
        row.append(f"{lost} of {len(cell.seeds)}" if lost else "")
        rows.append(row)
    heads = [column.replace("_", " ") for column in columns]
    return _table(
        ("", "updates", "epochs", "gradient equivalents", "seconds", *heads, "diverged"), rows
    )


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean, low, high = (form.format(f(values)) for f in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


def _measurements(evidence: Evidence, scale: str) -> Iterator[str | Chart]:
    blocks = charts.blocks_of(evidence)
    if blocks:
        yield "## Which blocks"
        yield Chart("blocks", "Training error by the choice of blocks")
        yield (
            "The autoencoder with other blocks (H1): so many of layers, or drawn at random, scalar "
            f"by scalar. `make study STUDY=blocks SCALE={scale}`."
        )
        yield _final_values(blocks, [])
    if evidence.times:
        yield "## What an update takes"
        yield (
            "Seconds, medians over rounds in which the optimizers took turns on the same weights, "
            f"mini-batches and machine, one thread. `make measure SCALE={scale}`."
        )
        yield _time_table(evidence.times)
    if evidence.solves:
        yield "## CG without a cap"
        yield (
            "Iterations by the experiment's stopping rule, with the whole matrix and with each "
            f"block alone, on saved states. `make measure SCALE={scale}`."
        )
        yield _solve_table(evidence.solves)


def _time_table(times: Sequence[dict[str, str]]) -> str:
    rows = []
    for experiment, seed in dict.fromkeys((row["experiment"], row["seed"]) for row in times):
        mine = [r for r in times if (r["experiment"], r["seed"]) == (experiment, seed)]
        seconds = {
            name: float(np.median([float(r["seconds"]) for r in mine if r["optimizer"] == name]))
            for name in NAMES
        }
        ratios = [seconds["bdhf"] / seconds[name] for name in ("hf", "adam")]
        rows.append(
            [experiment, seed, *(f"{seconds[n]:.3g}" for n in NAMES), *(f"{r:.2f}" for r in ratios)]
        )
    heads = ("experiment", "seed", *NAMES.values(), "block-diagonal HF / HF", "/ Adam")
    return _table(heads, rows)


def _solve_table(solves: Sequence[dict[str, str]]) -> str:
    rows = []
    keys = dict.fromkeys((row["experiment"], row["seed"], row["state"]) for row in solves)
    for experiment, seed, state in keys:
        mine = [r for r in solves if (r["experiment"], r["seed"], r["state"]) ==
                (experiment, seed, state)]  # fmt: skip
        whole = [r["iterations"] for r in mine if r["solver"] == "whole"]
        blocks = [r["iterations"] for r in mine if r["solver"] != "whole"]
        rows.append([experiment, seed, state, ", ".join(whole), ", ".join(blocks)])
    return _table(("experiment", "seed", "weights after", "whole matrix", "blocks"), rows)


def _tuning(evidence: Evidence, scale: str) -> Iterator[str]:
    known = trials(evidence)
    if not known:
        return
    yield "## Tuning"
    yield (
        "One factor at a time, as many trials for each optimizer, one seed, half the budget; "
        "10,000 samples of the training set held out, and the test set not looked at. "
        f"`make tune SCALE={scale}`. The best in bold; accuracies in per cent."
    )
    rows = []
    for group in known:
        for cell in group.cells:
            score = group.score(cell)
            percent = group.metric.endswith("accuracy")
            shown = f"{100 * score:.1f}" if percent else f"{score:.4g}"
            shown = shown if math.isfinite(score) else "diverged"
            shown = f"**{shown}**" if cell is group.best else shown
            change = changes(cell) or "as shipped"
            rows.append([group.experiment, NAMES[group.optimizer], change, shown])
    yield _table(("experiment", "optimizer", "changed", "validation"), rows)
    yield (
        "How the claims would come out on these runs (parts that hold; one seed, half the budget, "
        "Adam at whatever it had reached, so these are no verdicts):"
    )
    moved = [(claim.id, claim.text, *counts) for claim, counts in moved_verdicts(evidence)]
    yield _table(("", "claim", "as shipped", "Adam tuned", "all three tuned"), moved)


def _circumstances(results: Path, scale: str, runs: Sequence[dict[str, str]]) -> Iterator[str]:
    yield "## Data"
    data = sorted({(run["data"], run["data_sha256"]) for run in runs})
    yield _table(("data set", "sha256 of the decoded pixels and labels"), data)
    yield "## Compute"
    keys = ("device", "processor", "threads", "torch", "git_commit", "git_dirty")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    seconds = _seconds_of(results, scale)
    rows = [
        [*group[:4], group[4][:10], group[5], str(len(mine)),
         f"{sum(seconds[run['run']] for run in mine) / 3600:.2f}",
         max((run["peak_memory_mib"] for run in mine), key=float)]
        for group, mine in sorted(groups.items())
    ]  # fmt: skip
    heads = ("device", "processor", "threads", "torch", "commit", "changed code", "runs")
    yield _table((*heads, "hours in updates", "peak memory of a run, MiB"), rows)
    for warning in mixtures(results, scale):
        yield f"Warning: {warning}."
    yield "## Divergences and failures"
    lost = [run for run in runs if run["status"] != "finished"]
    rows = [[run["experiment"], run["run"], run["changed"], run["reason"]] for run in lost]
    yield (
        _table(("experiment", "run", "changed", "why"), rows)
        if rows
        else "All runs finished; none diverged."
    )
    yield f"Every run, with its command and commit: [runs.csv](runs.csv). ({scale} scale)"


def _seconds_of(results: Path, scale: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in read_table(results / scale / "curves.csv"):
        found[row["run"]] = max(found.get(row["run"], 0.0), float(row["seconds"] or 0.0))
    return found


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
