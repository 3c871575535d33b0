"""What an update takes and what its systems need, measured on saved states."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import EXPERIMENTS, tiny
from torch import Tensor

from bdhf.cg import conjugate_gradient
from bdhf.config import Config
from bdhf.data import Images, load
from bdhf.first_order import FirstOrder
from bdhf.measure import MeasureError, cg_solves, find_state, update_times
from bdhf.optimizer import BlockDiagonalHF
from bdhf.record import read_table, write_table
from bdhf.runner import run, set_up
from bdhf.training import Training, batch_indices

AUTOENCODER = EXPERIMENTS["autoencoder"]

#: Few enough parameters for the dense matrix, and enough damping for counts that do not hang on
#: rounding.
SMALL = ("network.widths=[64,5,3]", "evaluation_rows=100")
DAMPED = "hessian_free.damping=1"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF and block-diagonal HF, finished; the sizes are those that ``scripts/measure.py`` finds."""
    path = tmp_path_factory.mktemp("results")
    for optimizer in ("hf", "bdhf"):
        run(AUTOENCODER, configs(path)[optimizer], shown=False)
    return path


@pytest.fixture(scope="module")
def images() -> Images:
    return load("digits", "")


def configs(results: Path, *overrides: str) -> dict[str, Config]:
    return {
        name: replace(composed(name, *overrides), results=str(results), threads=1)
        for name in ("adam", "hf", "bdhf")
    }


@functools.cache
def composed(name: str, *overrides: str) -> Config:
    sizes: tuple[str, ...] = ("batch_size=100",)
    if name != "adam":
        sizes = ("batch_size=720", "curvature_batch_size=180", "optimizer.cg_max_iter=30")
    every = ("updates=2", "evaluate_every=2", *SMALL, DAMPED, *overrides)
    return tiny("autoencoder", name, *sizes, *every)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each update of a measurement was given, and the weights before and after."""
    seen: list[dict[str, Any]] = []

    def watch(kind: Any) -> None:
        original = kind.step

        def step(
            self: Any, model: Any, criterion: Any, batch: Any, curvature_batch: Any, **rest: Any
        ) -> Any:
            call = {"kind": kind, "model": model, "batch": batch, "few": curvature_batch}
            call["before"] = flat(model)
            result = original(self, model, criterion, batch, curvature_batch, **rest)
            call["after"], call["report"] = flat(model), self.last_step
            seen.append(call)
            return result

        monkeypatch.setattr(kind, "step", step)

    watch(FirstOrder)
    watch(BlockDiagonalHF)
    return seen


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def flat_state(weights: dict[str, Tensor] | None) -> Tensor:
    assert weights is not None
    return torch.cat([value.reshape(-1) for value in weights.values()])


def test_all_optimizers_take_turns_on_the_same_weights_and_mini_batches(
    results: Path, images: Images, updates: list[dict[str, Any]]
) -> None:
    state = find_state(configs(results), "hf")
    assert state.update == 2 and state.run.startswith("hf-b720-c180-seed0-")
    rows = list(update_times(AUTOENCODER, configs(results), images, rounds=3))
    assert [row["optimizer"] for row in rows] == [
        *("hf", "bdhf", "adam"),
        *("bdhf", "adam", "hf"),
        *("adam", "hf", "bdhf"),
    ]
    assert [row["round"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    train = images.train[0].flatten(1)
    assert len(updates) == 12  # with a first round that no row tells of
    for k, call in enumerate(updates):
        assert torch.equal(call["before"], flat_state(state.weights))
        assert not torch.equal(call["after"], call["before"])  # an update it is
        assert torch.equal(flat(call["model"]), call["before"])  # and nothing is left of it
        expected = train[batch_indices(2 + k // 3, 720, len(train), seed=0)]
        assert torch.equal(call["batch"][0], expected)
        assert torch.equal(call["few"][0], expected[:180])
    for row, call in zip(rows, updates[3:], strict=True):
        assert (row["optimizer"] == "adam") == (call["kind"] is FirstOrder)
        iterations = [str(block.iterations) for block in call["report"].blocks]
        assert row["cg_iterations"] == "+".join(iterations)
        assert len(iterations) == {"adam": 0, "hf": 1, "bdhf": 2}[row["optimizer"]]
        assert row["seconds"] > 0 and row["threads"] == 1 and row["device"] == "cpu"
        assert row["run"] == state.run and row["update"] == 2 and row["batch_size"] == 720
        assert row["curvature_batch_size"] == (None if row["optimizer"] == "adam" else 180)


def test_an_update_starts_from_the_last_ones_solution(
    results: Path, images: Images, updates: list[dict[str, Any]]
) -> None:
    """A warm start costs a product; the round that is not counted has none."""
    list(update_times(AUTOENCODER, configs(results), images, rounds=2))
    solved = [call["report"].blocks for call in updates if call["kind"] is BlockDiagonalHF]
    extra = [[block.products - block.iterations for block in blocks] for blocks in solved]
    # A last product may be that of a step which is not taken: none here.
    assert sorted(extra[:2]) == [[0], [0, 0]]
    assert all(set(each) == {1} for each in extra[2:])


def test_clock_is_that_of_the_update_alone(
    results: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of putting weights back: the only thing that takes time here."""
    now = [0.0]
    original = torch.nn.Module.load_state_dict

    def slow(self: Any, *arguments: Any, **keywords: Any) -> Any:
        now[0] += 100
        return original(self, *arguments, **keywords)

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        now[0] += 1
        return take(self, *arguments, **keywords)

    take = FirstOrder.step
    monkeypatch.setattr(FirstOrder, "step", step)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", slow)
    monkeypatch.setattr("bdhf.training.time.perf_counter", lambda: now[0])
    rows = list(update_times(AUTOENCODER, configs(results), images, rounds=1))
    assert [(row["optimizer"], row["seconds"]) for row in rows] == [
        ("hf", 0),
        ("bdhf", 0),
        ("adam", 1),
    ]


