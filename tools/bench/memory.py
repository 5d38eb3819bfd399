"""Bytes an item costs, everything included, beside other stores.

    python -m tools.bench.memory [--items 100000] [--json]

A segment is filled with new keys until it has turned over twice; its size over the items it then holds is the figure, so
buckets, ghosts, guards, worker table and reserve are charged to the items. Keys have 17 bytes. The limit is 46 bytes and
4 % of the payload beyond the payload itself, at the matching item_size; for 17 + 100 bytes it is 168 bytes in all, 160 with
integrity=header. Rivals are asked for what they use with the same items in them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import pickle
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import machine, servers

__all__ = ["Row", "main", "ours", "rivals"]

KEY = 17
PAYLOADS = (26, 117, 132, 332, 1040)
SEGMENT = 16 << 20


@dataclass(frozen=True)
class Row:
    """One store at one payload (bytes of key and value); limit None: a rival's."""

    store: str
    payload: int
    items: int
    per_item: float
    limit: float | None

    @property
    def overhead(self) -> float:
        """Bytes beyond key and value."""
        return self.per_item - self.payload


def _limit(payload: int, integrity: str) -> float:
    if payload == 117:
        return 168.0 if integrity == "full" else 160.0
    return payload * 1.04 + 46


def ours(payload: int, integrity: str = "full", item_size: int | None = None, size: int = SEGMENT) -> Row:
    """Fill one anonymous segment. item_size None: the payload."""
    shmcache: Any = importlib.import_module("shmcache")
    tag = f"memory{payload}{integrity}{item_size or ''}"
    cache = shmcache.open(f"anon:{tag}://", size=size, item_size=item_size or payload, integrity=integrity)
    try:
        value = random.Random(1).randbytes(payload - KEY)
        for i in range(3 * size // payload):
            cache.set(f"passwd_{i:010d}", value)
        n_items = sum(1 for _ in cache.keys("*"))
    finally:
        cache.close()
    name = f"shmcache, integrity={integrity}, item_size={item_size or payload}"
    return Row(name, payload, n_items, size / max(n_items, 1), _limit(payload, integrity))


def _items(n: int, first: int = 0) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(first)
    for i in range(first, first + n):
        yield f"passwd_{i:010d}", draw.randbytes(100)


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def _dict(n: int, _work: Path) -> float:
    gc.collect()
    before = _resident()
    kept = dict(_items(n))
    used = _resident() - before
    del kept
    return float(used)


def _pickled(n: int, _work: Path) -> float:
    return float(len(pickle.dumps(dict(_items(n)), protocol=5)))


def _lmdb(n: int, work: Path) -> float:
    lmdb: Any = importlib.import_module("lmdb")
    with lmdb.open(str(work / "lmdb"), map_size=1 << 32, sync=False) as env:
        with env.begin(write=True) as txn:
            for key, value in _items(n):
                txn.put(key.encode(), value)
        used: float = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return used


def _diskcache(n: int, work: Path) -> float:
    diskcache: Any = importlib.import_module("diskcache")
    with diskcache.Cache(str(work / "diskcache"), size_limit=1 << 32) as cache:
        with cache.transact():
            for key, value in _items(n):
                cache.set(key, value)
        cache._sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return float(sum(path.stat().st_size for path in (work / "diskcache").rglob("*") if path.is_file()))


def _memcached(n: int, work: Path) -> float:
    pymemcache: Any = importlib.import_module("pymemcache")
    server = servers.start("memcached", work)
    try:
        client = pymemcache.Client(server.socket)
        for key, value in _items(n):
            client.set(key, value)
        used = float(client.stats("slabs")[b"total_malloced"])
        client.close()
        return used
    finally:
        server.stop()


def _redis(n: int, work: Path) -> float:
    redis: Any = importlib.import_module("redis")
    server = servers.start("redis", work)
    try:
        client = redis.Redis(unix_socket_path=server.socket)
        before = client.info("memory")["used_memory"]
        for at in range(0, n, 1000):
            client.mset(dict(_items(min(1000, n - at), at)))
        used: float = client.info("memory")["used_memory"] - before
        client.close()
        return used
    finally:
        server.stop()


_RIVALS: dict[str, tuple[Callable[[int, Path], float], str]] = {
    "dict, pickled": (_pickled, ""),
    "dict, resident memory": (_dict, ""),
    "lmdb, pages of the file": (_lmdb, "lmdb"),
    "diskcache (SQLite), files": (_diskcache, "diskcache"),
    "memcached, memory of slabs": (_memcached, "pymemcache"),
    "redis, used_memory": (_redis, "redis"),
}


def rivals(n: int) -> tuple[list[Row], dict[str, str]]:
    """Rows for the stores that are here, and why the others are not."""
    rows, missing = [], {}
    for name, (ask, package) in _RIVALS.items():
        if package and importlib.util.find_spec(package) is None:
            missing[name] = f"Python package {package} not installed"
            continue
        with tempfile.TemporaryDirectory(prefix="shmcache-bench-") as work:
            try:
                rows.append(Row(name, KEY + 100, n, ask(n, Path(work)) / n, None))
            except (FileNotFoundError, RuntimeError) as e:
                missing[name] = str(e)
    return rows, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every limit is kept, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, default=100_000, help="items the rivals are filled with")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = [ours(payload, integrity) for payload in PAYLOADS for integrity in ("full", "header")]
    rows.append(ours(117, "full", 256))
    others, missing = rivals(args.items)
    rows += others
    kept = all(row.limit is None or row.per_item <= row.limit for row in rows if "item_size=256" not in row.store)
    if args.json:
        print(json.dumps({"machine": machine.describe(), "rows": [asdict(row) for row in rows], "missing": missing}, indent=1))
        return 0 if kept else 1
    print(f"{'store':48}{'payload':>8}{'items':>9}{'B/item':>9}{'overhead':>9}{'limit':>9}")
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:>9.1f}" + ("" if row.per_item <= row.limit else " missed")
        print(f"{row.store:48}{row.payload:>8}{row.items:>9}{row.per_item:>9.1f}{row.overhead:>9.1f}{limit}")
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
