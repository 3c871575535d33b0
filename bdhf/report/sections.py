"""The sections of the report, in Markdown."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from bdhf.experiment import figures, shipped
from bdhf.record import read_table
from bdhf.report import verdicts as verdicts_module
from bdhf.report.blocks import blocks_of, coloured
from bdhf.report.evidence import NAMES, PLATEAU, Cell, Evidence, UntestedError, along
from bdhf.report.quantities import FINAL_VALUES
from bdhf.report.table import mixtures
from bdhf.report.tuning import STUDY, Trials, changes, changes_of, moved_verdicts, trials
from bdhf.report.verdicts import FIXED, HISTORY, PAPERS, Judged, Verdict
from bdhf.training import DIVERGENCE_FACTOR

OUTCOMES = {"holds": "holds", "fails": "does not hold", "untested": "not tested"}

_DEVIATIONS = Path(__file__).parent / "assets" / "deviations.md"

Runs = Sequence[dict[str, str]]


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

    def html(self) -> str:
        """Where the page draws it."""
        return f'<div class="chart" data-experiment="{self.name}"></div>'


@dataclass(frozen=True)
class Picture:
    """A picture beside the report; the page has it inside."""

    words: str
    path: Path

    def markdown(self) -> str:
        """What GitHub shows."""
        return f"![{self.words}]({self.path.name})"

    def html(self) -> str:
        """What the page shows."""
        inside = base64.b64encode(self.path.read_bytes()).decode()
        return f'<p><img alt="{self.words}" src="data:image/png;base64,{inside}"></p>'


def introduction(folder: Path, runs: Runs, verdicts: Sequence[Verdict]) -> str:
    """What the page is about, and how it came out."""
    words = ("holds", "holds in part", "does not hold", "not tested at this scale")
    found = [(sum(verdict.word == word for verdict in verdicts), word) for word in words]
    counts = [f"**{count}** {word}" for count, word in found if count]
    devices = sorted({plain(f"{run['device']} ({run['processor']})") for run in runs})
    scale = folder.name
    papers = sum(verdict.claim.id in PAPERS for verdict in verdicts)
    more = f" and {len(verdicts) - papers} of one's own" if papers < len(verdicts) else ""
    return (
        f"Verdicts on the {papers} claims of *Block-diagonal Hessian-free Optimization for "
        f"Training Neural Networks* (Zhang, Xiong, Bradbury, Socher 2017){more}: "
        f"{', '.join(counts)}. {_kinds(runs)}; on {', '.join(devices)}. "
        "Everything below is made from the tables beside "
        f"this page and the configs by `make figures report SCALE={scale}`; the runs by "
        f"`make reproduce-all SCALE={scale}`."
    )


def _kinds(runs: Runs) -> str:
    """How many runs there are of figures and of each study, and of how many seeds."""
    words = []
    for study in sorted({run["study"] for run in runs}):
        mine = [run for run in runs if run["study"] == study]
        counts = {
            len({run["seed"] for run in mine if run["experiment"] == name})
            for name in {run["experiment"] for run in mine}
        }
        seeds = f"{' or '.join(map(str, sorted(counts)))} seed{'s' if counts != {1} else ''}"
        what = f"of the {study} study" if study else "of the figures"
        words.append(f"{len(mine)} runs {what} ({seeds} an experiment)")
    return ", ".join(words)


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a table in Markdown."""
    rows = [
        (v.claim.id, v.claim.text, "; ".join(filter(None, (f"**{v.word}**", v.failed))))
        for v in verdicts
    ]
    return table(("", "claim", "verdict"), rows)


