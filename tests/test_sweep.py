"""Sweeps: which runs they make, what they survive, and what they say of it."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from rich.console import Console
from suite import EXPERIMENTS, TINY, TINY_HF, tiny, without_clocks

import bdhf.sweep.grid
import bdhf.sweep.launching
from bdhf.archive import ArchiveError, bring_in
from bdhf.experiment import CONFIGS
from bdhf.optimizer import BlockDiagonalHF
from bdhf.record import RunFolder, read_metrics, read_table
from bdhf.report.table import collect, mixtures
from bdhf.runner import run
from bdhf.sweep import plan, sweep
from bdhf.sweep.display import disk_in_words, failure_table, live_view, plan_table
from bdhf.sweep.estimate import Estimate, duration
from bdhf.sweep.grid import Grid, expand
from bdhf.sweep.launching import Orders, launch
from bdhf.sweep.state import State, in_words, look
from bdhf.training import Training

#: A sweep of a second or two: HF and block-diagonal HF on the digits.
SMALL = ("experiment=autoencoder", *TINY_HF, "optimizer=hf,bdhf")


def grid_of(*arguments: str) -> Grid:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return expand(arguments)


def states_of(*arguments: str) -> list[State]:
    return [look(run) for run in grid_of(*arguments).runs]


def all_metrics(results: Path) -> dict[str, list[Any]]:
    folders = sorted(path.parent for path in results.glob("runs/*/*/*/metrics.csv"))
    return {folder.name: without_clocks(read_metrics(folder)) for folder in folders}


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


# The grid


@pytest.mark.parametrize(("scale", "runs"), [("demo", 9), ("laptop", 54), ("paper", 9 * 13)])
def test_grid_of_a_scale_is_every_cell_and_seed_once(scale: str, runs: int) -> None:
    """Paper: five seeds, three for the ResNet."""
    grid = grid_of(f"scale={scale}")
    assert len(grid.runs) == runs == len({run.folder().path for run in grid.runs})
    seeds = [run.config.seed for run in grid.runs]
    assert seeds == sorted(seeds)  # a whole figure of one seed before the next
    for single in (grid.runs[0], grid.runs[-1]):
        (again,) = grid_of(*single.overrides).runs
        assert again.config == single.config and again.folder().path == single.folder().path


def test_grid_takes_hydras_grammar() -> None:
    grid = grid_of("experiment=lstm", "optimizer=glob(*hf)", "seed=range(2)", "cell=choice(0,1)")
    assert len(grid.runs) == 2 * 2 * 2 and not grid.refused
    given = grid_of("experiment=lstm", "optimizer=bdhf", "seed=7", "hydra/launcher=processes")
    assert given.hydra == ["hydra/launcher=processes"]
    assert [run.config.batch_size for run in given.runs] == [2000, 2000]
    assert {run.config.seed for run in given.runs} == {7}


def test_cells_that_become_the_same_run_are_made_once_with_the_larger_budget() -> None:
    sizes = ("batch_size=50", "evaluate_every=5")
    grid = grid_of("experiment=lstm", "optimizer=adam", *sizes, "seed=0")
    (single,) = grid.runs
    assert single.config.updates == 12_000  # the other cell has 3000


def test_what_cannot_run_is_refused_once_with_its_number() -> None:
    grid = grid_of("experiment=autoencoder", *TINY, "seed=0,-1,-2", "optimizer=adam,hf")
    assert [run.config.seed for run in grid.runs] == [0]
    assert grid.refused["seed=-1: must be 0 or more"] == 2
    (message,) = [m for m in grid.refused if m.startswith("curvature_batch_size=180: must be")]
    assert grid.refused[message] == 1 and len(grid.refused) == 3


def test_seeds_share_one_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing is what takes time where all is finished."""
    calls = []
    original = bdhf.sweep.grid.compose

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **keywords)

    monkeypatch.setattr("bdhf.sweep.grid.compose", counted)
    assert len(grid_of("experiment=autoencoder", "scale=demo", "seed=range(200)").runs) == 600
    assert len(calls) == 1 + 3


# A sweep


