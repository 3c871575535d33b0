"""The loop: batches, evaluation, divergence, and runs that continue as if never stopped."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from suite import EXPERIMENTS, TINY_HF, tiny, without_clocks
from torch import nn

import bdhf.runner
from bdhf.data import DataError, load
from bdhf.first_order import FirstOrder
from bdhf.progress import ProgressDisplay
from bdhf.record import RunFolder, read_metrics
from bdhf.runner import run
from bdhf.steps import StepReport
from bdhf.stopping import Stopping
from bdhf.training import (
    Outcome,
    Problem,
    Progress,
    Row,
    Sizes,
    Training,
    batch_indices,
    evaluate,
    stream_seed,
)
from bdhf.work import Work, count_work

ROOT = Path(__file__).resolve().parent.parent


def make(
    tmp_path: Path, *overrides: str, experiment: str = "autoencoder", optimizer: str = "bdhf"
) -> RunFolder:
    values = tiny(experiment, optimizer, *overrides)
    values.results = str(tmp_path)
    return run(EXPERIMENTS[experiment], values).folder


def metrics(folder: RunFolder) -> list[Row]:
    return without_clocks(read_metrics(folder.path))


# Mini-batches


def test_every_epoch_reads_every_row_once() -> None:
    seen = torch.cat([batch_indices(u, 30, rows=100, seed=0) for u in range(10)])
    for epoch in range(3):
        assert sorted(seen[100 * epoch : 100 * (epoch + 1)].tolist()) == list(range(100))
    assert seen[:100].tolist() != seen[100:200].tolist() != list(range(100))


def test_order_is_the_same_for_all_batch_sizes_and_another_at_another_seed() -> None:
    small = torch.cat([batch_indices(u, 10, rows=100, seed=3) for u in range(20)])
    large = torch.cat([batch_indices(u, 50, rows=100, seed=3) for u in range(4)])
    assert torch.equal(small, large)
    other = torch.cat([batch_indices(u, 10, rows=100, seed=4) for u in range(20)])
    assert not torch.equal(small, other)


def test_random_streams_differ_by_name_and_seed() -> None:
    names = ("initialisation", "training", "order of epoch 0")
    seeds = [stream_seed(name, seed) for name in names for seed in range(3)]
    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


# Evaluation and divergence


def linear_problem(rows: int = 50, accuracy: Any = None) -> Problem:
    torch.manual_seed(0)
    data = torch.randn(rows, 3), torch.randint(2, (rows,))
    return Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), data, data, accuracy)


def test_evaluation_in_pieces_is_evaluation_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear_problem(accuracy=lambda o, t: o.argmax(1) == t)
    loss, accuracy = evaluate(problem, problem.model, problem.train, rows=7)
    outputs = problem.model(problem.train[0])
    expected = nn.functional.cross_entropy(outputs, problem.train[1])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    hits = (outputs.argmax(1) == problem.train[1]).float().mean().item()
    assert accuracy == pytest.approx(hits)


def test_evaluation_leaves_mode_gradients_and_statistics_alone() -> None:
    problem = linear_problem()
    model = nn.Sequential(nn.BatchNorm1d(3), problem.model)
    problem = Problem(model, problem.criterion, problem.train, problem.test)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(problem, model, problem.train, rows=7)
    assert model.training and model[1].weight.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def train(problem: Problem, lr: float, updates: int = 20) -> tuple[Any, list[Row]]:
    optimizer = FirstOrder(torch.optim.SGD(problem.model.parameters(), lr=lr))
    rows: list[Row] = []
    training = Training(
        problem, optimizer, Sizes(10, None, updates, 5, 1000), seed=0, work=Work(0.0, [])
    )
    return training.run(rows.append), rows


def test_loop_evaluates_at_the_start_on_the_grid_and_at_the_end() -> None:
    outcome, rows = train(linear_problem(), lr=0.1, updates=12)
    assert outcome.status == "finished" and outcome.reason == "12 updates"
    assert [row["update"] for row in rows] == [0, 5, 10, 12]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 2.4]
    assert [row["gradient_equivalents"] for row in rows] == [0, 1, 2, 2.4]
    losses = [row["train_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]


@pytest.mark.parametrize(("lr", "reason"), [(3.0, "times the initial"), (1e38, "loss nan")])
def test_divergence_ends_the_run_as_a_result(lr: float, reason: str) -> None:
    problem = linear_problem()
    squared = Problem(
        problem.model, lambda o, t: (o - t[:, None]).square().mean(), problem.train, problem.test
    )
    squared.criterion.reduction = "mean"  # type: ignore[attr-defined]
    outcome, rows = train(squared, lr)
    assert outcome.status == "diverged" and reason in outcome.reason
    assert rows[-1]["update"] == 5


# Work


def test_work_is_counted_in_gradients() -> None:
    """By hand: a layer of n inputs and m outputs has n·m multiply-adds a row and pass."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    first, second = 8 * 6, 6 * 4
    gradient = 3 * (first + second) - first  # no gradient for the inputs
    batch = torch.randn(2, 8), torch.randn(2, 4)
    blocks = [list(model[0].parameters()), list(model[2].parameters())]
    before = [p.clone() for p in model.parameters()]
    work = count_work(model, nn.MSELoss(), batch, blocks)
    assert work.linearization == pytest.approx((first + second) / gradient)
    assert work.products[0] == pytest.approx((2 * first + 2 * second) / gradient)
    assert work.products[1] == pytest.approx(2 * second / gradient)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_gradient_equivalents_of_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    work = json.loads((folder.path / "provenance.json").read_text())["work"]
    rows = read_metrics(folder.path)
    # 4 updates: 60 rows of gradient, 20 rows of curvature, 5 CG iterations for each block and,
    # from the second update on, one product for the warm start.
    products = sum(work["products"]) * (4 * 5 + 3)
    expected = (4 * 60 + 20 * (4 * work["linearization"] + products)) / 1437
    assert rows[-1]["gradient_equivalents"] == pytest.approx(expected, rel=1e-12)


