"""The page of the report: what is written into it, and what its controls do in a browser."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import opened

from bdhf.report.interactive import render

TITLE = "Curves <script>window.broken = 1</script> & verdicts"
REASON = "loss <b>NaN</b> </script><script>window.broken = 2</script><!-- <script>"
BODY = """
<p>Verdict: <span class="verdict holds">holds</span></p>
<table><tr><th>wide</th></tr><tr><td>cell</td></tr></table>
<div class="chart" data-experiment="autoencoder"></div>
<div class="chart" data-experiment="lstm"></div>
<div class="chart" data-experiment="resnet"></div>
"""


def seed(number: int, losses: list[float], accuracies: list[float], **status: str) -> dict:
    """A run evaluated every 10 updates; update k takes it (seed + 1) k seconds."""
    updates = [10.0 * i for i in range(len(losses))]
    return {
        "seed": number,
        "status": "finished",
        "reason": "",
        **status,
        "axes": {"update": updates, "seconds": [(number + 1) * u for u in updates]},
        "metrics": {"train_loss": losses, "test_accuracy": accuracies},
    }


def cell(id_: str, optimizer: str, color: str, seeds: list[dict]) -> dict:
    size = f"mini-batch {id_}"
    label = f"{optimizer}, {size}"
    style = {"color": color, "dash": "solid"}
    return {
        "id": id_,
        "label": label,
        "optimizer": optimizer,
        "size": size,
        **style,
        "seeds": seeds,
    }


def experiment(name: str) -> dict:
    """Adam with two cells, one with a diverged seed; HF with one; block-diagonal HF with one seed.

    Only HF has a test accuracy.
    """
    nan = math.nan
    none = [nan, nan, nan]
    small = [seed(0, [8.0, 4.0, 2.0], none), seed(1, [8.0, 6.0, 4.0], none)]
    diverged = seed(1, [8.0, 16.0, nan], none, status="diverged", reason=REASON)
    large = [seed(0, [8.0, 5.0, 3.0], none), diverged, seed(2, [8.0, 3.0, 1.0], none)]
    hf = [seed(0, [8.0, 2.0, 1.0], [0.0, 0.5, 0.9]), seed(1, [8.0, 3.0, 2.0], [0.0, 0.7, 0.7])]
    return {
        "name": name,
        "title": f"Figure of {name}",
        "metrics": [
            {"key": "train_loss", "label": "train error", "log": True},
            {"key": "test_accuracy", "label": "test accuracy", "log": False},
        ],
        "axes": [{"key": "update", "label": "updates"}, {"key": "seconds", "label": "seconds"}],
        "cells": [
            cell("125", "Adam", "#E69F00", small),
            cell("1000", "Adam", "#E69F00", large),
            cell("375", "HF", "#0072B2", hf),
            cell("750", "Block-diagonal HF", "#D55E00", [seed(0, [8.0, 1.0, 0.5], none)]),
        ],
    }


DATA = {"scale": "demo", "experiments": [experiment("autoencoder"), experiment("lstm")]}


def data_in(page: str) -> Any:
    """The data as a browser finds them: up to the first end of the element."""
    text = page.split('<script type="application/json" id="data">')[1].split("</script")[0]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_same_bytes_for_the_same_input() -> None:
    assert render(TITLE, BODY, DATA) == render(TITLE, BODY, DATA)


def test_data_are_strict_json_and_survive_any_string() -> None:
    found = data_in(render(TITLE, BODY, DATA))
    seeds = found["experiments"][0]["cells"][1]["seeds"]
    assert seeds[1]["reason"] == REASON
    assert seeds[1]["metrics"]["train_loss"] == [8, 16, None]


def test_numbers_are_short_counts_are_exact() -> None:
    values = [1 / 3, 123456.789, -2.5e-7, 1234567.0, 7654321, math.inf, -math.inf, True, None]
    expected = [0.33333, 123460, -2.5e-7, 1234567, 7654321, None, None, True, None]
    found = data_in(render(TITLE, BODY, {"experiments": [], "values": values}))["values"]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


def test_title_is_escaped_and_becomes_the_heading_where_the_body_has_none() -> None:
    page = render(TITLE, "<p>text</p>", DATA)
    assert "window.broken = 1</script>" not in page
    assert page.count("Curves &lt;script&gt;") == 2
    assert render(TITLE, "<h1>Own</h1>", DATA).count("Curves &lt;script&gt;") == 1


def test_page_needs_no_other_file_and_says_what_is_missing_without_javascript() -> None:
    page = render(TITLE, BODY, DATA)
    own = page.split('<script id="plotly">')[0] + page.split("</script>")[-2]
    assert "src=" not in own and "<link" not in own and "@import" not in own and "url(" not in own
    assert "<noscript>" in own and BODY in own


class Chart:
    """The first chart of a page: what it shows, and its controls."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.place = page.locator('.chart[data-experiment="autoencoder"]')

    def traces(self, kind: str = "", cell: str = "") -> list[dict]:
        found = self.place.locator(".plot").evaluate("plot => plot.data")
        same = [t for t in found if kind in ("", t["meta"]["kind"])]
        return [t for t in same if cell in ("", t["meta"]["cell"])]

    def cells(self) -> set[str]:
        return {trace["meta"]["cell"] for trace in self.traces()}

    def layout(self) -> Any:
        return self.place.locator(".plot").evaluate("plot => plot.layout")

    def tick(self, label: str, on: bool) -> None:
        self.place.get_by_label(label, exact=True).set_checked(on)

    def choose(self, label: str, option: str) -> None:
        self.place.get_by_label(label, exact=True).select_option(label=option)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render(TITLE, BODY, DATA), encoding="utf-8")
    return path