@pytest.mark.parametrize("state", ["initial", "hf"])
def test_iterations_are_those_of_the_dense_matrices(
    results: Path, images: Images, updates: list[dict[str, Any]], state: Any
) -> None:
    rows = list(cg_solves(AUTOENCODER, configs(results), images, state))
    assert [row["solver"] for row in rows] == ["whole", "block 0", "block 1"]
    first, second = updates
    for call in (first, second):
        assert torch.equal(call["before"], call["after"])
        assert torch.equal(flat(call["model"]), call["before"])
    assert torch.equal(first["before"], second["before"])
    if state == "initial":
        fresh = set_up(AUTOENCODER, configs(results)["bdhf"], images)
        assert torch.equal(first["before"], flat(fresh.problem.model))
    else:
        saved = find_state(configs(results), state)
        assert torch.equal(first["before"], flat_state(saved.weights))
    gradient, matrix = dense(first, images, update=0 if state == "initial" else 2)
    encoder = sum(p.numel() for p in first["model"].encoder.parameters())
    parts = (slice(None), slice(0, encoder), slice(encoder, None))
    for row, part in zip(rows, parts, strict=True):
        block = matrix[part, part]
        exact = conjugate_gradient(
            block.mv,
            -gradient[part],
            tol=5e-4,
            max_iter=10_000,
            damping=1,
        )
        assert row["reason"] == exact.reason == "relative progress"
        assert abs(row["iterations"] - exact.iterations) <= 1
        assert row["damping"] == 1 and row["tol"] == 5e-4 and row["curvature_batch_size"] == 180
    assert len({row["iterations"] for row in rows}) > 1  # or the parts could be mixed up
    # Of 180 samples, in gradients of one; what lies behind a block is part of its product.
    whole, encoder_work, decoder_work = (row["products_work"] for row in rows)
    assert 90 < decoder_work < encoder_work < whole < encoder_work + decoder_work
    assert 180 < whole < 2 * 180


def dense(call: dict[str, Any], images: Images, update: int) -> tuple[Tensor, Tensor]:
    """Gradient and Gauss-Newton matrix in double precision, from definitions."""
    model = call["model"].double()
    train = images.train[0].flatten(1).double()
    batch = train[batch_indices(update, 720, len(train), seed=0)]
    parameters = list(model.parameters())
    loss = AUTOENCODER.criterion(model(batch), batch)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (batch[:180],)).flatten()

    parts = torch.func.jacfwd(outputs)({k: p.detach() for k, p in model.named_parameters()})
    jacobian = torch.cat([part.flatten(1) for part in parts.values()], 1)
    # The loss is a squared error, mean over images: its Hessian is 2 / 180 times the identity.
    return gradient, jacobian.T @ jacobian * 2 / 180


def test_the_cap_is_said(results: Path, images: Images) -> None:
    rows = list(cg_solves(AUTOENCODER, configs(results), images, "hf", cap=7))
    assert [row["reason"] for row in rows] == 3 * ["iteration cap"]
    assert [row["iterations"] for row in rows] == [7, 7, 7]


