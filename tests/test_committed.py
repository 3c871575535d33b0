"""What is committed under results/ is what the committed tables give."""

from __future__ import annotations

import re
from typing import Any

import pytest
from browsing import opened

from bdhf.record import read_table
from bdhf.report.page import make_report
from bdhf.report.readme import README, with_results

RESULTS = README.parent / "results"
SCALES = sorted(p.parent.name for p in RESULTS.glob("*/report.md") if p.parent.name != "demo")


def without_plotly(page: str) -> str:
    """The page but for the library, of which another version may be installed."""
    return re.sub(r'<script id="plotly">.*?</script>', "", page, flags=re.DOTALL)


def test_there_are_results_at_laptop_scale() -> None:
    assert "laptop" in SCALES


@pytest.mark.parametrize("scale", SCALES)
def test_committed_report_is_what_the_committed_tables_give(scale: str) -> None:
    report = make_report(RESULTS, scale)
    folder = RESULTS / scale
    assert (folder / "report.md").read_text(encoding="utf-8") == report.markdown
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert without_plotly(page) == without_plotly(report.html)
    rows = read_table(folder / "verdicts.csv")
    assert [(row["id"], row["verdict"]) for row in rows] == [
        (verdict.claim.id, verdict.word) for verdict in report.verdicts
    ]


def test_readme_has_the_results_of_laptop_scale() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_results(text, RESULTS, "laptop")


def test_table_of_blocks_compares_each_with_hf_at_the_last_update() -> None:
    """From the rows themselves: seed by seed, at the end of the updates."""
    folder = RESULTS / "laptop"
    runs = {row["run"]: row for row in read_table(folder / "runs.csv")}
    last: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_table(folder / "curves.csv"):  # in the order of the updates
        run = runs[row["run"]]
        if (row["experiment"], row["curvature_batch_size"]) == ("autoencoder", "250"):
            key = row["optimizer"], run["changed"]
            last.setdefault(key, {})[row["seed"]] = float(row["train_loss"])
    text = (folder / "report.md").read_text(encoding="utf-8")
    whole = last["hf", ""]
    for name, changed in (
        ("the experiment's blocks", ""),
        ("4 blocks of layers", "optimizer.blocks=4"),
        ("8 random blocks", "optimizer.blocks=random-8"),
    ):
        ends = last["bdhf", changed]
        shares = ", ".join(f"{1 - ends[seed] / whole[seed]:.1%}" for seed in sorted(whole))
        (row_of_it,) = re.findall(rf"^\| {name} \| (.*) \|$", text, flags=re.MULTILINE)
        assert row_of_it.split(" | ")[1] == shares


@pytest.mark.parametrize("scale", SCALES)
def test_committed_figures_are_there_and_linked_files_exist(scale: str) -> None:
    folder = RESULTS / scale
    text = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links and [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("scale", SCALES)
def test_committed_page_opens_and_draws_each_chart(browser: Any, scale: str) -> None:
    path = RESULTS / scale / "report.html"
    with opened(browser, path) as page:
        charts = page.locator(".chart").count()
        assert charts >= 3
        for number in range(charts):
            assert page.evaluate(
                "n => document.querySelectorAll('.chart .js-plotly-plot')[n].data.length", number
            )
        words = {"holds", "holds in part", "does not hold", "not tested at this scale"}
        shown = page.locator("table").first.locator(".verdict").all_inner_texts()
        assert len(shown) == 16 and set(shown) <= words
