"""Runs in Weights & Biases, mirrored from their folders: the disk is the truth, W&B a copy of it.

A process of its own reads the folders and publishes them, so that nothing W&B does can make
training fail or wait: ``python -m bdhf.mirror``, told what to do on its standard input, whose end
tells it that training is over. `make wandb-sync` publishes folders in the same way, later.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bdhf.config import TargetConfig, WandbConfig, settings_hash
from bdhf.progress import say
from bdhf.record import ENDED, first_line, read_metrics, read_provenance, write_json
from bdhf.summary import best, final, updates_to

#: Which figure of the paper an experiment belongs to, for the tags.
FIGURES = {"autoencoder": "figure 1", "lstm": "figure 2", "resnet": "figure 3"}

#: What panels may be drawn against.
AXES = ("update", "epoch", "gradient_equivalents", "seconds")

#: Seconds between two looks at the folders.
_PAUSE = 5.0

#: Seconds for which the end of a command waits for W&B, and for which it goes on afterwards.
_PATIENCE, _AFTERWARDS = 30.0, 900

#: Seconds after which W&B counts as out of reach, unless the user says otherwise.
_INIT_TIMEOUT = "30"

#: What says in a folder that it has been published.
_MARKER = "wandb.json"


def identity(folder: Path) -> dict[str, Any]:
    """The arguments of ``wandb.init`` that say which run it is: always the same for a folder."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    provenance = read_provenance(folder)
    few = settings["curvature_batch_size"]
    sizes = f"b{settings['batch_size']}" + ("" if few is None else f"-c{few}")
    optimizer = settings["optimizer"]["name"]
    described = [session.get("git_describe") for session in provenance.get("sessions", [])]
    tags = [settings["scale"], FIGURES.get(settings["experiment"], settings["experiment"])]
    return {
        "id": f"{settings['experiment']}-{folder.name}",  # its end is the hash of the settings
        "name": folder.name,
        "group": f"{settings['experiment']}/{optimizer}/{sizes}",
        "job_type": optimizer,
        "tags": [*tags, *dict.fromkeys(tag[:64] for tag in described if tag)],
        "config": {**settings, "settings_hash": settings_hash(settings, without=("seed",))},
    }


def summary_of(folder: Path) -> dict[str, Any]:
    """Best and final values, updates to the target, and how the run ended."""
    rows, provenance = read_metrics(folder), read_provenance(folder)
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    target = TargetConfig(**settings.get("target", {}))
    found: dict[str, Any] = {"status": provenance.get("status"), "reason": provenance.get("reason")}
    for metric in [key for key in rows[0] if key.endswith(("loss", "accuracy"))] if rows else []:
        if (value := best(rows, metric)) is not None:
            found |= {f"best/{metric}": value, f"final/{metric}": final(rows, metric)}
    found |= {key: value for key, value in provenance.items() if key.startswith("full_")}
    if target.metric is not None:
        found |= {f"target/{target.metric}": target.value}
        found["updates_to_target"] = updates_to(rows, target)
    return {key: value for key, value in found.items() if value is not None}


