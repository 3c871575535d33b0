"""W&B as a mirror of what is on disk: for real offline, and against a stand-in of its server."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from suite import EXPERIMENTS, TINY_HF, composed, tiny, without_clocks
from wandb.proto import wandb_internal_pb2
from wandb_stand_in import SentRun, StandIn, stand_in

from bdhf.config import TargetConfig, WandbConfig, checked
from bdhf.mirror import AXES, identity, publish, summary_of
from bdhf.record import read_metrics, write_table
from bdhf.runner import run
from bdhf.summary import best, final, updates_to

ROOT = Path(__file__).resolve().parent.parent
KEY = "0123456789abcdef" * 2 + "deadbeef"


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key that must turn up nowhere, and no settings of the user's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("BDHF_WANDB_CONFIRM", "1")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


def train(results: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run as a user makes it."""
    arguments = (*TINY_HF, f"results={results}", "threads=1", *more)
    return call("experiments/autoencoder.py", *arguments, **environment)


def finished(results: Path, *overrides: str, optimizer: str = "bdhf") -> Path:
    """The folder of a run that was made without W&B."""
    values = tiny("autoencoder", optimizer, f"results={results}", *overrides)
    return run(EXPERIMENTS["autoencoder"], values, shown=False).folder.path


def the_folder(results: Path) -> Path:
    (folder,) = results.glob("runs/*/*/*")
    return folder


# Reading back what W&B writes offline


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_offline(folder: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """The one offline run in a folder: its description, history and summary."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    about, history, summary = None, [], {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about = record.run
        elif kind == "history":
            items = {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
            }
            history.append({k: v for k, v in items.items() if not k.startswith("_")})
        elif kind == "summary":
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return about, history, summary


def on_disk(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics as W&B gets them, without gaps."""
    return [{k: v for k, v in row.items() if v is not None} for row in read_metrics(folder)]


def test_offline_run_holds_every_row_once_with_config_and_summary(tmp_path: Path) -> None:
    done = train(tmp_path, "wandb.mode=offline", "wandb.project=mine")
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder = the_folder(tmp_path)
    about, history, summary = read_offline(folder)
    assert history == on_disk(folder)
    assert (about.project, about.run_group) == ("mine", "autoencoder/bdhf/b60-c20")
    assert (about.run_id, about.job_type) == (f"autoencoder-{folder.name}", "bdhf")
    assert list(about.tags)[:2] == ["demo", "figure 1"] and len(about.tags) == 3
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["optimizer"]["cg_max_iter"] == 5 and config["batch_size"] == 60
    losses = [row["train_loss"] for row in history]
    assert summary["best/train_loss"] == losses[-1]
    assert summary["final/train_loss"] == sorted(losses)[1]  # the median of three
    assert summary["status"] == "finished" and summary["full_train_loss"] > 0
    assert "updates_to_target" not in summary  # missed in so few updates
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert KEY.encode() not in file.read_bytes(), file


def test_resumed_offline_run_is_published_anew_as_a_whole(tmp_path: Path) -> None:
    for updates in (2, 6):
        done = train(tmp_path, "wandb.mode=offline", f"updates={updates}")
        assert done.returncode == 0, done.stderr
    folder = the_folder(tmp_path)
    _, history, _ = read_offline(folder)
    assert history == on_disk(folder) and [row["update"] for row in history] == [0, 2, 4, 6]


def test_disabled_is_the_default_and_imports_nothing(tmp_path: Path) -> None:
    script = str(ROOT / "experiments" / "autoencoder.py")
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['autoencoder.py', *{TINY_HF!r}, 'results={tmp_path}']\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, 'wandb' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")
    assert not list(tmp_path.rglob("*wandb*"))


# Online, against the stand-in


def sent(server: StandIn, folder: Path) -> SentRun:
    return server.runs[f"autoencoder-{folder.name}"]


def history_of(run: SentRun) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in run.history]


def test_sync_sends_each_ended_run_once_however_often_it_is_called(
    tmp_path: Path, server: StandIn
) -> None:
    """A run made without W&B, one made offline, one that was resumed, and one not ended."""
    plain = finished(tmp_path)
    offline = finished(tmp_path, optimizer="hf")
    publish(offline, WandbConfig("offline"))
    resumed = finished(tmp_path, "updates=2", optimizer="adam")
    finished(tmp_path, "updates=6", optimizer="adam")
    left = finished(tmp_path, "seed=1")
    provenance = (left / "provenance.json").read_text()
    (left / "provenance.json").write_text(provenance.replace('"finished"', '"running"'))
    first = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("3 runs published, 0 were there already\n")
    again = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
    assert again.stdout.endswith("0 runs published, 3 were there already\n")
    assert len(server.runs) == 3
    for folder in (plain, offline, resumed):
        run_ = sent(server, folder)
        assert run_.opened == 1 and run_.complete and history_of(run_) == on_disk(folder)
        assert run_.summary["status"] == "finished" and run_.config["batch_size"]["value"] == 60
        assert [row["_step"] for row in run_.history] == [row["update"] for row in on_disk(folder)]
    metrics = sent(server, plain).config["_wandb"]["value"]["m"]
    assert set(AXES) <= {metric.get("1") for metric in metrics}


