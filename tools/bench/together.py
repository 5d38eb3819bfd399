"""Several processes at once on one store."""

from __future__ import annotations

import itertools
import os
import random
import select
import struct
import time
import traceback
from collections.abc import Callable
from typing import Any

from shmcache.bench import Call, Field, Subject, chunked, one_argument, two_arguments

__all__ = ["together"]


def _mixed(get: Call, put: Call, keys: list[Any], value: Any, chunk: int) -> Callable[[], int]:
    chunks = chunked(keys, chunk)

    def passed() -> int:
        some = next(chunks)
        rest = iter(some)
        for key in rest:
            put(key, value)
            for other in itertools.islice(rest, 19):
                get(other)
        return len(some)

    return passed


def together(f: Field, kind: str, processes: int, seconds: float) -> tuple[float, float]:
    """Calls of `processes` forked processes at once, all of them together: a second, and a second of processor time.

    The second figure is what the first would be on a machine of one's own, unless processes sleep for one another.

    Args:
        kind: "mixed" (95 % get, 5 % set, the same keys) or "set" (each process its own keys).
    """
    pipes, children = [], []
    go_read, go_write = os.pipe()
    for number in range(processes):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                subject = f.subject.fork() if f.subject.fork else f.subject
                parts = max(processes, 2)  # as many keys for one process as for each of two
                mine = f.keys[number * len(f.keys) // parts : (number + 1) * len(f.keys) // parts]
                passed = _alone(f, subject, kind, mine)
                passed()
                os.write(write, b"r")
                select.select([go_read], [], [], 60)
                calls, start, used = 0, time.perf_counter(), time.thread_time()
                while (spent := time.perf_counter() - start) < seconds:
                    calls += passed()
                used = max(time.thread_time() - used, 1e-6)
                os.write(write, struct.pack("=dd", calls / spent, calls / used))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(write)
        children.append(pid)
        pipes.append(read)
    for read in pipes:
        os.read(read, 1)
    os.write(go_write, b"go")
    answers = [os.read(read, 16) for read in pipes]
    for pid in children:
        os.waitpid(pid, 0)
    for fd in (*pipes, go_read, go_write):
        os.close(fd)
    if any(len(answer) != 16 for answer in answers):
        raise RuntimeError(f"{f.subject.name}: an answer of every one of {processes} processes wanted, {answers} found")
    rates = [struct.unpack("=dd", answer) for answer in answers]
    return sum(rate for rate, _ in rates), sum(rate for _, rate in rates)


def _alone(f: Field, subject: Subject, kind: str, mine: list[Any]) -> Callable[[], int]:
    chunk = max(f.chunk // 10, 100)
    if subject.set is None:
        return one_argument(subject.get, f.asked, chunk)
    if kind == "mixed":
        return _mixed(subject.get, subject.set, f.asked, f.value, chunk)
    return two_arguments(subject.set, random.Random(1).sample(mine, len(mine)), f.value, chunk)
