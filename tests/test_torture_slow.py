"""Sweeps that are killed at random, on a disk that fills, in pairs: they end as if nothing was."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from suite import without_clocks

from bdhf.record import read_metrics
from bdhf.training import Row

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KILLS = 20

#: Twelve runs, with a checkpoint as often as may be; together a minute or two.
SWEEP = (
    *("autoencoder", "lstm", "scale=demo", "optimizer=adam,hf,bdhf", "seed=0,1"),
    *("hessian_free.cg_max_iter=6", "evaluate_every=5", "checkpoint_seconds=0.1", "threads=1"),
)
UPDATES = 100
FEW_UPDATES = 30
TWO_AT_ONCE = ("hydra/launcher=processes", "hydra.launcher.n_jobs=2")


def start(results: Path, *more: str, updates: int = FEW_UPDATES) -> subprocess.Popen[str]:
    """A sweep in a process group of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *SWEEP]
    return subprocess.Popen(
        [*command, f"updates={updates}", f"results={results}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Its output, once it and its workers are gone."""
    output, _ = process.communicate(timeout=600)
    return output


def metrics(results: Path) -> dict[str, list[Row]]:
    folders = sorted(path.parent for path in results.glob("runs/*/*/*/metrics.csv"))
    return {folder.name: without_clocks(read_metrics(folder)) for folder in folders}


def statuses(results: Path) -> list[str]:
    files = results.glob("runs/*/*/*/provenance.json")
    return [json.loads(file.read_text())["status"] for file in files]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """The metrics of a sweep that nothing interrupts, one run after the other."""
    results = tmp_path_factory.mktemp("whole")
    process = start(results, updates=UPDATES)
    output = finish(process)
    assert process.returncode == 0 and "12 runs: 12 finished" in output
    found = metrics(results)
    assert len(found) == 12 and all(len(rows) == UPDATES / 5 + 1 for rows in found.values())
    return found


@pytest.fixture(scope="module")
def expected_early(expected: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The same up to the smaller number of updates."""
    count = FEW_UPDATES // 5 + 1
    return {name: rows[:count] for name, rows in expected.items()}


def a_worker(process: subprocess.Popen[str]) -> int:
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "LokyProcess"], capture_output=True, text=True
    )
    return int(listed.stdout.split()[0])


def kill(process: subprocess.Popen[str], how: str) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have come to its end
        if how == "worker, SIGKILL":
            os.kill(a_worker(process), signal.SIGKILL)
        elif how == "sweep, SIGKILL":
            os.kill(process.pid, signal.SIGKILL)
        elif how == "sweep, SIGTERM":
            os.kill(process.pid, signal.SIGTERM)
        elif how == "all, SIGINT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGKILL)


WAYS = ("all, SIGKILL", "worker, SIGKILL", "sweep, SIGKILL", "sweep, SIGTERM", "all, SIGINT")


def test_random_kills(tmp_path: Path, expected: dict[str, list[Row]]) -> None:
    chance = random.Random(0)
    for number in range(KILLS):
        process = start(tmp_path, *TWO_AT_ONCE, updates=UPDATES)
        assert process.stdout is not None
        at_work = next((line for line in process.stdout if " update " in line), "")
        time.sleep(chance.uniform(0, 1))
        how = WAYS[number % len(WAYS)]
        kill(process, how)
        if how == "worker, SIGKILL":  # which the sweep survives, but here it is to be killed
            time.sleep(1)
            kill(process, "all, SIGKILL")
        output = finish(process)
        print(f"kill {number}: {how}; {sorted(statuses(tmp_path))}")
        assert "Traceback" not in output and "failed" not in output, output
        if not at_work:
            break
    assert number == KILLS - 1, "all was made before the last kill: a longer sweep is needed"
    damaged = cut_short_newest_checkpoint(with_two_checkpoints(tmp_path))
    process = start(tmp_path, *TWO_AT_ONCE, updates=UPDATES)
    output = finish(process)
    assert process.returncode == 0
    assert f"{damaged} cannot be read" in output and "the older checkpoint serves" in output
    assert metrics(tmp_path) == expected
    assert statuses(tmp_path) == ["finished"] * 12
    again = finish(start(tmp_path, updates=UPDATES))
    assert "12 runs: 12 finished\n" in again and " update " not in again
    names = {file.name for file in tmp_path.glob("runs/*/*/*/*")}
    assert names == {"config.yaml", "metrics.csv", "provenance.json", "checkpoint.pt"}


def test_sweep_survives_the_death_of_a_worker(
    tmp_path: Path, expected_early: dict[str, list[Row]]
) -> None:
    process = start(tmp_path, *TWO_AT_ONCE)
    assert process.stdout is not None
    assert any(" update 10/" in line for line in process.stdout)
    kill(process, "worker, SIGKILL")
    assert "12 runs: 12 finished" in finish(process)
    assert process.returncode == 0 and metrics(tmp_path) == expected_early


def test_idle_worker_ends_with_its_sweep(tmp_path: Path) -> None:
    """It waits for its next run, and nothing else tells it that there will be none."""
    process = start(tmp_path, "optimizer=hf", "seed=0", *TWO_AT_ONCE, updates=UPDATES)
    assert process.stdout is not None
    assert any(": finished, " in line for line in process.stdout)
    kill(process, "sweep, SIGKILL")
    process.communicate(timeout=30)  # until the last that could write has gone
    assert sorted(statuses(tmp_path)) == ["finished", "stopped"]


def test_repeated_at_once_after_the_death_of_the_sweep(
    tmp_path: Path, expected_early: dict[str, list[Row]]
) -> None:
    """Its workers are still there, and stop after their update; their runs are taken over."""
    process = start(tmp_path, *TWO_AT_ONCE)
    assert process.stdout is not None
    assert any(" update 10/" in line for line in process.stdout)
    kill(process, "sweep, SIGKILL")
    again = start(tmp_path)
    assert "12 runs: 12 finished" in finish(again)
    assert again.returncode == 0 and metrics(tmp_path) == expected_early
    finish(process)


def with_two_checkpoints(results: Path) -> list[Path]:
    """Unfinished runs that have an older checkpoint too; the sweep goes on until there are some.

    A run that was killed soon after it was taken up has one only.
    """

    def found() -> list[Path]:
        return [path.parent for path in results.glob("runs/*/*/*/checkpoint.older.pt")]

    while not found():
        process = start(results, *TWO_AT_ONCE, updates=UPDATES)
        while not found() and process.poll() is None:
            time.sleep(0.01)
        kill(process, "all, SIGKILL")
        output = finish(process)
        assert "12 runs: 12 finished" not in output, "a longer sweep is needed"
    return found()


def cut_short_newest_checkpoint(folders: list[Path]) -> Path:
    newest = max((folder / "checkpoint.pt" for folder in folders), key=os.path.getmtime)
    os.truncate(newest, newest.stat().st_size // 2)
    return newest


def test_two_sweeps_at_once_make_each_run_once(
    tmp_path: Path, expected_early: dict[str, list[Row]]
) -> None:
    sweeps = [start(tmp_path), start(tmp_path, *TWO_AT_ONCE)]
    outputs = [finish(process) for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0]
    assert metrics(tmp_path) == expected_early
    for file in tmp_path.glob("runs/*/*/*/provenance.json"):
        assert len(json.loads(file.read_text())["sessions"]) == 1
    assert sum(output.count(": finished, 30 updates\n") for output in outputs) == 12


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_disk_that_fills(tmp_path: Path, expected_early: dict[str, list[Row]]) -> None:
    whole = sum(len(rows) for rows in expected_early.values())
    with small_disk(tmp_path, 600):
        process = start(tmp_path, *TWO_AT_ONCE)
        output = finish(process)
        assert process.returncode == 1 and "No space left on device" in output
        assert 0 < sum(len(rows) for rows in metrics(tmp_path).values()) < whole
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
        process = start(tmp_path, *TWO_AT_ONCE)
        assert "12 runs: 12 finished" in finish(process)
        assert process.returncode == 0
        assert metrics(tmp_path) == expected_early


def test_runs_as_jobs_of_a_cluster(tmp_path: Path, expected_early: dict[str, list[Row]]) -> None:
    """The launcher for Slurm, by its local executor."""
    pytest.importorskip("submitit", reason="pip install '.[slurm]' brings it")
    process = start(tmp_path, "seed=0", "optimizer=hf", "hydra/launcher=submitit_local")
    output = finish(process)
    assert process.returncode == 0, output
    found = metrics(tmp_path)
    assert len(found) == 2 and found == {name: expected_early[name] for name in found}
