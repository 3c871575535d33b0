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
from bdhf.record import read_metrics, read_provenance, write_json, write_table
from bdhf.report.evidence import NAMES
from bdhf.report.figures import draw_figures
from bdhf.report.table import CellKey, TableError, collect, read_curves
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


def key(optimizer: str, curvature: int | None) -> CellKey:
    settings = settings_of(tiny("autoencoder", optimizer))
    hash_ = settings_hash(settings, ("seed",))
    changed = {
        "adam": "batch_size=60 network.widths=[64,12,6]",
        "hf": "batch_size=60 curvature_batch_size=20 network.widths=[64,12,6] "
        "optimizer.cg_max_iter=5",
    }
    changed["bdhf"] = changed["hf"]
    return CellKey("autoencoder", optimizer, 60, curvature, hash_, changed[optimizer])


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


def test_figures_are_drawn_and_redrawn_the_same(results: Path) -> None:
    collect(results, "demo")
    paths = draw_figures(results, "demo")
    stems = ["figure1_autoencoder", "figure1_autoencoder_cost", "figure1_autoencoder_cg"]
    expected = [f"{stem}{end}" for stem in (*stems, "stability") for end in (".png", ".svg")]
    assert [p.name for p in paths] == expected
    svg = paths[1].read_text()
    for label in ("Adam, mini-batch 60", "HF, mini-batch 60, curvature 20", "updates", "epochs"):
        assert label in svg
    assert "1 or 2 seeds" in svg
    assert "seconds in updates" in paths[3].read_text()
    assert "block 1; HF has block 0 only" in paths[5].read_text()
    before = [path.read_bytes() for path in paths[1::2]]
    draw_figures(results, "demo")
    assert [path.read_bytes() for path in paths[1::2]] == before


def test_figure_shows_what_the_table_says(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(results, "demo")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw_figures(results, "demo")
    monkeypatch.undo()
    curves = read_curves(results, "demo")
    for figure, columns in ((drawn[0], 4), (drawn[1], 2)):
        axes = figure.axes
        assert [axis.get_ylabel() for axis in axes[::columns]] == ["train error", "test error"]
        for place, axis in enumerate(axes):
            x = (("update", "epoch"), ("gradient_equivalents", "seconds"))[columns == 2][place % 2]
            metric = ("train_loss", "test_loss")[place // columns]
            # Adam beside block-diagonal HF on the left, HF beside it on the right.
            others = (
                {0: {"adam"}, 1: {"hf"}}[place % columns // 2] if columns == 4 else {"adam", "hf"}
            )
            expected = {k: c for k, c in curves.items() if k.optimizer in others | {"bdhf"}}
            lines = {str(line.get_label()): line for line in axis.get_lines()}
            assert len(lines) == len(expected)
            for cell, values in expected.items():
                (line,) = [v for k, v in lines.items() if k.startswith(NAMES[cell.optimizer])]
                places = values.update if x == "update" else values.columns[x].mean(0)
                assert np.allclose(line.get_xdata(), places[1:])
                assert np.allclose(line.get_ydata(), values.columns[metric].mean(0)[1:])
            (band,) = axis.collections  # of the only cell with two seeds
            heights = band.get_paths()[0].vertices[:, 1]
            assert heights.min() == curves[BDHF].columns[metric][:, 1:].min()
            assert heights.max() == curves[BDHF].columns[metric][:, 1:].max()
    for figure in drawn:
        pyplot.close(figure)


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
    common = "network.widths=[64,12,6] optimizer.cg_max_iter=5"
    changed = {common, f"{common} optimizer.lr=0.05"}
    sizes = "batch_size=60 curvature_batch_size=20"  # no cell's
    assert {cell.changed for cell in curves} == {f"{sizes} {words}" for words in changed}
    for words in changed:
        assert f"curvature 20 ({words})" in svg


def test_a_seed_that_diverged_does_not_hide_the_others(tmp_path: Path) -> None:
    for seed in (0, 1):
        values = tiny("autoencoder", "adam", f"seed={seed}")
        values.results = str(tmp_path)
        folder = run(EXPERIMENTS["autoencoder"], values).folder
    rows = read_metrics(folder.path)[:2]
    write_table(folder.path / "metrics.csv", rows)
    provenance = read_provenance(folder.path)
    write_json(folder.path / "provenance.json", {**provenance, "status": "diverged"})
    collect(tmp_path, "demo")
    (curves,) = read_curves(tmp_path, "demo").values()
    assert curves.update.tolist() == [0, 2, 4]
    assert np.isnan(curves.columns["train_loss"]).tolist() == [3 * [False], [False, False, True]]
    _, svg, *_, stability = draw_figures(tmp_path, "demo")
    assert "(network.widths=[64,12,6]); 1 of 2 diverged" in svg.read_text()
    assert "1 of 2 diverged" in stability.read_text()


def test_the_row_in_which_a_seed_diverged_is_in_no_mean_and_cut_losses_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        values = tiny("autoencoder", "adam", f"seed={seed}", "evaluate_every=1")
        values.results = str(tmp_path)
        folder = run(EXPERIMENTS["autoencoder"], values).folder
    rows = read_metrics(folder.path)[:4]
    rows[-1]["train_loss"] = 1000 * rows[0]["train_loss"]
    write_table(folder.path / "metrics.csv", rows)
    provenance = read_provenance(folder.path)
    write_json(folder.path / "provenance.json", {**provenance, "status": "diverged"})
    collect(tmp_path, "demo")
    (curves,) = read_curves(tmp_path, "demo").values()
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw_figures(tmp_path, "demo")
    monkeypatch.undo()
    *seeds, _, mean = drawn[0].axes[0].get_lines()  # the last but one is the cross
    loss = curves.columns["train_loss"]
    assert mean.get_xdata().tolist() == [1, 2]
    assert np.allclose(mean.get_ydata(), loss[:, 1:3].mean(0))
    assert np.nanmax(seeds[1].get_ydata()) == 10 * loss[1, 0]
    said = ["10 times the initial one" in figure.get_suptitle() for figure in drawn]
    assert said == [True, True, False]  # seconds too; not what says nothing of losses' size
    for figure in drawn:
        pyplot.close(figure)


def test_missing_table_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"make collect SCALE=laptop writes it"):
        draw_figures(tmp_path, "laptop")
