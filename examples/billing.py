"""Distributed billing: many processes add to and subtract from one balance in a Redis cluster.

    python examples/billing.py --workers 6 --calls 300

Several SIP servers serve one domain and bill the same subscriber. The script is the one of the tutorial
"Key-Value Interface" of OpenSIPS, in its functions (shmcache.opensips): an INVITE is rejected with 403 when
the credit is not above 1 cent, a BYE subtracts duration * price, and now and then the subscriber pays in.

The example starts three redis-server of its own on 127.0.0.1, joins them to a cluster, lets `--workers`
processes handle `--calls` calls each, and compares the balance with the sum of what the workers noted down.
It does so twice: with cache_add and cache_sub, which are one step each for all processes, and with a fetch
and a store in their place, where two processes that fetch the same balance lose what one of them stores.
Then it kills the three servers (SIGKILL) and starts them again from their append-only files.

Exit status: 0; 1 if a balance of cache_add and cache_sub is wrong; 2 without redis-server; 128 + n after
signal n. The servers end with the example, and with its temporary directory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import prefork

import shmcache
from shmcache.opensips import OK, cache_add, cache_counter_fetch, cache_fetch, cache_store, cache_sub

ENGINE_ID = "redis+cluster:billing"
SLOTS = 16_384
PRICE = 3
"""Cents for a second of a call: the tutorial's."""
CREDIT = 20_000
"""Cents at the beginning: some calls are rejected in a default run, most are not."""
READY_S = 20.0
"""Seconds for a server, and for the cluster, to answer; a busy machine took 3."""
PR_SET_PDEATHSIG = 1


@dataclass
class Ledger:
    """What one worker did, in cents and calls."""

    paid: int = 0
    billed: int = 0
    calls: int = 0
    rejected: int = 0
    failed: int = 0


@dataclass
class Result:
    """One row of the table."""

    method: str
    calls: int
    rejected: int
    failed: int
    paid: int
    billed: int
    wanted: int
    found: int | None
    calls_per_s: int
    lost: int = field(init=False)

    def __post_init__(self) -> None:
        self.lost = self.wanted - (self.found or 0)


# -- the cluster -------------------------------------------------------------------------------------------


class Node:
    """One redis-server of the cluster, in a directory of its own; the same port and files after `start`."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory = directory / f"node{number}"
        self.directory.mkdir()
        self.port, self.bus = free_ports()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "bind": "127.0.0.1", "port": self.port, "dir": self.directory, "daemonize": "no", "save": "",
            "appendonly": "yes", "appendfsync": "always", "cluster-enabled": "yes", "cluster-port": self.bus,
            "cluster-config-file": "nodes.conf", "cluster-node-timeout": 2000,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_us,
            )

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as link:
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith(b"+PONG")
        return False

    def ask(self, *command: str) -> object:
        """The answer to a command that has no key."""
        group = f"billing-node-{self.port}"
        with shmcache.open(f"redis:{group}://127.0.0.1:{self.port}") as engine:
            return engine.raw(command[0], *command[1:])


class Cluster:
    """`count` nodes without replicas, each with an equal share of the slots."""

    def __init__(self, directory: Path, count: int) -> None:
        self.nodes = [Node(directory, number) for number in range(count)]

    def __enter__(self) -> Cluster:
        try:
            self.start()
            for number, node in enumerate(self.nodes):
                first, end = SLOTS * number // len(self.nodes), SLOTS * (number + 1) // len(self.nodes)
                node.ask("CLUSTER ADDSLOTS", *map(str, range(first, end)))
                node.ask("CLUSTER SET-CONFIG-EPOCH", str(number + 1))
            for node in self.nodes[1:]:
                node.ask("CLUSTER MEET", "127.0.0.1", str(self.nodes[0].port), str(self.nodes[0].bus))
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            until(f"redis-server on port {node.port}", node.answers)

    def wait(self) -> None:
        """Until every node sees all nodes and all slots."""
        for node in self.nodes:

            def whole(node: Node = node) -> bool:
                info = node.ask("CLUSTER INFO")
                assert isinstance(info, dict)
                return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)

            until("the cluster", whole)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster:billing://{hosts}/?timeout=5"


def free_ports() -> tuple[int, int]:
    """Two ports of 127.0.0.1 that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def end_with_us() -> None:
    """In the server, before it starts: the kernel ends it when the example is gone, however that ended; a
    terminal's signals reach the example alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)


def until(what: str, done: Callable[[], object]) -> None:
    """Ask until the answer is true. SystemExit after READY_S."""
    end = time.monotonic() + READY_S
    while True:
        if done():
            return
        if time.monotonic() > end:
            sys.exit(f"billing: {what}: ready within {READY_S:.0f} s wanted, not ready found")
        time.sleep(0.02)


# -- the script --------------------------------------------------------------------------------------------


def route_invite(user: str) -> bool:
    """Whether the call may begin: `cache_fetch(..., $avp(user_credit)); if ($avp(user_credit) <= 1) 403`."""
    code, credit = cache_fetch(ENGINE_ID, f"credit_{user}")
    return code == OK and credit is not None and int(credit) > 1


def in_one_step(user: str, cents: int) -> bool:
    """Add cents (negative: subtract) by cache_add and cache_sub."""
    change = cache_add if cents >= 0 else cache_sub
    return change(ENGINE_ID, f"credit_{user}", abs(cents))[0] == OK


def in_two_steps(user: str, cents: int) -> bool:
    """The same by a fetch and a store: what must not be done."""
    code, credit = cache_fetch(ENGINE_ID, f"credit_{user}")
    return (
        code == OK
        and credit is not None
        and cache_store(ENGINE_ID, f"credit_{user}", int(credit) + cents) == OK
    )


METHODS = {"add and sub": in_one_step, "fetch, then store": in_two_steps}


def serve(stop: prefork.Stop, go: int, out: Path, method: str, user: str, calls: int, seed: str) -> None:
    """One SIP server's process: wait for the start (end of file on `go`), handle calls, note them down."""
    change, dice, ledger = METHODS[method], random.Random(seed), Ledger()
    os.read(go, 1)
    while ledger.calls < calls and not stop:
        ledger.calls += 1
        if not route_invite(user):
            ledger.rejected += 1  # sl_send_reply("403", "Forbidden - Not enough credit")
            cents = dice.randrange(1_000, 10_000)
        else:
            cents = -PRICE * dice.randrange(1, 120)  # BYE
        if not change(user, cents):
            ledger.failed += 1
        elif cents > 0:
            ledger.paid += cents
        else:
            ledger.billed -= cents
    out.write_text(json.dumps(asdict(ledger)))


