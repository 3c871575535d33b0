"""Studies: runs beside the figures', on a validation split or with other blocks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from suite import EXPERIMENTS, tiny, without_clocks

import bdhf.data
import bdhf.report.figures
from bdhf.config import (
    Config,
    FigureConfig,
    TargetConfig,
    changed_settings,
    check_against_data,
    settings_hash,
    settings_of,
)
from bdhf.data import Images, load
from bdhf.data.images import with_validation
from bdhf.errors import ConfigError
from bdhf.experiment import CONFIGS, experiment_names, figures, shipped, target
from bdhf.record import RunFolder, read_metrics, read_table
from bdhf.report.claims.hypothesis import structure_matters
from bdhf.report.evidence import Cell, Evidence, UntestedError, gather, read_evidence
from bdhf.report.figures import draw_figures
from bdhf.report.table import CellKey, Curves, collect, read_curves
from bdhf.runner import run
from bdhf.sweep import sweep
from bdhf.sweep.grid import Grid, GridRun, expand

STUDIES = {
    path.stem: OmegaConf.to_container(OmegaConf.load(path))
    for path in sorted((CONFIGS / "studies").glob("*.yaml"))
}
SCALES = ("demo", "laptop", "paper")

#: Where each study has trials.
NAMED = [
    (study, scale)
    for study, found in STUDIES.items()
    for scale in SCALES
    if any(scale in lines for lines in found.values())
]


@functools.cache
def grid(*arguments: str) -> Grid:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return expand(arguments)


@functools.cache
def runs_of(study: str | None, scale: str) -> list[GridRun]:
    """The study's runs at a scale, or the figures'."""
    if study not in (None, "blocks"):
        return grid(f"scale={scale}", f"study={study}").runs
    # Together, as `make reproduce-all` has them.
    return [r for r in grid(f"scale={scale}", "study=null,blocks").runs if r.config.study == study]


def changes(config: Config) -> list[str]:
    known = shipped(config.experiment, config.scale, config.optimizer.name)
    words = changed_settings(settings_of(config), *known).split()
    return [word for word in words if not word.startswith("updates=")]  # the study's budget


# The shipped studies


def test_studies_name_what_there_is() -> None:
    assert list(STUDIES) == ["blocks", "tuning"]
    for found in STUDIES.values():
        assert set(found) <= set(experiment_names())
        assert all(lines and set(lines) <= set(SCALES) for lines in found.values())
    assert set(NAMED) == set(itertools.product(STUDIES, ("laptop", "paper")))


@pytest.mark.parametrize(("study", "scale"), NAMED)
def test_study_expands_at_every_scale_it_names(study: str, scale: str) -> None:
    asked = "null,blocks" if study == "blocks" else study
    assert not grid(f"scale={scale}", f"study={asked}").refused
    runs = runs_of(study, scale)
    named = {name for name, lines in STUDIES[study].items() if scale in lines}
    assert {run.config.experiment for run in runs} == named
    assert {run.config.study for run in runs} == {study}
    for found in runs:
        check_against_data(found.config)
        assert changes(found.config)  # or it would be a figure's run, with its folder
    labels = [run.label for run in runs]
    assert len(set(labels)) == len(labels) == len({run.folder().path for run in runs})


def test_labels_of_a_study_name_what_it_tries_and_no_more() -> None:
    labels = [made.label for made in runs_of("tuning", "laptop")]
    labels = [label for label in labels if label.startswith("resnet hf ")]
    begin = "resnet hf b1000 c125 seed 0 optimizer."
    ends = ("lr=0.05", "lr=0.1", "lr=0.2", "damping=0.01", "damping=1", "cg_max_iter=10")
    assert labels == [f"{begin}{end}" for end in (*ends, "cg_momentum=0")]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_tuning_treats_the_optimizers_alike(scale: str) -> None:
    trials: dict[tuple[str, str], list[Config]] = defaultdict(list)
    for made in runs_of("tuning", scale):
        trials[made.config.experiment, made.config.optimizer.name].append(made.config)
    assert set(trials) == set(itertools.product(EXPERIMENTS, ("adam", "hf", "bdhf")))
    assert {len(configs) for configs in trials.values()} == {7}
    for (experiment, optimizer), configs in trials.items():
        cell = shipped(experiment, scale, optimizer)[1][0]
        for size in ("batch_size", "curvature_batch_size", "evaluate_every"):
            assert {getattr(c, size) for c in configs} == {cell[size]}
        assert {2 * c.updates for c in configs} == {cell["updates"]}
        assert cell["updates"] // 2 % cell["evaluate_every"] == 0
        assert {c.seed for c in configs} == {0}


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_tuning_tries_one_setting_at_a_time_and_never_on_the_test_set(scale: str) -> None:
    tried: dict[tuple[str, str], list[str]] = defaultdict(list)
    for made in runs_of("tuning", scale):
        words = changes(made.config)
        assert words[0] == f"data.validation_rows={made.config.data.validation_rows}"
        assert made.config.data.validation_rows == 10_000
        assert len(words) <= 2
        tried[made.config.experiment, made.config.optimizer.name] += words[1:] or ["as shipped"]
    for (experiment, optimizer), words in tried.items():
        assert len(set(words)) == 7 and words.count("as shipped") == 1
        assert all(word.startswith("optimizer.") for word in words if word != "as shipped")
        if optimizer == "bdhf":
            assert words == tried[experiment, "hf"]


def test_study_without_runs_at_a_scale_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(["scale=demo", "study=tuning"], "") == 1
    said = capsys.readouterr().err
    assert said == "error: nothing is asked for: the study has no runs of this at this scale\n"


# What claim H1 needs


def cell_of(made: GridRun) -> CellKey:
    config, settings = made.config, settings_of(made.config)
    return CellKey(
        config.experiment,
        config.optimizer.name,
        config.batch_size,
        config.curvature_batch_size,
        settings_hash(settings, ("seed",)),
        " ".join(changes(config)),
        config.study or "",
    )


def some_evidence(scale: str, without: str = "") -> Evidence:
    """As if all that is shipped had been made: losses that halve ten times, from seed to seed."""
    seeds: dict[CellKey, list[int]] = defaultdict(list)
    for made in (*runs_of(None, scale), *runs_of("blocks", scale)):
        if made.config.experiment == "autoencoder":
            seeds[cell_of(made)].append(made.config.seed)
    course = 100.0 * 0.5 ** np.arange(11)
    updates = np.arange(11.0)
    curves = {
        key: Curves(updates, {"train_loss": np.stack([course] * len(of))}, of, [""] * len(of))
        for key, of in seeds.items()
        if key.changed != f"optimizer.blocks={without}"
    }
    figures = {key: value for key, value in curves.items() if not key.study}
    return Evidence(
        gather(figures), [Cell(key, value) for key, value in curves.items() if key.study]
    )


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_blocks_study_is_what_claim_h1_needs(scale: str) -> None:
    parts = structure_matters(some_evidence(scale))
    assert len(parts) == 3 + 3
    seeds = {made.config.seed for made in runs_of(None, scale)}
    assert seeds == set(range(3 if scale == "laptop" else 5))
    assert all(set(part.effects) == seeds for part in parts)


@pytest.mark.parametrize("without", ["4", "8", "random-2", "random-4", "random-8"])
def test_claim_h1_says_which_runs_it_lacks(without: str) -> None:
    message = rf"^no runs with blocks {without}: study=blocks makes them$"
    with pytest.raises(UntestedError, match=message):
        structure_matters(some_evidence("laptop", without))


# What a study is


OWN = """
autoencoder:
  demo:
    - optimizer=adam seed=4 optimizer.lr=0.1,0.2
    - optimizer=bdhf cell=0 optimizer.damping=1 updates=3
