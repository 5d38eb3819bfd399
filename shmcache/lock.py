"""lock, and the leases that it and get_or_set take: over the lease primitives of any engine.

I1  A lease is released by the process that took it: a child forked meanwhile, which has a copy of the owner
    word, neither extends nor releases it.
I2  An exception from outside, such as KeyboardInterrupt, leaves no lease behind, at whatever line of the
    taking it arrives: the owner word is in `_owners` before anybody sees the lease taken.
I3  Lease names have a domain: `F:` + key for fillers, `L:` + name for locks; a namespace puts its prefix
    first.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from datetime import timedelta
from typing import Any, Final, NamedTuple, Self

from .arguments import MAX_TTL, Key, check_key, key_text
from .engine import Capability, Engine
from .errors import EngineDown, LockTimeout, ShmCacheError

__all__ = ["POLL", "Lease", "Lock", "seconds_of"]

POLL: Final = 1.0
"""Seconds of one wait for a filler or a lock; the engine returns earlier on release. Bounds a lost
wake-up."""


def seconds_of(name: str, value: Any, least: float) -> float:
    """`value` as seconds between `least` (0: included, else excluded) and ten years."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: seconds as a number wanted, {type(value).__name__} found")
    if not (0 < value <= MAX_TTL or value == least == 0):
        raise ValueError(f"{name}: 0 to {MAX_TTL:.0f} seconds wanted, {value!r} found")
    return float(value)


class Lease:
    """One attempt at a lease: what it took it gives back, whether it was told so or not (I1)."""

    def __init__(self, engine: Engine, name: bytes) -> None:
        self._engine, self._name, self._pid = engine, name, os.getpid()
        self._owners: list[int] = []

    def take(self, seconds: float) -> tuple[int, int] | bool | None:
        """As Engine._lease_take. Whatever is raised: `release` afterwards."""
        taken = self._engine._lease_take(self._name, seconds, self._owners)
        if not isinstance(taken, tuple):
            self._owners.clear()
        return taken

    def extend(self, seconds: float) -> bool:
        return os.getpid() == self._pid and self._engine._lease_extend(self._name, self._owners[-1], seconds)

    def release(self) -> None:
        """Give back what was taken. Interrupted, or not answered: again, it releases its own only."""
        if self._owners and os.getpid() == self._pid:
            self._engine._lease_release(self._name, self._owners[-1])
            self._owners.clear()


class _Held(NamedTuple):
    lease: Lease
    fence: int
    thread: int


class Lock:
    """A lock by name across processes, threads and tasks; a context manager. What `Engine.lock` returns.

    Args: name: str or bytes, 1 to 65,535 bytes; other than keys of the same name. lease: seconds after which
    the lock is free again whoever holds it (`extend` starts them anew). timeout: seconds `with` waits; None =
    for ever, 0 = one attempt. Entering raises LockTimeout when the lock is not granted in time. It is not
    re-entrant: entering again while it is held waits like anybody else. Leaving releases what this object
    took, and nothing else: after the end of the lease the lock may be another's, and stays so. A forked child
    does not hold its parent's lock. With the server down, entering and leaving raise EngineDown, whatever
    on_down says; leaving by an exception of the block's own lets that one go on.
    """

    def __init__(self, engine: Engine, name: Key, lease: float, timeout: float | None) -> None:
        if not engine._can(Capability.LOCK):
            engine._unsupported("lock", Capability.LOCK)
        self._engine = engine
        self._name = b"L:" + check_key(name)
        self._lease = seconds_of("lease", lease, 1)
        self._timeout = None if timeout is None else seconds_of("timeout", timeout, 0)
        self._held: list[_Held] = []  # several only where a lease ended unnoticed

    def __enter__(self) -> Self:
        end = math.inf if self._timeout is None else time.monotonic() + self._timeout
        while True:
            lease = Lease(self._engine, self._name)
            try:
                taken = lease.take(self._lease)
                if isinstance(taken, tuple):
                    self._held.append(_Held(lease, taken[1], threading.get_ident()))
                    return self
            except BaseException:
                for held in [held for held in self._held if held.lease is lease]:
                    self._held.remove(held)
                with contextlib.suppress(ShmCacheError):
                    lease.release()
                raise
            left = end - time.monotonic()
            if left <= 0:
                state = "held by another" if taken is False else "no room in the lease table"
                raise LockTimeout(
                    f"lock {key_text(self._name[2:])!r:.80}: granted within {self._timeout} seconds wanted,"
                    f" {state} found"
                )
            if taken is False:
                self._engine._lease_wait(self._name, min(left, POLL))
            else:  # any lease may be the one that makes room
                time.sleep(min(left, 0.01))

    def __exit__(self, kind: object = None, *exc: object) -> None:
        if not self._held:
            return
        mine = [held for held in self._held if held.thread == threading.get_ident()]
        held = (mine or self._held)[-1]
        try:
            held.lease.release()
        except Exception as error:
            if kind is None or not isinstance(error, EngineDown):  # else what the block raised goes before
                raise
        except BaseException:  # an interrupt
            held.lease.release()
            raise
        finally:
            self._held.remove(held)

    def extend(self, lease: float | None = None) -> bool:
        """Let the lock end `lease` seconds (None: as at first) from now: True, or False if it is lost."""
        seconds = self._lease if lease is None else seconds_of("lease", lease, 1)
        return bool(self._held) and self._held[-1].lease.extend(seconds)

    @property
    def token(self) -> int | None:
        """Fencing token: grows with every grant, so that a store can refuse a late holder. None: not
        entered."""
        return self._held[-1].fence if self._held else None

    def __repr__(self) -> str:
        return f"<Lock {key_text(self._name[2:])!r:.80} token={self.token}>"
