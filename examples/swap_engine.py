"""One program, any engine: the URL in SHMCACHE_URL is all that changes.

    SHMCACHE_URL=posix:///swap                        python examples/swap_engine.py
    SHMCACHE_URL=memcached://127.0.0.1:11211/         python examples/swap_engine.py
    SHMCACHE_URL=redis://127.0.0.1:6379/0             python examples/swap_engine.py
    SHMCACHE_URL='tiered://?l1=posix:///near&l2=redis://127.0.0.1/0&l1_ttl=5' python examples/swap_engine.py

What it prints to stdout is the same for all of them; to stderr goes which engine it was. It keeps to a
namespace, which it empties at the end, and needs no iteration, which memcached has not. With --remove a
shared-memory segment is removed as well.

Exit status: 0; 1 for an engine that cannot be opened or answers with an error, which is printed.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import shmcache
from shmcache import MISS, Engine

THREADS = 4


def in_threads(work: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fails(call: Callable[[], Any]) -> str:
    """The name of the error that a call raises."""
    try:
        call()
    except shmcache.ShmCacheError as error:
        return type(error).__name__
    return "no error"


def values(cache: Engine) -> Iterator[tuple[str, Any]]:
    for value in ("text", b"\x00\xff", 42, 2**70, 1.5, True, None, [1, {"a": b"b"}], ""):
        cache.set("value", value)
        yield f"a {type(value).__name__} comes back", cache.get("value", MISS)
    cache.delete("value")
    yield "after delete", cache.get("value", "default")


def conditions(cache: Engine) -> Iterator[tuple[str, Any]]:
    yield "replace what is absent", cache.replace("user", "alice")
    yield "add what is absent", cache.add("user", "alice")
    yield "add what is there", cache.add("user", "bob")
    found, token = cache.gets("user")
    yield "gets", found
    yield "cas, unchanged", cache.cas("user", "carol", token)
    yield "cas, changed meanwhile", cache.cas("user", "dave", token)
    yield "append", (cache.append("user", "!"), cache.get("user"))
    yield "pop", (cache.pop("user"), cache.pop("user"))


def counters(cache: Engine) -> Iterator[tuple[str, Any]]:
    in_threads(lambda: [cache.incr("hits") for _ in range(250)])
    yield f"{THREADS} threads add 250 times 1", cache.counter("hits")
    yield "below zero", cache.decr("hits", 1001)
    cache.set("hits", 2**63 - 1)
    yield "beyond 64 bits", fails(lambda: cache.incr("hits"))
    cache.set("hits", "7")
    yield "text is no number", fails(lambda: cache.incr("hits"))
    yield "the value is untouched", cache.get("hits")


def lifetimes(cache: Engine) -> Iterator[tuple[str, Any]]:
    cache.set("session", "s1", ttl=1)
    cache.set("kept", "s2", ttl=1)
    cache.incr("logins", ttl=1)
    yield "with a lifetime of 1 s", cache.get_many(["session", "kept", "logins"])
    yield "touch", cache.touch("kept", 60)
    end = time.monotonic() + 5
    while ("session" in cache or "logins" in cache) and time.monotonic() < end:
        time.sleep(0.05)
    yield "afterwards", cache.get_many(["session", "kept", "logins"])
    yield "a counter begins again", cache.incr("logins")
    yield "40 days are no Unix time", cache.set("long", 1, ttl=40 * 86_400) and cache.get("long")


def recipes(cache: Engine) -> Iterator[tuple[str, Any]]:
    calls: list[int] = []
    results: list[Any] = []

    def slow() -> str:
        calls.append(1)
        time.sleep(0.05)
        return "computed"

    in_threads(lambda: results.append(cache.get_or_set("report", slow)))
    yield f"get_or_set in {THREADS} threads", (len(calls), sorted(set(results)))

    @cache.memoize(ttl=60)
    def double(x: int) -> int:
        calls.append(x)
        return 2 * x

    calls.clear()
    yield "memoize", ([double(x) for x in (1, 2, 1, 2)], calls)
    inside: list[int] = []
    with cache.lock("door") as lock:
        inside.append(1)
        yield "a second holder", fails(lambda: cache.lock("door", timeout=0).__enter__())
        yield "the token is a number", isinstance(lock.token, int)
    part = cache.namespace("part")
    part.set("k", 1)
    part.clear()
    yield "a namespace after clear()", part.get("k")


def program(cache: Engine) -> None:
    for chapter in (values, conditions, counters, lifetimes, recipes):
        print(f"-- {chapter.__name__}")
        for title, result in chapter(cache):
            print(f"{title:.<32} {result!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remove", action="store_true", help="remove the shared-memory segment at the end")
    args = parser.parse_args()
    try:
        with shmcache.open() as engine:
            print(f"engine {engine.engine_id}: {engine.url}", file=sys.stderr)
            space = engine.namespace("swap-example")
            space.clear()
            program(space)
            space.clear()
            if args.remove:
                engine.unlink()
    except (shmcache.ShmCacheError, ValueError, OSError) as error:
        print(f"swap_engine: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
