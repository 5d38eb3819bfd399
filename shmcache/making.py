"""Fresh kernel objects: files and shared memory of the size and owner wished, semaphore sets with their guards free.

posix_ipc and sysv_ipc create and remove and are imported for that alone: both refuse interpreters with a GIL of their own.
Whatever fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from . import _core
from .catalog import SHM_DIR, sysvipc
from .errors import NoSpace
from .refusal import calling, package
from .wish import Wish

__all__ = ["IPC_CREAT", "IPC_EXCL", "fresh_file", "make_set", "make_shm", "prepare_set"]

IPC_CREAT: Final = 0o1000
IPC_EXCL: Final = 0o2000


def make_set(wish: Wish, key: int) -> int:
    """A fresh semaphore set; FileExistsError if the key has one."""
    n_sems = wish.plan["n_sems"]
    try:
        made: int = _core.sem_get(key, n_sems, IPC_CREAT | IPC_EXCL | wish.perms)
        return made
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpace(
                f"segment {wish.name}: a set of {n_sems} semaphores wanted, none left by the limits found (kernel.sem; `ipcs -s`)"
            ) from error
        raise


def prepare_set(wish: Wish, sem_id: int) -> bool:
    """Guards free, owner given, SEM_UNDO probed; nothing else changes the set's change time afterwards."""
    _core.sem_prepare(sem_id, wish.plan["n_shards"], wish.plan["n_sems"])
    undo = _core.undo_probe(sem_id, 1 + wish.plan["n_shards"])
    if wish.uid >= 0 or wish.gid >= 0:
        uid, gid = (os.geteuid() if wish.uid < 0 else wish.uid), (os.getegid() if wish.gid < 0 else wish.gid)
        _core.sem_owner(sem_id, uid, gid, wish.perms)
    return undo is not False


def make_shm(wish: Wish, key: int | None) -> int:
    """A fresh zeroed System V segment, detached; key None: private."""
    sysv_ipc = package("sysv_ipc")
    size: int = wish.plan["size"]
    before = {row["shmid"] for row in sysvipc("shm")}
    try:
        with calling("shmget, shmat, shmctl", sysv_ipc):
            shm = sysv_ipc.SharedMemory(
                sysv_ipc.IPC_PRIVATE if key is None else key, sysv_ipc.IPC_CREX, wish.perms, size, init_character=b"\0"
            )
    except OSError as error:
        _remove_new(key or 0, size, before)
        if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EINVAL):
            raise
        raise NoSpace(
            f"segment {wish.name}: {size} bytes of System V memory wanted, refused found ({error.strerror}); see kernel.shmmax, "
            "kernel.shmall and kernel.shmmni"
        ) from error
    shm_id: int = shm.id
    with contextlib.suppress(sysv_ipc.Error, OSError):  # what stays attached goes with the process
        shm.detach()
    if wish.uid >= 0 or wish.gid >= 0:
        uid, gid = (os.geteuid() if wish.uid < 0 else wish.uid), (os.getegid() if wish.gid < 0 else wish.gid)
        try:
            _core.shm_owner(shm_id, uid, gid, wish.perms)
        except OSError:
            _core.shm_remove(shm_id)
            raise
    return shm_id


def _remove_new(key: int, size: int, before: set[int]) -> None:
    """sysv_ipc has made the segment when attaching it fails, and keeps its id to itself."""
    for row in sysvipc("shm"):
        mine = row["cpid"] == os.getpid() and row["size"] == size and row["shmid"] not in before
        if mine and row["key"] & 0xFFFFFFFF == key & 0xFFFFFFFF:
            with contextlib.suppress(OSError):
                _core.shm_remove(row["shmid"])


@contextlib.contextmanager
def fresh_file(wish: Wish, path: str) -> Iterator[int]:
    """The descriptor of a zeroed file in /dev/shm, every page of it there; removed again if the body fails."""
    posix_ipc = package("posix_ipc")
    size: int = wish.plan["size"]
    name = "/" + os.path.basename(path)
    with calling("shm_open", posix_ipc):
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        try:
            with calling("ftruncate"):
                os.ftruncate(shm.fd, size)
            with calling("posix_fallocate"):
                os.posix_fallocate(shm.fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM, errno.EINVAL):
                raise
            space = os.statvfs(SHM_DIR)
            raise NoSpace(
                f"segment {wish.name}: {size} bytes in {SHM_DIR} wanted, {space.f_bavail * space.f_frsize} of "
                f"{space.f_blocks * space.f_frsize} found free ({error.strerror}); give a smaller size=, a larger {SHM_DIR} "
                "(docker run --shm-size, mount -o remount,size=) or sysv:///"
            ) from error
        with calling("fchmod"):
            os.fchmod(shm.fd, wish.perms)
        if wish.uid >= 0 or wish.gid >= 0:
            with calling("fchown"):
                os.fchown(shm.fd, wish.uid, wish.gid)
        yield shm.fd
    except BaseException:
        with contextlib.suppress(Exception):
            posix_ipc.unlink_shared_memory(name)
        raise
    finally:
        shm.close_fd()
