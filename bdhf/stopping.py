"""When to stop: a signal, the word of another process, or the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from bdhf.training import Outcome

#: When this process began, as far as it can tell; a ``time_limit`` counts from here.
PROCESS_START = time.time()

#: Seconds between two looks at the file; on a network file system a look takes milliseconds.
_GLANCE = 0.5


class Stopping:
    """Asked before every update, it says whether to stop, and why.

    As a context manager it catches signals, so that training can stop after the current update; a
    second SIGINT interrupts at once.

    Args:
        time_limit: seconds after ``started`` when it is time to stop; None: no limit.
        started: in seconds since the epoch, so that it means the same to all processes.
        file: where there is such a file, one stops; a signal makes it, but for SIGUSR2. So a signal
            to one process of a sweep stops all of them.
        parent: the process that should have started this one; when it is gone, one stops too.
        signals: which are caught; SIGHUP not under nohup.
    """

    def __init__(
        self,
        time_limit: float | None = None,
        started: float = PROCESS_START,
        file: Path | None = None,
        parent: int | None = None,
        signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    ) -> None:
        self._limit, self._started, self._file, self._parent = time_limit, started, file, parent
        self._signals = tuple(signals)
        self._outcome: Outcome | None = None
        self._last_look = -_GLANCE
        self._previous: dict[int, Any] = {}
        self._caught: int | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # only there it is allowed
            for number in self._signals:
                before = signal.getsignal(number)
                if number == signal.SIGHUP and before == signal.SIG_IGN:  # nohup
                    continue
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Give the signal that was caught, if any, to whoever was to get it before."""
        if self._caught is not None:
            handler = self._previous[self._caught]
            if callable(handler):
                handler(self._caught, None)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._caught == number:
            raise KeyboardInterrupt
        self._caught = number
        self._outcome = _by_signal(number)
        if self._file is not None and number != signal.SIGUSR2:
            self._file.write_text(str(number))

    def __call__(self) -> Outcome | None:
        if self._outcome is None:
            self._outcome = self._look_around()
        return self._outcome

    @property
    def orphaned(self) -> bool:
        """Whether the process that should have started this one is gone."""
        return self._parent is not None and os.getppid() != self._parent

    def _look_around(self) -> Outcome | None:
        if self.orphaned:
            return Outcome("stopped", "the sweep's process is gone", 1)
        if self._limit is not None and time.time() - self._started >= self._limit:
            return Outcome("stopped", f"time_limit={self._limit:g} seconds")
        if self._file is not None and time.monotonic() - self._last_look >= _GLANCE:
            self._last_look = time.monotonic()
            if self._file.exists():
                return _by_signal(int(self._file.read_text() or signal.SIGTERM))
        return None


def _by_signal(number: int) -> Outcome:
    """The exit code is the one with which shells report a signal."""
    return Outcome("stopped", f"signal {signal.Signals(number).name}", 128 + number)