def rule(evidence: Evidence, runs: Runs) -> str:
    """The rule as its module has it, and which runs there were when it was fixed."""
    text = (verdicts_module.__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " ")
    fixed = datetime.fromisoformat(FIXED)
    cells = [cell for found in evidence.cells.values() for cell in found] + blocks_of(evidence)
    settings = {cell.key.settings for cell in cells}
    judged = [run for run in runs if run["settings"] in settings]
    begun = sum(datetime.fromisoformat(run["start"]) < fixed for run in judged)
    when = fixed.strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{text}\n\nThe rule, and definitions and thresholds of the paper's claims, are of "
        f"{when}. Of the {len(judged)} runs here that verdicts rest on (the figures' and those "
        f"with other blocks; tuning apart) {begun or 'none'} had begun before. {HISTORY}"
    )


def details(verdict: Verdict) -> str:
    """A claim: what it is taken to mean, and its numbers."""
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
        text.append(table(("part", "effect by seed", "needs", "comes out"), rows))
    return "\n\n".join(text)


def _part_row(judged: Judged) -> tuple[str, str, str, str]:
    part = judged.part
    outcome = OUTCOMES[judged.outcome]
    reason = f": {judged.why}" if judged.outcome == "fails" else ""
    return part.what, part.values(), part.shown(part.least), outcome + reason


def figure_sections(evidence: Evidence, folder: Path) -> Iterator[str | Chart]:
    """Each experiment: its chart and its final values."""
    scale = folder.name
    for name, figure in figures().items():
        cells = evidence.drawn(name)
        if not cells:
            continue
        stem = f"figure{figure.number}_{name}"
        yield f"## Figure {figure.number}: {figure.title}"
        links = {
            "seconds and gradient equivalents": f"{stem}_cost.png",
            "CG iterations": f"{stem}_cg.png",
            "how much losses jump": "stability.png",
        }
        there = {words: path for words, path in links.items() if (folder / path).exists()}
        more = "; ".join(f"[{words}]({path})" for words, path in there.items())
        words = f"{figure.title}: curves by optimizer and mini-batch"
        yield Chart(name, words, f"{stem}.png", f"More of it: {more}." if more else "")
        yield (
            f"Runs: `make reproduce-{name} SCALE={scale}`. Figures: `make figures SCALE={scale}`. "
            "Below: final values (medians over the last tenth of the updates, and over the last "
            f"{FINAL_VALUES} evaluations at least), mean over the seeds (least to greatest); "
            "accuracies in per cent. Seconds are of runs made side by side; what an update takes "
            "is measured separately."
        )
        yield _final_values(cells, list(figure.panels))
        if any(lost for cell in cells for lost in cell.curves.diverged):
            yield (
                "Where a seed diverged, the figure has a thin line for each seed and a cross at "
                "its end; the thick line is the mean as long as all go on. Losses above "
                f"{DIVERGENCE_FACTOR:g} times the initial one are drawn there."
            )
        yield from _equal_work(evidence, name)


def _equal_work(evidence: Evidence, experiment: str) -> Iterator[str]:
    """Block-diagonal HF against HF, at equal updates and at equal work."""
    try:
        pairs = evidence.pairs(experiment)
    except UntestedError:
        return
    yield (
        "By which share the training loss of block-diagonal HF is below HF's, the log curves "
        "averaged over the updates, or over the work, as long as both go on; and at the end of "
        "that. For each seed in which neither diverged."
    )
    yield _shares_below(
        (f"mini-batch {ours.key.batch_size}, curvature {ours.key.curvature_batch_size}", ours, hf)
        for ours, hf in pairs
    )


def _shares_below(compared: Iterable[tuple[str, Cell, Cell]]) -> str:
    rows = []
    for name, ours, theirs in compared:
        row = [name]
        for x in ("update", "gradient_equivalents"):
            found = along(ours, theirs, x, "train_loss").values()
            for shares in zip(*found, strict=True):
                row.append(", ".join(f"{share:.1%}" for share in shares))
            if not found:
                row += ["", ""]
        rows.append(row)
    return table(("", "by updates", "at the end", "by gradient equivalents", "at the end"), rows)