def test_sweep_makes_what_is_left_and_only_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = f"results={tmp_path}"
    assert sweep([*SMALL, results, "seed=0"], "the command") == 0
    out = capsys.readouterr().out
    assert out.startswith("2 runs: 2 left\n") and out.endswith("2 runs: 2 finished\n")
    (line,) = [line for line in out.splitlines() if " bdhf b60 c20 seed 0  finished " in line]
    (row,) = [rows[-1] for name, rows in all_metrics(tmp_path).items() if name.startswith("bdhf")]
    assert f"{row['train_loss']:.4g}" in line and f"{row['test_loss']:.4g}" in line
    before = all_metrics(tmp_path)
    launched = []
    original = bdhf.sweep.launching._launch_once

    def counting(grid: Grid, runs: Any, *others: Any) -> str | None:
        launched.append(len(runs))
        return original(grid, runs, *others)

    monkeypatch.setattr(bdhf.sweep.launching, "_launch_once", counting)
    assert sweep([*SMALL, results, "seed=0"], "") == 0
    assert launched == []  # finished runs never reach a launcher
    assert sweep([*SMALL, results, "seed=0,1"], "another command") == 0
    assert launched == [2]
    after = all_metrics(tmp_path)
    assert len(after) == 4 and {name: after[name] for name in before} == before
    for path in tmp_path.glob("runs/*/*/*/provenance.json"):
        (session,) = json.loads(path.read_text())["sessions"]
        assert session["command"] == ("the command" if "seed0" in str(path) else "another command")


def test_failed_run_stops_no_other_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, f"results={tmp_path}"]
    original = BlockDiagonalHF.step

    def failing(self: BlockDiagonalHF, *arguments: Any, **keywords: Any) -> Any:
        if len(self.param_groups) == 1:
            raise ArithmeticError("no such luck\nand more")
        return original(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(BlockDiagonalHF, "step", failing)
        assert sweep(arguments, "") == 1
    out = capsys.readouterr().out
    (log,) = tmp_path.glob("runs/*/*/hf-*/error.log")
    assert "2 runs: 1 finished, 1 failed" in out
    (line,) = [line for line in out.splitlines() if "no such luck" in line]
    assert line.startswith(" autoencoder hf b60 c20 seed 0  ArithmeticError: no such luck")
    assert str(log)[:40] in line and "Traceback" in log.read_text()
    assert sweep(arguments, "") == 0
    assert capsys.readouterr().out.endswith("2 runs: 2 finished\n")


def test_diverged_run_is_listed_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=autoencoder", *TINY, "optimizer=adam", f"results={tmp_path}"]
    assert sweep([*arguments, "optimizer.lr=1e6,0.001"], "") == 0
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 diverged" in out
    assert "diverged: autoencoder adam b60 seed 0 optimizer.lr=1000000.0: training loss" in out
    assert sweep([*arguments, "optimizer.lr=1e6,0.001"], "") == 0  # and it is not repeated
    assert "\n2 runs: 1 finished, 1 diverged\n" in capsys.readouterr().out


def test_time_limit_is_the_whole_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "whole"
    assert sweep([*SMALL, f"results={expected}"], "") == 0
    capsys.readouterr()
    updates = 0
    original = Training.update

    def late(training: Training) -> None:
        nonlocal updates
        original(training)
        updates += 1
        if updates == 6:  # in the second of two runs of four updates
            monkeypatch.setattr("bdhf.stopping.time.time", lambda: 1e12)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", late)
        assert sweep([*SMALL, f"results={tmp_path}/cut", "time_limit=540"], "") == 0
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert "stopped, time_limit=540 seconds\n" in out and "\n2 runs: 1 finished, 1 left\n" in out
    assert "left: autoencoder bdhf b60 c20 seed 0, stopped at update 2 of 4\nRepeat the c" in out
    assert sweep([*SMALL, f"results={tmp_path}/cut"], "") == 0
    assert all_metrics(tmp_path / "cut") == all_metrics(expected)


def test_bad_arguments_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--config-dir", "x"], "--config-dir: a sweep takes key=value and --multirun only"),
        (["experiment=vae"], "Could not find 'experiment/vae'"),
        (["hydra/launcher=none"], "Could not find 'hydra/launcher/none'"),
        (["hydra/launcher=processes", "hydra.launcher.n_jobs=0"], "n_jobs=0: must be 1 or more"),
        (["experiment=lstm", "seed=x"], "seed=x: "),
        (["experiment=lstm", "results=/proc/nope"], "/proc/nope"),
        (["optimizer.lr=interval(0,1)"], "a sweep takes lists, choices and ranges only"),
        (["seed=1,"], "seed=1,"),
    ):
        assert sweep(arguments, "") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and "Traceback" not in error


