"""Forked children for the examples: started, watched, stopped, and none of them left behind.

I1  A child's process id is on the parent's list before a signal can interrupt the parent.
I2  A child never runs its parent's clean-up: it leaves by os._exit, whatever its work raises.
I3  A child whose parent is gone, also by SIGKILL, stops by itself: it asks `Stop` between two pieces of work.

Not here: daemons, privilege drop, restarting (the caller decides what a death means).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a run from outside: Ctrl-C, kill, a closed terminal."""

STOP_S = 5.0
"""Seconds a child has between SIGTERM and SIGKILL; an idle one looks at its `Stop` five times a second."""


class Interrupted(BaseException):
    """One of SIGNALS arrived; raised once, later ones are ignored so that clean-up runs to its end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """True once SIGTERM has arrived or the parent is gone."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._asked = False

    def ask(self, number: int = 0, frame: FrameType | None = None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or os.getppid() != self._parent


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGNALS into Interrupted inside the block; the former handlers return at its end. Main thread."""
    former = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Hold SIGNALS back until the end of the block: what is made inside is registered before they act."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Cleanup(contextlib.ExitStack):
    """An ExitStack that no signal cuts short: SIGNALS are held back until its last callback has run."""

    def __exit__(self, *error: Any) -> bool | None:
        with blocked():
            return super().__exit__(*error)


class Children:
    """The children of one process, by name; leaving the `with` block stops those that still run."""

    def __init__(self) -> None:
        self._pids: dict[int, str] = {}

    def spawn(self, name: str, work: Callable[[Stop], None]) -> int:
        """Fork a child that runs `work(stop)` and exits with 0, or with 1 and a traceback if it raises.

        In the child SIGINT and SIGHUP are ignored (a terminal sends them to all, the parent decides);
        SIGTERM sets `stop`. Returns: the child's process id.
        """
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with blocked():
            pid = os.fork()
            if pid:
                self._pids[pid] = name
                return pid
            status = 1
            try:
                stop = Stop(parent)
                signal.signal(signal.SIGTERM, stop.ask)  # never SIG_IGN in between: that drops a pending one
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                work(stop)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def reap(self) -> list[tuple[str, int, str]]:
        """Collect, without waiting, children that have ended: (name, process id, "" or how it failed)."""
        ended = []
        for pid, name in list(self._pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._pids[pid]
                code = os.waitstatus_to_exitcode(status)
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                ended.append((name, pid, how if code else ""))
        return ended

    def names(self) -> list[str]:
        """The children not yet collected."""
        return list(self._pids.values())

    def stop(self) -> list[tuple[str, int, str]]:
        """SIGTERM to all, SIGKILL to what is left after STOP_S seconds; returns them as `reap`."""
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)
        ended, deadline = self.reap(), time.monotonic() + STOP_S
        while self._pids:
            if time.monotonic() > deadline:
                for pid in self._pids:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
            ended += self.reap()
        return ended

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        with blocked():
            self.stop()
