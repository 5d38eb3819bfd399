"""Segments as an operator finds them at three in the morning: wedged, scribbled over, of another layout, left alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmcache import _core, catalog, inspect
from shmcache.catalog import Found
from shmcache.inspect import View

WRITER = """
import sys, shmcache
cache = shmcache.open(sys.argv[1], mode="a")
value = b"x" * (6 << 20)
sys.stdout.write("on\\n"); sys.stdout.flush()
while True:
    cache.set("large", value)
"""


@contextlib.contextmanager
def stopped_writer(url: str, view: View) -> Iterator[subprocess.Popen[str]]:
    """A process stopped while it holds a guard."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True, cwd="/")
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "on\n"
        for _ in range(3000):
            os.kill(child.pid, signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            if any(g.state != "free" for g in view.guards()):
                break
            os.kill(child.pid, signal.SIGCONT)
            time.sleep(0.0005)
        else:
            pytest.fail("3000 stops, none inside a guard")
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def found(text: str) -> Found:
    row = inspect.locate(text)
    assert isinstance(row, Found)
    return row


def segment_bytes(row: Found) -> bytes:
    """Every byte of a segment, read past the library."""
    if row.shm_id < 0:
        return Path(catalog.shm_path(row.name)).read_bytes()
    import sysv_ipc  # type: ignore[import-untyped]

    memory = sysv_ipc.attach(row.shm_id, flags=sysv_ipc.SHM_RDONLY)
    try:
        return bytes(memory.read(row.size))
    finally:
        memory.detach()


def overwrite(row: Found, at: int, data: bytes) -> None:
    """Write into a segment past the library."""
    if row.shm_id < 0:
        with open(catalog.shm_path(row.name), "r+b") as f:
            f.seek(at)
            f.write(data)
        return
    import sysv_ipc

    memory = sysv_ipc.attach(row.shm_id)
    memory.write(data, at)
    memory.detach()


def scribble(row: Found, seed: int = 1) -> None:
    """Rot in one word of a hundred of everything behind the control page, buckets and the log included."""
    draw, data = random.Random(seed), bytearray(segment_bytes(row))
    start = row.header["shard_off"]
    for at in draw.sample(range(start, len(data) - 8, 8), (len(data) - start) // 800):
        struct.pack_into("<Q", data, at, draw.getrandbits(64))
    overwrite(row, start, bytes(data[start:]))


def without_semaphores(row: Found) -> None:
    """What ipcrm -s leaves."""
    _core.sem_remove(row.header["sem_id"])
