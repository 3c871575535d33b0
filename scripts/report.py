"""Write verdicts and the report from the compact tables: python scripts/report.py [SCALE].

--readme puts the verdicts into README.md, too, between the marks that are there for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdhf.report.page import write_report
from bdhf.report.readme import README, with_results
from bdhf.report.table import TableError
from bdhf.report.verdicts import ClaimError


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("--readme", action="store_true", help="renew the README's results too")
    arguments = parser.parse_args()
    try:
        write(arguments.results, arguments.scale)
        if arguments.readme:
            README.write_text(with_results(README.read_text(), arguments.results, arguments.scale))
            print(README)
    except (ClaimError, TableError) as error:
        sys.exit(f"error: {error}")


def write(results: Path, scale: str) -> None:
    """Write the report and name its files."""
    for path in write_report(results, scale):
        print(path)


if __name__ == "__main__":
    main()
