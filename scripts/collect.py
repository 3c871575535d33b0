"""Merge run folders into the compact table: python scripts/collect.py [SCALE]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdhf.report import collect


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    arguments = parser.parse_args()
    count, left_out = collect(arguments.results, arguments.scale)
    for line in left_out:
        print(f"left out: {line}")
    table = arguments.results / arguments.scale / "curves.csv"
    if not count and not table.exists():
        sys.exit(f"error: no finished run under {arguments.results / 'runs' / arguments.scale}")
    print(f"{table}: {count} runs added or renewed")


if __name__ == "__main__":
    main()