def _final_values(cells: Sequence[Cell], panels: Sequence[str]) -> str:
    columns = ["train_loss", "test_loss", *(p for p in panels if p.endswith("accuracy"))]
    rows = []
    for cell in cells:
        row = [plain(str(cell)), f"{cell.update[-1]:.0f}"]
        for metric in ("epoch", "gradient_equivalents", "seconds"):
            ran = zip(cell.curves.columns[metric], cell.curves.diverged, strict=True)
            row.append(_spread([float(np.nanmax(v)) for v, why in ran if not why], "{:.3g}"))
        for metric in columns:
            values = [value for value in cell.final(metric).values() if math.isfinite(value)]
            percent = metric.endswith("accuracy")
            shown = "{:.1f}" if percent else "{:.4g}"
            row.append(_spread([100 * v for v in values] if percent else values, shown))
        lost = sum(map(bool, cell.curves.diverged))
        row.append(f"{lost} of {len(cell.seeds)}, not in the means" if lost else "")
        rows.append(row)
    heads = [column.replace("_", " ") for column in columns]
    return table(
        ("", "updates", "epochs", "gradient equivalents", "seconds", *heads, "diverged"), rows
    )


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean, low, high = (form.format(f(values)) for f in (np.mean, np.min, np.max))
    return mean if low == high else f"{mean} ({low} to {high})"


def measurements(evidence: Evidence, scale: str) -> Iterator[str | Chart]:
    """Blocks, update times and CG without a cap, as far as they were made."""
    blocks = blocks_of(evidence)
    if blocks:
        yield "## Which blocks"
        yield Chart("blocks", "Losses by the choice of blocks", "blocks.png")
        yield (
            "The autoencoder with other blocks (H1): so many of layers, or as many of their sizes "
            "drawn at random, scalar by scalar (one draw for all seeds). "
            f"`make reproduce-autoencoder OVERRIDES=study=blocks SCALE={scale}`."
        )
        yield _final_values(blocks, [])
        hf = [cell for cell in blocks if cell.key.optimizer == "hf"]
        if hf:
            yield (
                "By which share the training loss is below that with one block (HF's), as in "
                "figure 1's table: what any blocks bring, and what layers do. Random blocks cost "
                "more, since a product with any of them goes through the whole network."
            )
            yield _shares_below(
                (name, cell, hf[0]) for cell, name, _ in coloured(blocks) if cell is not hf[0]
            )
    if evidence.times:
        yield "## What an update takes"
        yield (
            "Seconds, medians over rounds in which the optimizers took turns on the same weights "
            f"and mini-batches, {_machine(evidence.times)}. `make measure SCALE={scale}`."
        )
        yield _time_table(evidence.times)
    if evidence.solves:
        yield "## CG without a cap"
        yield (
            "Iterations by the experiment's stopping rule, with the whole matrix and with each "
            f"block alone, on saved states. `make measure SCALE={scale}`."
        )
        yield _solve_table(evidence.solves)


def _machine(times: Runs) -> str:
    threads = "/".join(sorted({row["threads"] for row in times}))
    load = max(float(row["load"]) for row in times)
    return f"threads: {threads}, the machine's load at most {load:.1f}"


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
    return table(heads, rows)


def _solve_table(solves: Sequence[dict[str, str]]) -> str:
    rows = []
    keys = dict.fromkeys((row["experiment"], row["seed"], row["state"]) for row in solves)
    for experiment, seed, state in keys:
        mine = [r for r in solves if (r["experiment"], r["seed"], r["state"]) ==
                (experiment, seed, state)]  # fmt: skip
        whole = [r["iterations"] for r in mine if r["solver"] == "whole"]
        blocks = [r["iterations"] for r in mine if r["solver"] != "whole"]
        reasons = ", ".join(dict.fromkeys(r["reason"] for r in mine))
        rows.append([experiment, seed, state, ", ".join(whole), ", ".join(blocks), reasons])
    heads = ("experiment", "seed", "weights after", "whole matrix", "blocks", "stopped by")
    return table(heads, rows)


