"""Users and processes as /proc and the user database show them: who owns a segment, who has it mapped, who holds a guard.

I1  What this user may not see is left out, never an error.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import catalog
from .catalog import Found

__all__ = ["Process", "attached", "attached_counts", "boot_time", "process", "user_name"]


class Process(NamedTuple):
    """A process as /proc shows it. `start` is in clock ticks since boot; `state` is its letter, "" when there is none."""

    pid: int
    command: str
    state: str
    start: int


def user_name(uid: int) -> str:
    """The user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def process(pid: int) -> Process | None:
    """The process, or None when there is none of that number here."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            head, _, tail = f.read().rpartition(b")")
        fields = tail.split()
        return Process(pid, head.partition(b"(")[2].decode("utf-8", "replace"), fields[0].decode(), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def boot_time() -> float:
    """Unix time this system booted: what start times in /proc count from."""
    with contextlib.suppress(OSError, ValueError), open("/proc/stat") as f:
        for line in f:
            if line.startswith("btime "):
                return float(line.split()[1])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _mapped() -> Iterator[tuple[int, str, int]]:
    """(pid, device or "sysv", inode or shared-memory id) of what processes map, as far as this user may see."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/maps", "rb") as f:
            for line in f:
                if b"/SYSV" in line or b"/shmcache." in line:
                    part = line.split(None, 5)
                    kind = "sysv" if part[5].startswith(b"/SYSV") else part[3].decode()
                    yield int(entry), kind, int(part[4])


def _mapping_of(found: Found) -> tuple[str, int] | None:
    if found.shm_id >= 0:
        return "sysv", found.shm_id
    if found.form == "posix":
        with contextlib.suppress(OSError):
            st = os.stat(catalog.shm_path(found.name), follow_symlinks=False)
            return f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}", st.st_ino
    return None


def attached(found: Found) -> list[Process]:
    """The processes that have the segment mapped, as far as /proc shows them to this user; one pass over /proc."""
    wanted = _mapping_of(found)
    pids = sorted({pid for pid, kind, number in _mapped() if (kind, number) == wanted})
    return [p for p in map(process, pids) if p is not None]


def attached_counts(rows: Iterable[Found]) -> list[int | None]:
    """How many attachments each row has: the kernel's count for System V, for POSIX the processes /proc shows to this user."""
    rows = list(rows)
    seen: set[tuple[int, str, int]] = set(_mapped()) if any(r.nattch is None for r in rows) else set()
    counts: list[int | None] = []
    for row in rows:
        place = _mapping_of(row)
        counts.append(row.nattch if row.nattch is not None else sum(1 for s in seen if s[1:] == place) if place else None)
    return counts
