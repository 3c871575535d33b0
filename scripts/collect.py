"""Merge run folders into the compact table: scripts/collect.py [SCALE] [--from ARCHIVE ...]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdhf.archive import ArchiveError, bring_in
from bdhf.report.table import TableError, collect, mixtures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="*",
        default=[],
        type=Path,
        metavar="ARCHIVE",
        help="archives of results/runs from other machines, or such folders, to bring in first",
    )
    arguments = parser.parse_args()
    try:
        for source in arguments.sources:
            for line in bring_in(source, arguments.results):
                print(line)
        made = merge(arguments.results, arguments.scale)
    except (ArchiveError, TableError) as error:
        sys.exit(f"error: {error}")
    if not made:
        sys.exit(f"error: no finished run under {arguments.results / 'runs' / arguments.scale}")


def merge(results: Path, scale: str) -> bool:
    """Merge what there is and say so; whether there is a table now."""
    count, left_out = collect(results, scale)
    for line in left_out:
        print(f"left out: {line}")
    table = results / scale / "curves.csv"
    if not table.exists():
        return False
    print(f"{table}: {count} runs added or renewed")
    for line in mixtures(results, scale):
        print(f"warning: {line}")
    return True


if __name__ == "__main__":
    main()