"""


@pytest.fixture
def own_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "own.yaml").write_text(OWN)
    monkeypatch.setattr("bdhf.sweep.grid.CONFIGS", tmp_path)


def in_short(found: Grid) -> list[str]:
    assert not found.refused
    return [run.label.removeprefix("autoencoder ") for run in found.runs]


@pytest.mark.usefixtures("own_study")
def test_lines_of_a_study_are_command_lines_with_the_scales_seeds() -> None:
    found = grid.__wrapped__("scale=demo", "study=own")  # the other experiments have none
    assert in_short(found) == [
        "bdhf b720 c180 seed 0 optimizer.damping=1",
        "adam b100 seed 4 optimizer.lr=0.1",
        "adam b100 seed 4 optimizer.lr=0.2",
    ]
    assert [run.config.updates for run in found.runs] == [3, 1500, 1500]
    assert not grid.__wrapped__("scale=laptop", "study=own").runs


@pytest.mark.usefixtures("own_study")
def test_seeds_of_the_command_line_are_those_of_all_lines() -> None:
    found = grid.__wrapped__("experiment=autoencoder", "scale=demo", "study=own", "seed=7,8")
    assert in_short(found) == [
        f"{words[0]} seed {seed} {words[1]}"
        for seed in (7, 8)
        for words in (
            ("adam b100", "optimizer.lr=0.1"),
            ("adam b100", "optimizer.lr=0.2"),
            ("bdhf b720 c180", "optimizer.damping=1"),
        )
    ]


@pytest.mark.usefixtures("own_study")
def test_study_beside_the_figures_is_both() -> None:
    common = ("experiment=autoencoder", "scale=demo")
    of_figures = grid.__wrapped__(*common).runs
    of_study = grid.__wrapped__(*common, "study=own").runs
    both = grid.__wrapped__(*common, "study=null,own").runs
    assert (len(of_figures), len(of_study), len(both)) == (3, 3, 6)
    assert {run.folder().path for run in both} == {
        run.folder().path for run in (*of_figures, *of_study)
    }
    assert [run.config.study for run in both] == [None] * 3 + ["own"] * 3
    assert all(f"study={run.config.study or 'null'}" in run.label for run in both)


def test_figures_of_a_seed_come_before_its_studies() -> None:
    runs = grid.__wrapped__("scale=paper", "study=null,blocks", "seed=0,1").runs
    places = [(run.config.seed, run.config.study or "") for run in runs]
    assert places == sorted(places)
    cells = 9 * 3  # three optimizers, each with three sizes, in three experiments
    assert Counter(places) == {
        (seed, study): count for seed in (0, 1) for study, count in (("", cells), ("blocks", 5))
    }


@pytest.mark.parametrize("asked", ["block", "null,block", "../scale/demo"])
def test_unknown_study_is_refused_by_name(asked: str) -> None:
    unknown = asked.removeprefix("null,")
    message = rf"^study={unknown}: must be null or one of blocks, tuning$"
    with pytest.raises(ConfigError, match=message):
        grid("experiment=autoencoder", "scale=demo", "optimizer=adam", f"study={asked}")


@functools.cache
def adam(*overrides: str) -> Config:
    return tiny("autoencoder", "adam", *overrides)


def test_study_changes_no_folder() -> None:
    """Whoever made a run: it is the same run."""
    plain = adam()
    of_study = dataclasses.replace(plain, study="blocks")
    assert settings_hash(settings_of(plain)) == settings_hash(settings_of(of_study))
    assert RunFolder(plain).path == RunFolder(of_study).path
    assert settings_of(of_study)["study"] == "blocks"  # but it is noted
    assert changes(of_study) == changes(plain)


# What is not as shipped


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_is_changed_in_what_is_shipped(scale: str) -> None:
    runs = [made for made in runs_of(None, scale) if made.config.seed < 2]
    cells = {"demo": 3, "laptop": 2 * 6, "paper": 2 * 9}[scale]
    assert len(runs) == 3 * cells
    for made in runs:
        assert changes(made.config) == [], made.label


def test_changes_are_named() -> None:
    assert " ".join(changes(adam("optimizer.lr=0.01", "data.validation_rows=100"))) == (
        "batch_size=60 data.validation_rows=100 network.widths=[64,12,6] optimizer.lr=0.01"
    )
    assert changes(adam("optimizer.betas=[0.5,0.9]"))[2:] == ["optimizer.betas=[0.5,0.9]"]


#: As `settings_of` gives them, and a table of cells.
SETTINGS: dict[str, Any] = {
    "batch_size": 50,
    "curvature_batch_size": 10,
    "evaluate_every": 5,
    "evaluation_rows": 1000,
    "seed": 0,
    "updates": 40,
    "network": {"widths": [4, 2]},
    "data": {"name": "digits", "root": "data", "validation_rows": None},
    "optimizer": {"name": "bdhf", "lr": 0.1, "betas": (0.9, 0.999), "blocks": None},
}
CELLS = [
    {"batch_size": 50, "curvature_batch_size": 10, "updates": 40, "evaluate_every": 5},
    {"batch_size": 50, "curvature_batch_size": 25, "updates": 20, "evaluate_every": 2},
]


def difference(**changed: Any) -> str:
    settings = {**SETTINGS}
    for key, value in changed.items():
        group, _, name = key.partition("__")
        settings[group] = {**settings[group], name: value} if name else value
    return changed_settings(settings, SETTINGS, CELLS)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"seed": 3, "device": "cuda", "threads": 2, "study": "blocks"},
        {"wandb": {"mode": "online"}, "results": "elsewhere", "micro_batch": 3, "cell": "1"},
        {"data__root": "/elsewhere"},
        {"curvature_batch_size": 25, "evaluate_every": 2, "updates": 20},  # cell 1
        {"optimizer__betas": [0.9, 0.999]},  # as a run's own config.yaml has them
        {"optimizer__later": None, "later": None, "data__later": None},
    ],
)
def test_what_does_not_count_as_changed(changed: dict[str, Any]) -> None:
    assert difference(**changed) == ""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"optimizer__lr": 0.05, "seed": 1}, "optimizer.lr=0.05"),
        ({"optimizer__blocks": "random-2"}, "optimizer.blocks=random-2"),
        ({"optimizer__betas": [0.5, 0.9]}, "optimizer.betas=[0.5,0.9]"),
        ({"network__widths": [4, 3, 2]}, "network.widths=[4,3,2]"),
        ({"data__validation_rows": 9}, "data.validation_rows=9"),
        ({"evaluation_rows": 10, "data__name": "mnist"}, "data.name=mnist evaluation_rows=10"),
        ({"evaluate_every": 2}, "evaluate_every=2"),
        ({"curvature_batch_size": 25, "updates": 20}, "evaluate_every=5"),  # the second cell's: 2
        ({"later": 1}, "later=1"),
        ({"updates": 7}, "updates=7"),
        ({"batch_size": 60}, "batch_size=60 curvature_batch_size=10"),  # no cell's
        ({"batch_size": 60, "evaluate_every": 3}, "batch_size=60 curvature_batch_size=10"),
        ({"batch_size": 60, "updates": 7}, "batch_size=60 curvature_batch_size=10"),
    ],
)
def test_what_counts_as_changed(changed: dict[str, Any], expected: str) -> None:
    assert difference(**changed) == expected


def test_shipped_is_refused_where_it_is_not() -> None:
    with pytest.raises(ValueError, match=r"^experiment=mlp: must be one of autoencoder, lstm, res"):
        shipped("mlp", "demo", "adam")


def test_figures_and_targets_are_the_configs() -> None:
    found = figures()
    assert list(found) == ["autoencoder", "lstm", "resnet"]
    assert [figure.number for figure in found.values()] == [1, 2, 3]
    assert all(isinstance(f, FigureConfig) and f.title and f.panels for f in found.values())
    for name, scale in itertools.product(found, SCALES):
        assert target(name, scale) == runs_of_experiment(name, scale).target
    assert target("autoencoder", "demo") == TargetConfig("test_loss", 5.0)
    assert target("autoencoder", "nowhere") == TargetConfig()


def runs_of_experiment(name: str, scale: str) -> Config:
    return next(r.config for r in runs_of(None, scale) if r.config.experiment == name)


def test_figures_come_in_the_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    for name, number in (("autoencoder", 7), ("resnet", 2)):  # the LSTM says nothing
        text = f"experiment: {name}\nfigure:\n  number: {number}\n  title: T\n"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr("bdhf.experiment.CONFIGS", tmp_path)
    expected = [("resnet", FigureConfig(2, "T")), ("autoencoder", FigureConfig(7, "T"))]
    assert list(figures().items()) == expected


# The validation split


def numbered(rows: int, test_rows: int = 5) -> Images:
    """Images and labels that are their own numbers; the test set's are negative."""
    train, test = torch.arange(rows), -1 - torch.arange(test_rows)
    return Images(
        (train.view(-1, 1, 1, 1) * 1.0, train), (test.view(-1, 1, 1, 1) * 1.0, test), "Here", "ab"
    )