def test_sync_after_a_loss_of_the_marker_sends_no_row_twice(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path)
    for _ in range(2):
        done = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
        assert done.stdout.endswith("1 runs published, 0 were there already\n"), done.stderr
        (folder / "wandb.json").unlink()
    run_ = sent(server, folder)
    assert run_.opened == 2 and history_of(run_) == on_disk(folder)
    with stand_in() as another:  # of which the marker says nothing
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        for published in (1, 0):
            done = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
            assert done.stdout.count("\n1 runs published, 0") == published, done.stderr
        assert len(another.runs) == 1


@pytest.mark.slow
def test_upload_that_the_server_refuses_is_not_taken_for_published(
    tmp_path: Path, server: StandIn
) -> None:
    folder, other = finished(tmp_path), finished(tmp_path, "seed=1")
    server.refuses.append(f"autoencoder-{folder.name}")
    done = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
    assert done.returncode == 1 and f"error: {folder}: " in done.stderr
    assert done.stdout.endswith("1 runs published, 0 were there already\n")
    assert history_of(sent(server, other)) == on_disk(other)
    server.refuses.clear()
    done = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path))
    assert done.stdout.endswith("1 runs published, 1 were there already\n"), done.stderr
    assert history_of(sent(server, folder)) == on_disk(folder)


LIVE = """
import sys
from pathlib import Path
from bdhf.config import WandbConfig
from bdhf.mirror import RunMirror
mirror = RunMirror(Path(sys.argv[1]), WandbConfig("online"))
for line in sys.stdin:
    mirror.update(last=line == "last\\n")
    print("updated", flush=True)
"""


