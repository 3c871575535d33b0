"""Processes that make one run together, started by torchrun.

The first one leads: it owns the run's folder and decides when to stop. The others follow: they have
the same network and data, and make each update with it when they are told to.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from bdhf.config import Config, device_of
from bdhf.distributed.ranks import Ranks, failures_named
from bdhf.errors import require

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """What the leader tells the others; a process that is alone tells nobody.

    Attributes:
        rank: this process's number; the leader's is 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process leads, or is alone."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def tell(self, word: Any) -> None:
        """Say a word to all others, who `hear` it."""
        if not self.alone:
            with failures_named(str(self)):
                dist.broadcast_object_list([word], src=0, device=_CPU)

    def hear(self) -> Any:
        """The leader's next word."""
        words = [None]
        with failures_named(str(self)):
            dist.broadcast_object_list(words, src=0, device=_CPU)
        return words[0]

    def goes_on(self, so: bool | None = None) -> bool:
        """Whether another update is made: the leader says ``so``, the others hear it."""
        if self.alone:
            return bool(so)
        word = torch.tensor(bool(so), dtype=torch.uint8)
        with failures_named(str(self)):
            dist.broadcast(word, src=0)
        return bool(word)

    def meet(self) -> None:
        """Wait until all are here."""
        if not self.alone:
            with failures_named(str(self)):
                dist.all_reduce(torch.zeros(1))

    def ranks(self, placement: Any) -> Ranks | None:
        """As an optimizer takes them: all are given the same mini-batches."""
        return None if self.alone else Ranks(_everyone(), placement, sharded=False)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


ALONE = Processes()


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def leading() -> bool:
    """Whether this process leads, or is alone; known before the processes have met."""
    return not launched() or int(os.environ["RANK"]) == 0


def first_of_machine() -> bool:
    """Whether torchrun started this process first on its machine, or did not start it."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def with_own_device(config: Config) -> Config:
    """The config of this process: each has a GPU of its own.

    Raises:
        ConfigError: all were given the same one.
    """
    if not launched() or device_of(config).type != "cuda":
        return config
    allowed = "auto, cpu or cuda under torchrun, where each process takes the GPU of its number"
    require(torch.device(device_of(config)).index is None, "device", config.device, allowed)
    place = int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count()
    allowed = f"cpu, or torchrun --nproc-per-node {count} at most: there are so many GPUs"
    require(place < count, "device", config.device, allowed)
    return dataclasses.replace(config, device=f"cuda:{place}")


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """The processes that torchrun started, met; or this one alone.

    A collective that another process does not come to within ``config.collective_seconds`` fails.
    """
    if not launched():
        yield ALONE
        return
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=config.collective_seconds),
    )
    processes = Processes(dist.get_rank(), dist.get_world_size())
    # All get a signal, and the leader tells of it while it trains. When a process is gone torchrun
    # sends SIGTERM to the others, which should still say what they found.
    own = (signal.SIGTERM,) if processes.leads else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in own:
        signal.signal(number, signal.SIG_IGN)
    # After an error nothing more is said: the others may be waiting for something else. They find
    # this process gone.
    yield processes
    processes.meet()  # nobody leaves while another still talks


def leave(exit_code: int) -> NoReturn:
    """End this process.

    One of torchrun's at once, without taking down what connects it: gloo's threads may abort a
    process that does, now and then, though all is done.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