# Processes that meet, and processes that die


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_that_meet_at_a_run(tmp_path: Path) -> None:
    """One works, the other goes on; the lock of a process that was killed is none."""
    values = tiny("autoencoder", "bdhf", f"results={tmp_path}")
    folder = RunFolder(values)
    folder._lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(folder._lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert folder.held()
        ended = run(EXPERIMENTS["autoencoder"], values)
        assert (ended.status, ended.exit_code) == ("elsewhere", 0)
        assert not folder.path.exists()
        with folder.held_alone() as free:
            assert not free
        (state,) = states_of(*SMALL[:-1], "optimizer=bdhf", f"results={tmp_path}")
        assert state.standing == "running"
        holder.kill()
    assert not folder.held()
    assert run(EXPERIMENTS["autoencoder"], values).status == "finished"


def test_looking_whether_a_run_is_held_keeps_nobody_out(tmp_path: Path) -> None:
    """Nor do two who look see each other."""
    folder = RunFolder(tiny("autoencoder", "bdhf", f"results={tmp_path}"))
    with folder.held_alone() as free:
        assert free and folder.held()
    with folder._lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as one who looks
        assert not folder.held()
        threading.Timer(0.1, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with folder.held_alone() as free:
            assert free


def test_run_of_another_process_is_waited_for_and_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose sweep was killed, say: it stops after its update, and the run is free."""
    folder = RunFolder(tiny("autoencoder", "bdhf", f"results={tmp_path}"))
    folder._lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(folder._lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"

        def killed_at_the_first_pause() -> None:
            holder.kill()
            holder.wait()

        monkeypatch.setattr("bdhf.sweep.launching._pause", killed_at_the_first_pause)
        assert sweep([*SMALL, f"results={tmp_path}"], "") == 0
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert "waiting for 1 runs that another process is at work on\n" in out
    assert out.endswith("2 runs: 2 finished\n")


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


ORDERS = """
import os, signal
from pathlib import Path
from bdhf.sweep.launching import Orders
def orders(jobs, process):
    return Orders("", 0.0, None, Path({folder!r}) / "stop", process, False, {{}}, jobs)
"""


def test_signal_to_one_process_stops_all_but_jobs_of_a_cluster(tmp_path: Path) -> None:
    """The cluster's SIGTERM is submitit's; before time is over a job stops, and is queued again."""
    head = ORDERS.format(folder=str(tmp_path))
    local = in_child(
        head + "with orders(False, os.getpid()).stopping() as stopping:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print(stopping().reason)"
    )
    assert local.stdout == "signal SIGTERM\n", local.stderr
    assert (tmp_path / "stop").read_text() == "15"
    (tmp_path / "stop").unlink()
    job = in_child(
        head + "for n in (signal.SIGTERM, signal.SIGUSR2):\n"
        "    signal.signal(n, lambda number, frame: print('submitit', number.__int__()))\n"
        "with orders(True, 1).stopping() as stopping:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print(stopping())\n"
        "    os.kill(os.getpid(), signal.SIGUSR2)\n    print(stopping().reason)\n"
        "stopping.pass_on()"
    )
    assert job.stdout == "submitit 15\nNone\nsignal SIGUSR2\nsubmitit 12\n", job.stderr
    assert not (tmp_path / "stop").exists()


def test_worker_whose_sweep_is_gone_stops(tmp_path: Path) -> None:
    """Also where it was gone before the worker came to its first run."""
    child = in_child(
        ORDERS.format(folder=str(tmp_path)) + "print(orders(False, 999999).stopping()().reason)"
    )
    assert child.stdout == "the sweep's process is gone\n", child.stderr


def test_closed_pipe_does_not_end_the_work(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "reproduce.py"
    arguments = ["autoencoder", *TINY_HF, "optimizer=hf,bdhf", f"results={tmp_path}"]
    command = [sys.executable, str(script), *arguments, "seed=0,1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert len(all_metrics(tmp_path)) == 4
    assert {json.loads(p.read_text())["status"] for p in tmp_path.rglob("provenance.json")} == {
        "finished"
    }


def orders(tmp_path: Path) -> Orders:
    return Orders("", 0.0, None, tmp_path / "stop", os.getpid(), False, {})


class Deaths:
    """A launcher some of whose runs kill their process; it takes the whole pool of two along."""

    def __init__(self, deadly: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.deadly = deadly  # how often, by optimizer
        self.launched: list[list[str]] = []
        monkeypatch.setattr(bdhf.sweep.launching, "_launch_once", self)

    def __call__(self, grid: Grid, runs: Any, task: Any, failed: Any) -> str | None:
        names = [single.config.optimizer.name for single in runs]
        self.launched.append(names)
        for k, single in enumerate(runs):
            name = single.config.optimizer.name
            if self.deadly.get(name, 0):
                self.deadly[name] -= 1
                for victim in runs[k : k + 2]:
                    self.begin(victim.folder())
                return "TerminatedWorkerError: {SIGKILL(-9)}"
            run(EXPERIMENTS["autoencoder"], single.config, shown=False)
        return None

    @staticmethod
    def begin(folder: RunFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        provenance = {"status": "running", "sessions": [{"device": "cpu"}]}
        (folder.path / "provenance.json").write_text(json.dumps(provenance))


DEADLY = ("experiment=autoencoder", *TINY_HF[:-2], "optimizer=adam,hf,bdhf", "cell=0")


def deadly_grid(tmp_path: Path) -> Grid:
    cells = ["batch_size=60", "updates=2", f"results={tmp_path}"]
    small = ["scale=demo", "network.widths=[64,12,6]", "evaluate_every=2", "evaluation_rows=60"]
    return grid_of("experiment=autoencoder", *small, *cells, "curvature_batch_size=20,null")


def test_accident_is_survived_by_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = deadly_grid(tmp_path)
    launcher = Deaths({"hf": 1}, monkeypatch)
    stopping = orders(tmp_path).stopping()
    assert launch(grid, orders(tmp_path), stopping) == {}
    assert launcher.launched == [["adam", "hf", "bdhf"], ["hf", "bdhf"]]
    assert in_words(look(single) for single in grid.runs) == "3 runs: 3 finished"


def test_run_whose_process_always_dies_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = deadly_grid(tmp_path)
    launcher = Deaths({"hf": 99}, monkeypatch)
    failed = launch(grid, orders(tmp_path), orders(tmp_path).stopping())
    assert launcher.launched == [["adam", "hf", "bdhf"], ["hf", "bdhf"], ["hf"], ["bdhf"]]
    (path,) = failed
    assert path.name.startswith("hf-") and failed[path].endswith("{SIGKILL(-9)}")
    states = [look(single) for single in grid.runs]
    assert in_words(states) == "3 runs: 2 finished, 1 left"
    table = failure_table(states, failed)
    assert table is not None and "autoencoder hf b60 c20 seed 0" in shown(table)


def test_launcher_that_cannot_launch_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bdhf.sweep.launching, "_launch_once", lambda *arguments: "no srun")
    failed = launch(deadly_grid(tmp_path), orders(tmp_path), orders(tmp_path).stopping())
    assert len(failed) == 3 and all("no srun" in reason for reason in failed.values())


def test_stop_file_stops_before_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("15")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        grid = expand([*SMALL, f"results={tmp_path}"])
        told = orders(tmp_path)
        assert launch(grid, told, told.stopping()) == {}
    outcome = told.stopping()()
    assert outcome is not None and (outcome.reason, outcome.exit_code) == ("signal SIGTERM", 143)
    assert in_words(look(single) for single in grid.runs) == "2 runs: 2 left"


# Memory, disk, damage


def test_out_of_gpu_memory_goes_on_in_smaller_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny("autoencoder", "bdhf", f"results={tmp_path}/whole", "checkpoint_seconds=0")
    expected = read_metrics(run(EXPERIMENTS["autoencoder"], values).folder.path)
    original = BlockDiagonalHF.step
    tried: list[int | None] = []

    seen: list[weakref.ref[BlockDiagonalHF]] = []

    def small_card(self: BlockDiagonalHF, *arguments: Any, **keywords: Any) -> Any:
        if not any(known() is self for known in seen):
            gc.collect()
            assert not any(known() for known in seen)  # what filled the card is gone
            seen.append(weakref.ref(self))
        tried.append(keywords["micro_batch"])
        if len(tried) > 2 and (tried[-1] or 60) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(BlockDiagonalHF, "step", small_card)
    values.results = str(tmp_path / "small")
    ended = run(EXPERIMENTS["autoencoder"], values)
    assert ended.status == "finished" and tried[:5] == [None, None, None, 30, 15]
    assert "goes on from its last checkpoint with micro_batch=15" in capsys.readouterr().out
    rows = read_metrics(ended.folder.path)
    assert [row["update"] for row in rows] == [row["update"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert ended.folder.provenance["micro_batch"] == 15 and len(seen) == 3


def test_out_of_memory_for_good_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny_card(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockDiagonalHF, "step", tiny_card)
    values = tiny("autoencoder", "bdhf", f"results={tmp_path}")
    with pytest.raises(torch.OutOfMemoryError):
        run(EXPERIMENTS["autoencoder"], values)
    assert RunFolder(values).reason == "OutOfMemoryError: CUDA out of memory"


class Killed(BaseException):
    """Stands for a SIGKILL."""


def killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> RunFolder:
    """A run of six updates killed after some, with checkpoints of the last and the one before."""
    values = tiny("autoencoder", "bdhf", "updates=6", "checkpoint_seconds=0", f"results={tmp_path}")
    original = Training.update

    def killed(training: Training) -> None:
        if training.progress.update == after:
            raise Killed
        original(training)

    with monkeypatch.context() as patch:
        patch.setattr("bdhf.runner._CHECKPOINT_SHARE", float("inf"))
        patch.setattr(Training, "update", killed)
        with pytest.raises(Killed):
            run(EXPERIMENTS["autoencoder"], values, shown=False)
    return RunFolder(values)


def test_older_checkpoint_serves_where_the_newer_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny("autoencoder", "bdhf", "updates=6", f"results={tmp_path}/whole")
    expected = without_clocks(read_metrics(run(EXPERIMENTS["autoencoder"], values).folder.path))
    folder = killed_run(tmp_path / "cut", monkeypatch)
    newer, older = (folder.path / f"checkpoint{part}.pt" for part in ("", ".older"))
    reached = [torch.load(p, weights_only=True)["progress"]["update"] for p in (newer, older)]
    assert reached == [3, 2]
    whole = newer.read_bytes()
    newer.write_bytes(newer.read_bytes()[: newer.stat().st_size // 2])
    (folder.path / ".writing-checkpoint.pt-left").write_bytes(b"half")
    values.results = str(tmp_path / "cut")
    RunFolder(values).load_checkpoint()
    assert not newer.exists()  # or the next checkpoint would be put in the good one's place
    newer.write_bytes(whole[:1000])
    ended = run(EXPERIMENTS["autoencoder"], values)
    assert f"{newer} cannot be read" in (out := capsys.readouterr().out)
    assert "the older checkpoint serves, of update 2" in out
    assert without_clocks(read_metrics(ended.folder.path)) == expected
    names = {path.name for path in folder.path.iterdir()}  # nothing is left behind
    assert names == {"config.yaml", "metrics.csv", "provenance.json", "checkpoint.pt"}


def test_killed_between_the_two_names_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny("autoencoder", "bdhf", "updates=6", f"results={tmp_path}/whole")
    expected = without_clocks(read_metrics(run(EXPERIMENTS["autoencoder"], values).folder.path))
    folder = killed_run(tmp_path / "cut", monkeypatch)
    (folder.path / "checkpoint.pt").unlink()
    values.results = str(tmp_path / "cut")
    assert (
        without_clocks(read_metrics(run(EXPERIMENTS["autoencoder"], values).folder.path))
        == expected
    )


def test_two_damaged_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_run(tmp_path, monkeypatch)
    for path in folder.path.glob("*.pt"):
        path.write_bytes(b"PK")
    values = tiny("autoencoder", "bdhf", "updates=6", f"results={tmp_path}")
    with pytest.raises(RuntimeError, match=r"checkpoint.pt cannot be read .*older.*delete"):
        run(EXPERIMENTS["autoencoder"], values)


def test_metrics_end_with_the_run_after_a_smaller_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five updates, then killed on the way to eight, then five again: the row of five is there."""
    values = tiny("autoencoder", "bdhf", "updates=5", f"results={tmp_path}")
    expected = without_clocks(read_metrics(run(EXPERIMENTS["autoencoder"], values).folder.path))
    assert [row["update"] for row in expected] == [0, 2, 4, 5]
    original = Training.update

    def killed(training: Training) -> None:
        if training.progress.update == 7:
            raise Killed
        original(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", killed)
        with pytest.raises(Killed):
            run(EXPERIMENTS["autoencoder"], dataclasses.replace(values, updates=8))
    assert [row["update"] for row in read_metrics(RunFolder(values).path)] == [0, 2, 4, 6]
    ended = run(EXPERIMENTS["autoencoder"], values)
    assert without_clocks(read_metrics(ended.folder.path)) == expected


def test_metrics_that_are_gone_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed_run(tmp_path, monkeypatch)
    (folder.path / "metrics.csv").unlink()
    values = tiny("autoencoder", "bdhf", "updates=6", f"results={tmp_path}")
    with pytest.raises(RuntimeError, match=r"metrics.csv is gone or empty.*delete the checkpoint"):
        run(EXPERIMENTS["autoencoder"], values)


def test_damaged_provenance_fails_its_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep([*SMALL, f"results={tmp_path}"], "") == 0
    (path,) = tmp_path.glob("runs/*/*/hf-*/provenance.json")
    path.write_text("")
    before = all_metrics(tmp_path)
    _, left_out = collect(tmp_path, "demo")
    assert len(left_out) == 1 and left_out[0].endswith(": failed")
    assert plan([*SMALL, f"results={tmp_path}"]) == 0
    assert "2 runs: 1 finished, 1 failed" in capsys.readouterr().out
    assert sweep([*SMALL, f"results={tmp_path}"], "") == 0  # from its checkpoint
    assert all_metrics(tmp_path) == before


def test_full_disk_fails_the_run_and_room_lets_it_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep([*SMALL, f"results={tmp_path}/whole"], "") == 0
    writes = 0
    original = os.fsync

    def full(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes > 9:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert sweep([*SMALL, f"results={tmp_path}/full"], "") == 1
    assert "No space left on device" in capsys.readouterr().out
    assert sweep([*SMALL, f"results={tmp_path}/full"], "") == 0
    assert all_metrics(tmp_path / "full") == all_metrics(tmp_path / "whole")


def test_checkpoints_take_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save takes one second of a clock on which an update takes ten: every fifth, then."""
    clock = [0.0]
    monkeypatch.setattr("bdhf.runner.time.monotonic", lambda: clock[0])
    saved: list[float] = []
    save, update = RunFolder.save_checkpoint, Training.update

    def slow_save(folder: RunFolder, checkpoint: dict[str, Any]) -> None:
        save(folder, checkpoint)
        clock[0] += 1
        saved.append(clock[0])

    def slow_update(training: Training) -> None:
        update(training)
        clock[0] += 10

    monkeypatch.setattr(RunFolder, "save_checkpoint", slow_save)
    monkeypatch.setattr(Training, "update", slow_update)
    sizes = ("updates=30", "checkpoint_seconds=5", f"results={tmp_path}")
    run(EXPERIMENTS["autoencoder"], tiny("autoencoder", "adam", *sizes))
    *pauses, _ = [after - before for before, after in itertools.pairwise(saved)]
    assert len(pauses) >= 3 and set(pauses) == {51.0}


# What is shown


def test_plan_counts_and_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, f"results={tmp_path}", "seed=0,1", "updates=8"]
    assert sweep([*arguments[:-2], "optimizer=hf", "seed=0", "updates=8"], "") == 0
    capsys.readouterr()
    assert plan(arguments) == 0
    out = capsys.readouterr().out
    hf, bdhf_ = [line for line in out.splitlines() if line.startswith(" autoencoder")]
    assert hf.split()[:9] == ["autoencoder", "hf", "b60", "c20", "8", "1", "finished,", "1", "left"]
    assert bdhf_.split()[:7] == ["autoencoder", "bdhf", "b60", "c20", "8", "2", "left"]
    assert max(map(len, out.splitlines())) <= 80
    assert "4 runs: 1 finished, 3 left\n" in out
    assert "on this machine" in out and "free\n" in out
    assert not list(tmp_path.glob("runs/*/*/bdhf-*"))  # a plan makes nothing


def test_estimate_is_what_the_same_cell_took(tmp_path: Path) -> None:
    arguments = [*SMALL[:-1], "optimizer=bdhf", f"results={tmp_path}"]
    assert sweep([*arguments, "seed=0"], "") == 0
    (folder,) = tmp_path.glob("runs/*/*/bdhf-*")
    file = folder / "provenance.json"
    provenance = json.loads(file.read_text())
    start, end = "2026-01-01T00:00:00+00:00", "2026-01-01T00:02:00+00:00"
    provenance["sessions"][0] |= {"start": start, "end": end}
    file.write_text(json.dumps(provenance))
    states = states_of(*arguments, "seed=0,1,2")
    estimate = Estimate(states, jobs=1, trials=False)
    assert [estimate.seconds(state) for state in states] == [0.0, 120.0, 120.0]
    assert estimate.total() == 240.0 and estimate.words() == "about 4 min"
    assert Estimate(states, jobs=2).total() == 120.0
    assert Estimate(states, jobs=9).total() == 120.0  # no faster than the longest
    provenance["sessions"][0]["device"] = "another"
    file.write_text(json.dumps(provenance))
    other = Estimate(states_of(*arguments, "seed=0,1,2"), jobs=1, trials=False)
    assert other.total() == 0.0 and other.words().startswith("at least")


def test_trial_estimates_work_and_disk(tmp_path: Path) -> None:
    small, large = (
        states_of(*SMALL[:-1], "optimizer=bdhf", f"updates={n}", f"results={tmp_path}")
        for n in (10, 1000)
    )
    few, many = Estimate(small), Estimate(large)
    assert 0 < few.total() < many.total()
    (state,) = small
    now, later = few.disk()
    ended = run(EXPERIMENTS["autoencoder"], dataclasses.replace(state.run.config, updates=1))
    checkpoint = (ended.folder.path / "checkpoint.pt").stat().st_size
    assert now == 0 and later > 3 * checkpoint * 0.3  # so small a network's is mostly its frame
    assert "free" in disk_in_words(few, tmp_path) and "NOT" not in disk_in_words(few, tmp_path)


def test_live_view_shows_the_runs_at_work(tmp_path: Path) -> None:
    arguments = [*SMALL, f"results={tmp_path}"]
    assert sweep(arguments, "") == 0
    folder = RunFolder(tiny("autoencoder", "bdhf", f"results={tmp_path}"))
    file = folder.path / "provenance.json"
    file.write_text(file.read_text().replace('"finished"', '"running"'))
    with folder.held_alone():
        text = shown(live_view(states_of(*arguments), jobs=2))
    assert "2 runs: 1 finished, 1 running" in text and "left, 2 at once" in text
    (line,) = [line for line in text.splitlines() if "autoencoder" in line]
    assert "bdhf b60 c20 seed 0" in line and "4/4" in line and "train" in line
    assert "hf" in shown(plan_table(states_of(*arguments), Estimate(states_of(*arguments))))


def test_durations_are_in_fitting_units() -> None:
    seconds = (0.4, 80, 600, 3 * 3600, 40 * 86400)
    assert list(map(duration, seconds)) == ["0 s", "80 s", "10 min", "3.0 h", "40 days"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is to be said")
def test_paper_scale_without_a_gpu_says_how_long_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=autoencoder", "scale=paper", "seed=0", f"results={tmp_path}"]
    assert sweep([*arguments, "time_limit=0.001"], "") == 0
    out = capsys.readouterr().out
    assert (
        "On this machine's CPU it takes about" in out
        and "SCALE=laptop" in out
        and "Going on" in out
    )


# From other machines


def archive(results: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(results / "runs", "somewhere/runs")
    return path


def test_archive_of_another_machine_is_collected_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    assert sweep([*SMALL, f"results={there}", "seed=0"], "") == 0
    killed_run(there, monkeypatch, after=5)  # continues the finished run, and stops on its way
    lines = bring_in(archive(there, tmp_path / "a.tar.gz"), here)
    assert [line.partition(": ")[2] for line in lines] == [
        "brought in, 4 updates",
        "brought in, 4 updates",
    ]
    assert collect(here, "demo")[0] == 1
    assert sweep([*SMALL, f"results={here}", "seed=0", "updates=6"], "") == 0
    assert sweep([*SMALL, f"results={there}", "seed=0", "updates=6"], "") == 0
    assert all_metrics(here) == all_metrics(there)
    assert all(line.endswith("the one here went as far") for line in bring_in(there, here))
    assert collect(here, "demo")[0] == 2 and collect(here, "demo")[0] == 0
    assert not [line for line in mixtures(here, "demo") if "different" in line]


def test_run_that_went_further_replaces_the_one_here(tmp_path: Path) -> None:
    for name, updates in (("here", 4), ("there", 6)):
        assert sweep([*SMALL, f"results={tmp_path / name}", f"updates={updates}"], "") == 0
    for file in (tmp_path / "there").rglob("provenance.json"):  # further, if not finished
        file.write_text(file.read_text().replace('"finished"', '"stopped"'))
    lines = bring_in(tmp_path / "there", tmp_path / "here")
    assert all(line.endswith("brought in, 6 updates") for line in lines)
    assert all_metrics(tmp_path / "here") == all_metrics(tmp_path / "there")
    lines = bring_in(tmp_path / "here", tmp_path / "there")
    assert all(line.endswith("the one here went as far") for line in lines)


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with tarfile.open(tmp_path / "climbing.tar", "w") as tar:
        tar.add(tmp_path / "text", "../outside")
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    for name, message in (
        ("text", "cannot be read as a tar archive"),
        ("missing.tar", "cannot be read as a tar archive"),
        ("empty.tar", "no run in it; expected <scale>/<experiment>/<run>/provenance.json"),
        ("cut.tar.gz", "cannot be read as a tar archive"),
        ("climbing.tar", "cannot be read as a tar archive"),
    ):
        with pytest.raises(ArchiveError, match=rf"{name}: {message}"):
            bring_in(tmp_path / name, tmp_path / "r" / "results")
    assert not list(tmp_path.rglob("outside"))


def test_foreign_folders_are_left_out(tmp_path: Path) -> None:
    assert sweep([*SMALL, f"results={tmp_path}/there"], "") == 0
    (tmp_path / "there/runs/demo/autoencoder").rename(tmp_path / "there/runs/demo/lstm")
    lines = bring_in(tmp_path / "there", tmp_path / "here")
    assert all("left out, its config is of demo/autoencoder" in line for line in lines)
    assert not list((tmp_path / "here").rglob("metrics.csv"))


def test_figure_of_different_commits_or_data_is_warned_of(tmp_path: Path) -> None:
    assert sweep([*SMALL, f"results={tmp_path}"], "") == 0
    first, second = sorted(tmp_path.glob("runs/*/*/*/provenance.json"))
    for file, commit, dirty in ((first, "a" * 40, False), (second, "b" * 40, True)):
        provenance = json.loads(file.read_text())
        provenance["sessions"][0] |= {"git_commit": commit, "git_dirty": dirty}
        provenance["data"]["sha256"] = commit[::-1]
        file.write_text(json.dumps(provenance))
    collect(tmp_path, "demo")
    assert mixtures(tmp_path, "demo") == [
        "autoencoder: its runs are of different commits: aaaaaaaaaa, bbbbbbbbbb",
        "autoencoder: its runs are of different data: aaaaaaaaaa, bbbbbbbbbb",
        "autoencoder: 1 of 2 runs are of code with changes not committed",
    ]
    (row, _) = read_table(tmp_path / "demo" / "runs.csv")
    assert row["git_commit"] == "b" * 40 or row["git_commit"] == "a" * 40
