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
from bdhf.record import read_metrics, read_provenance

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/bundle.py, which needs a probe that no machine has, and downloads nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bundle")
    wanted = module.requirements()
    monkeypatch.setattr(module, "requirements", lambda: [*wanted, "bdhf-probe==1.0"])
    monkeypatch.setattr(module, "download", lambda wanted, python_version, wheels: probe(wheels))
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


def test_a_sweep_in_two_slices_on_two_machines(bundle: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "note.txt").write_text("data sets lie here\n")
    kit = tmp_path / "bdhf-kit.pyz"
    bundle.pack(kit, "3.12", data)

    # A machine on which the time is over before the first update is made, and then goes on.
    one = tmp_path / "one"
    one.mkdir()
    os.link(kit, one / kit.name)
    adam = ("autoencoder", "optimizer=adam", "seed=0", *TINY)
    hf = ("autoencoder", "optimizer=hf,bdhf", "seed=0", *TINY_HF)
    first = call(one, *hf, "time_limit=0.001")
    assert first.returncode == 0, first.stderr
    assert "installing bdhf-probe==1.0" in first.stdout and "2 runs: 2 left" in first.stdout
    assert (one / "bdhf-kit" / "site" / "bdhf_probe.py").exists()
    assert (one / "bdhf-kit" / "data" / "note.txt").exists()
    second = call(one, *adam)
    assert second.returncode == 0, second.stderr
    assert "installing" not in second.stdout and "1 runs: 1 finished" in second.stdout
    with tarfile.open(one / "bdhf-runs.tar.gz") as archive:
        packed = {Path(name).name: name for name in archive.getnames()}
        checkpoints = [name for name in archive.getnames() if name.endswith("checkpoint.pt")]
    assert "curves.csv" in packed
    assert not any("/adam-" in name for name in checkpoints)  # it is finished

    # Another one, which is given what came back, and makes the rest.
    two = tmp_path / "two"
    two.mkdir()
    os.link(kit, two / kit.name)
    third = call(two, *hf, "--from", str(one / "bdhf-runs.tar.gz"), "--output", "out/runs.tar.gz")
    assert third.returncode == 0, third.stderr
    assert "2 runs: 2 finished" in third.stdout

    # At home: the same curves as without the kit, and the commit that was packed.
    results = tmp_path / "results"
    for archive_path in (one / "bdhf-runs.tar.gz", two / "out" / "runs.tar.gz"):
        bring_in(archive_path, results)
    plain = tmp_path / "plain"
    for arguments in (adam, hf):
        command = [sys.executable, "scripts/reproduce.py", *arguments, f"results={plain}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    names = sorted(path.name for path in (plain / "runs" / "demo" / "autoencoder").iterdir())
    assert [name.split("-")[0] for name in names] == ["adam", "bdhf", "hf"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for name in names:
        there, here = (root / "runs" / "demo" / "autoencoder" / name for root in (results, plain))
        assert without_clocks(read_metrics(there)) == without_clocks(read_metrics(here))
        provenance = read_provenance(there)
        assert provenance["status"] == "finished"
        sessions = provenance["sessions"]
        assert {session["git_commit"] for session in sessions} == {head.stdout.strip()}


def test_wheels_that_do_not_fit_are_said_to(bundle: ModuleType, tmp_path: Path) -> None:
    bundle.download = lambda wanted, python_version, wheels: None
    bundle.pack(tmp_path / "bdhf-kit.pyz", "3.12", tmp_path / "nothing")
    done = call(tmp_path, "autoencoder", "scale=demo")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the kit's wheels do not fit Python" in done.stderr


def test_what_is_uncommitted_stays_here(
    bundle: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = bundle.code()
    commit = files["bdhf/commit.txt"].decode().strip()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit == head.stdout.strip() and "configs/run.yaml" in files
    assert not any(name.startswith("results/runs") for name in files)