@pytest.fixture
def chart(browser: Any, file: Path) -> Iterator[Chart]:
    """A chart; after the test: no error, nothing asked of the network, no string has run."""
    with opened(browser, file) as page:
        yield Chart(page)
        assert page.evaluate("window.broken") is None


def test_each_experiment_has_its_chart(chart: Chart) -> None:
    assert chart.page.locator(".js-plotly-plot").count() == 2
    missing = chart.page.locator('.chart[data-experiment="resnet"]')
    assert missing.inner_text() == "There are no curves of this experiment yet."
    chart.tick("Adam", False)  # of the first chart only
    other = chart.page.locator('[data-experiment="lstm"] .plot')
    assert other.evaluate("plot => new Set(plot.data.map(t => t.meta.cell)).size") == 4


def test_mean_and_band_go_as_far_as_all_seeds(chart: Chart) -> None:
    [mean] = chart.traces("mean", "125")
    assert mean["x"] == [10, 20] and mean["y"] == [5, 3]  # a log axis has no place for update 0
    assert mean["customdata"] == [[4, 6], [2, 4]]
    [band] = chart.traces("band", "125")
    assert band["x"] == [10, 20, 20, 10] and band["y"] == [6, 4, 2, 4]
    [mean] = chart.traces("mean", "1000")
    assert mean["x"] == [10] and mean["y"] == [8]
    assert [t["y"] for t in chart.traces("seed", "1000")] == [[5, 3], [16], [3, 1]]
    assert chart.traces("seed", "125") == []
    assert [t["meta"]["kind"] for t in chart.traces(cell="750")] == ["seed"]


def test_the_point_at_which_a_seed_diverged_is_in_no_mean(browser: Any, tmp_path: Path) -> None:
    data = copy.deepcopy(DATA)
    losses = [8.0, 6.0, 80.0]
    seeds = data["experiments"][0]["cells"][0]["seeds"]
    seeds[1] = seed(1, losses, 3 * [math.nan], status="diverged", reason=REASON)
    path = tmp_path / "report.html"
    path.write_text(render(TITLE, BODY, data), encoding="utf-8")
    with opened(browser, path) as page:
        chart = Chart(page)
        [mean] = chart.traces("mean", "125")
        assert mean["x"] == [10] and mean["y"] == [5]
        assert [t["y"] for t in chart.traces("seed", "125")] == [[4, 2], [6, 80]]
        assert [t["y"] for t in chart.traces("diverged", "125")] == [[80]]


def test_optimizers_and_cells_can_be_hidden(chart: Chart) -> None:
    assert chart.cells() == {"125", "1000", "375", "750"}
    chart.tick("Adam", False)
    assert chart.cells() == {"375", "750"}
    assert chart.place.get_by_label("mini-batch 125").is_disabled()
    chart.tick("Adam", True)
    chart.tick("mini-batch 125", False)
    assert chart.cells() == {"1000", "375", "750"}
    for optimizer in ("Adam", "HF", "Block-diagonal HF"):
        chart.tick(optimizer, False)
    assert chart.traces() == []
    assert chart.layout()["annotations"][0]["text"] == "No curve to draw here"


def test_metric_can_be_chosen(chart: Chart) -> None:
    assert chart.layout()["yaxis"]["title"]["text"] == "train error"
    chart.choose("metric", "test accuracy")
    assert chart.layout()["yaxis"]["title"]["text"] == "test accuracy"
    assert chart.layout()["yaxis"]["type"] == "linear"  # as the metric asks
    assert chart.cells() == {"375"}  # the others have none
    assert chart.traces("mean")[0]["y"] == pytest.approx([0.6, 0.8])


def test_horizontal_axis_can_be_chosen(chart: Chart) -> None:
    assert chart.layout()["xaxis"]["title"]["text"] == "updates"
    chart.choose("against", "seconds")
    assert chart.layout()["xaxis"]["title"]["text"] == "seconds"
    assert chart.traces("mean", "125")[0]["x"] == [15, 30]  # between 10 and 20, 20 and 40 seconds


