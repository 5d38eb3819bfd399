"""Measures how long a call of the memcached or Redis engine blocks when its server misbehaves, and prints a table.

    python tools/fault_table.py [--only memcached|redis] [--timeout 1.0] [--connect-timeout 2.0] [--json]

A real server stands behind a proxy (tests/servers) that spoils its answers. Per fault: `first`, the longest
of the calls get, set, incr, get_many of 300 keys, delete and lock, each by an engine that does not know of the
fault yet, its connection open or not; `next`, the longest of 100 calls after that, within the retry interval;
`probe`, the longest call that probes; and what was raised. Runs for about two minutes per kind of server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from servers import fake, processes

import shmcache

CALLS: dict[str, Callable[[Any], Any]] = {
    "get": lambda e: e.get("k"),
    "set": lambda e: e.set("k", 1),
    "incr": lambda e: e.incr("n"),
    "get_many": lambda e: e.get_many([f"k{i}" for i in range(300)]),
    "delete": lambda e: e.delete("k"),
    "lock": lambda e: e.lock("name").__enter__(),
}
PROXY_MODES = ("hang", "deaf", "drop", "reset", "half", "stall", "trickle", "garbage", "refuse")
REFUSALS: dict[str, tuple[re.Pattern[bytes], bytes]] = {
    "memcached": (re.compile(rb"(?:^|\n)(?:m[gsda]|version|lru_crawler)\b"), b"SERVER_ERROR out of order\r\n"),
    "redis": (re.compile(rb"(?:^|\n)\*[0-9]+\r\n"), b"-LOADING the dataset is being read\r\n"),
}
"""Start of a command, and the answer of a server that cannot serve."""
_serial = itertools.count()


def timed(call: Callable[[], Any]) -> tuple[float, str]:
    start = time.monotonic()
    try:
        call()
        found = "an answer"
    except shmcache.ShmCacheError as error:
        found = type(error).__name__
    return time.monotonic() - start, found


def measure(
    scheme: str,
    address: str,
    spoil: Callable[[], None],
    mend: Callable[[], None],
    options: dict[str, Any],
) -> dict[str, Any]:
    first = later = probe = 0.0
    slowest = ""
    raised: set[str] = set()
    for warm, name in itertools.product((True, False), CALLS):
        mend()
        url = f"{scheme}:f{next(_serial)}://{address}/"
        opened: Any = shmcache.open(url, health=False, **options)
        with opened as engine:
            if warm:
                timed(lambda engine=engine: engine.get("k"))  # type: ignore[misc]
            spoil()
            seconds, found = timed(lambda engine=engine, name=name: CALLS[name](engine))  # type: ignore[misc]
            if seconds > first:
                first, slowest = seconds, name
            raised.add(found)
            engine.health._interval = 0.0
            probe = max(probe, timed(lambda engine=engine: engine.get("k"))[0])  # type: ignore[misc]
            engine.health._interval = 15.0
            for _ in range(100):
                later = max(later, timed(lambda engine=engine: engine.get("k"))[0])  # type: ignore[misc]
    mend()
    return {"first": first, "slowest": slowest, "next": later, "probe": probe, "raised": sorted(raised)}


def faults(scheme: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fault -> what was measured."""
    rows: dict[str, dict[str, Any]] = {}
    starts: dict[str, Callable[[Path], processes.Server]] = {
        "memcached": processes.start_memcached,
        "redis": processes.start_redis,
    }
    command, answer = REFUSALS[scheme]
    with tempfile.TemporaryDirectory() as directory, starts[scheme](Path(directory)) as server:
        assert server.port is not None
        with fake.Proxy(server.host, server.port) as proxy:
            for mode in PROXY_MODES:

                def spoil(mode: str = mode) -> None:
                    proxy.mode = mode
                    if mode == "refuse":
                        proxy.drop_all()

                rows[mode] = measure(scheme, proxy.address, spoil, lambda: setattr(proxy, "mode", "pass"), options)
        rows["stopped (SIGSTOP)"] = measure(scheme, server.address, server.pause, server.resume, options)
        with fake.Fake(lambda data: answer * len(command.findall(data))) as broken:
            name = answer.split()[0].decode().lstrip("-")
            rows[name] = measure(scheme, broken.address, lambda: None, lambda: None, options)

        def revive() -> None:
            if server._process is None:
                server.start()

        rows["killed"] = measure(scheme, server.address, server.kill, revive, options)
    with fake.FullBacklog() as nobody:
        rows["connect hangs"] = measure(scheme, nobody.address, lambda: None, lambda: None, options)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*REFUSALS])
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--connect-timeout", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    options = {"timeout": args.timeout, "connect_timeout": args.connect_timeout}
    found = {scheme: faults(scheme, options) for scheme in ([args.only] if args.only else REFUSALS)}
    if args.json:
        print(json.dumps({"options": options, "faults": found}))
        return
    print(f"timeout {args.timeout} s, connect_timeout {args.connect_timeout} s; longest seconds of a call")
    for scheme, rows in found.items():
        print(f"{scheme:20}{'first':>8} {'of':9}{'probe':>7}{'next':>9}  raised")
        for name, row in rows.items():
            raised = ", ".join(row["raised"])
            print(f"{name:20}{row['first']:8.3f} {row['slowest']:9}{row['probe']:7.3f}{row['next']:9.6f}  {raised}")


if __name__ == "__main__":
    main()