def tuning(evidence: Evidence, scale: str) -> Iterator[str]:
    """The trials, and how the claims would come out with the best."""
    known = trials(evidence)
    yield "## Tuning"
    if not known:
        yield f"Nothing was tuned at this scale; `make tune SCALE={scale}` does it."
        return
    yield (
        "One factor at a time, on samples held out of the training set: the test set was not "
        "looked at. Budgets and trials: [tuning.yaml](../../configs/studies/tuning.yaml). "
        f"`make tune SCALE={scale}`. The best in bold; accuracies in per cent."
    )
    rows = []
    for group in known:
        for cell in group.cells:
            score = group.score(cell)
            percent = group.metric.endswith("accuracy")
            shown = f"{100 * score:.1f}" if percent else f"{score:.4g}"
            if not math.isfinite(score):
                shown = "not evaluated" if math.isnan(score) else "diverged"
            shown = f"**{shown}**" if cell is group.best else shown
            change = plain(changes(cell)) or "as shipped"
            rows.append(
                [group.experiment, NAMES.get(group.optimizer, group.optimizer), change, shown]
            )
    yield table(("experiment", "optimizer", "changed", "validation"), rows)
    yield from _tuned_where_shipped_diverge(known)
    yield (
        "How the claims would come out on these runs: parts that hold, of one seed, with Adam at "
        "whatever it had reached, so these are no verdicts. One mini-batch was tuned: claims about "
        "several are judged on it alone, or, where they compare them, are not among these."
    )
    moved = [
        (claim.id, claim.text, *(count or "not tuned" for count in counts))
        for claim, counts in moved_verdicts(evidence)
    ]
    yield table(("", "claim", "as shipped", "Adam tuned", "all three tuned"), moved)


def _tuned_where_shipped_diverge(known: Sequence[Trials]) -> Iterator[str]:
    """A warning of seeds at which whatever is tried looks good."""
    for name in dict.fromkeys(group.experiment for group in known):
        shipped_ = [(g, g.shipped) for g in known if g.experiment == name and g.shipped is not None]
        lost = [NAMES.get(g.optimizer, g.optimizer) for g, c in shipped_ if all(c.curves.diverged)]
        if lost:
            seeds = sorted({seed for g in known if g.experiment == name for c in g.cells
                            for seed in c.seeds})  # fmt: skip
            where = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            who = " and ".join(lost)
            yield (
                f"Experiment {name} was tuned at {where} only, where {who} as shipped "
                f"diverge{'s' if len(lost) == 1 else ''} on this split: what the tuning gains "
                "there says nothing of other seeds."
            )


def settings(evidence: Evidence, scale: str) -> Iterator[str]:
    """Sizes, targets and how often was evaluated, as the configs have them."""
    yield "## What was run"
    rows = []
    order = [(experiment, name) for experiment in figures() for name in NAMES]
    for experiment, optimizer in [key for key in order if key in evidence.cells]:
        values, cells = shipped(experiment, scale, optimizer)
        goal = evidence.targets[experiment]
        target = f"{goal.metric} {goal.value:g}" if goal.metric else "none"
        method = ", ".join(
            f"{key} {value}"
            for key, value in values["optimizer"].items()
            if key != "name" and value is not None
        )
        for cell in cells:
            few = cell["curvature_batch_size"]
            sizes = [str(cell["batch_size"]), "" if few is None else str(few)]
            counts = [str(cell["updates"]), str(cell["evaluate_every"])]
            subset = str(values["evaluation_rows"])
            name = NAMES.get(optimizer, optimizer)
            rows.append([experiment, name, *sizes, *counts, subset, target, plain(method)])
    heads = (
        "experiment",
        "",
        "mini-batch",
        "curvature",
        "updates",
        "evaluated every",
        "on samples",
    )
    yield table((*heads, "target", "settings"), rows)
    yield (
        "Targets are ours, from first trials, for the counting of updates. Adam is at its plateau "
        f"where its training loss changes by less than {PLATEAU:.0%} in the second half of a run."
    )


