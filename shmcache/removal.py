"""Remove segments and their semaphores: POSIX, System V, anonymous.

I1  The segment goes before its semaphores, under the set's lifecycle semaphore, which whoever creates the next one of that name
    must hold, too: a removal never takes the successor.
I2  What goes is what the header names: a segment by its uuid, a set by its id and change time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from . import _core
from .catalog import PREFIX, Found, full_name, ipc_key, list_segments, shm_path
from .errors import LayoutMismatch, SegmentInvalid
from .refusal import calling, package, refused

if TYPE_CHECKING:
    from .segment import Attachment

__all__ = ["forget_anon", "remove", "require_packages", "sets_in_use", "unlink"]

GONE: Final = (errno.EIDRM, errno.EINVAL, errno.EEXIST, errno.ENOENT)
"""What removing says of something that somebody else has removed; EEXIST stands for ExistentialError of the packages."""


def require_packages(form: str) -> None:
    """Import what removing a segment of this form needs; NotSupported names what is missing."""
    for name in ("posix_ipc", "sysv_ipc") if form == "posix" else ("sysv_ipc",):
        package(name)


def sets_in_use(name: str) -> set[int]:
    return {f.header["sem_id"] for f in list_segments() if f.header and f.header["name"] != name}


def forget_anon(att: Attachment) -> None:
    """Mark an attached anonymous segment for removal: the kernel counts its users and frees it with the last."""
    try:
        _core.shm_remove(att.shm_id)
    except OSError as error:
        raise refused(f"segment anon:{att.name}", error) from error


def unlink(form: str, name: str, header: dict[str, Any], att: Attachment | None = None) -> None:
    """Remove segment, then semaphores. A segment that was replaced meanwhile under the name stays: who creates one under it
    holds the lifecycle semaphore of the old set for as long as that is there, and so does this.

    Args: att: what is attached, so that a header which was scribbled over since does not keep the segment.

    Raises: ShmCacheError naming the call that the system refused; calling it again goes on from there.
    """
    sysv_ipc, sem_id, held = package("sysv_ipc"), header["sem_id"], False
    try:
        with contextlib.suppress(OSError):
            held = _core.sem_stat(sem_id)["ctime"] == header["sem_ctime"] and _core.lifecycle_enter(sem_id, 1.0)
        if form == "posix":
            _unlink_posix(name, header, att)
        elif form == "sysv":
            with contextlib.suppress(SegmentInvalid, LayoutMismatch), _gone():
                shm_id = _core.shm_get(header["shm_key"], 0, 0)
                size = _core.shm_stat(shm_id)["size"]
                mine = att is not None and att.shm_id == shm_id
                if mine or _core.read_header(-1, shm_id, size)["uuid"] == header["uuid"]:
                    with calling("shmctl IPC_RMID", sysv_ipc):
                        sysv_ipc.remove_shared_memory(shm_id)
        with _gone():
            if _core.sem_stat(sem_id)["ctime"] == header["sem_ctime"]:
                with calling("semctl IPC_RMID", sysv_ipc):
                    sysv_ipc.remove_semaphore(sem_id)
    except OSError as error:
        raise refused(f"segment {full_name(form, name)}", error) from error
    finally:
        with contextlib.suppress(OSError):
            if held:
                _core.lifecycle_leave(sem_id)


def _unlink_posix(name: str, header: dict[str, Any], att: Attachment | None) -> None:
    posix_ipc = package("posix_ipc")
    with contextlib.suppress(FileNotFoundError, SegmentInvalid, LayoutMismatch):
        with calling("open"):
            fd = os.open(shm_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            st = os.fstat(fd)
            if att is not None and att.file is not None:
                same = (st.st_dev, st.st_ino) == att.file
            else:
                same = _core.read_header(fd, -1, st.st_size)["uuid"] == header["uuid"]
        finally:
            os.close(fd)
        if same:
            with contextlib.suppress(FileExistsError), calling("shm_unlink", posix_ipc):  # ExistentialError: it is gone
                posix_ipc.unlink_shared_memory(f"/{PREFIX}{name}")


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """Passes over the errors that say that somebody else has removed it."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise


def remove(found: Found) -> None:
    """Remove what `list_segments` found, sound or not."""
    if found.header:
        unlink(found.form, found.name, found.header)
        return
    if found.form == "posix":
        os.unlink(shm_path(found.name))
    else:
        _core.shm_remove(found.shm_id)
    with contextlib.suppress(OSError):  # the set its name leads to, unless a sound segment uses it
        sem_id = _core.sem_get(found.shm_key if not found.name else ipc_key(found.form, found.name), 0, 0)
        if sem_id not in sets_in_use("") and _core.sem_stat(sem_id)["uid"] == os.geteuid():
            _core.sem_remove(sem_id)