class RunMirror:
    """One folder's run in W&B.

    Args:
        folder: the run's folder.
        account: mode, project and entity.
    """

    def __init__(self, folder: Path, account: WandbConfig) -> None:
        self._folder, self._account = folder, account
        self._run: Any = None
        self._sent = 0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._finished = False

    def is_published(self) -> bool:
        """Whether W&B has all of the folder's rows already."""
        marker = self._folder / _MARKER
        if not marker.exists():
            return False
        known: dict[str, Any] = json.loads(marker.read_text())
        return known == self._state()

    def update(self, last: bool = False) -> None:
        """Publish what is new in the folder; all of it, if this is the last look at it.

        Raises:
            Exception: whatever W&B raises.
        """
        if self._finished or not (self._folder / "metrics.csv").exists():
            return
        over = last or read_provenance(self._folder).get("status") in ENDED
        if over and self._run is None and self.is_published():
            self._finished = True
            return
        if over or self._account.mode == "online":  # an offline run cannot be continued later
            self._send()
        if over:
            self._finish()

    def close(self) -> None:
        """Let go of a run that could not be published."""
        self._finished = True
        if self._scratch is not None:
            self._scratch.cleanup()

    def _send(self) -> None:
        if self._run is None:
            self._open()
        rows = read_metrics(self._folder)
        for row in rows[self._sent :]:
            update = int(row["update"] or 0)
            if update >= self._first:  # the server has those before, from an earlier session
                self._run.log({k: v for k, v in row.items() if v is not None}, step=update)
        self._sent = len(rows)

    def _open(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", _INIT_TIMEOUT)
        import wandb

        offline = self._account.mode == "offline"
        if offline:
            # An offline run cannot be continued, so the new one with all rows takes its place.
            shutil.rmtree(self._folder / "wandb", ignore_errors=True)
            place = str(self._folder)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="bdhf-wandb-")
            place = self._scratch.name
        settings = wandb.Settings(
            mode="offline" if offline else "online",
            root_dir=place,
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=self._account.project,
            entity=self._account.entity,
            resume=None if offline else "allow",
            reinit="create_new",
            settings=settings,
            **identity(self._folder),
        )
        self._first = self._run.starting_step
        for axis in AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="update")

    def _finish(self) -> None:
        self._run.summary.update(summary_of(self._folder))
        state = self._state()
        self._run.finish(exit_code=int(read_provenance(self._folder).get("status") == "failed"))
        write_json(self._folder / _MARKER, state)
        self.close()

    def _state(self) -> dict[str, Any]:
        """Of what is published where: the same as long as nothing is new."""
        import wandb

        rows = read_metrics(self._folder)
        provenance = read_provenance(self._folder)
        return {
            **asdict(self._account),
            "host": wandb.Settings().base_url if self._account.mode == "online" else None,
            "id": identity(self._folder)["id"],
            "rows": len(rows),
            "updates": rows[-1]["update"] if rows else None,
            "status": provenance.get("status"),
        }


def publish(folder: Path, account: WandbConfig) -> bool:
    """Publish a folder's run as a whole; False where W&B has it already.

    Raises:
        Exception: whatever W&B raises; what it has by then is continued the next time.
    """
    mirror = RunMirror(folder, account)
    if mirror.is_published():
        return False
    try:
        mirror.update(last=True)
    finally:
        mirror.close()
    return True


@contextlib.contextmanager
def mirrored(folders: Sequence[Path], account: WandbConfig) -> Iterator[None]:
    """While this lasts, a process of its own mirrors the folders as they come and grow."""
    if account.mode == "disabled":
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "bdhf.mirror"],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert process.stdin is not None
    told = {"folders": [str(folder.absolute()) for folder in folders], "wandb": asdict(account)}
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()
    patience = 0.0
    try:
        yield
        patience = _PATIENCE  # but none after a second Ctrl-C
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            say("W&B is not done yet and goes on by itself; make wandb-sync publishes what is left")


def follow(folders: Sequence[Path], account: WandbConfig) -> None:
    """Mirror the folders until standard input ends."""
    mirrors = [RunMirror(folder, account) for folder in folders]
    over = False
    while not over:
        readable, _, _ = select.select([sys.stdin], [], [], _PAUSE)
        over = bool(readable)
        if over:
            signal.alarm(_AFTERWARDS)
        for mirror in mirrors:
            try:
                mirror.update(last=over)
            except Exception as error:
                mirror.close()
                say(
                    f"W&B: {type(error).__name__}: {first_line(error)}. Training goes on; "
                    "make wandb-sync publishes the run from disk"
                )


if __name__ == "__main__":
    told = json.loads(sys.stdin.readline())
    follow([Path(folder) for folder in told["folders"]], WandbConfig(**told["wandb"]))
