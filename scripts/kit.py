"""Runs of bdhf on a machine without internet: what `make bundle` packs begins here.

    python bdhf-kit.pyz all scale=paper study=null,blocks device=cuda time_limit=540

unpacks beside itself, installs what Python lacks from the wheels it brought (torch has to be
there), makes runs until the time limit, and packs their folders. The same command goes on; so does
one on another machine that is given what came of this one (--from).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

#: Of what a run's folder holds, what only a run that goes on needs.
_CHECKPOINT = "checkpoint.pt"
#: What stands in for it should it be damaged.
_OLDER = "checkpoint.older.pt"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python bdhf-kit.pyz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        help="as for scripts/reproduce.py: experiments or all, and key=value",
    )
    parser.add_argument("--into", type=Path, default=Path("bdhf-kit"), help="where to unpack")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        type=Path,
        metavar="ARCHIVE",
        help="runs of an earlier slice to go on with; may be given several times",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bdhf-runs.tar.gz"), help="the archive of the runs"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time updates afterwards (scripts/measure.py)"
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="pack those of finished runs too: to measure them, or enlarge their budget, elsewhere",
    )
    parser.add_argument("--plan", action="store_true", help="what is left, and how long it takes")
    given = parser.parse_intermixed_args()
    for argument in given.arguments:
        if argument.startswith("results="):
            parser.error(f"{argument}: runs are kept in {given.into}/results")
    for source in given.sources:
        if not source.exists():
            parser.error(f"--from {source}: there is no such file")
    kit = unpacked(Path(sys.argv[0]), given.into)
    environment = prepared(kit)
    results = kit / "results"
    for source in given.sources:
        call = "import sys; from pathlib import Path; from bdhf.archive import bring_in; "
        call += "print('\\n'.join(bring_in(Path(sys.argv[1]), Path(sys.argv[2]))))"
        if run(kit, environment, ["-c", call, str(source.absolute()), str(results)]):
            sys.exit(f"error: {source} could not be read; nothing was run")
    arguments = [*given.arguments, f"results={results}"]
    if given.plan:
        return run(kit, environment, ["scripts/reproduce.py", "--plan", *arguments])
    status = run(kit, environment, ["scripts/reproduce.py", *arguments])
    pack(results, given.output, given.checkpoints)
    if given.measure and status:
        print("not measured: runs failed, or were refused; see above")
    if given.measure and not status:
        scale = next((a.split("=")[1] for a in arguments if a.startswith("scale=")), "laptop")
        run(kit, environment, ["scripts/measure.py", scale, "--results", str(results)])
        pack(results, given.output, given.checkpoints)  # again, since that may take long
    return status


def unpacked(kit: Path, folder: Path) -> Path:
    """The folder with the kit's contents; unpacked again only where another kit was."""
    folder = folder.absolute()
    stamp, digest = folder / "kit.sha256", hashlib.sha256(kit.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        for before in ("code", "site", "wheels", "data"):
            shutil.rmtree(folder / before, ignore_errors=True)
        with zipfile.ZipFile(kit) as archive:
            archive.extractall(folder)
        stamp.write_text(digest)
    return folder


def prepared(kit: Path) -> dict[str, str]:
    """The environment in which the suite runs, with what was missing installed in the kit."""
    wanted = json.loads((kit / "requirements.json").read_text())
    site = kit / "site"
    paths = [str(kit / "code"), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if (kit / "data").is_dir():
        environment["BDHF_DATA"] = str(kit / "data")
    missing = [line for line in wanted if not is_met(line, site)]
    if missing:
        print("installing", ", ".join(missing), flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-compile"]
        pip += ["--disable-pip-version-check", "--find-links", str(kit / "wheels")]
        done = subprocess.run([*pip, "--target", str(site), "--upgrade", *missing])
        if done.returncode:
            sys.exit(
                f"error: the kit's wheels do not fit Python {sys.version.split()[0]} here; make "
                "bundle takes PYTHON_VERSION (for Linux on x86-64)"
            )
    return environment


def is_met(requirement: str, site: Path) -> bool:
    """Whether what is installed, here or in the kit, satisfies a requirement."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    found = importlib.metadata.distributions(name=wanted.name, path=[*sys.path, str(site)])
    return any(wanted.specifier.contains(each.version, prereleases=True) for each in found)


def run(kit: Path, environment: dict[str, str], arguments: list[str]) -> int:
    """Run Python in the kit's code, and hand it the signals that ask us to stop."""
    child = subprocess.Popen([sys.executable, *arguments], cwd=kit / "code", env=environment)
    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(n, lambda number, _: child.send_signal(number)) for n in caught]
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the child, in our group, has it too, and will end
                continue
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


def pack(results: Path, output: Path, checkpoints: bool) -> None:
    """An archive of the runs; without ``checkpoints``, those only of runs that go on."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(member.name)
        if any(part.startswith(".") for part in path.parts) or path.name == _OLDER:
            return None
        over = path.name == _CHECKPOINT and has_ended(results.parent / path.parent)
        return None if over and not checkpoints else member

    if not (results / "runs").is_dir():
        print("no runs to pack")
        return
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.part")  # the archive there may be the only one
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(results, "results", filter=kept)
    os.replace(temporary, output)
    size = output.stat().st_size / 2**20
    print(f"{output}: {size:.1f} MiB; at home: make collect SCALE=... FROM={output.name}")


def has_ended(run: Path) -> bool:
    """Whether a run is finished or has diverged."""
    try:
        status = json.loads((run / "provenance.json").read_text())["status"]
        return status in ("finished", "diverged")
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    sys.exit(main())