def run(method: str, args: argparse.Namespace, directory: Path) -> Result:
    """All workers at once on one balance."""
    user = "alice" if method == "add and sub" else "bob"
    cache_store(ENGINE_ID, f"credit_{user}", CREDIT)
    outs = [directory / f"{user}-{number}" for number in range(args.workers)]
    ready, go = os.pipe()
    with prefork.Children() as children:
        for number, out in enumerate(outs):
            work = partial(
                serve,
                go=ready,
                out=out,
                method=method,
                user=user,
                calls=args.calls,
                seed=f"{args.seed}-{number}",
            )

            def child(stop: prefork.Stop, work: partial[None] = work) -> None:
                os.close(go)
                work(stop)

            children.spawn(f"worker {number}", child)
        os.close(ready)
        start = time.perf_counter()
        os.close(go)
        while children.names():
            for name, _, how in children.reap():
                if how:
                    sys.exit(f"billing: {name}: exit status 0 wanted, {how} found")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
    total = Ledger()
    for out in outs:
        for name, value in json.loads(out.read_text()).items():
            setattr(total, name, getattr(total, name) + value)
    return Result(
        method, total.calls, total.rejected, total.failed, total.paid, total.billed,
        CREDIT + total.paid - total.billed, balance(user), round(total.calls / seconds),
    )  # fmt: skip


def balance(user: str) -> int | None:
    return cache_counter_fetch(ENGINE_ID, f"credit_{user}")[1]


# -- what is shown -----------------------------------------------------------------------------------------


def show(results: list[Result], restarted: int | None, args: argparse.Namespace) -> None:
    head = (
        "method",
        "calls",
        "403",
        "failed",
        "paid",
        "billed",
        "balance wanted",
        "found",
        "lost",
        "calls/s",
    )
    rows = [
        (
            r.method,
            *(f"{n:,}" for n in (r.calls, r.rejected, r.failed, r.paid, r.billed, r.wanted, r.found or 0)),
            f"{r.lost:,}",
            f"{r.calls_per_s:,}",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"one balance, {args.workers} processes, {args.nodes} redis-server; cents")
    for row in [head, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))
    if not args.no_restart:
        print(f"balance after SIGKILL of all servers and a restart: {restarted or 0:,}")


def bill(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="billing-")))
        cluster = stack.enter_context(Cluster(directory, args.nodes))
        stack.enter_context(shmcache.open(cluster.url))
        results = [run(method, args, directory) for method in METHODS]
        restarted = None
        if not args.no_restart:
            cluster.kill()
            cluster.start()
            cluster.wait()
            until("the balance", lambda: balance("alice") is not None)
            restarted = balance("alice")
    good = results[0].lost == results[0].failed == 0 and restarted in (None, results[0].found)
    if args.json:
        rows = [asdict(result) for result in results]
        print(
            json.dumps(
                {"workers": args.workers, "nodes": args.nodes, "results": rows, "after_restart": restarted}
            )
        )
    else:
        show(results, restarted, args)
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=6, help="processes that bill (6)")
    parser.add_argument("--calls", type=int, default=300, help="calls of each process (300)")
    parser.add_argument("--nodes", type=int, default=3, help="servers of the cluster (3)")
    parser.add_argument("--seed", default="1", help="of durations and payments")
    parser.add_argument("--no-restart", action="store_true", help="leave out the SIGKILL of the servers")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    args = parser.parse_args()
    if min(args.workers, args.calls, args.nodes) < 1:
        parser.error("--workers, --calls, --nodes: 1 or more wanted, less found")
    if shutil.which("redis-server") is None:
        print(
            "billing: redis-server wanted, not found (Debian: apt-get install redis-server)", file=sys.stderr
        )
        return 2
    try:
        with prefork.interruptible():
            return bill(args)
    except prefork.Interrupted as error:
        return 128 + error.number


if __name__ == "__main__":
    sys.exit(main())
