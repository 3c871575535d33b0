"""What a user types: commands, their messages, and what the library needs."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from suite import TINY, TINY_HF

ROOT = Path(__file__).resolve().parent.parent


def call(
    script: str, *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


def test_sweep_collect_and_figures(tmp_path: Path) -> None:
    """The demo's way, at a tiny size: a sweep in one process, the table, the figure."""
    results = f"results={tmp_path}"
    sweep = call(
        "experiments/autoencoder.py",
        "--multirun",
        *TINY,
        results,
        "optimizer=hf,bdhf",
        "curvature_batch_size=20",
        "optimizer.cg_max_iter=5",
    )
    assert sweep.returncode == 0, sweep.stderr
    assert sweep.stdout.count("finished, 4 updates") == 2
    assert "update 4/4" in sweep.stdout and "CG 5+5" in sweep.stdout  # plain lines: no terminal
    assert "\x1b[" not in sweep.stdout
    collected = call("scripts/collect.py", "demo", "--results", str(tmp_path))
    assert collected.returncode == 0 and "2 runs added" in collected.stdout
    drawn = call("scripts/figures.py", "demo", "--results", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    for line in drawn.stdout.splitlines():
        assert Path(line).stat().st_size > 1000


def test_experiments_are_reproduced_in_one_process(tmp_path: Path) -> None:
    """As `make demo` does, with a bad value for one of the experiments."""
    sizes = (*TINY[:4], "optimizer=bdhf", "curvature_batch_size=20", "optimizer.cg_max_iter=2")
    results = f"results={tmp_path}"
    done = call("scripts/reproduce.py", "autoencoder", "resnet", results, *sizes, "updates=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, 1 updates") == 2
    again = call("scripts/reproduce.py", "all", results, *sizes, "updates=1", "data.name=svhn")
    assert again.returncode == 1
    assert again.stderr == "error: data.name=svhn: must be one of cifar10, digits, mnist (3 runs)\n"
    stopped = call("scripts/reproduce.py", "all", f"{results}/s", *sizes, "time_limit=0.001")
    assert stopped.returncode == 0 and "stopped, time_limit=0.001 seconds\n" in stopped.stdout
    assert stopped.stdout.count("seed 0, not begun\n") == 3
    assert stopped.stdout.endswith("Repeat the command to go on.\n")
    unknown = call("scripts/reproduce.py", "vae", results)
    assert unknown.stderr == "error: vae: must be all or one of autoencoder, lstm, resnet\n"


def test_runs_from_any_folder(tmp_path: Path) -> None:
    done = call("experiments/autoencoder.py", *TINY_HF, "updates=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["results"]  # and nothing of Hydra's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=-1"], "error: seed=-1: must be 0 or more\n"),
        (["batch_size=9999"], "error: batch_size=9999: must be at most 1437"),
        (["data.name=svhn"], "error: data.name=svhn: must be one of cifar10, digits, mnist\n"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["learning_rate=1"], "learning_rate"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = call("experiments/autoencoder.py", *TINY_HF, f"results={tmp_path}/r", *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_refused_run_does_not_end_a_sweep(tmp_path: Path) -> None:
    done = call(
        "experiments/autoencoder.py",
        "--multirun",
        *TINY_HF,
        "optimizer=bdhf",
        "optimizer.cg_max_iter=0,2",
        f"results={tmp_path}",
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: optimizer.cg_max_iter=0: must be 1 or more\n"
        "error: 1 runs were refused, as said at the start\n"
    )
    assert done.stdout.count("finished, 4 updates") == 1


def test_several_cells_at_once_are_those_one_after_the_other(tmp_path: Path) -> None:
    sizes = ("scale=demo", "updates=2", "threads=1", "optimizer=hf,bdhf", "cell=0", "seed=0,-1")
    joblib = ("hydra/launcher=processes", "hydra.launcher.n_jobs=2")
    alone = call("scripts/reproduce.py", "resnet", *sizes, f"results={tmp_path}/1")
    both = call("scripts/reproduce.py", "resnet", *sizes, *joblib, f"results={tmp_path}/2")
    for done in (alone, both):
        assert done.returncode == 1
        assert done.stderr.startswith("error: seed=-1: must be 0 or more (2 runs)\n")
        assert done.stdout.count("finished, 2 updates") == 2
    one, other = (sorted((tmp_path / n).rglob("metrics.csv")) for n in "12")
    assert [path.relative_to(tmp_path / "1") for path in one] == [
        path.relative_to(tmp_path / "2") for path in other
    ]
    for path, twin in zip(one, other, strict=True):
        assert without_seconds(path) == without_seconds(twin)


def without_seconds(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def test_example_of_the_readme_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    own = readme.split("## The optimizer on your own model")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", own, re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    loss = float(done.stdout.split()[0])
    assert loss < 0.5  # from log 3 = 1.1
    assert "StepReport" in done.stdout


def test_collect_without_runs_says_so(tmp_path: Path) -> None:
    done = call("scripts/collect.py", "paper", "--results", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"error: no finished run under {tmp_path}/runs/paper\n"


def test_library_needs_torch_alone() -> None:
    code = (
        "import sys, bdhf\n"
        "suite = {'hydra', 'omegaconf', 'matplotlib', 'rich', 'sklearn', 'torchvision', 'wandb'}\n"
        "print(sorted(suite & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for target in ("setup", "demo", "test", "test-slow", "reproduce-autoencoder", "figures"):
        assert f"make {target} " in done.stdout
