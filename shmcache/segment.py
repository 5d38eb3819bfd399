"""Create, attach and remove segments: POSIX, System V, anonymous.

I1  The semaphore set elects: whoever holds semaphore 0 (lifecycle, SEM_UNDO) and finds no READY segment creates it. A creator
    that dies gives the semaphore back by its death; what it left half-made is taken away by the next.
I2  A POSIX segment is made under a private name and published by a rename that replaces nothing, so an attacher sees a
    finished one or none. A System V segment stands in state INIT until it is READY.
I3  Attach creates nothing, follows no symbolic link and adopts nothing whose owner or permissions are not as asked; the
    semaphore set must be the very one the header names (key, id, change time, owner, size).
I4  Only removal.unlink(), removal.remove(), catalog.gc() and a failed creator remove anything.
I5  What a resize builds is no segment of the name until it has replaced the one that is (catalog.py).

Attaching needs neither posix_ipc nor sysv_ipc. Names and keys are catalog's, fresh kernel objects making's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from . import _core
from .catalog import (
    ANON_KEYS,
    PRIVATE,
    PROBES,
    SHM_DIR,
    complete,
    explicit_key,
    full_name,
    private_path,
    probe_keys,
    replaced,
    shm_path,
    sysvipc,
    unborn,
    word_of,
)
from .errors import LayoutMismatch, SegmentInvalid, SegmentNotOurs, ShmCacheError
from .making import fresh_file, make_set, make_shm, prepare_set
from .refusal import no_memory, refused
from .removal import forget_anon, remove, require_packages, sets_in_use, unlink
from .wish import Wish, check_header, refuse_mode, refuse_owner

__all__ = ["Attachment", "forget_anon", "open_segment", "remove", "require_packages", "sysv_keys", "unlink"]

PATIENCE: Final = 10.0
"""Seconds an opener waits for a creator that is alive."""
_RETRY: Final = (errno.EIDRM, errno.EINVAL, errno.EEXIST, errno.ENOENT)


@dataclass(slots=True)
class Attachment:
    """What Table._attach maps: an open descriptor (to be closed after mapping) or a shared-memory id, and the semaphores."""

    form: str
    name: str
    size: int
    sem_id: int
    header: dict[str, Any]
    mode: int = 0  # permissions as the system has them; of an anonymous one nobody else knows
    fd: int = -1
    shm_id: int = -1
    path: str | None = None
    created: bool = False
    file: tuple[int, int] | None = None
    """Device and inode of a POSIX segment: what its name must still stand for when it is removed."""

    def close(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _header_sem(header: dict[str, Any], wish: Wish) -> int:
    """The set the header names, if it is that very set; -1 in mode r without it."""
    what, sem_id = f"semaphores of segment {header['name']}", int(header["sem_id"])
    if header["successor"] == _core.SUCCESSOR_REMOVED:
        return -1  # nobody writes into it any more
    try:
        found = _core.sem_stat(sem_id)
    except OSError as error:
        if wish.mode == "r":
            return -1
        if error.errno == errno.EACCES:
            raise SegmentNotOurs(f"{what}: a set that uid {os.geteuid()} may use wanted, refused by the kernel found") from error
        if error.errno not in (errno.EIDRM, errno.EINVAL):
            raise
        raise SegmentInvalid(
            f"{what}: set {sem_id} wanted, none found: somebody removed it; `shmcache rm` removes the segment"
        ) from error
    wanted = {"n_sems": header["n_sems"], "ctime": header["sem_ctime"], "key": header["sem_key"]}
    for key, value in wanted.items():
        if found[key] != value:
            if wish.mode == "r":
                return -1
            raise SegmentInvalid(f"{what}: {key} {value} wanted, {found[key]} found: the set was replaced; `shmcache rm`")
    refuse_owner(what, found["uid"], wish, found["cuid"])
    refuse_mode(what, found["mode"], wish)
    return sem_id


# -- the semaphore set, which elects -------------------------------------------------------------------------------------------


def _find_set(wish: Wish) -> tuple[int, int, bool]:
    """(id, key, made) of the set of this name, made if there is none. OSError: somebody else was faster, start over."""
    free, used = 0, None
    for key in probe_keys(wish.form, wish.name):
        try:
            sem_id = _core.sem_get(key, 0, 0)
            found = _core.sem_stat(sem_id)
        except OSError as error:
            if error.errno == errno.ENOENT:
                free = free or key
                break
            if error.errno == errno.EACCES:
                continue
            raise
        used = sets_in_use(full_name(wish.form, wish.name)) if used is None else used
        if sem_id not in used and found["uid"] in wish.owners and found["cuid"] in wish.owners | {0}:
            return sem_id, key, False
    if not free:
        raise SegmentNotOurs(f"semaphores of segment {wish.name}: a free key among {PROBES} wanted, none found")
    return make_set(wish, free), free, True


@contextlib.contextmanager
def _elected(wish: Wish, until: float) -> Iterator[tuple[int, int]]:
    """Holds the lifecycle semaphore of the name's set. OSError with an errno of _RETRY: start over.

    A set made here goes again when what is done inside fails; one that was found stays.
    """
    n_sems = wish.plan["n_sems"]
    sem_id, key, made = _find_set(wish)
    entered = False
    try:
        while not (entered := _core.lifecycle_enter(sem_id, 0.25)):
            if time.monotonic() > until:
                raise ShmCacheError(
                    f"segment {wish.name}: its creator to finish within {PATIENCE:g} s wanted, set {sem_id} still held found"
                )
        if _core.sem_stat(sem_id)["n_sems"] != n_sems:
            _core.sem_remove(sem_id)  # left by a creator of another geometry; waiters meet EIDRM and start over
            raise OSError(errno.EIDRM, "semaphore set of another size")
        yield sem_id, key
    except BaseException:
        with contextlib.suppress(OSError):
            if made and (entered or _core.lifecycle_enter(sem_id, 0)):
                _core.sem_remove(sem_id)
        raise
    finally:
        with contextlib.suppress(OSError):
            if entered:
                _core.lifecycle_leave(sem_id)


# -- POSIX ---------------------------------------------------------------------------------------------------------------------


def _attach_posix(wish: Wish, word: int = 0) -> Attachment | None:
    """word: not what the name leads to but what replaced it, still under its private name."""
    path = private_path(wish.name, word) if word else shm_path(wish.name)
    what = f"segment {full_name('posix', wish.name)}"
    flags = (os.O_RDONLY if wish.mode == "r" else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise SegmentNotOurs(
            f"{what}: a file that uid {os.geteuid()} may open wanted, permission denied found; its creator opens with "
            "owner=user or perms="
        ) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise SegmentNotOurs(f"{what}: a regular file wanted, {error.strerror} found") from error
        raise OSError(error.errno, f"open: {error.strerror}") from error
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise SegmentNotOurs(f"{what}: a regular file wanted, file type 0{stat.S_IFMT(st.st_mode):o} found")
        refuse_owner(what, st.st_uid, wish)
        refuse_mode(what, st.st_mode, wish)
        header = _core.read_header(fd, -1, st.st_size, bool(word))
        if header["size"] != st.st_size:
            raise SegmentInvalid(f"{what}: {header['size']} bytes as in its header wanted, {st.st_size} found")
        if replaced(header) and (found := _successor_posix(wish, header)) is not None:
            os.close(fd)
            return found
        check_header(header, wish)
        try:
            sem_id = _header_sem(header, wish)
        except SegmentInvalid:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == st.st_ino:
                    raise
            raise OSError(errno.EIDRM, "replaced or removed meanwhile") from None
        file, mode = (st.st_dev, st.st_ino), stat.S_IMODE(st.st_mode)
        return Attachment(
            "posix", wish.name, st.st_size, sem_id, header, mode, fd=fd, path=None if word else path, file=file
        )  # fmt: skip
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise


def _successor_posix(wish: Wish, header: dict[str, Any]) -> Attachment | None:
    """What replaced the segment of `header`, while that still has the name; None where nothing did: rot."""
    with contextlib.suppress(PermissionError):  # the name is another user's to change
        if wish.mode != "r" and complete("posix", wish.name, header):
            raise OSError(errno.EIDRM, "replaced by another size")
    try:
        return _attach_posix(wish, header["successor"])
    except SegmentInvalid:
        return None


def _create_posix(wish: Wish, sem_id: int, sem_key: int) -> dict[str, Any]:
    private = f"{SHM_DIR}/" + f"{PRIVATE}{os.getpid()}.{secrets.token_hex(4)}.{wish.name}"[:254]
    with fresh_file(wish, private) as fd:
        header = _core.format(fd, -1, wish.fields(sem_id, sem_key, 0, prepare_set(wish, sem_id)))
        _core.rename_noreplace(private, shm_path(wish.name))
        return header


# -- System V ------------------------------------------------------------------------------------------------------------------


def sysv_keys(name: str) -> list[int]:
    key = explicit_key(name)
    return probe_keys("sysv", name) if key is None else [key]


def _find_sysv(wish: Wish) -> tuple[int, int, dict[str, Any] | None, int]:
    """(id, key, header, size) of this name's segment; id -1: none, key is a free one; header None: still in state INIT.

    A resize moves a segment to a later key, the first after the last, and makes the new one before it removes the old: who looks
    in that order, twice around, meets it unless sixteen resizes overtake him.
    """
    free = barred = 0
    old = half = None
    built: dict[int, tuple[int, int, dict[str, Any], int]] = {}
    for key in sysv_keys(wish.name) * 2:
        what = f"segment {full_name('sysv', wish.name)}"
        try:
            shm_id = _core.shm_get(key, 0, 0)
            found = _core.shm_stat(shm_id)
        except OSError as error:
            if error.errno == errno.ENOENT:
                free = free or key
                continue  # ours may lie further on: what had this key when it was made is gone
            if error.errno == errno.EACCES:
                barred = barred or (0 if free else key)
                continue
            if error.errno in _RETRY:
                return _find_sysv(wish)
            raise
        try:
            header = _core.read_header(-1, shm_id, found["size"], True)
        except (SegmentInvalid, LayoutMismatch, OSError) as error:
            if free:
                continue  # beyond a free key only what bears our name is ours
            refuse_owner(what, found["uid"], wish, found["cuid"])
            refuse_mode(what, found["mode"], wish)
            if not isinstance(error, SegmentInvalid):
                raise
            if unborn(error):
                half = half or (shm_id, key, None, found["size"])
                continue
            raise SegmentInvalid(f"{what} (key 0x{key & 0xFFFFFFFF:x}): {error}") from None
        if header["name"] == full_name("sysv", wish.name):
            refuse_owner(what, found["uid"], wish, found["cuid"])
            refuse_mode(what, found["mode"], wish)
            row = shm_id, key, header, found["size"]
            if header["state"] == _core.STATE_COPY:
                built[word_of(header)] = row
            elif replaced(header):
                old = row
            else:
                return row
        elif explicit_key(wish.name) is not None:
            raise SegmentInvalid(f"{what}: name {wish.name!r} in its header wanted, {header['name']!r} found")
    if old is not None:
        if wish.mode != "r" and complete("sysv", wish.name, old[2]):
            raise OSError(errno.EIDRM, "replaced by another size")
        return built.get(old[2]["successor"], old)
    if half is not None:
        return half
    if barred:  # most likely the segment of this name: a process that dropped its privileges must not make one of its own
        owner = next((row["uid"] for row in sysvipc("shm") if row["key"] & 0xFFFFFFFF == barred & 0xFFFFFFFF), "another")
        raise SegmentNotOurs(
            f"segment sysv:{wish.name}: key 0x{barred & 0xFFFFFFFF:x} that uid {os.geteuid()} may use wanted, one of uid {owner} "
            "found; a server that drops privileges opens with owner=user"
        )
    if not free:
        raise SegmentNotOurs(f"segment sysv:{wish.name}: a free key among {PROBES} wanted, none found")
    return -1, free, None, 0


def _attach_sysv(wish: Wish) -> Attachment | None:
    shm_id, _, header, size = _find_sysv(wish)
    if shm_id < 0 or header is None:
        return None
    check_header(header, wish)
    try:
        sem_id = _header_sem(header, wish)
    except SegmentInvalid:
        if _find_sysv(wish)[0] == shm_id:
            raise
        raise OSError(errno.EIDRM, "replaced or removed meanwhile") from None
    mode = _core.shm_stat(shm_id)["mode"] & 0o777
    return Attachment("sysv", wish.name, size, sem_id, header, mode, shm_id=shm_id)


def _create_sysv(wish: Wish, sem_id: int, sem_key: int) -> dict[str, Any]:
    stale, key, _, _ = _find_sysv(wish)
    if stale >= 0:
        _core.shm_remove(stale)  # a creator died half-way: the lifecycle semaphore is ours, so nobody is making it
    undo = prepare_set(wish, sem_id)
    shm_id = make_shm(wish, key)
    try:
        return _core.format(-1, shm_id, wish.fields(sem_id, sem_key, key, undo))
    except BaseException:
        _core.shm_remove(shm_id)
        raise


def _open_anon(wish: Wish) -> Attachment:
    """A private segment and a set with a random key. The caller attaches, then calls `forget_anon`."""
    while True:
        key = ANON_KEYS | secrets.randbelow(1 << 24)
        with contextlib.suppress(FileExistsError):
            sem_id = make_set(wish, key)
            break
    shm_id = -1
    try:
        undo = prepare_set(wish, sem_id)
        shm_id = make_shm(wish, None)
        header = _core.format(-1, shm_id, wish.fields(sem_id, key, 0, undo))
    except BaseException:
        _core.sem_remove(sem_id)
        if shm_id >= 0:
            _core.shm_remove(shm_id)
        raise
    return Attachment("anon", wish.name, header["size"], sem_id, header, shm_id=shm_id, created=True)


# -- opening --------------------------------------------------------------------------------------------------------------------


def open_segment(form: str, name: str, options: dict[str, Any], like: dict[str, Any] | None = None) -> Attachment:
    """Create or attach by mode: c create or attach, a attach only, x create only, r attach read-only.

    Args: options: those given, typed. like: header whose geometry a creation takes where no option was given.

    Raises: FileNotFoundError (a, r), FileExistsError (x), ValueError for impossible geometry, NoSpace, LayoutMismatch,
    SegmentNotOurs, SegmentInvalid, NotSupported. Nothing of a failed creation is left.
    """
    wish, what = Wish(form, name, options, like), full_name(form, name)
    try:
        return _open_anon(wish) if form == "anon" else _open_named(wish, what)
    except OSError as error:
        if error.filename == what:  # said by this module
            raise
        if error.errno == errno.ENOMEM:
            raise no_memory(name, wish.plan["size"], error) from error
        raise refused(f"segment {what}", error) from error


def _open_named(wish: Wish, what: str) -> Attachment:
    attach, create = (_attach_posix, _create_posix) if wish.form == "posix" else (_attach_sysv, _create_sysv)
    until, made = time.monotonic() + PATIENCE, dict[str, Any]()
    while True:
        try:
            found = attach(wish)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _RETRY and time.monotonic() < until:
                continue
            if made:
                unlink(wish.form, wish.name, made)
            raise
        if found is not None and found.header["successor"] == _core.SUCCESSOR_REMOVED and wish.mode != "r":
            found.close()
            if time.monotonic() > until:
                raise SegmentInvalid(f"segment {what}: one in use wanted, one whose removal does not end found; `shmcache rm`")
            unlink(wish.form, wish.name, found.header)  # its remover died half-way, or is at it
            continue
        if found is not None:
            if wish.mode == "x" and not made:
                found.close()
                raise FileExistsError(errno.EEXIST, "segment exists, mode=x wanted none", what)
            found.created = bool(made)
            return found
        if wish.mode in ("a", "r"):
            raise FileNotFoundError(errno.ENOENT, f"segment wanted (mode={wish.mode}), none found", what)
        try:
            with _elected(wish, until) as (sem_id, key):
                if (there := attach(wish)) is not None:  # somebody was faster
                    there.close()
                    continue
                if any(_core.sem_values(sem_id, wish.plan["n_sems"])[1:]):
                    # of a segment that somebody removed: its users may be inside a guard and give it back later
                    _core.sem_remove(sem_id)
                    raise OSError(errno.EIDRM, "semaphore set of a removed segment")
                try:
                    made = create(wish, sem_id, key)
                except BaseException:
                    with contextlib.suppress(OSError):
                        _core.sem_remove(sem_id)
                    raise
        except OSError as error:
            if error.errno not in _RETRY or time.monotonic() > until:
                raise
