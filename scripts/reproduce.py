"""Make every cell of some experiments in one process.

python scripts/reproduce.py all scale=demo
python scripts/reproduce.py lstm resnet scale=laptop seed=0,1

Arguments with an equals sign are Hydra overrides. What is finished is skipped, so repeating the
command resumes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from bdhf.experiment import main

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def reproduce(names: list[str], overrides: list[str]) -> int:
    """Sweep the experiments one after the other; the exit code is the worst of theirs."""
    known = sorted(path.stem for path in EXPERIMENTS.glob("*.py"))
    for name in names:
        if name not in (*known, "all"):
            sys.exit(f"error: {name}: must be all or one of {', '.join(known)}")
    sys.path.insert(0, str(EXPERIMENTS))
    worst = 0
    for name in known if "all" in names else names:
        sys.argv = [str(EXPERIMENTS / f"{name}.py"), "--multirun", *overrides]
        try:
            main(importlib.import_module(name).EXPERIMENT)
        except SystemExit as stop:
            if stop.code != 1:  # a signal, or the time limit: what is left stays for next time
                return int(stop.code or 0)
            worst = 1
    return worst


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [argument for argument in arguments if "=" not in argument]
    if not chosen:
        sys.exit(__doc__)
    sys.exit(reproduce(chosen, [argument for argument in arguments if "=" in argument]))
