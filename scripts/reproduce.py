"""Make every run of some experiments in one sweep, then the table and the figures.

python scripts/reproduce.py all scale=demo
python scripts/reproduce.py lstm resnet scale=laptop seed=0,1
python scripts/reproduce.py --plan all scale=paper

Arguments with an equals sign are Hydra overrides. What is finished is skipped, so repeating the
command resumes. --plan shows what is done and left, and how long the rest will take.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from collect import merge

from bdhf.experiment import experiment_names
from bdhf.report.table import TableError
from bdhf.sweep import plan, sweep


def main() -> int:
    """Command line."""
    arguments = [a for a in sys.argv[1:] if a != "--plan"]
    chosen = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    if not chosen or {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0 if chosen else 1
    known = experiment_names()
    for name in chosen:
        if name not in (*known, "all"):
            sys.exit(f"error: {name}: must be all or one of {', '.join(known)}")
    names = known if "all" in chosen else chosen
    overrides.insert(0, f"experiment={','.join(names)}")
    if "--plan" in sys.argv:
        return plan(overrides)
    return sweep(overrides, shlex.join(sys.argv), afterwards=collect_and_draw)


def collect_and_draw(results: Path, scale: str) -> None:
    """What `make collect figures` does, once there is something."""
    try:
        if merge(results, scale):
            if importlib.util.find_spec("matplotlib") is None:  # on a machine that makes runs only
                print("no figures: matplotlib is not installed")
                return
            from figures import draw

            draw(results, scale)
    except TableError as error:  # the runs are there; the tables are another matter
        print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
