"""Mend a segment that nobody uses; see repair.c for what is kept and what is given up.

I1  Nobody uses it: no other process has it mapped as far as /proc shows, none holds a worker slot or can get one meanwhile.
I2  The lifecycle semaphore is held throughout, so neither a resize nor a second repair runs beside it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from . import _core, catalog, processes, segment
from .catalog import Found
from .errors import LayoutMismatch, LockTimeout, NotSupported, SegmentInvalid

__all__ = ["Repaired", "repair"]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did."""

    mended: list[dict[str, Any]]  #: code, shard, text of each thing mended
    lost: int  #: entries whose item could not be kept
    moved: int  #: items stored anew, because the log around them was damaged
    left: list[dict[str, Any]]  #: findings of the audit afterwards, as `check` gives them


def repair(found: Found) -> Repaired:
    """Mend what `check` finds, and check again.

    Raises: LockTimeout naming the processes that use the segment; SegmentInvalid or LayoutMismatch where its header or its
    semaphores are beyond repair; SegmentNotOurs, NotSupported for anonymous segments and copies. Nothing was changed then.
    A kill on the way leaves what it had mended; of a shard whose log was given up, items not yet stored anew are lost.
    """
    if found.form not in ("posix", "sysv"):
        raise NotSupported(f"repair: a posix or sysv segment wanted, {found.form}:{found.name} found")
    what = f"segment {found.form}:{found.name}"
    if not found.header:
        raise SegmentInvalid(f"{what}: a header to go by wanted, {found.problem} found; beyond repair: `shmcache rm --force`")
    if found.header["successor"] == _core.SUCCESSOR_REMOVED:
        raise SegmentInvalid(f"{what}: one in use wanted, one whose removal has begun found: `shmcache rm`")
    users = [str(p.pid) for p in processes.attached(found) if p.pid != os.getpid()]
    if users:
        raise LockTimeout(f"{what}: one that nobody uses wanted, attached by pid {', '.join(users)} found")
    table = _core.Table()
    try:
        att = segment.open_segment(found.form, found.name, {"mode": "a", "owners": (found.uid,)})
    except (SegmentInvalid, LayoutMismatch) as error:
        raise type(error)(f"{error}; beyond repair: `shmcache dump` or `save` what can be read, then `shmcache rm`") from error
    try:
        table._attach(att.fd, att.shm_id, att.size, att.sem_id, False, att.path, False, False)
        if catalog.replaced(att.header) and catalog.complete(found.form, found.name, att.header):
            raise SegmentInvalid(f"{what}: the segment of that name wanted, one that was replaced found")
        if not _core.lifecycle_enter(att.sem_id, 0):
            raise LockTimeout(f"{what}: one left alone wanted, a resize or another repair at work found")
        try:
            done = table._repair()
        finally:
            with contextlib.suppress(OSError):
                _core.lifecycle_leave(att.sem_id)
        if isinstance(done, int):
            raise LockTimeout(f"{what}: one that nobody uses wanted, a worker slot held by pid {done} found")
        mended, lost, moved = done
        return Repaired(mended, lost, moved, table._check())
    finally:
        table._detach()
        att.close()
