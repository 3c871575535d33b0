"""Things timed in turn, round after round, by one job of processes.

Of these the first few take part in each timing while the others wait, so that everything is
measured under the same circumstances.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: A timing of less than so many seconds is of several calls.
_LEAST_SECONDS = 0.01

Row = dict[str, Any]


@dataclass
class Timed:
    """Something to be timed.

    Attributes:
        row: what the table says of it.
        call: does it; None: there is nothing to be timed, only the row.
        processes: how many do it at once, the first ones.
        calls: how often in a timing; 0: as often as makes it long enough (of one process only).
        before: done before each timing.
        after: what the table says afterwards.
        each: of how many equal things a call consists.
    """

    row: Row
    call: Callable[[], object] | None
    processes: int = 1
    calls: int = 0
    before: Callable[[], None] = lambda: None
    after: Callable[[], Row] = dict
    each: int = 1
    seconds: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Seconds of each of the things a call consists of."""
        assert self.call is not None
        self.before()
        started = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - started) / (self.calls * self.each)


def in_turn(timed: Sequence[Timed], rounds: int) -> None:
    """Time each once a round. It took as long as it took the slowest process."""
    mine = [one for one in timed if one.call is not None]
    for number in range(-1, rounds):  # the first round, of traces and first touches, is not counted
        for one in mine:
            dist.barrier()
            if dist.get_rank() >= one.processes:
                continue
            if number < 0:
                calls, one.calls = one.calls, 1
                one.time()
                one.calls = calls or max(1, math.ceil(_LEAST_SECONDS / one.time()))
            else:
                one.seconds.append(one.time())
    for one in mine:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, one.seconds)
        one.seconds = [max(values) for values in zip(*found[: one.processes], strict=True)]


def spread(seconds: Sequence[float]) -> Row:
    """Their median, least and greatest; nothing of none."""
    if not seconds:
        return {}
    values = {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "greatest": max(seconds),
    }
    return {name: float(f"{value:.5g}") for name, value in values.items()}


class Others:
    """How many cores were busy with something else than this job."""

    def __init__(self) -> None:
        self._began = self._clocks()

    def busy(self) -> float | None:
        """Since this was made; None where the system does not tell."""
        ended = self._clocks()
        all_, mine, wall = (b - a for a, b in zip(self._began, ended, strict=True))
        return round(max(all_ - mine, 0.0) / wall, 2) if ended[0] else None

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        total = 0.0
        if stat.exists():
            user, nice, system, _, _, irq, soft, steal, *_ = map(
                float, stat.read_text().split("\n", 1)[0].split()[1:]
            )
            total = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        mine = torch.tensor(times.user + times.system, dtype=torch.float64)
        dist.all_reduce(mine)
        return total, float(mine), time.monotonic()
