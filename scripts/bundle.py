"""Pack wheels, data and code into one file for a machine without internet: scripts/bundle.py.

That machine needs Linux on x86-64, Python 3.10, pip, torch 2.9 and torchvision 0.24, or newer ones.
There, `python bdhf-kit.pyz all scale=paper time_limit=540` unpacks it and makes runs
(scripts/kit.py, which is where it begins).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What a machine with a GPU has, and nobody wants to carry.
_THERE = ("torch", "torchvision")

#: Wheels for a Linux as old as this, or older.
_NEWEST_GLIBC = 39
_OLDEST_GLIBC = 17


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bdhf-kit.pyz"))
    parser.add_argument("--python-version", default="3.12", help="of the machine's Python")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("BDHF_DATA", "data")),
        help="the folder with the data sets; what is in it is packed",
    )
    arguments = parser.parse_args()
    pack(arguments.output, arguments.python_version, arguments.data)


def pack(output: Path, python_version: str, data: Path) -> None:
    """Write the kit."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".part")
    with (
        tempfile.TemporaryDirectory() as wheels,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as kit,
    ):
        wanted = requirements()
        kit.writestr("requirements.json", json.dumps(wanted))
        kit.write(ROOT / "scripts" / "kit.py", "__main__.py")
        for name, content in code().items():
            kit.writestr(f"code/{name}", content)
        files = [path for path in sorted(data.rglob("*")) if path.is_file()]
        for path in files:
            kit.write(path, f"data/{path.relative_to(data)}", zipfile.ZIP_STORED)
        download(wanted, python_version, Path(wheels))
        for path in sorted(Path(wheels).iterdir()):
            kit.write(path, f"wheels/{path.name}", zipfile.ZIP_STORED)
    os.replace(temporary, output)
    if not files:
        print(f"no data sets in {data}: name their folder by BDHF_DATA")
    print(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB. There: python3 {output.name} all "
        "scale=paper study=null,blocks device=cuda time_limit=540"
    )


def requirements() -> list[str]:
    """What making runs needs, and not every machine with a GPU has (pyproject.toml, `runs`)."""
    found = []
    for line in importlib.metadata.requires("bdhf") or []:
        requirement, _, condition = line.partition(";")
        of_runs = condition.replace("'", '"').strip() == 'extra == "runs"'
        if of_runs and not requirement.startswith(_THERE):
            found.append(requirement.strip())
    if not found:
        sys.exit("error: this environment is older than pyproject.toml; run make setup")
    return sorted(found)


def code() -> dict[str, bytes]:
    """The files of the last commit, which know which one it is."""
    git = ["git", "-C", str(ROOT)]
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if changes.stdout.strip():
        print("uncommitted changes stay here: the kit holds the last commit")
    made = subprocess.run([*git, "archive", "HEAD"], capture_output=True)
    if made.returncode:
        sys.exit(f"error: git archive: {made.stderr.decode().strip()}")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                found[member.name] = file.read()
    return found


def download(wanted: list[str], python_version: str, wheels: Path) -> None:
    """Wheels of what is wanted and all it needs."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Published as source only; it is pure Python, so that its wheel fits everywhere.
    antlr = ["wheel", "--no-deps", "--wheel-dir", str(wheels), "antlr4-python3-runtime==4.9.*"]
    subprocess.run([*pip, *antlr], check=True)
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(_OLDEST_GLIBC, _NEWEST_GLIBC + 1)]
    command = [*pip, "download", "--only-binary=:all:", "--python-version", python_version]
    command += ["--implementation", "cp", "--find-links", str(wheels), "--dest", str(wheels)]
    command += [f"--platform={each}" for each in (*platforms, "manylinux2014_x86_64")]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *wanted], check=True)


if __name__ == "__main__":
    main()