# Runs


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("optimizer", ["adam", "hf", "bdhf"])
def test_same_seed_twice_gives_the_same_metrics_bit_for_bit(
    tmp_path: Path, experiment: str, optimizer: str
) -> None:
    kind = {"experiment": experiment, "optimizer": optimizer}
    one, other = (metrics(make(tmp_path / name, **kind)) for name in "ab")
    assert one == other and [row["update"] for row in one] == [0, 2, 4]
    another = metrics(make(tmp_path / "c", "seed=1", **kind))
    assert another != one


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_optimizers_start_from_the_same_weights(tmp_path: Path, experiment: str) -> None:
    names = ("adam", "hf", "bdhf")
    starts = [metrics(make(tmp_path, experiment=experiment, optimizer=n))[0] for n in names]
    assert len({(row["train_loss"], row["test_loss"]) for row in starts}) == 1


def test_micro_batch_gives_the_same_curve_to_rounding(tmp_path: Path) -> None:
    whole = metrics(make(tmp_path / "whole"))
    cut = metrics(make(tmp_path / "cut", "micro_batch=7"))
    for one, other in zip(whole, cut, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing may catch it."""


@pytest.mark.parametrize(
    ("experiment", "optimizer"),
    [("autoencoder", "adam"), ("autoencoder", "bdhf"), ("lstm", "hf"), ("resnet", "bdhf")],
)
@pytest.mark.parametrize("kill_at", [1, 2, 3, 5])
def test_killed_run_continues_to_the_same_metrics(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    optimizer: str,
    kill_at: int,
) -> None:
    """Killed right after an update, with the last checkpoint one to three updates old."""
    sizes = ("updates=6", "checkpoint_seconds=0")
    kind = {"experiment": experiment, "optimizer": optimizer}
    expected = metrics(make(tmp_path / "whole", *sizes, **kind))
    saves = 0
    save = RunFolder.save_checkpoint

    def every_other(folder: RunFolder, checkpoint: dict[str, Any]) -> None:
        nonlocal saves
        saves += 1
        if saves % 2:
            save(folder, checkpoint)

    updates = 0
    original = Training.update

    def killed(training: Training) -> None:
        nonlocal updates
        original(training)
        updates += 1
        if updates == kill_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", every_other)
        patch.setattr(Training, "update", killed)
        with pytest.raises(Killed):
            make(tmp_path / "cut", *sizes, **kind)
    folder = make(tmp_path / "cut", *sizes, **kind)
    assert folder.status == "finished"
    assert metrics(folder) == expected


def test_killed_between_the_last_checkpoint_and_the_end_off_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("updates=5", "checkpoint_seconds=0")
    expected = metrics(make(tmp_path / "whole", *sizes))
    with monkeypatch.context() as patch:
        patch.setattr(bdhf.runner, "_close", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "cut", *sizes)
    assert metrics(make(tmp_path / "cut", *sizes)) == expected


def test_run_is_not_continued_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, "updates=2")
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    images = load("digits", "")
    other = dataclasses.replace(images, source="another copy", sha256="0" * 64)
    monkeypatch.setattr(bdhf.runner, "load", lambda name, root, rows: other)
    with pytest.raises(DataError, match=r"was begun on other data \(scikit-learn.*than data\.root"):
        make(tmp_path, "updates=4")
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_finished_run_is_skipped(tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in folder.path.iterdir()}
    again = run(EXPERIMENTS["autoencoder"], tiny("autoencoder", "bdhf", f"results={tmp_path}"))
    assert str(again).endswith("finished, already, with 4 updates") and again.exit_code == 0
    assert {p.name: p.stat().st_mtime_ns for p in folder.path.iterdir()} == before


def test_larger_budget_continues_the_folder(tmp_path: Path) -> None:
    expected = metrics(make(tmp_path / "whole", "updates=7"))
    make(tmp_path / "grown", "updates=3")  # evaluated off the grid, at 3
    folder = make(tmp_path / "grown", "updates=7")
    assert metrics(folder) == expected
    provenance = json.loads((folder.path / "provenance.json").read_text())
    assert len(provenance["sessions"]) == 2 and provenance["updates"] == 7


def test_smaller_budget_than_what_is_done_ends_with_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = iter([None, None, None, Outcome("stopped", "enough")])
    original = Training.run

    def stopped(training: Training, on_row, on_update, stop) -> Outcome:
        return original(training, on_row, on_update, lambda: next(stops))

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", stopped)
        assert make(tmp_path, "updates=9").status == "stopped"
    folder = make(tmp_path, "updates=1")
    provenance = json.loads((folder.path / "provenance.json").read_text())
    assert (provenance["reason"], provenance["updates"]) == ("3 updates", 3)
    assert [row["update"] for row in metrics(folder)] == [0, 2, 3]
    assert metrics(make(tmp_path, "updates=6")) == metrics(make(tmp_path / "whole", "updates=6"))


def test_divergence_survives_a_kill_before_it_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "end", lambda *arguments, **facts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path, "optimizer.lr=1e6", optimizer="adam")
    folder = make(tmp_path, "optimizer.lr=1e6", optimizer="adam")
    assert folder.status == "diverged"
    assert metrics(folder) == metrics(make(tmp_path / "w", "optimizer.lr=1e6", optimizer="adam"))


def test_sessions_keep_their_own_circumstances(tmp_path: Path) -> None:
    make(tmp_path, "updates=2")
    torch.set_num_threads(2)
    try:
        folder = make(tmp_path, "updates=4")
    finally:
        torch.set_num_threads(1)
    sessions = json.loads((folder.path / "provenance.json").read_text())["sessions"]
    assert [session["threads"] for session in sessions] == [1, 2]


def test_folder_of_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    relative = folder.path.relative_to(tmp_path)
    assert relative.parts[:3] == ("runs", "demo", "autoencoder")
    assert relative.name.startswith("bdhf-b60-c20-seed0-") and len(relative.name) == 19 + 8
    names = {p.name for p in folder.path.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "provenance.json", "checkpoint.pt"}
    provenance = json.loads((folder.path / "provenance.json").read_text())
    assert provenance["status"] == "finished" and provenance["reason"] == "4 updates"
    assert provenance["data"]["sha256"] and provenance["full_train_loss"] > 0
    (session,) = provenance["sessions"]
    assert session["torch"] == torch.__version__ and session["device"] == "cpu"
    assert session["threads"] == torch.get_num_threads() and session["peak_memory_mib"] > 1
    assert session["start"] <= session["end"]
    with (folder.path / "metrics.csv").open() as file:
        header = next(csv.reader(file))
    assert header == [
        "update",
        "epoch",
        "seconds",
        "gradient_equivalents",
        "train_loss",
        "test_loss",
        "test_accuracy",
        "gradient_norm",
        "learning_rate",
        "cg_iterations_0",
        "cg_iterations_1",
    ]


def test_failed_run_says_why_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path)
    (path,) = (tmp_path / "runs" / "demo" / "autoencoder").iterdir()
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["status"] == "failed"
    assert provenance["reason"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in (path / "error.log").read_text()
    assert make(tmp_path).status == "finished"
    assert not (path / "error.log").exists()


def test_diverged_run_is_a_result_and_is_not_repeated(tmp_path: Path) -> None:
    folder = make(tmp_path, "optimizer.lr=1e6", optimizer="adam")
    assert folder.status == "diverged"
    rows = read_metrics(folder.path)
    assert make(tmp_path, "optimizer.lr=1e6", optimizer="adam").status == "diverged"
    assert read_metrics(folder.path) == rows


def test_time_limit_stops_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    expected = metrics(make(tmp_path / "whole"))
    values = tiny("autoencoder", "bdhf", f"results={tmp_path}/cut", "time_limit=50")
    late = Stopping(values.time_limit, started=time.time() - 100)
    ended = run(EXPERIMENTS["autoencoder"], values, late)
    assert (ended.status, ended.exit_code) == ("stopped", 0)
    assert ended.reason == "time_limit=50 seconds; continues from update 0"
    assert metrics(make(tmp_path / "cut")) == expected


def test_checkpoints_hold_nothing_but_data(tmp_path: Path) -> None:
    folder = make(tmp_path)
    checkpoint = torch.load(folder.path / "checkpoint.pt", weights_only=True)
    assert Progress(**checkpoint["progress"]).update == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_signal_stops_after_the_update_and_the_command_continues(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments" / "autoencoder.py"),
        *TINY_HF,
        f"results={tmp_path}",
        "threads=1",
    ]
    with subprocess.Popen(
        [*command, "updates=100000"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "update 4/" in line:
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(60) == 128 + number
    assert f"stopped, signal {number.name}" in rest
    (path,) = (tmp_path / "runs" / "demo" / "autoencoder").iterdir()
    reached = torch.load(path / "checkpoint.pt", weights_only=True)["progress"]["update"]
    done = subprocess.run(
        [*command, f"updates={reached + 3}"], capture_output=True, text=True, check=True
    )
    assert f"finished, {reached + 3} updates" in done.stdout
    updates = [row["update"] for row in read_metrics(path)]
    assert updates == sorted(set(updates)) and updates[-1] == reached + 3


# What the loop hands on


class Recorder:
    """An optimizer that takes no step and keeps what it was called with."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"lr": 0.5, "params": list(model.parameters())}]
        self.last_step = StepReport([], torch.tensor(2.5), "gradient")
        self.calls: list[dict[str, Any]] = []

    def step(self, model, criterion, batch, curvature_batch=None, *, micro_batch=None):
        self.calls.append(
            {
                "batch": batch,
                "curvature_batch": curvature_batch,
                "micro_batch": micro_batch,
                "training": model.training,
            }
        )
        return torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def recorded(seed: int = 0, **sizes: Any) -> tuple[Training, Recorder]:
    problem = linear_problem()
    recorder = Recorder(problem.model)
    values = {"batch_size": 20, "curvature_batch_size": 8, "updates": 4, "evaluate_every": 2}
    sizes = {**values, "evaluation_rows": 10, **sizes}
    training = Training(problem, recorder, Sizes(**sizes), seed, Work(0.0, []))
    return training, recorder


def test_curvature_batch_is_the_first_rows_of_the_shuffled_batch() -> None:
    training, recorder = recorded()
    training.run(lambda row: None)
    for update, call in enumerate(recorder.calls):
        rows = batch_indices(update, 20, 50, seed=0)
        for k, tensor in enumerate(training.problem.train):
            assert torch.equal(call["batch"][k], tensor[rows])
            assert torch.equal(call["curvature_batch"][k], tensor[rows[:8]])


def test_seed_changes_the_order_and_without_curvature_rows_there_is_no_such_batch() -> None:
    (one, first), (other, second) = recorded(0), recorded(1, curvature_batch_size=None)
    for training in (one, other):
        training.run(lambda row: None)
    assert not torch.equal(first.calls[0]["batch"][0], second.calls[0]["batch"][0])
    assert second.calls[0]["curvature_batch"] is None


def test_micro_batch_and_training_mode_reach_the_optimizer() -> None:
    training, recorder = recorded(micro_batch=7)
    training.problem.model.eval()
    training.run(lambda row: None)
    assert all(call["micro_batch"] == 7 and call["training"] for call in recorder.calls)


def test_evaluation_subset_is_random_and_the_same_for_all_seeds() -> None:
    (one, _), (other, _) = recorded(0), recorded(1)
    inputs, targets = one._subset(one.problem.train)
    assert torch.equal(inputs, other._subset(other.problem.train)[0])
    matches = (inputs[:, None] == one.problem.train[0][None]).all(2)
    rows = matches.float().argmax(1)
    assert matches.any(1).all() and len(rows.unique()) == 10
    assert len(rows.diff().unique()) > 3  # no stride
    assert torch.equal(targets, one.problem.train[1][rows])


def test_row_reports_the_last_update() -> None:
    training, _ = recorded()
    rows: list[Row] = []
    training.run(rows.append)
    assert rows[-1]["gradient_norm"] == 2.5 and rows[-1]["learning_rate"] == 0.5


def test_seconds_leave_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = evaluate

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr("bdhf.training.evaluate", slow)
    training, _ = recorded()
    training.run(lambda row: None)
    assert 0 < training.progress.seconds < 0.1  # six evaluations would take 0.6


def test_divergence_is_above_ten_times_the_initial_loss() -> None:
    training, _ = recorded()
    training.progress.initial_loss = 2.0
    for loss, diverged in ((19.9, False), (20.1, True), (float("inf"), True)):
        assert bool(training._divergence({"update": 3, "train_loss": loss})) is diverged


def test_hf_is_one_block_and_block_diagonal_hf_the_experiments() -> None:
    sizes = {}
    for experiment, parts in EXPERIMENTS.items():
        for optimizer in ("hf", "bdhf", "adam"):
            values = tiny(experiment, optimizer)
            model = parts.network(values.network)
            blocks, stepper = values.optimizer.make(model, parts.blocks)
            sizes[experiment, optimizer] = len(blocks)
            held = [p for group in stepper.param_groups for p in group["params"]]
            assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert [sizes[e, "hf"] for e in EXPERIMENTS] == [1, 1, 1]
    assert [sizes[e, "bdhf"] for e in EXPERIMENTS] == [2, 2, 2]  # the small LSTM has two layers
    assert [sizes[e, "adam"] for e in EXPERIMENTS] == [0, 0, 0]


def test_seed_changes_the_initial_weights(tmp_path: Path) -> None:
    starts = [metrics(make(tmp_path, f"seed={seed}"))[0]["train_loss"] for seed in (0, 1)]
    assert starts[0] != starts[1]


def test_checkpoint_restores_the_random_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dropout layer would draw next."""
    draws = {}
    original = Training.update

    def drawing(training: Training) -> None:
        original(training)
        draws.setdefault(training.progress.update, []).append(torch.rand(()).item())

    monkeypatch.setattr(Training, "update", drawing)
    make(tmp_path / "whole", "updates=4")
    make(tmp_path / "cut", "updates=2")
    make(tmp_path / "cut", "updates=4")
    assert set(draws) == {1, 2, 3, 4}
    assert all(len(values) == 2 and len(set(values)) == 1 for values in draws.values())


def test_threads_are_set_and_the_full_training_loss_is_that_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    folder = make(tmp_path, "threads=2", "evaluation_rows=30")
    assert threads == [2]
    provenance = json.loads((folder.path / "provenance.json").read_text())
    whole = make(tmp_path, "evaluation_rows=1437")
    expected = read_metrics(whole.path)[-1]
    assert provenance["full_train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert provenance["full_test_loss"] == pytest.approx(expected["test_loss"], rel=1e-6)
    few = read_metrics(folder.path)[-1]
    assert few["train_loss"] != expected["train_loss"]
    assert few["test_loss"] != expected["test_loss"]


def test_failed_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (
        lambda: folder.save_checkpoint({"x": 1}),
        lambda: folder.append({"update": 9}),
        lambda: folder.end("finished", "", 9),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_progress_is_live_on_a_terminal_and_plain_elsewhere() -> None:
    row: Row = {
        "update": 3,
        "train_loss": 1.25,
        "test_loss": 1.5,
        "test_accuracy": 0.5,
        "cg_iterations_0": 7,
        "cg_iterations_1": 9,
    }
    text = {}
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=200, highlight=False)
        with ProgressDisplay("title", 10, 2, console=console) as display:
            display.update(3)
            display.row(row)
        text[terminal] = file.getvalue()
    metrics_text = "train 1.25  test 1.5  accuracy 50.0 %  CG 7+9"
    assert text[False] == f"title  update 3/10  {metrics_text}  [0 s]\n"
    assert "3/10" in text[True] and metrics_text in text[True] and "\x1b[" in text[True]
