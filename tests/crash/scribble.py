"""Random bytes over a live segment while workers read, write, iterate and dump (`scribble`).

Epoch by epoch: a sound segment, three workers, then a scribbler. Each worker goes through every call of the API; the command line
dumps and audits beside them. Allowed are misses and ShmCacheErrors. Found are: a worker or command that dies, hangs or ends with
another error, a value that was never set for its key, a key that was never set. Numbers of counters change in place and prove
nothing. A forged owner word may block a shard's writers for the rest of the epoch: they get LockTimeout, and are counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import shmcache
from shmcache.catalog import Found, shm_path
from shmcache.errors import ShmCacheError
from shmcache.inspect import View, locate
from tests.crash.ledger import make, parse
from tests.crash.storm import HUNG, Outcome, segment

__all__ = ["add_commands", "scribble"]

N_KEYS: Final = 150
WORKERS: Final = 3
EPOCH: Final = 2.0
KEY: Final = re.compile(r"(v|log|map|n|text):\d+|gone:\d+|lease:\d")
COMMANDS: Final = (
    ("dump", "--values", "--json"), ("dump", "--expired", "--json"), ("check", "--json"), ("stats", "--json"),
    ("guards", "--json"), ("info", "--json"),
)  # fmt: skip
_SIZES: Final = (1, 1, 1, 2, 4, 8, 8, 8, 16, 64, 300)


@contextmanager
def _raw(cache: Any) -> Iterator[Any]:
    """The segment's bytes, writable, past every check."""
    attachment, libc = cache._attachment, ctypes.CDLL(None, use_errno=True)
    if attachment.shm_id < 0:
        fd = os.open(shm_path(attachment.name), os.O_RDWR)
        mapped = mmap.mmap(fd, attachment.size)
        os.close(fd)
        yield (ctypes.c_char * attachment.size).from_buffer(mapped)
        return
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(attachment.shm_id, None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "shmat")
    try:
        yield (ctypes.c_char * attachment.size).from_address(address)
    finally:
        libc.shmdt(ctypes.c_void_p(address))


