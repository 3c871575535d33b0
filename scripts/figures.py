"""Draw the figures from the compact table: python scripts/figures.py [SCALE]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdhf.report.devices import draw_scaling
from bdhf.report.figures import draw_figures
from bdhf.report.table import TableError


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    arguments = parser.parse_args()
    try:
        draw(arguments.results, arguments.scale)
    except TableError as error:
        sys.exit(f"error: {error}")


def draw(results: Path, scale: str) -> None:
    """Draw the figures and name their files."""
    for path in (*draw_figures(results, scale), *draw_scaling(results / scale)):
        print(path)


if __name__ == "__main__":
    main()
