"""Replay of a cache trace by forked workers: miss ratio and operations per second.

    python examples/replay_trace.py webapp --traces DIRECTORY --form posix --size 32M --workers 2

The trace is in the format SCT1, perhaps xz-compressed: "SCT1", u32 number of keys, u64 n, then the columns
u32 second[n], key[n], size[n], ttl[n] (0 = for ever), u8 operation[n] (0 GET, 1 SET, 2 DELETE, 3 INCR), key
length[n]; little endian. A GET that misses stores `size` bytes with `ttl`, as a read-through client does;
INCR adds 1 and creates what is absent. Miss ratio: missed GET and INCR over all of both, cold ones included.

I1  Time is the trace's: each worker freezes its handle's clock (`_set_clock`) at the request's second. An
    engine without that, memcached say, gets the lifetimes in real time, and the result says so.
I2  No worker begins a second of the trace more than --lead seconds ahead of the slowest: to that their clocks
    agree. 0 keeps them in step, and they wait for each other at every second.
I3  --split keys gives each key to one worker: the requests of a key keep their order, and without eviction
    the miss ratio is that of one process. --split requests deals the requests out in turn: workers meet on
    the same keys, and the order within --lead seconds is theirs.

With memory:// each worker has a private cache of size / workers.
"""

from __future__ import annotations

import argparse
import array
import json
import lzma
import mmap
import os
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import prefork

import shmcache

GET, SET, DELETE, INCR = range(4)
FIELDS = ("position", "begun_ns", "ended_ns", "reads", "misses", "refused", "evicted", "expired")
"""What a worker tells in shared memory; `position`: 2 + its second of the trace, 1 = ready, 0 = not yet."""
END = 2**63
"""Position of a worker that is through."""
FORMS = ("posix", "sysv", "anon", "memory")


@dataclass
class Trace:
    """A trace in memory: one entry per request in each column, one name per key."""

    seconds: array.array[int]
    keys: array.array[int]
    sizes: array.array[int]
    ttls: array.array[int]
    operations: bytes
    names: dict[int, bytes]

    @classmethod
    def load(cls, path: Path, limit: int | None = None) -> Trace:
        """Read the first `limit` requests. Raises: ValueError for what is no SCT1; OSError, LZMAError."""
        data = path.read_bytes()
        if data[:4] != b"SCT1":
            data = lzma.decompress(data)
        if len(data) < 16 or data[:4] != b"SCT1":
            raise ValueError(f"{path}: magic b'SCT1' wanted, {data[:4]!r} found")
        n_keys, n = struct.unpack_from("<IQ", data, 4)
        if len(data) != 16 + 18 * n:
            raise ValueError(f"{path}: {16 + 18 * n} bytes for {n} requests wanted, {len(data)} found")
        count = n if limit is None else min(n, limit)
        columns = []
        for place in range(4):
            column = array.array("I")
            column.frombytes(data[16 + 4 * n * place :][: 4 * count])
            if sys.byteorder == "big":
                column.byteswap()
            columns.append(column)
        seconds, keys, sizes, ttls = columns
        operations, lengths = data[16 + 16 * n :][:count], data[16 + 17 * n :][:count]
        if count and (max(keys) >= n_keys or max(operations) > INCR):
            found = f"{max(keys)}, {max(operations)}"
            raise ValueError(f"{path}: keys under {n_keys}, operations up to {INCR} wanted, {found} found")
        names: dict[int, bytes] = {}
        for key, length in zip(keys, lengths, strict=True):
            if key not in names:
                names[key] = b"%0*d" % (length, key)
        return cls(seconds, keys, sizes, ttls, operations, names)


class Board:
    """FIELDS of each worker in memory shared with the parent; each row is written by its worker only."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._words = memoryview(mmap.mmap(-1, 8 * workers * len(FIELDS))).cast("Q")

    def put(self, worker: int, field: str, value: int) -> None:
        self._words[worker * len(FIELDS) + FIELDS.index(field)] = value

    def get(self, field: str) -> list[int]:
        return self._words[FIELDS.index(field) :: len(FIELDS)].tolist()

    def meet(self, worker: int, position: int, slack: int, stop: prefork.Stop) -> bool:
        """Tell `position` and wait until nobody is more than `slack` behind it; False: told to stop."""
        self.put(worker, "position", position)
        while min(self.get("position")) < position - slack:
            if stop:
                return False
            time.sleep(0.0002)
        return not stop


def replay(
    cache: shmcache.Engine,
    trace: Trace,
    board: Board,
    worker: int,
    options: argparse.Namespace,
    stop: prefork.Stop,
) -> None:
    """One worker's share of the trace."""
    owner = trace.keys if options.split == "keys" else range(len(trace.keys))
    share = [i for i, place in enumerate(owner) if place % board.workers == worker]
    payload = bytes(max(trace.sizes, default=0))
    set_clock = getattr(cache, "_set_clock", None)
    reads = misses = refused = 0
    now = -1
    if not board.meet(worker, 1, 0, stop):
        return
    board.put(worker, "begun_ns", time.monotonic_ns())
    for i in share:
        if trace.seconds[i] != now:
            now = trace.seconds[i]
            if not board.meet(worker, 2 + now, options.lead, stop):
                return
            if set_clock is not None:
                set_clock(1000 * (1 + now))  # a clock's first moment need not be 0
        name, operation = trace.names[trace.keys[i]], trace.operations[i]
        try:
            if operation == GET:
                reads += 1
                if cache.get(name, shmcache.MISS) is shmcache.MISS:
                    misses += 1
                    cache.set(name, payload[: trace.sizes[i]], trace.ttls[i])
            elif operation == SET:
                cache.set(name, payload[: trace.sizes[i]], trace.ttls[i])
            elif operation == DELETE:
                cache.delete(name)
            else:
                reads += 1
                misses += cache.incr(name, ttl=trace.ttls[i]) == 1
        except (shmcache.ValueTooLarge, shmcache.NoSpace):
            refused += 1
    board.put(worker, "ended_ns", time.monotonic_ns())
    board.put(worker, "position", END)
    results = {"reads": reads, "misses": misses, "refused": refused}
    if shmcache.Capability.SHARED not in cache.capabilities:
        results |= {name: cache.stats()[name] for name in ("evicted", "expired")}
    for field, value in results.items():
        board.put(worker, field, value)


