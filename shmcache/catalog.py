"""Names and keys of segments, which segments there are, which replaced which, and what dead processes left behind.

A POSIX segment is /dev/shm/shmcache.NAME. System V keys are 31 bits of SHA-256("shmcache", form, name), the explicit key for a
sysv name like 0x53484d43. Listing reads headers only; gc removes nothing that a live process could still use.

A segment that a resize builds stands in state COPY, a POSIX one under a private name. It has replaced the old one from the
moment the old one's successor word names it (Z1 of resize.c). What follows, READY and its public name, is `complete`: done by the
resizer, or by whoever meets the word first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from . import _core
from .errors import LayoutMismatch, SegmentInvalid

__all__ = [
    "Found",
    "built_for",
    "complete",
    "explicit_key",
    "full_name",
    "gc",
    "ipc_key",
    "lineage_of",
    "list_segments",
    "private_path",
    "probe_keys",
    "replaced",
    "shm_path",
    "sysvipc",
    "unborn",
    "word_of",
]

SHM_DIR: Final = "/dev/shm"
PREFIX: Final = "shmcache."
PRIVATE: Final = ".shmcache-new."
ANON_KEYS: Final = _core.ANON_KEYS
"""Semaphore keys of anonymous segments: this plus 24 random bits, so that gc can tell them."""
_RESIZED: Final = re.compile(re.escape(PRIVATE) + r"r[0-9a-f]{16}\..*")
PROBES: Final = 16
"""Keys looked through when another set or segment has ours: 31 bits clash once in 2**31 pairs."""
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


def probe_keys(form: str, name: str) -> list[int]:
    """The keys that a segment of this name may have, in the order in which they are looked through."""
    base = ipc_key(form, name)
    return [((base + i) & 0x7FFFFFFF) or 1 for i in range(PROBES)]


def unborn(error: SegmentInvalid) -> bool:
    """Whether a header was refused for being unfinished, not for being wrong."""
    return "state" in str(error) or "magic: found 0000000000000000" in str(error)


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


# -- who replaced whom ---------------------------------------------------------------------------------------------------------


def word_of(header: dict[str, Any]) -> int:
    """What the successor word of a segment holds that this one replaces."""
    return int.from_bytes(header["uuid"][:8], "little")


def lineage_of(header: dict[str, Any]) -> int:
    """One number for all segments of a chain of resizes."""
    return int(header["lineage"]) or word_of(header)


def replaced(header: dict[str, Any]) -> bool:
    """Whether another segment has the place of this one, by a header as `_core.read_header` gives it."""
    return int(header["successor"]) > _core.SUCCESSOR_REMOVED


def private_path(name: str, word: int) -> str:
    """Where the POSIX segment whose uuid begins with `word` is built, before it has the place of `name`."""
    return f"{SHM_DIR}/" + f"{PRIVATE}r{word:016x}.{name}"[:254]


def built_for(file: str, name: str) -> bool:
    """Whether a file of this name is what a resize of POSIX segment `name` builds."""
    return bool(_RESIZED.fullmatch(file)) and file == os.path.basename(private_path(name, int(file[len(PRIVATE) + 1 :][:16], 16)))


def complete(form: str, name: str, header: dict[str, Any]) -> bool:
    """Give the segment that replaced the one of `header` its place under the name; whether the name leads elsewhere now.

    Safe to do twice, at once, and by any process that may write both. Raises: PermissionError where another user owns them.
    """
    word = int(header["successor"])
    if form == "sysv":
        return any(_core.publish(-1, shm_id) for shm_id, _ in _of_lineage(header, word))
    path = private_path(name, word)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _posix_word(name) != word_of(header)
    try:
        found = _core.read_header(fd, -1, os.fstat(fd).st_size, True)
        if word_of(found) != word or lineage_of(found) != lineage_of(header) or not _core.publish(fd, -1):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, shm_path(name))
        return True
    except (SegmentInvalid, LayoutMismatch):
        return False
    finally:
        os.close(fd)


def _file_header(path: str) -> dict[str, Any]:
    """The header of a POSIX segment, built or in use."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _core.read_header(fd, -1, os.fstat(fd).st_size, True)
    finally:
        os.close(fd)


def _posix_word(name: str) -> int:
    """The uuid word of the segment that has the name, 0 if none has."""
    try:
        return word_of(_file_header(shm_path(name)))
    except (SegmentInvalid, LayoutMismatch, OSError):
        return 0


