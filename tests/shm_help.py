"""What the tests of the shared-memory engine share: children that must succeed, and a worker that dies inside a guard."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable

from shmcache.engines.shm import ShmEngine

_libc = ctypes.CDLL(None, use_errno=True)
SEM_UNDO = 0x1000


class _Sembuf(ctypes.Structure):
    _fields_ = [("num", ctypes.c_ushort), ("op", ctypes.c_short), ("flg", ctypes.c_short)]


def semop(sem_id: int, num: int, op: int, flags: int = SEM_UNDO) -> None:
    """One System V semaphore operation of this process."""
    if _libc.semop(sem_id, ctypes.byref(_Sembuf(num, op, flags)), 1) != 0:
        raise OSError(ctypes.get_errno(), "semop")


def in_child(body: Callable[[], object]) -> int:
    """Run body in a forked child that leaves by os._exit; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def reap(*pids: int) -> None:
    """Wait for children; every one must have ended with 0."""
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def run_child(body: Callable[[], object]) -> None:
    reap(in_child(body))


def guard_off(cache: ShmEngine, shard: int) -> int:
    """Offset of a shard's guard line: owner word, dirty word."""
    header = cache._header()
    return int(header["shard_off"]) + shard * int(header["shard_size"])


def own_word(cache: ShmEngine) -> int:
    """The owner word of this process: slot:12 | generation:19 | 0, read from its worker slot by pid."""
    with open(cache._attachment.path or "", "rb") as f:
        f.seek(8192)
        for slot in range(cache._header()["n_workers"]):
            generation, pid = struct.unpack_from("<QQ", f.read(128))
            if pid == os.getpid():
                return slot << 20 | (generation & 0x7FFFF) << 1
    raise AssertionError("this process has no worker slot")


def take_guard(cache: ShmEngine, shard: int) -> None:
    """Leave a POSIX segment's guard as a writer holds it inside its critical section."""
    header, at = cache._header(), guard_off(cache, shard)
    word = own_word(cache)
    if header["guard_kind"] == 1:
        semop(header["sem_id"], 1 + shard, -1)
    with open(cache._attachment.path or "", "r+b") as f, mmap.mmap(f.fileno(), 0) as m:
        struct.pack_into("<I", m, at + (0 if header["guard_kind"] == 2 else 4), word)


def die_inside(cache: ShmEngine, shards: range) -> None:
    """A child takes the guards of these shards and is killed while it holds them."""

    def body() -> None:
        cache.set("claims a worker slot", 1)
        for shard in shards:
            take_guard(cache, shard)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(body)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "condition not met in time"
        time.sleep(0.005)
