"""The kit for machines without internet, rehearsed here: packed, unpacked, run in two slices."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from suite import TINY, TINY_HF, without_clocks

from bdhf.archive import bring_in
from bdhf.record import read_metrics, read_provenance, read_table, write_table
from bdhf.sweep import sweep
from bdhf.training import Training

ROOT = Path(__file__).parent.parent
PACKED = "0123456789" * 4


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/bundle.py, which needs a probe that no machine has, and downloads nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bundle")
    wanted = module.requirements()
    monkeypatch.setattr(module, "requirements", lambda: [*wanted, "bdhf-probe==1.0"])
    monkeypatch.setattr(module, "download", lambda wanted, python_version, wheels: probe(wheels))
    code = module.code()
    # What shows that the kit's own copy was at work.
    monkeypatch.setattr(module, "code", lambda: {**code, "bdhf/commit.txt": PACKED.encode()})
    return module


def probe(folder: Path) -> None:
    """A wheel with one module in it."""
    info = "bdhf_probe-1.0.dist-info"
    with zipfile.ZipFile(folder / "bdhf_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("bdhf_probe.py", "here = True\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: bdhf-probe\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The kit's one command, on a machine where nothing of ours is installed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BDHF_DATA")}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-P", "bdhf-kit.pyz", *arguments]
    if sys.version_info < (3, 11):
        command.remove("-P")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def checkpoints(archive: Path) -> list[str]:
    """The optimizers of the runs that brought theirs."""
    with tarfile.open(archive) as file:
        found = [Path(name) for name in file.getnames() if name.endswith("checkpoint.pt")]
    return sorted(path.parent.name.split("-")[0] for path in found)


@pytest.mark.slow
def test_a_sweep_in_two_slices_on_two_machines(bundle: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "note.txt").write_text("data sets lie here\n")
    kit = tmp_path / "bdhf-kit.pyz"
    bundle.pack(kit, "3.12", data)

    # A machine that makes half of the updates of HF, and Adam's run.
    one = tmp_path / "one"
    one.mkdir()
    os.link(kit, one / kit.name)
    adam = ("autoencoder", "optimizer=adam", "seed=0", "threads=1", *TINY)
    hf = ("autoencoder", "optimizer=hf,bdhf", "seed=0", "threads=1", *TINY_HF)
    half = [word.replace("updates=4", "updates=2") for word in hf]
    first = call(one, *half, "--checkpoints", "--output", "half.tar.gz")
    assert first.returncode == 0, first.stderr
    assert "installing bdhf-probe==1.0" in first.stdout and "2 runs: 2 finished" in first.stdout
    assert (one / "bdhf-kit" / "site" / "bdhf_probe.py").exists()
    assert (one / "bdhf-kit" / "data" / "note.txt").exists()
    measured = [{"experiment": "autoencoder", "seed": "0", "seconds": "0.5"}]
    write_table(one / "bdhf-kit" / "results" / "demo" / "update_times.csv", measured)
    second = call(one, *adam)
    assert second.returncode == 0, second.stderr
    assert "installing" not in second.stdout and "1 runs: 1 finished" in second.stdout
    assert checkpoints(one / "half.tar.gz") == ["bdhf", "hf"]
    assert checkpoints(one / "bdhf-runs.tar.gz") == []  # all are finished

    # Another one, which is given what came back, and makes the rest.
    two = tmp_path / "two"
    two.mkdir()
    os.link(kit, two / kit.name)
    lost = call(two, *hf, "--from", "nosuch.tar.gz")
    assert lost.returncode == 2 and "--from nosuch.tar.gz: there is no such file" in lost.stderr
    broken = two / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    lost = call(two, *hf, "--from", broken.name)
    assert lost.returncode == 1 and "broken.tar.gz could not be read" in lost.stderr
    lost = call(two, *hf, "results=elsewhere")
    assert lost.returncode == 2 and "runs are kept in bdhf-kit/results" in lost.stderr
    third = call(
        two, "--from", str(one / "half.tar.gz"), *hf, "--measure", "--output", "out/runs.tar.gz"
    )
    assert third.returncode == 0, third.stderr
    assert "2 runs: 2 finished" in third.stdout and "update 0/4" not in third.stdout

    # At home: the same curves as without the kit, and the commit that was packed.
    results = tmp_path / "results"
    for archive_path in (one / "bdhf-runs.tar.gz", two / "out" / "runs.tar.gz"):
        bring_in(archive_path, results)
    assert read_table(results / "demo" / "update_times.csv") == measured
    bring_in(one / "bdhf-runs.tar.gz", results)  # again
    assert read_table(results / "demo" / "update_times.csv") == measured
    plain = tmp_path / "plain"
    for arguments in (adam, hf):
        command = [sys.executable, "scripts/reproduce.py", *arguments, f"results={plain}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    names = sorted(path.name for path in (plain / "runs" / "demo" / "autoencoder").iterdir())
    assert [name.split("-")[0] for name in names] == ["adam", "bdhf", "hf"]
    for name in names:
        there, here = (root / "runs" / "demo" / "autoencoder" / name for root in (results, plain))
        assert without_clocks(read_metrics(there)) == without_clocks(read_metrics(here))
        provenance = read_provenance(there)
        assert provenance["status"] == "finished"
        sessions = provenance["sessions"]
        assert {session["git_commit"] for session in sessions} == {PACKED}


def test_a_run_that_the_time_limit_stopped_goes_on_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: `sweep` is what the kit runs, `pack` and `bring_in` what it does then."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    kit = importlib.import_module("kit")
    arguments = ["experiment=autoencoder", *TINY_HF, "optimizer=hf,bdhf", "evaluate_every=1"]
    there, here, whole = (tmp_path / name / "results" for name in ("there", "here", "whole"))
    made: list[int] = []
    original = Training.update

    def counted(training: Training) -> None:
        original(training)
        made.append(training.progress.update)

    def late(training: Training) -> None:
        counted(training)
        if len(made) == 6:  # in the second of two runs of four updates
            patch.setattr("bdhf.stopping.time.time", lambda: 1e12)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", late)
        assert sweep([*arguments, f"results={there}", "time_limit=540"], "") == 0
    assert made == [1, 2, 3, 4, 1, 2]
    assert "left: autoencoder bdhf b60 c20 seed 0, stopped at update 2 of 4" in (
        capsys.readouterr().out
    )
    kit.pack(there, tmp_path / "runs.tar.gz", False)
    assert checkpoints(tmp_path / "runs.tar.gz") == ["bdhf"]  # and not that of the finished run

    bring_in(tmp_path / "runs.tar.gz", here)
    made.clear()
    monkeypatch.setattr(Training, "update", counted)
    assert sweep([*arguments, f"results={here}"], "") == 0
    assert made == [3, 4]
    monkeypatch.undo()
    assert sweep([*arguments, f"results={whole}"], "") == 0
    folders = sorted((whole / "runs" / "demo" / "autoencoder").iterdir())
    assert len(folders) == 2
    for folder in folders:
        found = here / folder.relative_to(whole)
        assert without_clocks(read_metrics(found)) == without_clocks(read_metrics(folder))
        assert read_provenance(found)["status"] == "finished"


def test_wheels_that_do_not_fit_are_said_to(bundle: ModuleType, tmp_path: Path) -> None:
    bundle.download = lambda wanted, python_version, wheels: None
    bundle.pack(tmp_path / "bdhf-kit.pyz", "3.12", tmp_path / "nothing")
    done = call(tmp_path, "autoencoder", "scale=demo")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the kit's wheels do not fit Python" in done.stderr


def test_the_code_is_that_of_the_last_commit_and_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    files = importlib.import_module("bundle").code()
    commit = files["bdhf/commit.txt"].decode().strip()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit == head.stdout.strip() and "configs/run.yaml" in files
    assert not any(name.startswith("results/runs") for name in files)
