"""Publish ended runs to Weights & Biases from disk, each once: scripts/wandb_sync.py [SCALE]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import wandb

from bdhf.config import WandbConfig
from bdhf.mirror import publish
from bdhf.record import ENDED, first_line, read_provenance


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scale", nargs="?", default="laptop", help="paper, laptop or demo")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    parser.add_argument("--project", default=WandbConfig.project, help="the W&B project")
    parser.add_argument("--entity", help="whose project; default: the account's own")
    arguments = parser.parse_args()
    account = WandbConfig("online", arguments.project, arguments.entity)
    folders = sorted((arguments.results / "runs" / arguments.scale).glob("*/*/"))
    ended = [path for path in folders if read_provenance(path).get("status") in ENDED]
    if not ended:
        sys.exit(f"error: no ended run under {arguments.results / 'runs' / arguments.scale}")
    published = failed = 0
    for folder in ended:
        try:
            new = publish(folder, account)
        except wandb.Error as error:  # no key, no network, ...: the others would meet it too
            sys.exit(
                f"error: {folder}: {type(error).__name__}: {first_line(error)}; {published} runs "
                "were published. `wandb login` stores a key; repeat the command to go on"
            )
        except Exception as error:  # this folder's own
            failed += 1
            print(f"error: {folder}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
            continue
        published += new
        print(f"{folder}: {'published' if new else 'there already'}", flush=True)
    there = len(ended) - published - failed
    print(f"{published} runs published, {there} were there already")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