def test_rows_are_sent_while_a_run_is_made_and_when_it_is_continued(
    tmp_path: Path, server: StandIn
) -> None:
    """A run that had ended and is continued with a larger budget, too."""
    folder = finished(tmp_path)
    whole, provenance = read_metrics(folder), (folder / "provenance.json").read_text()
    command = [sys.executable, "-c", LIVE, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def mirror(status: str, rows: int, word: str = "more") -> None:
            assert process.stdin is not None and process.stdout is not None
            text = provenance.replace('"finished"', f'"{status}"')
            (folder / "provenance.json").write_text(text)
            write_table(folder / "metrics.csv", whole[:rows])
            process.stdin.write(word + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "updated\n"

        mirror("finished", 1)
        assert len(sent(server, folder).history) == 1
        mirror("running", 2)
        mirror("running", 3)
        deadline = time.monotonic() + 60
        while len(sent(server, folder).history) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert history_of(sent(server, folder)) == on_disk(folder)  # and it is not over yet
        mirror("stopped", 3, "last")
        process.stdin.close()
    run_ = sent(server, folder)
    assert history_of(run_) == on_disk(folder) and run_.exit_codes == [0, 1]
    assert run_.summary["status"] == "stopped"


@pytest.mark.slow
def test_live_run_is_mirrored_and_continued(tmp_path: Path, server: StandIn) -> None:
    for updates in (4, 8):
        done = train(tmp_path, "wandb.mode=online", f"updates={updates}")
        assert done.returncode == 0 and not done.stderr, done.stderr
    folder = the_folder(tmp_path)
    assert history_of(sent(server, folder)) == on_disk(folder)
    assert sent(server, folder).summary["update"] == 8
    assert (folder / "wandb.json").exists()  # nothing is left to send
    assert not (folder / "wandb").exists()
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        assert KEY.encode() not in file.read_bytes(), file
    assert not any(KEY in text for text in server.everything)


@pytest.mark.slow
def test_sweep_is_mirrored(tmp_path: Path, server: StandIn) -> None:
    arguments = [*TINY_HF, "optimizer=hf,bdhf", f"results={tmp_path}", "wandb.mode=online"]
    done = call("scripts/reproduce.py", "autoencoder", *arguments)
    assert done.returncode == 0, done.stderr
    folders = list(tmp_path.glob("runs/*/*/*-seed*"))
    assert len(folders) == len(server.runs) == 2
    for folder in folders:
        assert history_of(sent(server, folder)) == on_disk(folder)


@pytest.mark.slow
def test_wandb_out_of_reach_leaves_training_alone(tmp_path: Path) -> None:
    """No server, no key, and no W&B at all."""
    expected = without_clocks(read_metrics(finished(tmp_path / "plain")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise OSError('broken installation')")
    for name, environment in (
        ("nobody there", {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"}),
        ("no key", {"WANDB_API_KEY": "", "HOME": str(tmp_path)}),
        ("broken", {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"}),
    ):
        done = train(tmp_path / name, "wandb.mode=online", **environment)
        assert done.returncode == 0, done.stderr
        assert "W&B: " in done.stdout and "Training goes on" in done.stdout, name
        assert "finished, 4 updates" in done.stdout
        assert without_clocks(read_metrics(the_folder(tmp_path / name))) == expected


def test_sync_without_a_key_says_so(tmp_path: Path) -> None:
    finished(tmp_path)
    environment = {"WANDB_API_KEY": "", "HOME": str(tmp_path)}
    done = call("scripts/wandb_sync.py", "demo", "--results", str(tmp_path), **environment)
    assert done.returncode == 1 and "`wandb login` stores a key; repeat" in done.stderr
    assert "Traceback" not in done.stderr
    none = call("scripts/wandb_sync.py", "paper", "--results", str(tmp_path))
    assert none.stderr == f"error: no ended run under {tmp_path}/runs/paper\n"


# What a curve comes to


def rows_of(*losses: float) -> list[dict[str, float | int | None]]:
    return [{"update": 10 * k, "test_loss": loss} for k, loss in enumerate(losses)]


def test_best_final_and_updates_to_a_target() -> None:
    rows = rows_of(9, 5, 7, 3, 4, 4, 4, 4, 4, 4, 8)
    assert best(rows, "test_loss") == 3 and final(rows, "test_loss") == 4  # of 4, 4 and 8
    assert updates_to(rows, TargetConfig("test_loss", 5)) == 10
    assert updates_to(rows, TargetConfig("test_loss", 2)) is None
    assert updates_to(rows, TargetConfig()) is None
    accuracies = [{"update": k, "test_accuracy": k / 10} for k in range(10)]
    assert best(accuracies, "test_accuracy") == 0.9
    assert updates_to(accuracies, TargetConfig("test_accuracy", 0.25)) == 3
    assert best(rows, "test_accuracy") is final(rows, "test_accuracy") is None
    diverged = rows_of(3, 2, float("nan"))
    assert best(diverged, "test_loss") == 2 and final(diverged, "test_loss") is None


def test_summary_counts_the_updates_to_the_target(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    rows = read_metrics(folder)
    write_table(folder / "metrics.csv", [*rows[:-1], {**rows[-1], "test_loss": 4.0}])
    found = summary_of(folder)
    assert found["updates_to_target"] == 4 and found["target/test_loss"] == 5.0
    assert identity(folder)["id"] == f"autoencoder-{folder.name}"


# Dashboards


def test_report_is_built_and_saved(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb_workspaces", reason="pip install '.[dashboard]' brings it")
    claims = [{"id": "A1", "claim": "gets worse", "verdict": "holds"}]
    (tmp_path / "laptop").mkdir()
    write_table(tmp_path / "laptop" / "verdicts.csv", claims)
    arguments = ["laptop", "--entity", "me", "--results", str(tmp_path)]
    shown = call("scripts/wandb_dashboard.py", *arguments, "--outline", WANDB_BASE_URL="http://no")
    assert shown.returncode == 0, shown.stderr
    for text in ("1: Deep autoencoder", "2: Peephole LSTM", "3: ResNet", "RunComparer"):
        assert text in shown.stdout
    assert "| A1 | gets worse | holds |" in shown.stdout
    for axis in AXES:
        assert f"LinePlot: train_loss against {axis}" in shown.stdout
    saved = call("scripts/wandb_dashboard.py", *arguments)
    assert saved.returncode == 0, saved.stderr
    (view,) = server.views
    spec = json.loads(view["spec"])
    grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 3 * 2 + 1
    for grid, experiment in zip(grids[:-1:2], EXPERIMENTS, strict=True):
        text = json.dumps(grid["metadata"]["runSets"])
        for part in ("scale", "laptop", experiment, "optimizer", "adam", "bdhf", "settings_hash"):
            assert part in text
        panels = json.dumps(grid["metadata"]["panelBankSectionConfig"])
        assert all(axis in panels for axis in AXES) and "train_loss" in panels
    unreachable = call("scripts/wandb_dashboard.py", *arguments, WANDB_API_KEY="")
    assert unreachable.returncode == 1 and unreachable.stderr.startswith("error: the report cannot")


def test_wandb_sweep_drives_the_command_line() -> None:
    """Its arguments, as W&B's agent puts them together, compose."""
    sweep = yaml.safe_load((ROOT / "configs" / "wandb" / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists() and sweep["command"][-1] == "${args_no_hyphens}"
    choices = [
        [f"{key}={value}" for value in spec.get("values", [spec.get("value")])]
        for key, spec in sweep["parameters"].items()
    ]
    fixed = sweep["command"][3:-1]
    points = itertools.product(*choices)
    configs = [checked(composed("lstm", *fixed, *point)) for point in points]
    assert len(configs) == 8 and len({(c.seed, c.optimizer.lr) for c in configs}) == 8
    assert {c.wandb.mode for c in configs} == {"online"}
