"""From run folders to the table to the figure."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from suite import EXPERIMENTS, tiny

from bdhf.config import settings_hash, settings_of
from bdhf.record import read_metrics, write_table
from bdhf.report.figures import draw_figures
from bdhf.report.table import CellKey, collect, read_curves
from bdhf.runner import run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three optimizers, block-diagonal HF with two seeds, and a run that is not finished."""
    path = tmp_path_factory.mktemp("results")
    for optimizer, seeds in (("adam", [0]), ("hf", [0]), ("bdhf", [0, 1])):
        for seed in seeds:
            values = tiny("autoencoder", optimizer, f"seed={seed}")
            values.results = str(path)
            run(EXPERIMENTS["autoencoder"], values)
    unfinished = path / "runs" / "demo" / "autoencoder" / "bdhf-unfinished"
    unfinished.mkdir()
    (unfinished / "provenance.json").write_text(json.dumps({"status": "running"}))
    return path


def key(optimizer: str, curvature: int | None, *overrides: str) -> CellKey:
    settings = settings_of(tiny("autoencoder", optimizer, *overrides))
    return CellKey("autoencoder", optimizer, 60, curvature, settings_hash(settings, ("seed",)))


BDHF = key("bdhf", 20)


def test_table_holds_every_row_of_every_ended_run_once(results: Path) -> None:
    count, left_out = collect(results, "demo")
    assert count == 4
    assert len(left_out) == 1 and left_out[0].endswith("bdhf-unfinished: running")
    with (results / "demo" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    for folder in (results / "runs" / "demo" / "autoencoder").iterdir():
        expected = [str(row["train_loss"]) for row in read_metrics(folder)]
        assert [r["train_loss"] for r in rows if r["run"] == folder.name] == expected
    with (results / "demo" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len({run["run"] for run in runs}) == 4
    assert all(run["status"] == "finished" and run["data_sha256"] for run in runs)


def test_collecting_twice_changes_nothing(results: Path) -> None:
    collect(results, "demo")
    tables = [results / "demo" / name for name in ("curves.csv", "runs.csv")]
    before = [table.read_bytes() for table in tables]
    collect(results, "demo")
    assert [table.read_bytes() for table in tables] == before


def test_runs_without_a_folder_stay_in_the_table(results: Path, tmp_path: Path) -> None:
    """The committed table of a fresh clone, say; and a shorter run does not replace a longer."""
    shutil.copytree(results, tmp_path / "r")
    collect(tmp_path / "r", "demo")
    names = ("curves.csv", "runs.csv")
    before = [(tmp_path / "r" / "demo" / name).read_text() for name in names]
    folders = sorted((tmp_path / "r" / "runs" / "demo" / "autoencoder").glob("*-*-seed*"))
    for folder in folders[1:]:
        shutil.rmtree(folder)
    provenance = json.loads((folders[0] / "provenance.json").read_text())
    (folders[0] / "provenance.json").write_text(json.dumps({**provenance, "updates": 1}))
    count, left_out = collect(tmp_path / "r", "demo")
    assert count == 0 and any("the table has a longer one" in line for line in left_out)
    assert [(tmp_path / "r" / "demo" / name).read_text() for name in names] == before


def test_curves_come_back_by_cell_and_seed(results: Path) -> None:
    collect(results, "demo")
    curves = read_curves(results, "demo")
    assert set(curves) == {key("adam", None), key("hf", 20), BDHF}
    cell = curves[BDHF]
    assert cell.seeds == [0, 1] and cell.update.tolist() == [0, 2, 4]
    assert cell.columns["train_loss"].shape == (2, 3)
    assert np.isnan(cell.columns["test_accuracy"]).all()
    (folder,) = (results / "runs" / "demo" / "autoencoder").glob("bdhf-*-seed1-*")
    expected = [row["test_loss"] for row in read_metrics(folder)]
    assert cell.columns["test_loss"][1].tolist() == expected


def test_figure_is_drawn_and_redrawn_the_same(results: Path) -> None:
    collect(results, "demo")
    paths = draw_figures(results, "demo")
    assert [p.name for p in paths] == ["figure1_autoencoder.png", "figure1_autoencoder.svg"]
    svg = paths[1].read_text()
    for label in ("Adam, mini-batch 60", "HF, mini-batch 60, curvature 20", "updates", "epochs"):
        assert label in svg
    assert "1 or 2 seeds" in svg
    before = paths[1].read_bytes()
    draw_figures(results, "demo")
    assert paths[1].read_bytes() == before


def test_figure_shows_what_the_table_says(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(results, "demo")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    draw_figures(results, "demo")
    axes = pyplot.gcf().axes
    monkeypatch.undo()
    pyplot.close("all")
    curves = read_curves(results, "demo")[BDHF]
    assert [axis.get_ylabel() for axis in axes[::2]] == [
        "train error (squared, per image)",
        "test error (squared, per image)",
    ]
    for axis, x, metric in (
        (axes[0], "update", "train_loss"),
        (axes[1], "epoch", "train_loss"),
        (axes[2], "update", "test_loss"),
        (axes[3], "epoch", "test_loss"),
    ):
        (line,) = [a for a in axis.get_lines() if str(a.get_label()).startswith("Block")]
        places = curves.update if x == "update" else curves.columns["epoch"][0]
        assert np.allclose(line.get_xdata(), places[1:])
        assert np.allclose(line.get_ydata(), curves.columns[metric].mean(0)[1:])
        (band,) = axis.collections  # of the only cell with two seeds
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == curves.columns[metric][:, 1:].min()
        assert heights.max() == curves.columns[metric][:, 1:].max()


def test_runs_with_other_settings_are_other_curves(tmp_path: Path) -> None:
    """The README's `optimizer.lr=0.05` must not be averaged with the shipped cell."""
    for override in ("seed=0", "optimizer.lr=0.05", "evaluate_every=1"):
        values = tiny("autoencoder", "bdhf", override)
        values.results = str(tmp_path)
        run(EXPERIMENTS["autoencoder"], values)
    collect(tmp_path, "demo")
    curves = read_curves(tmp_path, "demo")
    assert len(curves) == 3 and all(c.columns["epoch"].shape[0] == 1 for c in curves.values())
    svg = draw_figures(tmp_path, "demo")[1].read_text()
    for cell in curves:
        assert f"curvature 20 (settings {cell.settings})" in svg


def test_a_seed_that_diverged_does_not_hide_the_others(tmp_path: Path) -> None:
    for seed in (0, 1):
        values = tiny("autoencoder", "adam", f"seed={seed}")
        values.results = str(tmp_path)
        folder = run(EXPERIMENTS["autoencoder"], values).folder
    rows = read_metrics(folder.path)[:2]
    write_table(folder.path / "metrics.csv", rows)
    collect(tmp_path, "demo")
    (curves,) = read_curves(tmp_path, "demo").values()
    assert curves.update.tolist() == [0, 2, 4]
    assert np.isnan(curves.columns["train_loss"]).tolist() == [3 * [False], [False, False, True]]
    _, svg = draw_figures(tmp_path, "demo")
    assert "Adam, mini-batch 60; 1 of 2 ended early" in svg.read_text()


def test_missing_table_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make collect SCALE=laptop writes it"):
        draw_figures(tmp_path, "laptop")