def measure(cache: shmcache.Engine, trace: Trace, options: argparse.Namespace) -> dict[str, Any]:
    """Replay by processes, all ended when it returns. Raises: ChildProcessError if one fails."""
    board = Board(options.workers)
    with prefork.Children() as children:
        for worker in range(options.workers):
            children.spawn(f"worker {worker}", partial(replay, cache, trace, board, worker, options))
        while children.names():
            for name, pid, how in children.reap():
                if how:
                    raise ChildProcessError(f"{name} (process {pid}): exit status 0 wanted, {how} found")
            time.sleep(0.02)
    shared = shmcache.Capability.SHARED in cache.capabilities
    seconds = (max(board.get("ended_ns")) - min(board.get("begun_ns"))) / 1e9
    reads, misses = sum(board.get("reads")), sum(board.get("misses"))
    return {
        "requests": len(trace.keys),
        "reads": reads,
        "misses": misses,
        "miss_ratio": round(misses / max(reads, 1), 4),
        "evicted": cache.stats()["evicted"] if shared else sum(board.get("evicted")),
        "expired": cache.stats()["expired"] if shared else sum(board.get("expired")),
        "refused": sum(board.get("refused")),
        "clock": "logical" if hasattr(cache, "_set_clock") else "real",
        "operations_per_second": round(len(trace.keys) / max(seconds, 1e-9)),
        "seconds": round(seconds, 3),
    }


def open_cache(options: argparse.Namespace, cleanup: prefork.Cleanup) -> shmcache.Engine:
    """The cache to replay through: one of --form has a name of its own and is removed, one of --url stays."""
    with prefork.blocked():
        if options.url:
            cache = shmcache.open(options.url, size=options.size)
        elif options.form == "memory":
            cache = shmcache.open("memory://", size=parse_size(options.size or "64M") // options.workers)
        else:
            name = "" if options.form == "anon" else f"/replay-trace-{os.getpid()}-{os.urandom(4).hex()}"
            cache = shmcache.open(f"{options.form}://{name}", size=options.size or "64M")
        cleanup.callback(cache.close)
        if not options.url and options.form in ("posix", "sysv"):
            cleanup.callback(cache.unlink)
    return cache


def parse_size(text: str) -> int:
    """`64M` in bytes."""
    unit = "KMG".find(text[-1:].upper()) + 1
    digits = text[:-1] if unit else text
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"size: digits and K, M or G wanted, {text!r} found")
    return int(digits) << 10 * unit


def number(text: str, least: int = 1, most: int = 2**32) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{least} to {most} wanted, {text!r} found")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("trace", help="a file, or a name in --traces (without .sct.xz)")
    add("--traces", type=Path, metavar="DIRECTORY")
    add("--form", choices=FORMS, default="posix", help="a cache of its own, removed at the end")
    add("--url", help="in place of --form: any engine; what it holds stays in it")
    add("--size", help="of the whole segment, everything included, as 64M (the default of --form)")
    add("--workers", type=partial(number, most=256), default=2)
    add("--split", choices=("keys", "requests"), default="keys", help="what a worker gets")
    add(
        "--lead",
        type=partial(number, least=0),
        default=10,
        metavar="SECONDS",
        help="of the trace, between workers; 0: in step",
    )
    add("--limit", type=number, help="replay the first requests only")
    add("--json", action="store_true", help="one JSON object in place of the table")
    options = parser.parse_args(argv)
    path = options.traces / f"{options.trace}.sct.xz" if options.traces else Path(options.trace)
    try:
        with prefork.interruptible(), prefork.Cleanup() as cleanup:
            trace = Trace.load(path, options.limit)
            cache = open_cache(options, cleanup)
            result = measure(cache, trace, options)
            where = str(cache.url) if options.url else options.form
    except prefork.Interrupted as error:
        print(f"ended by {error}", file=sys.stderr)
        return 128 + error.number
    except (OSError, ValueError, lzma.LZMAError, argparse.ArgumentTypeError, shmcache.ShmCacheError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    size = options.size or (None if options.url else "64M")
    head = {"trace": path.name.partition(".")[0], "cache": where, "size": size}
    report = head | {"workers": options.workers, "split": options.split, "lead": options.lead} | result
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            shown = f"{value:,}" if isinstance(value, int | float) else value or "as in the URL"
            print(f"{name.replace('_', ' '):24}{shown:>16}")
    if result["clock"] == "real":
        print("lifetimes ran in real time: fewer items expired than the trace says", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
