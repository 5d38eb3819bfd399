"""The near tier of a tiered engine: copies of what the far tier has, and the marks that keep them true.

A mark is a value that nobody else has. It is put into L1 before L2 is written, or read for a copy, and a copy
is stored only over the maker's own mark, by cas. A mark lives `hold` = min(1, l1_ttl / 5) seconds, a copy
l1_ttl - hold. What follows from that is said in tiered.py.

I1  No call but `plant` raises for want of room, guard or server: L1 then has nothing, or what there was.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable
from typing import Any, Final

from ..arguments import MISS, Key
from ..engine import Capability, Engine
from ..errors import EngineDown, GuardLost, LockTimeout, NoSpace

__all__ = ["NEEDED", "Near", "is_mark"]

MARK: Final = b"\xffshmcache.tiered\xff"
"""How a mark begins; kind and 16 random bytes follow. A bytes value that begins so is never copied."""
FILL: Final = MARK + b"F"
"""Somebody asks L2 for a copy: wait for it."""
WRITE: Final = MARK + b"W"
"""Somebody writes to L2: ask L2."""
DIRECT: Final = MARK + b"D"
"""L2 has what is not copied: ask L2."""
NEEDED: Final = Capability.CAS | Capability.EXPIRE | Capability.SUBSECOND | Capability.ITERATE
"""What L1 has to be able to do."""
_FAILS: Final = (NoSpace, LockTimeout, GuardLost, EngineDown, ValueError, TypeError)
"""What a store into L1 may raise. ValueError: key or value too long for it. TypeError: its codec cannot."""


def is_mark(value: Any) -> bool:
    return type(value) is bytes and value.startswith(MARK)


class Near:
    """L1 as a tiered engine uses it.

    Args: engine: L1. head: what stands before each key in it. l1_ttl: seconds.
    Keys (`name`) have the head already. Safe for threads and processes as far as L1 is.
    """

    def __init__(self, engine: Engine, head: bytes, l1_ttl: float) -> None:
        self.engine = engine
        self.head = head
        self.hold = min(1.0, l1_ttl / 5)
        self.life = l1_ttl - self.hold
        self.get = engine.get

    def look(self, name: bytes) -> Any:
        """A copy, a mark, or MISS."""
        try:
            return self.get(name, MISS)
        except (EngineDown, ValueError):
            return DIRECT

    def look_many(self, names: list[bytes]) -> dict[Key, Any]:
        try:
            return self.engine.get_many(names)
        except (EngineDown, ValueError):
            return dict.fromkeys(names, DIRECT)

    def plant(self, name: bytes) -> bytes | None:
        """Put a writer's mark in the place of what is there. None: there is no room for one, and no copy
        either.

        Raises: LockTimeout, GuardLost, EngineDown; L1 has what there was.
        """
        mark = WRITE + os.urandom(16)
        try:
            self.engine.set(name, mark, self.hold)
            return mark
        except NoSpace:
            self.engine.delete(name)
        except ValueError:  # such a key has no copy
            pass
        return None

    def plant_fill(self, name: bytes) -> bytes | None:
        """Put a filler's mark where nothing is. None: something is there, or there is no room."""
        mark = FILL + os.urandom(16)
        try:
            return mark if self.engine.add(name, mark, self.hold) else None
        except _FAILS:
            return None

    def settle(self, name: bytes, mark: bytes | None, value: Any, left: float | None) -> bool:
        """Replace our mark: by a copy of `value`, which has `left` seconds (None or inf: for ever); by DIRECT
        where it is not to be copied; by nothing for MISS. False: the mark was no longer there."""
        if mark is None:
            return False
        life = min(self.life, (math.inf if left is None else left) - self.hold)
        try:
            found = self.engine.gets(name, MISS)
            if found is MISS or type(found[0]) is not bytes or found[0] != mark:
                return False
            if value is MISS:
                return self.engine.cas(name, mark, found[1], expire_at=0) is True
            if type(value) is not int and life > 0 and not is_mark(value):
                with contextlib.suppress(*_FAILS):
                    return self.engine.cas(name, value, found[1], life) is True
            return self.engine.cas(name, DIRECT, found[1], self.life) is True
        except _FAILS:
            return False

    def drop(self, name: bytes) -> None:
        """Remove what is there. Where that fails, a mark that stands there sends readers to L2 until it
        dies."""
        with contextlib.suppress(*_FAILS):
            self.engine.delete(name)

    def wait(self, name: bytes, mark: bytes) -> Any:
        """What replaced the mark of a filler, at most `hold` real seconds later; MISS if nothing did."""
        end, step = time.monotonic() + self.hold, 0.0002
        while time.monotonic() < end:
            time.sleep(step)
            found = self.look(name)
            if found is MISS or found != mark:
                return found
            step = min(step * 2, 0.005)
        return MISS

    def drop_match(self, glob: bytes) -> None:
        """Remove the copies and marks of all keys that match. Raises: what delete_match of L1 raises."""
        self.engine.delete_match(self.head + glob)

    def drop_all(self, names: Iterable[bytes]) -> None:
        for name in names:
            self.drop(name)
