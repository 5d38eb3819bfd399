"""Names and keys of segments, which segments there are, and what dead processes left behind.

A POSIX segment is /dev/shm/shmcache.NAME. System V keys are 31 bits of SHA-256("shmcache", form, name), the explicit key for a
sysv name like 0x53484d43. Listing reads headers only; gc removes nothing that a live process could still use.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any, Final

from . import _core
from .errors import LayoutMismatch, SegmentInvalid

__all__ = ["Found", "explicit_key", "full_name", "gc", "ipc_key", "list_segments", "shm_path", "sysvipc"]

SHM_DIR: Final = "/dev/shm"
PREFIX: Final = "shmcache."
PRIVATE: Final = ".shmcache-new."
ANON_KEYS: Final = _core.ANON_KEYS
"""Semaphore keys of anonymous segments: this plus 24 random bits, so that gc can tell them."""
GRACE: Final = 60.0
"""Seconds before gc takes something for a leftover: a creator needs far less."""


@dataclass(slots=True)
class Found:
    """One row of `list_segments`: a segment, or what claims to be one (`problem`)."""

    form: str
    name: str
    uid: int
    mode: int
    size: int
    header: dict[str, Any] = field(default_factory=dict)
    shm_id: int = -1
    shm_key: int = 0
    nattch: int | None = None
    problem: str | None = None


def ipc_key(form: str, name: str) -> int:
    """The System V key of a segment's semaphores, and of a sysv segment itself; 1 to 2**31-1."""
    digest = hashlib.sha256(b"\0".join((b"shmcache", form.encode(), name.encode()))).digest()
    return (int.from_bytes(digest[:4], "big") & 0x7FFFFFFF) or 1


def explicit_key(name: str) -> int | None:
    """The key that a sysv name like 0x53484d43 stands for, else None."""
    if not re.fullmatch(r"0[xX][0-9a-fA-F]+", name):
        return None
    if len(name) > 10:
        raise ValueError(f"segment name: a key from 0x1 to 0xffffffff wanted, {name!r} found")
    key = int(name, 16)
    if key == 0:
        raise ValueError(f"segment name: a key from 0x1 to 0xffffffff wanted, {name!r} found")
    return key - (1 << 32) if key >= 1 << 31 else key


def full_name(form: str, name: str) -> str:
    return f"{form}:{name}"


def shm_path(name: str) -> str:
    return f"{SHM_DIR}/{PREFIX}{name}"


def _posix() -> list[Found]:
    rows = []
    try:
        entries = list(os.scandir(SHM_DIR))
    except OSError:
        return []
    for entry in entries:
        if not entry.name.startswith(PREFIX):
            continue
        with contextlib.suppress(FileNotFoundError):
            st = entry.stat(follow_symlinks=False)
            row = Found("posix", entry.name[len(PREFIX) :], st.st_uid, st.st_mode & 0o7777, st.st_size)
            rows.append(row)
            try:
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                row.problem = error.strerror
                continue
            try:
                row.header = _core.read_header(fd, -1, st.st_size)
            except (SegmentInvalid, LayoutMismatch, OSError) as error:
                row.problem = str(error)
            finally:
                os.close(fd)
    return rows


def sysvipc(what: str) -> list[dict[str, int]]:
    try:
        with open(f"/proc/sysvipc/{what}") as f:
            names = f.readline().split()
            rows = [dict(zip(names, line.split(), strict=False)) for line in f]
        return [{name: int(text, 8 if name == "perms" else 10) for name, text in row.items()} for row in rows]
    except OSError:
        return []


def _sysv() -> list[Found]:
    rows = []
    for line in sysvipc("shm"):
        if line["size"] < _core.MIN_SIZE:
            continue
        row = Found("sysv", "", line["uid"], line["perms"] & 0o777, line["size"])
        row.shm_id, row.shm_key, row.nattch = line["shmid"], line["key"] & 0xFFFFFFFF, line["nattch"]
        try:
            row.header = _core.read_header(-1, row.shm_id, row.size)
        except OSError:
            continue  # not ours to look at: ipcs lists it
        except (SegmentInvalid, LayoutMismatch) as error:
            if "magic" in str(error):
                continue  # not one of this library
            row.problem = str(error)
        if row.header:
            row.form, _, row.name = row.header["name"].partition(":")
            if row.form not in ("sysv", "anon"):
                continue
        rows.append(row)
    return rows


def list_segments() -> list[Found]:
    """Every segment this process may look at, and POSIX files that only bear the name of one (`problem` says why)."""
    return sorted(_posix() + _sysv(), key=lambda f: (f.form, f.name, f.shm_id))


def gc(grace: float = GRACE, *, dry_run: bool = False) -> list[str]:
    """Remove what dead processes left: files of creators killed half-way, semaphore sets without a segment.

    Args: grace: seconds since the last change before something counts as left. dry_run: only say it.
    Returns: one line for each thing removed. Segments that are sound are never removed, used or not.
    """
    removed, now = [], time.time()
    uid = os.geteuid()
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(SHM_DIR)):
            if not entry.name.startswith(PRIVATE):
                continue
            with contextlib.suppress(FileNotFoundError):
                st = entry.stat(follow_symlinks=False)
                if st.st_uid != uid or now - st.st_mtime < grace:
                    continue
                removed.append(f"file {entry.path}: its creator died")
                if not dry_run:
                    os.unlink(entry.path)
    found = list_segments()
    for row in found:
        made = row.header.get("created_ns", 0) / 1e9
        if row.form == "anon" and row.nattch == 0 and row.uid == uid and now - made >= grace:
            removed.append(f"memory {row.shm_id} (anon:{row.name}): its creator died before it was in use")
            if not dry_run:
                with contextlib.suppress(OSError):
                    _core.shm_remove(row.shm_id)
                row.header = {}
    used = {f.header["sem_id"] for f in found if f.header}
    keys = {((ipc_key(f.form, f.name) + i) & 0x7FFFFFFF) or 1 for f in found for i in range(16)}
    for line in sysvipc("sem"):
        key, sem_id = line["key"] & 0xFFFFFFFF, line["semid"]
        ours = key & 0xFF000000 == ANON_KEYS or key in keys
        if not ours or sem_id in used or line["uid"] != uid or now - line["ctime"] < grace:
            continue
        try:
            if any(_core.sem_values(sem_id, line["nsems"])[:1]):
                continue  # somebody is creating
        except OSError as error:
            if error.errno in (errno.EIDRM, errno.EINVAL, errno.EACCES):
                continue
            raise
        removed.append(f"semaphore set {sem_id} (key 0x{key:08x}): its segment is gone")
        if not dry_run:
            with contextlib.suppress(OSError):
                _core.sem_remove(sem_id)
    return removed
