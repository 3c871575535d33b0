"""Runs in Weights & Biases, mirrored from their folders: the disk is the truth, W&B a copy of it.

A process of its own reads the folders and publishes them, so that nothing W&B does can make
training fail or wait: ``python -m bdhf.mirror FILE``, which ends some time after its standard input
does. `make wandb-sync` publishes folders in the same way, later.

A run's id stays the same, and its steps are its updates. So W&B, which takes no step twice, gets
each row once, also of a run that was continued or published in part before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bdhf.config import TargetConfig, WandbConfig, settings_hash
from bdhf.experiment import figures
from bdhf.progress import say
from bdhf.record import (
    ENDED,
    alone_with,
    first_line,
    read_metrics,
    read_provenance,
    sizes_in_short,
    write_json,
)
from bdhf.summary import best, final, updates_to

#: What panels may be drawn against.
AXES = ("update", "epoch", "gradient_equivalents", "seconds")

#: Seconds between two looks at the folders, and before W&B is tried again after an error.
_PAUSE, _RETRY = 5.0, 60.0

#: Seconds for which the end of a command waits for W&B, and for which its process goes on then.
_PATIENCE, _AFTERWARDS = 15.0, 600

#: Seconds after which W&B counts as out of reach, unless the user says otherwise, and seconds
#: that the end of an upload may take.
_INIT_TIMEOUT, _FINISH_TIMEOUT = "30", 300.0

#: Seconds after which a server that does not show what it was sent counts as not having it.
_CONFIRM = float(os.environ.get("BDHF_WANDB_CONFIRM", 20))

#: What says in a folder that it has been published.
_MARKER = "wandb.json"


def identity(folder: Path) -> dict[str, Any]:
    """The arguments of ``wandb.init`` that say which run it is: always the same for a folder."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    provenance = read_provenance(folder)
    sizes = sizes_in_short(settings["batch_size"], settings["curvature_batch_size"])
    optimizer = settings["optimizer"]["name"]
    sessions = provenance.get("sessions", [])
    described = [session.get("git_describe") or session.get("git_commit") for session in sessions]
    drawn = figures().get(settings["experiment"])
    tags = [settings["scale"], f"figure {drawn.number}" if drawn else settings["experiment"]]
    tags += [settings["study"]] if settings.get("study") else []
    return {
        "id": f"{settings['experiment']}-{folder.name}",  # its end is the hash of the settings
        "name": folder.name,
        "group": f"{settings['experiment']}/{optimizer}/{sizes}",
        "job_type": optimizer,
        "tags": [*tags, *dict.fromkeys(tag[:40] for tag in described if tag)],
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
        self._sent = self._first = 0
        self._held = contextlib.ExitStack()  # the lock, and what W&B writes meanwhile
        self._try_after = 0.0
        self._complained = False

    def update(self, last: bool = False) -> bool:
        """Publish what is new in the folder; all of it, if the run or the mirroring is over.

        Returns:
            Whether the run was published as a whole, just now.

        Raises:
            Exception: whatever W&B raises; the next call begins anew.
        """
        rows = read_metrics(self._folder)
        status = read_provenance(self._folder).get("status")
        over = last or status in ENDED
        # W&B cannot continue an offline run, so one is written when all of it is there.
        if not rows or not (over or self._account.mode == "online"):
            return False
        if self._run is None and (time.monotonic() < self._try_after or self.is_published()):
            return False
        try:
            if self._run is None and not self._open():
                self._let_go()  # another process mirrors it
                return False
            for row in rows[self._sent :]:
                step = int(row["update"] or 0)
                if step >= self._first:  # W&B has those before, from an earlier time
                    known = {key: value for key, value in row.items() if value is not None}
                    self._run.log(known, step=step, commit=True)  # not held for the next
            self._sent = len(rows)
            if over:
                self._finish(str(status))
        except BaseException:
            self._try_after = time.monotonic() + _RETRY
            self._let_go()
            raise
        return over

    def try_update(self, last: bool = False) -> None:
        """The same; an error is told, once, and W&B is tried again later."""
        if last:
            self._try_after = 0.0
        try:
            self.update(last)
        except Exception as error:
            if not self._complained:
                say(
                    f"W&B: {type(error).__name__}: {first_line(error)}. Training goes on; "
                    "make wandb-sync publishes the run from disk"
                )
            self._complained = True

    def is_published(self) -> bool:
        """Whether W&B has all that the folder holds already."""
        marker = self._folder / _MARKER
        if "WANDB_SWEEP_ID" in os.environ or not marker.exists():
            return False  # an agent's trial is a run of its own each time
        known: dict[str, Any] = json.loads(marker.read_text())
        return known == self._state()

    def _open(self) -> bool:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", _INIT_TIMEOUT)
        import wandb

        *_, scale, experiment, name = self._folder.absolute().parts
        runs = self._folder.absolute().parents[2]
        if not self._held.enter_context(alone_with(runs, scale, experiment, f"{name}-wandb")):
            return False
        offline = self._account.mode == "offline"
        if offline:
            shutil.rmtree(self._folder / "wandb", ignore_errors=True)  # the new one takes its place
            place = str(self._folder)
        else:
            scratch = tempfile.TemporaryDirectory(prefix="bdhf-wandb-", ignore_cleanup_errors=True)
            place = self._held.enter_context(scratch)
        settings = wandb.Settings(
            mode="offline" if offline else "online",
            root_dir=place,
            finish_timeout=_FINISH_TIMEOUT,
            finish_timeout_raises=True,
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
        return True

    def _finish(self, status: str) -> None:
        """Close the run in W&B; one that has not ended does not look as if it had."""
        state = self._state()
        self._run.summary.update(summary_of(self._folder))
        path = f"{self._run.entity}/{self._run.project}/{self._run.id}"
        self._run.finish(exit_code=0 if status in ENDED else 1)
        self._run = None
        if self._account.mode == "online":
            self._confirm(path)
        write_json(self._folder / _MARKER, state)
        self._let_go()

    def _confirm(self, path: str) -> None:
        """W&B's client ends in peace also where the server took nothing, so ask the server."""
        import wandb

        last = int(read_metrics(self._folder)[-1]["update"] or 0)
        deadline = time.monotonic() + _CONFIRM
        while (found := wandb.Api().run(path).lastHistoryStep) < last:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"W&B has {path} up to step {found} of {last} only")
            time.sleep(1)

    def _let_go(self) -> None:
        if self._run is not None:
            with contextlib.suppress(Exception):
                self._run.finish(exit_code=1)
        self._run, self._sent = None, 0
        self._held.close()

    def _state(self) -> dict[str, Any]:
        """Of what is published where: the same as long as nothing is new."""
        import wandb

        online = self._account.mode == "online"
        return {
            **asdict(self._account),
            "host": wandb.setup().settings.base_url if online else None,
            "id": identity(self._folder)["id"],
            "rows": hashlib.sha256((self._folder / "metrics.csv").read_bytes()).hexdigest(),
            "status": read_provenance(self._folder).get("status"),
        }


def publish(folder: Path, account: WandbConfig) -> bool:
    """Publish a folder's run as a whole; False where W&B has it, or where nothing is to be sent.

    Raises:
        Exception: whatever W&B raises.
    """
    return RunMirror(folder, account).update(last=True)


@contextlib.contextmanager
def mirrored(folders: Sequence[Path], account: WandbConfig) -> Iterator[None]:
    """While this lasts, a process of its own mirrors the folders as they come and grow."""
    process = None if account.mode == "disabled" else _start(folders, account)
    if process is None:
        yield
        return
    try:
        yield
    except BaseException:  # refused, or a second Ctrl-C
        process.terminate()
        raise
    assert process.stdin is not None
    try:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        say("W&B is not done yet and goes on by itself; make wandb-sync publishes what is left")
    except KeyboardInterrupt:  # the runs are made; only the waiting ends
        process.terminate()


def _start(folders: Sequence[Path], account: WandbConfig) -> subprocess.Popen[str] | None:
    """The process that mirrors; None, and a word, where there can be none."""
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            names = [str(folder.absolute()) for folder in folders]
            json.dump({"folders": names, "wandb": asdict(account)}, file)
        process = subprocess.Popen(
            [sys.executable, "-m", "bdhf.mirror", file.name],
            stdin=subprocess.PIPE,
            # Not ours, which it would keep open for as long as it goes on.
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
    except OSError as error:
        say(f"W&B: {first_line(error)}. Training goes on; make wandb-sync publishes from disk")
        return None
    assert process.stdout is not None
    lines = process.stdout

    def relay() -> None:
        for line in lines:
            say(line.rstrip())

    threading.Thread(target=relay, daemon=True).start()
    return process


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
            mirror.try_update(last=over)


if __name__ == "__main__":
    for ending in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(ending, lambda *_: sys.exit(1))  # so that what is held is let go
    order = Path(sys.argv[1])
    told = json.loads(order.read_text())
    order.unlink()
    follow([Path(folder) for folder in told["folders"]], WandbConfig(**told["wandb"]))