def test_held_out_rows_are_the_same_each_time_and_no_others() -> None:
    torch.manual_seed(1)
    split = with_validation(numbered(1000), 300)
    torch.manual_seed(2)
    again = with_validation(numbered(1000), 300)
    for one, other in ((split.train, again.train), (split.test, again.test)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(one[0].flatten().long(), one[1])  # labels go with their images
    kept, held_out = split.train[1].tolist(), split.test[1].tolist()
    assert (len(kept), len(held_out)) == (700, 300)
    assert sorted(kept + held_out) == list(range(1000))  # disjoint, and none of the test set
    assert kept == sorted(kept) and 100 < np.mean([row < 500 for row in held_out]) * 300 < 200


def test_source_says_what_is_held_out() -> None:
    split = with_validation(numbered(10), 3)
    assert split.source == "Here, 3 of the training set held out as the test set"
    assert split.sha256 == "ab"  # of the same files


def test_loaded_data_are_split_where_that_is_asked() -> None:
    whole, split = load("digits", ""), load("digits", "", 400)
    assert (len(whole.train[0]), len(whole.test[0])) == (1437, 360)
    assert (len(split.train[0]), len(split.test[0])) == (1037, 400)
    assert "held out" in split.source and "held out" not in whole.source


def made(results: Path, *overrides: str, study: str | None = None) -> RunFolder:
    config = dataclasses.replace(adam(*overrides), results=str(results), study=study)
    ended = run(EXPERIMENTS["autoencoder"], config, shown=False)
    assert ended.status == "finished"
    return ended.folder


def test_run_on_a_validation_split_never_sees_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = "data.validation_rows=300"
    folder = made(tmp_path / "a", split)
    images = load("digits", "")
    poisoned = dataclasses.replace(images, test=(images.test[0] * torch.nan, images.test[1]))
    monkeypatch.setitem(bdhf.data.LOADERS, "digits", lambda folder: poisoned)
    rows, again = (read_metrics(f.path) for f in (folder, made(tmp_path / "b", split)))
    assert without_clocks(again) == without_clocks(rows)
    assert np.isfinite([row["test_loss"] for row in rows]).all()
    assert rows[-1]["epoch"] == pytest.approx(4 * 60 / 1137)
    assert np.isnan([row["test_loss"] for row in read_metrics(made(tmp_path / "b").path)]).all()
    assert "300 of the training set held out" in folder.provenance["data"]["source"]


def test_run_on_a_validation_split_is_another_run() -> None:
    paths = {
        RunFolder(config).path
        for config in (adam(), adam("data.validation_rows=300"), adam("data.validation_rows=301"))
    }
    assert len(paths) == 3


@pytest.mark.parametrize(
    ("rows", "batch_size", "message"),
    [
        (1437, 60, r"^data.validation_rows=1437: must be below 1437, the size of the digits train"),
        (2000, 60, r"^data.validation_rows=2000: must be below 1437"),
        (1378, 60, r"^batch_size=60: must be at most 59, the size of the digits training set wi"),
        (300, 1138, r"^batch_size=1138: must be at most 1137, .* without 300 held out$"),
        (None, 1438, r"^batch_size=1438: must be at most 1437, .* the digits training set$"),
    ],
)
def test_split_that_leaves_too_little_is_refused_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int | None,
    batch_size: int,
    message: str,
) -> None:
    monkeypatch.setattr("bdhf.runner.load", None)  # would fail if it were called
    data = dataclasses.replace(adam().data, validation_rows=rows)
    results = tmp_path / "r"
    config = dataclasses.replace(adam(), data=data, batch_size=batch_size, results=str(results))
    with pytest.raises(ConfigError, match=message):
        run(EXPERIMENTS["autoencoder"], config)
    assert not results.exists()


