"""resize: resizers killed at any point, and the command."""

# ruff: noqa: F811
from __future__ import annotations

import contextlib
import importlib.util
import itertools
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable

import pytest

from shmcache import catalog
from shmcache.engines.shm import ShmEngine

from .resize_help import again, cache, form, make  # noqa: F401
from .shm_help import in_child, reap, run_child

STEP = int(os.environ.get("SHMCACHE_RESIZE_STEP", "60"))
"""Calls from one kill to the next are random up to this one; 2 kills at every one of about 1,500 (7 minutes)."""


def killed_at(cache: ShmEngine, event: int, size: str) -> bool:
    """A child resizes and is killed at its n-th call or return of a function, C or Python; whether it got that far."""

    def body() -> None:
        left = event

        def count(frame: object, what: str, arg: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        cache.resize(size)
        os._exit(0)

    code = os.waitstatus_to_exitcode(os.waitpid(in_child(body), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_resizer_killed_between_any_two_calls(make: Callable[..., ShmEngine], form: str) -> None:
    """Whatever the resizer had done, the handle of before and one opened by name see one segment with every item."""
    cache = make(size=1 << 20)
    items = {f"k{i}": os.urandom(50) for i in range(100)}
    cache.set_many(items)
    sizes, rng, event = set(), random.Random(form), 1
    while killed_at(cache, event, "2M"):
        fresh = again(cache) if event % 2 else again(cache, mode="r")
        assert fresh.get_many(items) == items
        assert cache.incr("event") == fresh.get("event")
        sizes.add(cache._header()["size"])
        assert fresh._header()["uuid"] == cache._header()["uuid"]
        assert cache.check() == []
        fresh.close()
        if rng.random() < 0.2:
            catalog.gc(0, name=cache._name)
        if cache._header()["size"] == 2 << 20:
            cache.resize("1M")
        event += rng.randrange(1, STEP)
    assert sizes == {1 << 20, 2 << 20}


def test_resizers_killed_at_random_while_others_write(make: Callable[..., ShmEngine]) -> None:
    """Fifteen resizers killed at random: what two writers were told is stored is there, and there is one segment."""
    cache = make(eviction="none", lock_timeout=30.0)
    board = mmap.mmap(-1, 4096)

    def write(n: int) -> None:
        while not board[0]:
            count = cache.incr(f"n{n}")
            cache.set(f"s{n}:{count % 100}", count)
            struct.pack_into("<Q", board, 8 + 8 * n, count)

    cache.set_many({f"k{i}": b"v" * 60 for i in range(3000)})
    writers = [in_child(lambda n=n: write(n)) for n in range(2)]
    rng, size = random.Random(6), itertools.cycle(("3M", "2M"))
    with contextlib.ExitStack() as end:
        end.callback(board.__setitem__, 0, 1)
        for _ in range(15):
            wanted = next(size)
            resizer = in_child(lambda wanted=wanted: cache.resize(wanted, timeout=30.0))
            time.sleep(rng.uniform(0.0, 0.03))
            with contextlib.suppress(ProcessLookupError):
                os.kill(resizer, signal.SIGKILL)
            os.waitpid(resizer, 0)
    reap(*writers)
    for n, count in enumerate(struct.unpack_from("<2Q", board, 8)):
        assert cache.counter(f"n{n}") == count
        for i in range(max(count - 99, 1), count + 1):
            assert cache.get(f"s{n}:{i % 100}") == i
    assert len(cache.get_many([f"k{i}" for i in range(3000)])) == 3000
    catalog.gc(0, name=cache._name)
    names = [f for f in catalog.list_segments() if f.name == cache._name]
    assert [f.header["uuid"] for f in names] == [cache._header()["uuid"]]


def test_gc_spares_a_living_resizer(cache: ShmEngine) -> None:
    """gc() run by another process at every step of a resize takes nothing away from it."""
    cache.set_many({f"k{i}": i for i in range(5000)})
    calls = []

    def progress(done: int, of: int) -> None:
        run_child(lambda: catalog.gc(0, name=cache._name))
        calls.append((done, of))

    assert cache.resize("3M", progress=progress).items == 5000
    assert calls[-1][0] == calls[-1][1]
    assert cache.get("k4999") == 4999


# -- the command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="typer is not installed")
def test_the_command(cache: ShmEngine) -> None:
    """`shmcache resize` says what it did, on stderr or as JSON; without a geometry, or with an impossible one, it ends with 2."""
    from .cli_help import run

    target = f"{cache._form}:{cache._name}"
    cache.set_many({f"k{i}": i for i in range(100)})
    result = run("resize", target, "--size", "3M")
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("shmcache: 2097152 to 3145728 bytes, 100 items; writers waited ")
    (found,) = run("resize", target, "-s", "1M", "--guards", "2", "--item-size", "100", "--workers", "50", "--json").objects
    assert {key: found[key] for key in ("items", "left_out", "corrupt", "size", "old_size")} == {
        "items": 100, "left_out": 0, "corrupt": 0, "size": 1 << 20, "old_size": 3 << 20,
    }  # fmt: skip
    header = cache._header()
    assert (header["n_shards"], header["item_size"], header["n_workers"]) == (2, 100, 50)
    assert run("resize", target).code == 2
    assert run("resize", target, "--size", "10K").code == 2
    assert run("resize", "memory://", "--size", "1M").code == 4
    assert cache.get("k99") == 99


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="typer is not installed")
def test_the_bar_is_for_terminals(make: Callable[..., ShmEngine]) -> None:
    """On a terminal a progress bar is drawn while items are copied; elsewhere stderr has the one closing line."""
    from .cli_help import on_terminal, run

    cache = make()
    assert "copying" in on_terminal("resize", f"{cache._form}:{cache._name}", "--size", "3M")
    assert len(run("resize", f"{cache._form}:{cache._name}", "--size", "2M").err.splitlines()) == 1
