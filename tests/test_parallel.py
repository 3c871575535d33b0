"""Updates and runs that several processes make together, under torchrun with gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import CHECKS

from bdhf.distributed.placement import Team, balanced_blocks, balanced_teams
from bdhf.record import read_metrics, read_provenance
from bdhf.training import Row

ROOT = Path(__file__).resolve().parent.parent
LSTM = (
    *("experiments/lstm.py", "scale=demo", "network.units=4", "network.layers=2"),
    *("batch_size=60", "curvature_batch_size=21", "optimizer.cg_max_iter=5", "evaluate_every=2"),
)


def launch(processes: int, *command: str, standalone: bool = True) -> subprocess.Popen[str]:
    """``command`` by so many processes, in a process group of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--standalone"] if standalone else []
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, *command],
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def made(processes: int, *command: str, code: int = 0) -> str:
    """What the command says, once it has ended with this exit code."""
    process = launch(processes, *command)
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"it hangs:\n{output}") from None
    assert process.returncode == code, output
    return output


def by_ranks(processes: int, folder: Path) -> dict[str, list[str]]:
    file = folder / "results.json"
    made(processes, "tests/ranks.py", str(file))
    results: dict[str, list[str]] = json.loads(file.read_text())
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return by_ranks(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return by_ranks(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, two: dict[str, list[str]]) -> None:
    assert two[check] == [""] * 2


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(check: str, four: dict[str, list[str]]) -> None:
    assert four[check] == [""] * 4


@pytest.mark.parametrize(
    ("costs", "ranks", "teams"),
    [
        ([3.0], 2, [((0,), (0, 1))]),
        ([5.0, 1.0, 1.0, 2.0], 2, [((0,), (0,)), ((1, 2, 3), (1,))]),
        ([2.0, 1.0], 2, [((0,), (0,)), ((1,), (1,))]),
        # The bottom block is the dear one, and gets the ranks to spare.
        ([0.7, 0.3, 0.2], 4, [((0,), (0, 1)), ((1,), (2,)), ((2,), (3,))]),
        ([0.7, 0.4], 4, [((0,), (0, 1)), ((1,), (2, 3))]),
        ([0.0, 0.0, 0.0], 2, [((0, 2), (0,)), ((1,), (1,))]),
    ],
)
def test_balanced_teams(costs: list[float], ranks: int, teams: list[Any]) -> None:
    assert balanced_teams(costs, ranks) == [Team(*team) for team in teams]


def test_balanced_teams_leave_nothing_out() -> None:
    for blocks in range(1, 9):
        costs = [1.0 + (7 * k) % 5 for k in range(blocks)]
        for ranks in range(1, 12):
            teams = balanced_teams(costs, ranks)
            assert sorted(b for team in teams for b in team.blocks) == list(range(blocks))
            assert [r for team in teams for r in team.ranks] == list(range(ranks))
            slowest = max(sum(costs[b] for b in t.blocks) / len(t.ranks) for t in teams)
            assert slowest <= max(max(costs), 4 / 3 * sum(costs) / ranks) * (1 + 1e-12)


def test_balanced_blocks_may_leave_a_team_without() -> None:
    assert balanced_blocks([1.0, 3.0], 3) == [(1,), (0,), ()]


@pytest.mark.parametrize(
    ("costs", "ranks", "words"),
    [
        ([], 2, "0 blocks, 2 ranks; give at least one of each"),
        ([1.0], 0, "1 blocks, 0 ranks"),
        ([1.0, -1.0], 1, "must be numbers, 0 or more"),
        ([1.0, float("nan")], 4, "must be numbers, 0 or more"),
    ],
)
def test_balanced_teams_refuse(costs: list[float], ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        balanced_teams(costs, ranks)


def folder_in(results: Path) -> Path:
    (found,) = results.glob("runs/*/*/*/provenance.json")
    return found.parent


def assert_close(one: list[Row], other: list[Row]) -> None:
    """The same curves to rounding, which grows: gradients agree better at first than later."""
    assert [row["update"] for row in one] == [row["update"] for row in other]
    for own, row in zip(one, other, strict=True):
        for key in ("train_loss", "test_loss"):
            assert own[key] == pytest.approx(row[key], rel=1e-3), (key, own, row)
    assert one[1]["gradient_norm"] == pytest.approx(other[1]["gradient_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A run of one process, of ten updates."""
    results = tmp_path_factory.mktemp("alone")
    command = [sys.executable, *LSTM, "updates=10", "threads=1", f"results={results}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return read_metrics(folder_in(results))


def test_run_of_two_processes(tmp_path: Path, alone: list[Row]) -> None:
    output = made(2, *LSTM, "updates=10", f"results={tmp_path}")
    folder = folder_in(tmp_path)
    assert_close(read_metrics(folder), alone)
    # One process speaks, and writes.
    assert output.count(": finished, 10 updates") == 1 and output.count("update 10/10") == 1
    provenance = read_provenance(folder)
    assert provenance["sessions"][-1]["ranks"] == 2 and provenance["path"].endswith("rank 0 of 2")
    said = {(c["kind"], c["calls"]) for c in provenance["traffic"]}
    assert said == {("all_reduce", 1), ("broadcast", 2)}
    again = made(2, *LSTM, "updates=10", f"results={tmp_path}")
    assert "finished, already, with 10 updates" in again


def test_refusals_are_said_once(tmp_path: Path) -> None:
    output = made(2, *LSTM, "updates=10", f"results={tmp_path}", "data.name=letters", code=1)
    assert output.count("error: data.name=letters: must be one of") == 1
    assert "another rank is gone" not in output and not list(tmp_path.iterdir())


def test_torchrun_makes_no_sweeps() -> None:
    pretended = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, *LSTM, "--multirun"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | pretended, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "torchrun makes one run with all its processes" in ended.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path: Path, alone: list[Row]) -> None:
    """Four make four updates, two go on to eight, and one to ten."""
    made(4, *LSTM, "updates=4", f"results={tmp_path}", "placement=data")
    made(2, *LSTM, "updates=8", f"results={tmp_path}")
    made(1, *LSTM, "updates=10", f"results={tmp_path}")
    folder = folder_in(tmp_path)
    assert_close(read_metrics(folder), alone)
    assert [session["ranks"] for session in read_provenance(folder)["sessions"]] == [4, 2, 1]


@pytest.mark.slow
def test_script_of_the_readme(tmp_path: Path) -> None:
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [text for text in scripts if "init_process_group" in text]
    (tmp_path / "own.py").write_text(script)
    # Whatever becomes of the processes once all is said: gloo's threads may abort one that takes
    # down its connections.
    output, _ = launch(2, str(tmp_path / "own.py")).communicate(timeout=300)
    (loss,) = re.findall(r"^([\d.]+) \(Collective", output, re.MULTILINE)
    assert float(loss) < 0.8  # of 1.1 at first


@pytest.mark.slow
def test_two_machines(tmp_path: Path, alone: list[Row]) -> None:
    """As far as one machine can be two: each has a launcher of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    machines = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "two")
    command = (*machines, "--rdzv-endpoint", endpoint, *LSTM, "updates=10", f"results={tmp_path}")
    both = [launch(1, *command, standalone=False) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "".join(outputs).count(": finished, 10 updates") == 1
    assert_close(read_metrics(folder_in(tmp_path)), alone)


LONG = (
    *("experiments/autoencoder.py", "scale=demo", "optimizer=bdhf", "updates=60"),
    *("evaluate_every=20", "checkpoint_seconds=0.2"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    results = tmp_path_factory.mktemp("uninterrupted")
    made(2, *LONG, f"results={results}")
    return read_metrics(folder_in(results))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "seconds"),
    [(1, signal.SIGKILL, 15), (0, signal.SIGKILL, 15), (1, signal.SIGSTOP, 60)],
    ids=["a follower is killed", "the leader is killed", "a follower falls silent"],
)
def test_rank_that_is_lost(
    rank: int, how: signal.Signals, seconds: float, tmp_path: Path, uninterrupted: list[Row]
) -> None:
    """The job ends everywhere within the stated time, says why, and can be continued.

    That is at once where a process dies, and ``collective_seconds`` where it falls silent; torchrun
    then gives what is left half a minute.
    """
    process = launch(2, *LONG, f"results={tmp_path}", "collective_seconds=10")
    assert process.stdout is not None
    assert any(" update 20/60" in line for line in process.stdout)
    os.kill(worker(process, rank), how)
    began = time.monotonic()
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode != 0, output
    assert time.monotonic() - began < seconds
    left = 1 - rank
    assert f"error: rank {left} of 2: another rank is gone, or did not answer in time" in output
    status = read_provenance(folder_in(tmp_path))["status"]
    assert status == ("failed" if left == 0 else "running")
    made(2, *LONG, f"results={tmp_path}")
    folder = folder_in(tmp_path)
    assert len(read_provenance(folder)["sessions"]) == 2
    assert_close(read_metrics(folder), uninterrupted)


@pytest.mark.slow
def test_signal_stops_all(tmp_path: Path, uninterrupted: list[Row]) -> None:
    process = launch(2, *LONG, f"results={tmp_path}")
    assert process.stdout is not None
    assert any(" update 20/60" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped, signal SIGTERM; continues from update" in output
    made(2, *LONG, f"results={tmp_path}")
    assert_close(read_metrics(folder_in(tmp_path)), uninterrupted)


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank, which torchrun has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in map(int, listed.stdout.split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError(f"no rank {rank} among {listed.stdout.split()}")