def test_the_largest_split_that_leaves_a_batch_is_taken() -> None:
    data = dataclasses.replace(adam().data, validation_rows=1377)
    check_against_data(dataclasses.replace(adam(), data=data))
    with pytest.raises(ConfigError, match=r"^data.validation_rows=0: must be 1 or more, or null$"):
        adam("data.validation_rows=0")


# In the table, and in no figure


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    made(path)
    made(path, "optimizer.lr=0.01")
    made(path, "data.validation_rows=300", study="tuning")
    collect(path, "demo")
    return path


WIDTHS = "network.widths=[64,12,6]"
LISTED = [
    ("", f"batch_size=60 {WIDTHS}"),
    ("", f"batch_size=60 {WIDTHS} optimizer.lr=0.01"),
    ("tuning", f"batch_size=60 data.validation_rows=300 {WIDTHS}"),
]


def test_table_and_cells_have_study_and_changes(results: Path) -> None:
    runs = read_table(results / "demo" / "runs.csv")
    assert sorted((row["study"], row["changed"]) for row in runs) == LISTED
    curves = read_curves(results, "demo")
    assert sorted((key.study, key.changed) for key in curves) == LISTED
    assert len({key.settings for key in curves}) == 3


def test_claims_are_judged_on_what_is_shipped_only(results: Path) -> None:
    """And these have another network."""
    evidence = read_evidence(results, "demo")
    assert not evidence.cells and len(evidence.others) == 3
    assert evidence.targets["autoencoder"] == TargetConfig("test_loss", 5.0)


def test_figures_leave_studies_out(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legends: dict[str, list[str]] = {}

    def noted(figure: Any, stem: Path) -> list[Path]:
        legends[stem.name] = [
            " ".join(text.get_text().split())  # it may be broken into lines
            for legend in figure.legends
            for text in legend.get_texts()
        ]
        bdhf.report.figures.pyplot.close(figure)
        return [stem]

    monkeypatch.setattr(bdhf.report.figures, "save", noted)
    draw_figures(results, "demo")
    changes = [changed.removeprefix("batch_size=60 ") for study, changed in LISTED if not study]
    expected = sorted(f"Adam, mini-batch 60 ({changed})" for changed in changes)
    assert sorted(legends["figure1_autoencoder"]) == expected
    assert sorted(legends["figure1_autoencoder_cost"]) == expected
    assert list(legends) == ["figure1_autoencoder", "figure1_autoencoder_cost", "stability"]