def test_what_has_not_finished_is_no_state(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "r")
    own = configs(tmp_path / "r")
    with pytest.raises(MeasureError, match=r"seed7-\w+: there is no such run"):
        find_state(configs(tmp_path / "r", "seed=7"), "hf")
    with pytest.raises(MeasureError, match=r"bdhf-b720-c180-seed0-\w+: finished, 2 of 3 updates"):
        find_state({**own, "bdhf": replace(own["bdhf"], updates=3)}, "bdhf")
    (checkpoint,) = (tmp_path / "r").glob("runs/*/*/bdhf-*/checkpoint.pt")
    checkpoint.write_bytes(b"")
    with pytest.raises(MeasureError, match=r"checkpoint.pt cannot be read"):
        find_state(own, "bdhf")
    checkpoint.unlink()
    with pytest.raises(MeasureError, match=r"bdhf-b720-c180-seed0-\w+: its checkpoint.pt is gone"):
        find_state(own, "bdhf")
    provenance = checkpoint.parent / "provenance.json"
    provenance.write_text(
        provenance.read_text()
        .replace('"status": "finished"', '"status": "diverged"')
        .replace('"reason": "2 updates"', '"reason": "training loss nan"')
    )
    with pytest.raises(MeasureError, match=r": diverged, training loss nan"):
        find_state(own, "bdhf")


# The script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    import measure

    def called(results: Path, *arguments: str, seeds: str = "0") -> None:
        settings = ("updates=2", "evaluate_every=2", *SMALL, DAMPED, f"seed={seeds}")
        given = ["measure.py", "demo", "--results", str(results), "--rounds", "1"]
        given += ["--experiments", "autoencoder", *arguments]
        if "--overrides" not in arguments:
            given += ["--overrides", *settings]
        monkeypatch.setattr(sys, "argv", given)
        measure.main()

    called.module = measure  # type: ignore[attr-defined]
    yield called
    sys.modules.pop("measure")


