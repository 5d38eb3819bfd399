"""Harnesses about processes: survivors (R5), attach cycles (R10), fork storms (R9)."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import shmcache
from shmcache import _core
from tests.crash.storm import HUNG, Outcome, Storm, live_beacons, segment
from tests.crash.worker import Board

__all__ = ["add_commands", "cycles", "forks", "survivors"]


def survivors(form: str, guard: str, *, seconds: float, seed: int, workers: int = 4, rounds: int | None = None) -> Outcome:
    """All workers but one killed at the same moment, over and over; the one left must go on."""
    until = time.monotonic() + (seconds if rounds is None else 86400.0)
    board = Board(workers, may_miss=False)
    done, slowest = 0, 0.0
    with segment(form, guard, f"survivors-{seed}", size="4M", eviction="none") as (cache, url):
        run = Storm(cache, url, board, seed, until)
        try:
            for index in range(workers):
                run.spawn(index)
            while time.monotonic() < until and (rounds is None or done < rounds) and not run.violations:
                time.sleep(run.rng.uniform(0.001, 0.01))
                left = run.rng.randrange(workers)
                pids = [run.pids.pop(i) for i in range(workers) if i != left]
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                for pid in pids:
                    os.waitpid(pid, 0)
                beat, begun = board.ledger.word(left), time.monotonic()
                while board.ledger.word(left) < beat + 3:
                    if time.monotonic() - begun > HUNG:
                        run.violations.append(f"hung: worker {left} alone made no progress in {HUNG:g} s: {cache._guards()}")
                        break
                    time.sleep(0.0005)
                slowest = max(slowest, time.monotonic() - begun)
                done += 1
                for i in range(workers):
                    if i != left:
                        run.spawn(i)
                run.listen()
        finally:
            run.close()
        run.violations += [f"check: {finding}" for finding in cache.check()[:5]]
        figures = {"rounds": done, "slowest restart": f"{slowest * 1e3:.0f} ms", "inside": cache._stats()["recoveries"]}
        return Outcome(f"survivors {form} {guard}", figures, run.violations)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _maps() -> int:
    with open("/proc/self/maps") as f:
        return len(f.readlines())


def cycles(form: str, guard: str, *, seconds: float, seed: int, count: int | None = None) -> Outcome:
    """Attach/detach in one process and attach/operation/SIGKILL in children; nothing may be left over."""
    rng = random.Random(seed)
    found: list[str] = []
    until = time.monotonic() + (seconds if count is None else 86400.0)
    attached = killed = 0
    with segment(form, guard, "cycles", size="1M") as (cache, _):
        url, engine = cache.url, type(cache)
        cache.set("k", b"v" * 100)
        files, maps = _open_files(), _maps()
        bytes_before = cache._stats()["bytes"]
        while time.monotonic() < until and (count is None or killed < count):
            for _ in range(10):
                other = engine.from_url(url, mode=rng.choice(["a", "c", "r"]))
                if other.get("k") != b"v" * 100:
                    found.append(f"cycles: {other.get('k')!r} read after attaching")
                if not other._readonly:
                    other.set("k", b"v" * 100)
                other.close()
                attached += 1
            pid = os.fork()
            if pid == 0:
                try:
                    mine = engine.from_url(url, mode="a")
                    while True:
                        mine.set("k", b"v" * 100)
                        mine.get("k")
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, 0.003))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            if len(found) > 5:
                break
        cache.set("k", b"v" * 100)
        cache.clean()  # counts again what a kill left uncounted
        if _open_files() != files:
            found.append(f"descriptors: {files} wanted, {_open_files()} found")
        if abs(_maps() - maps) > 8:
            found.append(f"mappings: {maps} wanted, {_maps()} found")
        if live_beacons(cache) != 1:
            found.append(f"worker slots: 1 held wanted, {live_beacons(cache)} found")
        if cache._stats()["bytes"] != bytes_before:
            found.append(f"bytes: {bytes_before} wanted, {cache._stats()['bytes']} found")
        found += [f"check: {finding}" for finding in cache.check()[:5]]
        sem_id = cache._header()["sem_id"]
    try:
        _core.sem_stat(sem_id)
        found.append(f"semaphores: set {sem_id} gone wanted, still there found")
    except OSError:
        pass
    return Outcome(f"cycles {form} {guard}", {"attached": attached, "killed": killed}, found)


def forks(form: str, guard: str, *, seconds: float, seed: int, count: int | None = None) -> Outcome:
    """Children forked while threads of the parent write; each does a few operations and leaves in one of four ways."""
    rng = random.Random(seed)
    found: list[str] = []
    until = time.monotonic() + (seconds if count is None else 86400.0)
    forked = 0
    stop = threading.Event()
    with segment(form, guard, "forks", size="1M") as (cache, _):

        def write(n: int) -> None:
            i = 0
            while not stop.is_set():
                i += 1
                cache.set(f"thread:{n}:{i % 50}", b"x" * (i % 300))
                cache.incr(f"sum:{n}")

        threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        waiting: list[int] = []
        try:
            while time.monotonic() < until and (count is None or forked < count) and len(found) < 5:
                pid = os.fork()
                if pid == 0:
                    _child(cache, rng.randrange(4), forked)
                waiting.append(pid)
                forked += 1
                if len(waiting) >= 8:
                    _collect(waiting, found)
            while waiting:
                _collect(waiting, found)
        finally:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            stop.set()
            for thread in threads:
                thread.join(30)
        if any(thread.is_alive() for thread in threads):
            found.append("a thread of the parent hangs")
        if live_beacons(cache) != 1:
            found.append(f"worker slots: 1 held wanted, {live_beacons(cache)} found")
        found += [f"check: {finding}" for finding in cache.check()[:5]]
    return Outcome(f"forks {form} {guard}", {"children": forked}, found)


def _child(cache: Any, way: int, n: int) -> None:
    code = 2
    try:
        key = f"child:{n % 20}"
        cache.set(key, b"y" * 50)
        code = 0 if isinstance(cache.get(key, b""), bytes) and cache.incr("children") > 0 else 3
        if way == 1:
            cache.close()
        elif way == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        elif way == 3:
            pid = os.fork()
            if pid == 0:
                cache.set(key, b"z")
                os._exit(0)
            os.waitpid(pid, 0)
    except shmcache.ShmCacheError as error:
        sys.stderr.write(f"child {n}: {type(error).__name__}: {error}\n")
        code = 4
    finally:
        os._exit(code)


def _collect(waiting: list[int], found: list[str]) -> None:
    """Wait for the oldest child, HUNG seconds at most."""
    pid, begun = waiting[0], time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > HUNG:
            found.append(f"child {pid} hangs")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            waiting.pop(0)
            return
        time.sleep(0.0005)
    waiting.pop(0)
    if not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0) and not (
        os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    ):
        found.append(f"child {pid} ended with status {status:#x}")


def _each(options: argparse.Namespace, harness: Callable[..., Outcome], **more: Any) -> int:
    bad = 0
    for form in [options.form] if options.form else ("posix", "sysv"):
        for guard in [options.guard] if options.guard else ("fast", "semaphore"):
            bad += harness(form, guard, seconds=options.seconds, seed=options.seed, **more).report()
    return bad


def add_commands(
    command: Callable[[str, str, float], argparse.ArgumentParser], survivors_parser: argparse.ArgumentParser
) -> None:
    """The sub-commands of this module."""
    survivors_parser.add_argument("--rounds", type=int, help="so many rounds instead of --seconds")
    survivors_parser.set_defaults(run=lambda o: _each(o, survivors, workers=max(2, o.workers), rounds=o.rounds))
    for name, text, harness in (
        ("cycles", "attach/detach and attach/operation/SIGKILL: nothing is left over (R10)", cycles),
        ("forks", "a storm of forks while threads write (R9)", forks),
    ):
        sub = command(name, text, 15.0)
        sub.add_argument("--form", choices=("posix", "sysv"))
        sub.add_argument("--guard", choices=("fast", "semaphore"))
        sub.add_argument("--count", type=int, help="so many children instead of --seconds")
        sub.set_defaults(run=lambda o, harness=harness: _each(o, harness, count=o.count))