def deviations(runs: Runs) -> Iterator[str]:
    """What is ours, numbered, the paper's text beside it."""
    yield "## Where this departs from the paper, or had to choose"
    yield "Our copy of the paper's text has lost nearly all its numbers. Every value here is ours."
    listed = _DEVIATIONS.read_text(encoding="utf-8").strip()
    found = {run["data"] for run in runs if "compression" in run["data"]}
    # A validation split is said after the source that it is of.
    compressed = sorted(d for d in found if not any(d != e and d.startswith(e) for e in found))
    if compressed:
        number = len(listed.splitlines()) - 1
        listed += (
            f"\n| {number} | data of these runs | CIFAR-10 | {plain(', '.join(compressed))}: a "
            "copy whose pixels differ a little, since the original was not at hand |"
        )
    yield listed


def circumstances(results: Path, scale: str, runs: Runs) -> Iterator[str]:
    """Data, compute, divergences."""
    yield "## Data"
    data = sorted({(plain(run["data"]), plain(run["data_sha256"])) for run in runs})
    yield table(("data set", "sha256 of the decoded pixels and labels"), data)
    yield "## Compute"
    keys = ("device", "processor", "threads", "torch", "git_commit", "git_dirty")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    seconds = _seconds_of(results, scale)
    rows = [
        [*map(plain, group[:4]), plain(group[4][:10]), plain(group[5]), str(len(mine)),
         f"{sum(seconds[run['run']] for run in mine) / 3600:.2f}",
         max((run["peak_memory_mib"] for run in mine), key=float)]
        for group, mine in sorted(groups.items())
    ]  # fmt: skip
    heads = ("device", "processor", "threads", "torch", "commit", "changed code", "runs")
    yield table((*heads, "hours in updates", "peak memory of a run, MiB"), rows)
    for warning in mixtures(results, scale):
        yield f"Warning: {plain(warning)}."
    yield "## Divergences"
    lost = [run for run in runs if run["status"] != "finished"]
    columns = ("experiment", "run", "changed", "reason")
    rows = [[plain(run[column]) for column in columns] for run in lost]
    yield (
        table(("experiment", "run", "changed", "why"), rows)
        if rows
        else "None of the runs in the table diverged."
    )
    yield from _lost_on_the_split_only(runs)
    yield (
        "A run that failed or was not finished is not in the table; where runs are made, "
        "`make plan` names it."
    )
    yield f"Every run, with its command and commit: [runs.csv](runs.csv). ({scale} scale)"


def _lost_on_the_split_only(runs: Runs) -> Iterator[str]:
    """Runs as shipped that diverged on the validation split, and not as a figure's."""
    same = ("experiment", "optimizer", "batch_size", "curvature_batch_size", "seed")
    fine = {
        tuple(run[key] for key in same): run["run"]
        for run in runs
        if not run["changed"] and run["status"] == "finished"
    }
    for run in runs:
        tried = run["study"] == STUDY and not changes_of(run["changed"])
        other = fine.get(tuple(run[key] for key in same))
        if tried and run["status"] == "diverged" and other is not None:
            name = NAMES.get(run["optimizer"], run["optimizer"])
            yield (
                f"{name} in experiment {run['experiment']}, seed {run['seed']}, with the settings "
                f"that ship: the figure's run ({plain(other)}) did not diverge; with "
                f"samples held out for validation it did ({plain(run['run'])}, "
                f"{plain(run['reason'])})."
            )


def _seconds_of(results: Path, scale: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in read_table(results / scale / "curves.csv"):
        found[row["run"]] = max(found.get(row["run"], 0.0), float(row["seconds"] or 0.0))
    return found


def plain(text: str) -> str:
    """Text that is not ours (names, reasons), so that nothing in it is taken for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