class _Run:
    """One form and guard; `words`: heart, operations, misses and hits per worker, writes of the scribbler."""

    def __init__(self, cache: Any, url: str, seed: int) -> None:
        self.cache, self.url, self.seed = cache, url, seed
        self.words = memoryview(mmap.mmap(-1, 4096)).cast("Q")
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK)
        self.violations: list[str] = []
        self.errors: Counter[str] = Counter()

    # -- in the children -------------------------------------------------------------------------------------------------------

    def complain(self, text: str) -> None:
        """Tell the parent; one write, never torn."""
        with suppress(BlockingIOError):
            os.write(self.write_end, text.encode("utf-8", "replace")[:500].replace(b"\n", b" ") + b"\n")

    def judge(self, key: str, value: Any, what: str) -> None:
        """A value must have been set for its key."""
        if value is None or value is shmcache.MISS:
            return
        kind = key.partition(":")[0]
        good = (
            parse(key, value) >= 0 if kind in ("v", "gone")
            else value == f"{key};".encode() * (len(value) // (len(key) + 1)) if kind == "log"
            else value == {"key": key, "list": [1, 2.5, None, key]} if kind == "map"
            else value == f"{key} ü" if kind == "text"
            else isinstance(value, int) if kind == "n"
            else False
        )  # fmt: skip
        if not good:
            self.complain(f"foreign: {what} of {key!r} gives {value!r}"[:400])

    def judge_key(self, key: Any, what: str) -> None:
        """A key must have been set."""
        if not isinstance(key, str) or not KEY.fullmatch(key):
            self.complain(f"foreign key: {what} gives {key!r}"[:400])

    def write(self, cache: Any, rng: random.Random) -> None:
        """One of the writing calls."""
        i, way = rng.randrange(N_KEYS), rng.randrange(20)
        v, log, count = f"v:{i}", f"log:{i}", f"n:{i}"
        if way < 6:
            cache.set(v, make(v, rng.randrange(1000)), rng.choice((0, 5, 1000)))
        elif way == 6:
            cache.add(v, make(v, rng.randrange(1000)))
        elif way == 7:
            got = cache.gets(v)
            if got is not None:
                self.judge(v, got[0], "gets")
                cache.cas(v, make(v, rng.randrange(1000)), got[1])
        elif way == 8:
            if not cache.append(log, f"{log};".encode()):
                cache.set(log, f"{log};".encode())
        elif way == 9:
            cache.prepend(log, f"{log};".encode())
        elif way == 10:
            cache.incr(count)
        elif way == 11:
            cache.delete(rng.choice((v, log, count)))
        elif way == 12:
            self.judge(v, cache.pop(v), "pop")
        elif way == 13:
            cache.touch(v, rng.choice((5, 1000)))
        elif way == 14:
            self.judge(v, cache.gat(v, 500), "gat")
        elif way == 15:
            cache.set_many({f"map:{j}": {"key": f"map:{j}", "list": [1, 2.5, None, f"map:{j}"]} for j in range(i, i + 4)})
        elif way == 16:
            cache.set(f"text:{i}", f"text:{i} ü")
        elif way == 17:
            gone = f"gone:{i}"
            rng.choice((cache.clean, lambda: cache.delete_match(f"{gone}*"), lambda: cache.set(gone, make(gone, 1), 0.01)))()
        elif way == 18:
            self.judge(v, cache.get_or_set(v, lambda: make(v, 7), 100, lease=0.5), "get_or_set")
        else:
            with cache.lock(f"lease:{i % 4}", lease=0.2, timeout=0.01):
                pass

    def read(self, cache: Any, rng: random.Random, row: int) -> None:
        """Some of the reading calls."""
        for _ in range(10):
            key = f"{rng.choice(('v', 'v', 'log', 'map', 'text', 'n'))}:{rng.randrange(N_KEYS)}"
            value = cache.get(key)
            self.words[row + (2 if value is None else 3)] += 1
            self.judge(key, value, "get")
        keys = [f"v:{rng.randrange(N_KEYS)}" for _ in range(20)]
        for key, value in cache.get_many(keys).items():
            self.judge(key, value, "get_many")
        key = rng.choice(keys)
        cache.ttl(key)
        _ = key in cache

    def walk(self, cache: Any, rng: random.Random) -> None:
        """Iterations, statistics, audit and dump."""
        way = rng.randrange(6)
        if way == 0:
            for key in cache:
                self.judge_key(key, "keys")
        elif way == 1:
            for key, value in cache.items():
                self.judge_key(key, "items")
                self.judge(str(key), value, "items")
        elif way == 2:
            len(cache), cache.stats(), cache._guards(), cache._shards()
        elif way == 3:
            cache.check()
        else:
            found = locate(self.url)
            assert isinstance(found, Found)
            with View(found) as view:
                for item in view.items(expired=way == 4):
                    if item.state == "live" and item.key is not None:
                        value = view.value(item.key)
                        if value is not shmcache.MISS:
                            self.judge_key(item.key, "dump")
                            self.judge(str(item.key), value, "dump")
                view.stats(), view.guards(), view.check()

    def work(self, index: int, seed: int) -> None:
        """Calls until killed; every typed error is an answer."""
        rng, row = random.Random(seed), 8 * index
        cache = type(self.cache).from_url(self.cache.url, mode="a", lock_timeout=0.01)
        while True:
            self.words[row] += 1
            r = rng.random()
            try:
                if r < (0.3 if index == 0 else 0.02):
                    self.walk(cache, rng)
                elif r < 0.6:
                    self.read(cache, rng, row)
                elif r < 0.99:
                    for _ in range(10):
                        self.write(cache, rng)
                else:
                    other = type(cache).from_url(cache.url, mode=rng.choice("ar"), lock_timeout=0.01)
                    try:
                        self.read(other, rng, row)
                    finally:
                        other.close()
                if r < 0.05 and cache._lost and not cache._closed:
                    cache.reattach()
            except (ShmCacheError, FileNotFoundError) as error:  # the latter: no segment with such a header to attach
                self.words[row + 1] += 1
                if self.words[row + 1] % 50 == 1:
                    self.complain(f"typed {type(error).__name__}")
                if cache._closed:  # by a reattach that met a rotten header
                    with suppress(ShmCacheError, FileNotFoundError):
                        cache = type(cache).from_url(cache.url, mode="a", lock_timeout=0.01)
                    time.sleep(0.001)

    def scrawl(self, seed: int, gap: float) -> None:
        """Random bytes at random places, the whole segment over, with `gap` seconds between two."""
        rng = random.Random(seed)
        with _raw(self.cache) as memory:
            size = len(memory)
            while True:
                n = rng.choice(_SIZES)
                at = rng.randrange(size) if rng.random() < 0.7 else rng.randrange(min(size, 1 << 16))
                if rng.random() < 0.5:
                    at &= ~7
                data = rng.choice((rng.randbytes(n), b"\0" * n, b"\xff" * n))
                ctypes.memmove(ctypes.addressof(memory) + min(at, size - n), data, n)
                self.words[8 * WORKERS] += 1
                time.sleep(gap)

    # -- in the parent ---------------------------------------------------------------------------------------------------------

    def fork(self, work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException as error:
                self.complain(f"{type(error).__name__}: {error}")
            finally:
                os._exit(code)
        return pid

    def listen(self) -> None:
        with suppress(BlockingIOError):
            while data := os.read(self.read_end, 65536):
                for line in data.decode("utf-8", "replace").splitlines():
                    if line.startswith("typed "):
                        self.errors[line[6:]] += 1
                    else:
                        self.violations.append(line)

    def command(self, arguments: tuple[str, ...]) -> int:
        """One command of the command line; 0 or a typed error's code wanted."""
        shm_id = self.cache._attachment.shm_id
        target = f"@{shm_id}" if shm_id >= 0 else self.url
        call = [sys.executable, "-c", "from shmcache.__main__ import main; main()", arguments[0], target, *arguments[1:]]
        done = subprocess.run(call, capture_output=True, timeout=120, cwd="/", check=False)
        if done.returncode < 0 or done.returncode > 10 or b"Traceback" in done.stderr:
            self.violations.append(f"{' '.join(arguments)}: ended with {done.returncode}: {done.stderr[-300:]!r}")
        if arguments[:2] == ("dump", "--values") and done.returncode == 0:
            for line in done.stdout.decode().splitlines():
                row = json.loads(line)
                if row["state"] == "live" and row.get("value") is not None:
                    self.judge_key(row["key"], "shmcache dump")
        return done.returncode

    def epoch(self, seconds: float, seed: int) -> None:
        """Workers on a sound segment, then the scribbler, then everybody killed; nobody may have ended before."""
        rng = random.Random(seed)
        gap = rng.choice((0.0, 0.0002, 0.002, 0.01))
        pids = {self.fork(lambda i=i: self.work(i, seed + i)): f"worker {i}" for i in range(WORKERS)}  # type: ignore[misc]
        try:
            time.sleep(min(0.2, seconds / 5))
            pids[self.fork(lambda: self.scrawl(seed, gap))] = "scribbler"
            until = time.monotonic() + seconds
            while time.monotonic() < until and not self.violations:
                self.command(rng.choice(COMMANDS))
                self.listen()
            beats, begun = [self.words[8 * i] for i in range(WORKERS)], time.monotonic()
            while any(self.words[8 * i] < beats[i] + 2 for i in range(WORKERS)) and not self.violations:
                if time.monotonic() - begun > HUNG:
                    self.violations.append(f"hung: hearts {beats} wanted to beat on within {HUNG:g} s")
                time.sleep(0.001)
                self.listen()
                for pid, who in list(pids.items()):
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        del pids[pid]
                        self.violations.append(f"{who} ended by itself")
        finally:
            for pid, who in pids.items():
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
                if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                    self.violations.append(f"{who} ended by itself, status {status:#x}")
            self.listen()


def scribble(form: str, guard: str, *, seconds: float, seed: int) -> Outcome:
    """Epochs of EPOCH seconds for `seconds` in all."""
    until, epochs = time.monotonic() + seconds, 0
    hits = misses = typed = writes = beats = 0
    errors: Counter[str] = Counter()
    found: list[str] = []
    while time.monotonic() < until and not found:
        options = {"size": "512K", "guards": 1 + epochs % 2, "lock_timeout": 0.01, "clean_period": 1.0}
        with segment(form, guard, f"scribble-{seed}-{epochs}", **options) as (cache, url):
            run = _Run(cache, url, seed)
            try:
                run.epoch(min(EPOCH, max(0.5, until - time.monotonic())), seed * 1000 + epochs * 10)
            finally:
                os.close(run.read_end)
                os.close(run.write_end)
            rows = [8 * i for i in range(WORKERS)]
            beats += sum(run.words[row] for row in rows)
            typed += sum(run.words[row + 1] for row in rows)
            misses += sum(run.words[row + 2] for row in rows)
            hits += sum(run.words[row + 3] for row in rows)
            writes += run.words[8 * WORKERS]
            errors += run.errors
            found += [f"epoch {epochs}: {text}" for text in run.violations]
        epochs += 1
    figures = {
        "epochs": epochs, "scribbles": writes, "rounds of workers": beats, "hits": hits, "misses": misses, "typed errors": typed,
        "of them": "/".join(sorted(errors)) or "none",
    }  # fmt: skip
    return Outcome(f"scribble {form} {guard}", figures, found)


def _scribble(options: argparse.Namespace) -> int:
    return sum(
        scribble(form, guard, seconds=options.seconds, seed=options.seed).report()
        for form in ([options.form] if options.form else ("posix", "sysv"))
        for guard in ([options.guard] if options.guard else ("fast", "semaphore"))
    )


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("scribble", "random bytes over a live segment under the Python API (R8)", 20.0)
    sub.add_argument("--form", choices=("posix", "sysv"))
    sub.add_argument("--guard", choices=("fast", "semaphore"))
    sub.set_defaults(run=_scribble)