def tables(results: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    folder = results / "demo"
    return read_table(folder / "update_times.csv"), read_table(folder / "cg_solves.csv")


def test_script_measures_what_is_there_and_says_what_is_not(
    results: Path, tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results, tmp_path / "a,b [c]")  # a path that Hydra's grammar does not take
    here = tmp_path / "a,b [c]"
    script(here, seeds="0,1")
    times, solves = tables(here)
    assert [row["seed"] for row in times] == 3 * ["0"]
    assert [(row["state"], row["solver"]) for row in solves] == [
        (state, solver)
        for state in ("initial", "hf", "bdhf")
        for solver in ("whole", "block 0", "block 1")
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[0].startswith("autoencoder seed 0, state hf: an update takes adam ")
    assert said[3].startswith("autoencoder seed 0, state bdhf: CG takes whole ")
    assert said[4] == (
        "left out: autoencoder seed 1: neither HF nor block-diagonal HF has finished"
    )
    before = tables(here)
    script(here)
    assert tables(here) == before
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in said] == [
        "update_times.csv already",
        *(3 * ["cg_solves.csv already"]),
    ]
    script(here, "--again")
    again = tables(here)
    assert again[0] != before[0] and again[1] == before[1]  # other seconds, the same counts


def test_rows_of_others_stay_and_those_of_the_same_seed_are_replaced(
    results: Path, tmp_path: Path, script: Any
) -> None:
    # What is there of seed 0 was measured on a run with other settings.
    others = [("lstm", 2), ("autoencoder", 10), ("autoencoder", 0)]
    old = [{"experiment": e, "seed": seed, "run": "old", "kept": "x"} for e, seed in others]
    (tmp_path / "demo").mkdir()
    write_table(tmp_path / "demo" / "update_times.csv", old)
    by_state = [{**row, "state": state} for state in ("bdhf", "hf") for row in old]
    write_table(tmp_path / "demo" / "cg_solves.csv", by_state)
    row = {"experiment": "autoencoder", "seed": 0, "run": find_state(configs(results), "hf").run}
    part = script.module.Part("autoencoder", 0, configs(results), again=False)
    for name, key in (("update_times", ()), ("cg_solves", ("state",))):
        path = tmp_path / "demo" / f"{name}.csv"
        table = script.module.Table(path, ("experiment", "seed", *key))
        more = {"state": "hf"} if key else {}
        part.into(table, "hf", lambda *_, new={**row, **more}: [new, new], str)
    times, solves = tables(tmp_path)
    assert [(row["experiment"], row["seed"], row["kept"]) for row in times] == [
        *(2 * [("autoencoder", "0", "")]),
        ("autoencoder", "10", "x"),
        ("lstm", "2", "x"),
    ]
    assert [(row["experiment"], row["seed"], row["state"], row["kept"]) for row in solves] == [
        *(2 * [("autoencoder", "0", "hf", "")]),
        ("autoencoder", "0", "bdhf", "x"),
        ("autoencoder", "10", "hf", "x"),
        ("autoencoder", "10", "bdhf", "x"),
        ("lstm", "2", "hf", "x"),
        ("lstm", "2", "bdhf", "x"),
    ]


@pytest.mark.parametrize(
    ("missing", "timed", "solved", "lines"),
    [("bdhf", 3, {"initial", "hf"}, 1), ("hf", 0, {"initial", "bdhf"}, 2)],
)
def test_a_missing_state_leaves_the_others(
    results: Path,
    tmp_path: Path,
    script: Any,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    timed: int,
    solved: set[str],
    lines: int,
) -> None:
    """Times need where HF ended, and no run of block-diagonal HF."""
    shutil.copytree(results, tmp_path / "r")
    (folder,) = (tmp_path / "r").glob(f"runs/demo/autoencoder/{missing}-*")
    shutil.rmtree(folder)
    script(tmp_path / "r")
    times, solves = tables(tmp_path / "r")
    assert len(times) == timed and {row["state"] for row in solves} == solved
    said = capsys.readouterr().out
    assert said.count(f"left out: autoencoder seed 0, state {missing}: ") == lines
    assert said.count("there is no such run") == lines


def test_without_damping_no_systems_are_solved(
    tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    undamped = "hessian_free.damping=0"
    run(AUTOENCODER, configs(tmp_path, undamped)["hf"], shown=False)
    script(tmp_path, "--overrides", "updates=2", "evaluate_every=2", *SMALL, undamped)
    assert len(read_table(tmp_path / "demo" / "update_times.csv")) == 3
    assert not (tmp_path / "demo" / "cg_solves.csv").exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "an update takes " in said[0]
    assert said[1] == (
        "left out: autoencoder seed 0, CG solves: without damping its curvature mini-batch has a "
        "singular G"
    )


def test_validation_rows_are_held_out_as_in_the_run(tmp_path: Path, script: Any) -> None:
    given = []

    def function(experiment: Any, configs: Any, images: Images) -> list[Any]:
        given.append(images)
        return []

    held_out = configs(tmp_path, "data.validation_rows=100")
    table = script.module.Table(tmp_path / "t.csv", ("experiment", "seed", "state"))
    part = script.module.Part("autoencoder", 0, held_out, again=False)
    part.into(table, "initial", function, str)
    (images,) = given
    expected = load("digits", "", 100)
    assert len(expected.test[0]) == 100
    assert torch.equal(images.train[0], expected.train[0])
    assert torch.equal(images.test[0], expected.test[0])


def test_an_interrupt_loses_nothing_that_was_measured(
    results: Path,
    tmp_path: Path,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(results, tmp_path / "r")
    original = Training.update
    calls = []

    def interrupted(self: Training) -> None:
        calls.append(self)
        if len(calls) > 6 + 2:  # the times, and the solves of one state
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Training, "update", interrupted)
    with pytest.raises(SystemExit) as ended:
        script(tmp_path / "r")
    assert ended.value.code == 130
    assert "Repeat the command to go on." in capsys.readouterr().out
    times, solves = tables(tmp_path / "r")
    assert len(times) == 3 and {row["state"] for row in solves} == {"initial"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            r"error: no finished run .* \(cell 0\) of autoencoder under .*/runs/demo; "
            r"python scripts/reproduce.py autoencoder scale=demo results=\S+ makes them",
        ),
        (("--overrides", "updates=0"), r"error: updates=0: must be 1 or more"),
        (("--overrides", "optimizer.typo=1"), r"error: .*typo"),
        (("--overrides", "updates="), r"error: .*updates="),
    ],
)
def test_errors(tmp_path: Path, script: Any, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        script(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("option", "value"), [("--rounds", "0"), ("--threads", "0"), ("--cap", "0")]
)
def test_numbers_below_one_are_refused(
    tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        script(tmp_path, option, value)
    assert f"{option}={value}: must be 1 or more" in capsys.readouterr().err
