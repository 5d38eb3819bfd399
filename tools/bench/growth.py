"""What grows with the number of items: get and set beside a dict, attach, fork, page faults, clean, memory of a process.

    python -m tools.bench.growth [--most 1e6] [--json]

Each size runs in fresh processes. A segment takes about 190 bytes an item of 17 + 100 bytes, a dict and its keys about 350;
10 million items need 6 GB and some minutes. Growth is the time of a get over the time at 100,000 items; shmcache's may be
at most 1.5 times a dict's own in the same run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shmcache.bench import Field, Plan, Subject, dict_subject, engine_subject, measure, one_argument, tail, two_arguments

from . import machine
from .native import HERE

__all__ = ["main", "one"]

BASE = 100_000
GROWTH = 1.5
BYTES_AN_ITEM = 190


def _segment_size(n: int) -> int:
    return max(n * BYTES_AN_ITEM, 1 << 20) * 5 // 4


def _open(name: str, n: int, **options: Any) -> Any:
    shmcache: Any = importlib.import_module("shmcache")
    return shmcache.open(f"posix:///{name}", size=_segment_size(n), item_size=117, **options)


def _private_kib() -> int:
    """Memory of this process that is no part of a file or segment."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _attach_ms(cache: Any) -> float:
    """Middle of 20 further attachments, each dropped again."""
    took = []
    for _ in range(20):
        start = time.perf_counter_ns()
        other = type(cache).from_url(cache.url, mode="a")
        took.append((time.perf_counter_ns() - start) / 1e6)
        other.close()
    return median(took)


def _fork_ms() -> float:
    took = []
    for _ in range(15):
        start = time.perf_counter_ns()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        took.append((time.perf_counter_ns() - start) / 1e6)
        os.waitpid(pid, 0)
    return median(took)


def _clean(cache: Any, keys: list[str], value: bytes) -> dict[str, float]:
    """Every item gets a lifetime, time passes, one process cleans while another sets: how long, and what the other waits."""
    for key in keys:
        cache.set(key, value, 60)
    mine = keys[:1000]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            asked = [mine[i % len(mine)] for i in range(100_000)]
            found = tail(cache.set, asked, (value,))
            os.write(write, json.dumps([found.p50, found.p999, found.p9999]).encode())
        finally:
            os._exit(0)
    cache._set_clock(cache._now_ms() + 120_000)
    start, used = time.perf_counter(), time.thread_time()
    n = cache.clean()
    spent, worked = time.perf_counter() - start, time.thread_time() - used
    cache._set_clock(None)
    os.waitpid(pid, 0)
    p50, p999, p9999 = json.loads(os.read(read, 200) or b"[0, 0, 0]")
    os.close(read)
    os.close(write)
    return {
        "clean items": n, "clean s": spent, "clean processor s": worked, "set beside it p50 us": p50 / 1000,
        "set beside it p99.9 us": p999 / 1000, "set beside it p99.99 us": p9999 / 1000,
    }  # fmt: skip


def _calls(subject: Subject, plan: Plan) -> tuple[Field, dict[str, float]]:
    f = Field.fill(subject, plan)
    assert subject.set is not None
    return f, {
        "get ns": measure(one_argument(subject.get, f.asked, plan.chunk), plan.seconds).ns,
        "get uniform ns": measure(one_argument(subject.get, _spread(f.keys), plan.chunk), plan.seconds).ns,
        "set ns": measure(two_arguments(subject.set, f.asked, f.value, plan.chunk), plan.seconds).ns,
    }


def _spread(keys: list[Any]) -> list[Any]:
    """200,000 keys in an order that no prefetcher follows."""
    n = len(keys)
    step = next(s for s in range(int(n * 0.618) | 1, 2 * n) if math.gcd(s, n) == 1)
    return [keys[i * step % n] for i in range(200_000)]


def one(kind: str, n: int) -> dict[str, float]:
    """The figures of one store with n items, in this process."""
    plan = Plan(items=n, seconds=0.4)
    if kind == "dict":
        f, found = _calls(dict_subject(), plan)
        found["fork ms"] = _fork_ms()
        return found
    name = f"growth-{uuid.uuid4().hex[:12]}"
    found = {}
    if kind == "shmcache":
        for prefault in (True, False):
            start = time.perf_counter()
            cache = _open(name, n, prefault=prefault, hugepages="no")
            found[f"create ms, prefault={prefault}"] = (time.perf_counter() - start) * 1e3
            if prefault:
                cache.unlink()
                cache.close()
    else:
        cache = _open(name, n, hugepages="try")
    try:
        subject = engine_subject(cache)
        f, more = _calls(subject, plan)
        found.update(more)
        if kind == "shmcache":
            found["attach ms"] = _attach_ms(cache)
            found["fork ms"] = _fork_ms()
            found["items kept"] = len(cache)
            gc.collect()
            before = _private_kib()
            found["private KiB of a handle"] = before - _without(cache)
            found.update(_clean(cache, f.keys, f.value))
    finally:
        cache.unlink()
        cache.close()
    return found


def _without(cache: Any) -> int:
    """Private memory of this process while the cache is detached."""
    cache.close()
    gc.collect()
    left = _private_kib()
    cache.reattach()
    return left


def _ask(kind: str, n: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.bench.growth", "--one", kind, "--most", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    if done.returncode != 0:
        raise RuntimeError(f"growth of {kind} at {n} items: exit status 0 wanted, {done.returncode} found:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when get grows within the limit at every size, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.growth", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--most", type=float, default=1e6, help="items of the largest size, e.g. 1e7")
    parser.add_argument("--one", choices=("dict", "shmcache", "shmcache-huge"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one, int(args.most))))
        return 0
    sizes = [10**power for power in range(4, 10) if 10**power <= args.most]
    kinds = ("dict", "shmcache", "shmcache-huge")
    watch = machine.Watch([])
    found = {kind: {n: _ask(kind, n) for n in sizes} for kind in kinds}
    noise = watch.stop()
    base = {kind: found[kind].get(BASE, {}).get("get ns", 0.0) for kind in kinds}
    grown = {kind: {n: found[kind][n]["get ns"] / base[kind] for n in sizes if base[kind]} for kind in kinds}
    kept = all(grown["shmcache"][n] <= GROWTH * grown["dict"][n] for n in sizes if n > BASE and base["dict"])
    if args.json:
        print(json.dumps({"machine": machine.describe(), "noise": noise, "found": found, "growth": grown}, indent=1))
        return 0 if kept else 1
    print(f"{'':34}" + "".join(f"{n:>14,}" for n in sizes))
    for kind in kinds:
        for figure in dict.fromkeys(name for n in sizes for name in found[kind][n]):
            cells = [found[kind][n].get(figure, math.nan) for n in sizes]
            print(f"{kind + ' ' + figure:34.34}" + "".join(f"{cell:>14,.2f}" for cell in cells))
        print(f"{kind + ' growth of get':34}" + "".join(f"{grown[kind].get(n, math.nan):>14.2f}" for n in sizes))
    share = [grown["shmcache"][n] / grown["dict"][n] for n in sizes if base["dict"]]
    print(f"{'growth over dict growth (<= 1.5)':34}" + "".join(f"{value:>14.2f}" for value in share))
    print(f"others used {noise['others percent']} % of the processors, load {noise['load after']}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
