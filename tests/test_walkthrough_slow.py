"""What the README says one adds, added: an experiment, an optimizer, a claim."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bdhf.report.readme import README

pytestmark = pytest.mark.slow

ROOT = README.parent


def section(text: str, title: str) -> str:
    """A section of the README, up to the next heading of its rank or above."""
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def files_in(text: str) -> dict[str, str]:
    """The files that a section shows: each named in backticks before its block."""
    pattern = r"(?:A file|a config), `([^`]+)`.*?```(?:python|yaml)\n(.*?)```"
    return dict(re.findall(pattern, text, re.DOTALL))


def commands_in(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which `make` takes this environment for its own."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("bdhf", "configs", "experiments", "scripts"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "README.md", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, path)
    python = path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (path / ".venv" / ".ready").touch()
    return path


def call(command: str, clone: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(clone), "JOBS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_adds_an_experiment_an_optimizer_and_a_claim(clone: Path) -> None:
    text = README.read_text(encoding="utf-8")
    expected = {"An experiment": 2, "An optimizer": 2, "A claim": 1}
    for title, count in expected.items():
        own = section(text, title)
        files = files_in(own)
        assert len(files) == count
        for name, content in files.items():
            assert not (clone / name).exists()
            (clone / name).parent.mkdir(exist_ok=True)
            (clone / name).write_text(content)
        for command in commands_in(own):
            call(command, clone)
    folder = clone / "trials" / "demo"
    with (folder / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert {run["optimizer"] for run in runs} == {"adam", "hf", "bdhf"} and len(runs) == 9
    assert (folder / "figure4_mlp.png").exists()

    call("make collect figures SCALE=demo RESULTS=trials", clone)
    assert "make report SCALE=demo RESULTS=trials" in section(text, "A claim")
    call("make report SCALE=demo RESULTS=trials", clone)
    assert "sgd, mini-batch 100" in (folder / "figure4_mlp.svg").read_text()
    page = (folder / "report.html").read_text()
    assert 'data-experiment="mlp"' in page and "A small network on digits" in page
    with (folder / "verdicts.csv").open() as file:
        verdicts = {row["id"]: row for row in csv.DictReader(file)}
    assert len(verdicts) == 17
    # Adam is still descending or not, on another machine's rounding; the part has its numbers.
    assert "final test accuracy minus Adam's: " in verdicts["M1"]["parts"]
    assert verdicts["M1"]["parts"].count(" points") >= 3
    assert "at least one point higher" in (folder / "report.md").read_text()