def _of_lineage(header: dict[str, Any], word: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """System V segments of this user, built or in use, with this uuid word and the lineage of `header`."""
    for line, found in _sysv_headers():
        if word_of(found) == word and lineage_of(found) == lineage_of(header):
            yield line["shmid"], found


def _sysv_headers() -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    for line in sysvipc("shm"):
        if line["size"] >= _core.MIN_SIZE:
            with contextlib.suppress(SegmentInvalid, LayoutMismatch, OSError):
                yield line, _core.read_header(-1, line["shmid"], line["size"], True)


# -- listing -------------------------------------------------------------------------------------------------------------------


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
    return sorted(_posix() + _sysv(), key=lambda f: (f.form, f.name, bool(f.header) and replaced(f.header), f.shm_id))


def gc(grace: float = GRACE, *, dry_run: bool = False, name: str | None = None) -> list[str]:
    """Remove what dead processes left: files of creators killed half-way, semaphore sets without a segment.

    Args: grace: seconds since the last change before something counts as left. dry_run: only say it. name: only what belongs to
    segments of this name, in use or not.
    Returns: one line for each thing removed. Segments that are sound are never removed, used or not.
    """
    removed, now = _gc_resizes(grace, dry_run, name), time.time()
    uid = os.geteuid()
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(SHM_DIR)):
            if not entry.name.startswith(PRIVATE) or _RESIZED.fullmatch(entry.name) or not _of_name(entry.name, name):
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
    names = {(f.form, f.name) for f in found} if name is None else {("posix", name), ("sysv", name)}
    keys = {key for of in names for key in probe_keys(*of)}
    for line in sysvipc("sem"):
        key, sem_id = line["key"] & 0xFFFFFFFF, line["semid"]
        ours = key in keys or (key & 0xFF000000 == ANON_KEYS and name is None)
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


def _building(header: dict[str, Any]) -> bool:
    """Whether a live process is at work on it: it holds the lifecycle semaphore of what it builds."""
    try:
        return any(_core.sem_values(header["sem_id"], header["n_sems"])[:1])
    except OSError:
        return False


def _of_name(file: str, name: str | None) -> bool:
    return name is None or file.endswith(f".{name}")


def _gc_resizes(grace: float, dry_run: bool, name: str | None) -> list[str]:
    """What killed resizers left: a finished copy gets its place, any other goes, as does what a finished one replaced."""
    lines: list[str] = []
    now, uid = time.time(), os.geteuid()
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(SHM_DIR)):
            if not _RESIZED.fullmatch(entry.name) or not _of_name(entry.name, name):
                continue
            with contextlib.suppress(FileNotFoundError):
                st = entry.stat(follow_symlinks=False)
                if st.st_uid != uid or _gc_place(entry.path, lines, dry_run) or now - st.st_mtime < grace:
                    continue
                lines.append(f"file {entry.path}: its resizer died")
                if not dry_run:
                    os.unlink(entry.path)
    rows = [
        (line, header)
        for line, header in _sysv_headers()
        if line["uid"] == uid and header["form"] == _core.FORM_SYSV and name in (None, header["name"].partition(":")[2])
    ]
    by_word = {word_of(header): (line, header) for line, header in rows}
    named = {int(header["successor"]) for _, header in rows}
    for line, header in rows:
        what = f"segment {header['name']} (id {line['shmid']})"
        if header["state"] == _core.STATE_COPY and word_of(header) in named:
            lines.append(f"{what}: complete, its resizer died; it has its place")
            if not dry_run:
                _core.publish(-1, line["shmid"])
        elif (
            header["state"] == _core.STATE_COPY and now - line["ctime"] >= grace and not _building(header)
        ) or (replaced(header) and int(header["successor"]) in by_word and not _building(header)):
            lines.append(f"{what}: " + ("replaced by another size" if replaced(header) else "its resizer died"))
            if not dry_run:
                with contextlib.suppress(OSError):
                    _core.shm_remove(line["shmid"])
    names = {header["name"].partition(":")[2] for _, header in rows} | ({name} if name else set())
    keys = {key & 0xFFFFFFFF for one in names for key in probe_keys("sysv", one)}
    for line in sysvipc("shm"):
        left = line["key"] & 0xFFFFFFFF in keys and line["uid"] == uid and line["nattch"] == 0
        if left and now - line["ctime"] >= grace and not os.path.exists(f"/proc/{line['cpid']}") and _unborn(line):
            lines.append(f"shared memory {line['shmid']} (key 0x{line['key'] & 0xFFFFFFFF:08x}): its maker died")
            if not dry_run:
                with contextlib.suppress(OSError):
                    _core.shm_remove(line["shmid"])
    return lines


def _unborn(line: dict[str, int]) -> bool:
    """Whether shared memory is still all zero where a header goes, or in state INIT."""
    try:
        _core.read_header(-1, line["shmid"], line["size"], True)
    except SegmentInvalid as error:
        return unborn(error)
    except (LayoutMismatch, OSError):
        pass
    return False


def _gc_place(path: str, lines: list[str], dry_run: bool) -> bool:
    """True: the private file is at work, or has got its place; False: nobody needs it."""
    try:
        built = _file_header(path)
        name = built["name"].partition(":")[2]
        if _building(built):
            return True
        header = _file_header(shm_path(name))
    except (SegmentInvalid, LayoutMismatch, OSError):
        return False
    if header["successor"] != word_of(built):
        return False
    lines.append(f"segment posix:{name}: complete, its resizer died; it has its place")
    return dry_run or complete("posix", name, header)