def test_axes_can_be_linear_or_logarithmic(chart: Chart) -> None:
    assert [chart.layout()[axis]["type"] for axis in ("xaxis", "yaxis")] == ["log", "log"]
    chart.tick("log horizontal", False)
    assert chart.layout()["xaxis"]["type"] == "linear"
    assert chart.traces("mean", "125")[0]["x"] == [0, 10, 20]
    chart.choose("metric", "test accuracy")
    assert chart.traces("mean", "375")[0]["y"] == pytest.approx([0, 0.6, 0.8])
    chart.tick("log vertical", True)
    assert chart.layout()["yaxis"]["type"] == "log"
    assert chart.traces("mean", "375")[0]["y"] == pytest.approx([0.6, 0.8])


def test_each_seed_can_be_drawn(chart: Chart) -> None:
    chart.choose("seeds", "each")
    assert chart.traces("mean") == chart.traces("band") == []
    assert [t["y"] for t in chart.traces("seed", "125")] == [[4, 2], [6, 4]]
    assert len(chart.traces("seed")) == 2 + 3 + 2 + 1


def test_a_diverged_seed_is_marked_in_both_modes(chart: Chart) -> None:
    for mode in ("mean, least to greatest", "each"):
        chart.choose("seeds", mode)
        [cross] = chart.traces("diverged")
        assert (cross["x"], cross["y"], cross["marker"]["symbol"]) == ([10], [16], "x")
        [entry] = [t for t in chart.traces(cell="1000") if t["showlegend"]]
        assert entry["name"] == "Adam, mini-batch 1000; 1 of 3 diverged"
    assert chart.place.locator(".curves .count").all_inner_texts() == [
        "",
        "1 of 3 diverged",
        "",
        "",
    ]
    expected = [f"Adam, mini-batch 1000, seed 1 diverged: {REASON}"]
    assert chart.place.locator(".ends li").all_text_contents() == expected
    chart.tick("Adam", False)
    assert chart.place.locator(".ends li").count() == 0


def test_pointing_at_a_cross_says_what_it_is(chart: Chart) -> None:
    chart.choose("seeds", "each")
    chart.place.locator(".plot").evaluate(
        "plot => Plotly.Fx.hover(plot,"
        " [{curveNumber: plot.data.findIndex(t => t.meta.kind === 'diverged'), pointNumber: 0}])"
    )
    text = chart.place.locator(".hovertext").text_content()
    assert "Adam, mini-batch 1000" in text and f"seed 1 diverged: {REASON}" in text
    assert "updates: 10" in text and "train error: 16" in text


def test_controls_are_reached_by_keyboard_and_labelled(chart: Chart) -> None:
    controls = chart.place.locator("input, select")
    assert controls.count() == 5 + 3 + 4
    assert all(controls.evaluate_all("all => all.map(c => c.labels[0]?.textContent.trim())"))
    controls.first.focus()
    names = []
    for _ in range(5):
        names.append(chart.page.evaluate("document.activeElement.name"))
        chart.page.keyboard.press("Tab")
    assert names == ["metric", "against", "seeds", "log-x", "log-y"]
    controls.nth(3).focus()
    chart.page.keyboard.press("Space")
    assert chart.layout()["xaxis"]["type"] == "linear"


def test_no_button_sends_the_data_anywhere(chart: Chart) -> None:
    buttons = chart.place.locator(".modebar-btn")
    names = buttons.evaluate_all("all => all.map(b => b.dataset.title ?? b.ariaLabel)")
    assert names == ["Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Save as PNG"]
    assert chart.place.locator("a[href^=http]").count() == 0


def test_saved_picture_has_the_legend(chart: Chart) -> None:
    chart.place.locator(".plot").hover()
    with chart.page.expect_download() as saved:
        chart.place.locator('[data-title="Save as PNG"], [aria-label="Save as PNG"]').first.click()
    assert saved.value.suggested_filename == "autoencoder-train_loss.png"


def test_colours_follow_the_scheme_and_paper_is_light(chart: Chart) -> None:
    light = chart.layout()["paper_bgcolor"]
    width = chart.place.locator(".main-svg").first.evaluate("svg => svg.clientWidth")
    chart.page.emulate_media(color_scheme="dark")
    chart.page.wait_for_function(
        "light => document.querySelector('.plot').layout.paper_bgcolor !== light", arg=light
    )
    chart.page.emulate_media(color_scheme="dark", media="print")
    chart.page.wait_for_function(
        "light => document.querySelector('.plot').layout.paper_bgcolor === light", arg=light
    )
    assert not chart.place.locator(".options").is_visible()
    assert not chart.place.locator("input:visible").count()
    assert chart.place.locator(".swatch:visible").count() == 4  # the legend stays
    chart.page.emulate_media(color_scheme="light", media="screen")
    chart.page.wait_for_function(
        "width => document.querySelector('.main-svg').clientWidth === width", arg=width
    )


def test_page_fits_a_phone(chart: Chart) -> None:
    chart.page.set_viewport_size({"width": 390, "height": 800})
    chart.page.wait_for_function("document.querySelector('.main-svg').clientWidth <= 390")
    assert chart.page.evaluate("document.documentElement.scrollWidth") == 390
    assert chart.page.locator(".scroll > table").count() == 1
