"""Password caching for SIP digest authentication: pre-forked workers share one cache.

    python examples/password_cache.py --form posix --workers 4

A registrar asks its subscriber database for a credential at every signed request. Here the workers keep it
for 1200 s under `passwd_<user>` (registrar.py: Verifier); REGISTER (user of To, WWW-Authenticate) and
INVITE (user of From, Proxy-Authenticate) share it. When the password does not fit, the cached credential is
dropped and the database asked once more before the request is rejected, so a changed password works at
once. A load generator, a process of its own, registers and calls as `--users` telephones. All of it runs
twice, with the cache and without, and the database queries of both runs are counted, not computed (without
the cache for credentials, that is: responses to retransmitted requests stay in it).

What the cache changes: after a password change in the database the OLD password is accepted until the
cached credential ends (1200 s at most) or the new password is used, which replaces it for all workers. With
private caches (`--form memory`) that replaces it in one worker, and the others go on. Where this must not
be, whoever changes the password deletes the key. The table counts both cases.

Exit status: 0; 1 if a request failed or got another answer than it must; 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import os
import random
import select
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import prefork
import sip
from registrar import DOMAIN, Credential, Ledger, Settings, Subscribers, listen, serve

import shmcache

SIZE = "size=64M"
URLS = {
    "posix": f"posix:///{{name}}?{SIZE}",
    "sysv": f"sysv:///{{name}}?{SIZE}",
    "anon": f"anon://?{SIZE}",
    "memory": "",
}
"""By form. An empty one: each worker opens memory:// for itself."""
T1_S, T2_S = 0.5, 4.0
"""RFC 3261 timers: first retransmission, longest interval (INVITE has none); 64 * T1 ends the transaction."""
WINDOW = 48
"""Requests under way: enough that four workers on two cores never idle, within the socket's buffer."""
MAX_DEATHS = 20
"""Workers replaced before the run is given up: a request that kills its worker goes to the next."""
WRONG_SHARE, INVITE_SHARE, CHANGED_SHARE = 0.03, 0.3, 0.05
"""Of the requests: signed with a wrong password; INVITE. Of the users: whose password changes half-way."""
LONG_NAMES = ("Via", "From", "To", "Call-ID", "Contact", "Content-Length")


# -- load generator ------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One thing a telephone does: a method and a password, `right`, `wrong`, or around a change of it in the
    database: `old` (the change, then the old password), `new`, `again` (the old password once more)."""

    method: str
    kind: str


@dataclass
class Phone:
    """One user's telephone: at most one request under way."""

    user: str
    password: str
    algorithm: str
    compact: bool
    call_id: str
    tasks: deque[Task] = field(default_factory=deque)
    former: str = ""
    cseq: int = 0
    nonce: str = ""
    nc: int = 0
    waiting: int = 0
    busy: bool = False


@dataclass
class Transaction:
    """A request on its way: sent again after `interval` seconds until `deadline`."""

    phone: Phone
    task: Task
    datagram: bytes
    copied: tuple[str, ...]
    signed: bool
    challenges: int
    deadline: float
    interval: float = T1_S


def plan(users: int, requests: int, rng: random.Random) -> tuple[list[Phone], list[int]]:
    """The telephones with their tasks, and the order of the users to begin them in: rounds, each shuffled."""
    phones = [
        Phone(
            f"user{i:05}",
            f"secret-{i}",
            ("SHA-256", "MD5")[i % 2],
            i % 4 > 1,
            f"{rng.getrandbits(64):x}@phone",
        )
        for i in range(users)
    ]
    rounds = [rng.sample(range(users), users) for _ in range(-(-requests // users))]
    order = list(itertools.chain(*rounds))[:requests]
    for user in order:
        method = "INVITE" if rng.random() < INVITE_SHARE else "REGISTER"
        phones[user].tasks.append(Task(method, "wrong" if rng.random() < WRONG_SHARE else "right"))
    for phone in rng.sample(phones, max(1, int(users * CHANGED_SHARE))):
        middle = len(phone.tasks) // 2
        if len(phone.tasks) >= 5:
            for place, kind in enumerate(("old", "new", "again"), middle):
                phone.tasks[place] = Task(phone.tasks[place].method, kind)
    return phones, order


class LoadGenerator:
    """Plays the telephones against the server and checks every answer; `results` counts by name.

    Args: loss: probability that a datagram, either way, is lost on purpose.
    """

    def __init__(
        self, server: sip.Address, database: Path, users: int, requests: int, seed: int, loss: float
    ) -> None:
        self._rng = random.Random(seed)
        self._phones, self._order = plan(users, requests, self._rng)
        self._server, self._loss, self._subscribers = server, loss, Subscribers(database)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self._port = self._socket.getsockname()[1]
        self._open: dict[str, Transaction] = {}
        self._timers: list[tuple[float, str]] = []
        self._branches = itertools.count(self._rng.getrandbits(48) << 16)
        self.results: Counter[str] = Counter(requests=requests)
        self.failures: list[str] = []

    def run(self, stop: prefork.Stop) -> dict[str, Any]:
        """Play all tasks. Returns: the counts, seconds, and the first failures as text."""
        start, order = time.monotonic(), iter(self._order)
        finished = False
        while not stop and not (finished and not self._open):
            while not finished and len(self._open) < WINDOW:
                user = next(order, None)
                if user is None:
                    finished = True
                elif self._phones[user].busy:
                    self._phones[user].waiting += 1
                else:
                    self._begin(self._phones[user])
            pause = min(max(self._timers[0][0] - time.monotonic(), 0), 0.2) if self._timers else 0
            if select.select([self._socket], [], [], pause)[0]:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(WINDOW):  # then timers and `stop` again, however fast answers come
                        self._receive(self._socket.recv(65535))
            self._retransmit()
        elapsed = time.monotonic() - start
        return dict(self.results) | {"seconds": elapsed, "failures": self.failures[:10]}

    def _begin(self, phone: Phone) -> None:
        task = phone.tasks.popleft()
        phone.busy = True
        if task.kind == "old":
            phone.former, changed = phone.password, phone.password + "-changed"
            self._subscribers.change(phone.user, Credential.make(phone.user, changed))
            self.results["password_changes"] += 1
        elif task.kind == "new":
            phone.password += "-changed"
        self._send(phone, task)

    def _send(self, phone: Phone, task: Task, challenges: int = 0) -> None:
        """Send a request, signed if the telephone has a nonce."""
        branch = f"z9hG4bK{next(self._branches):x}"
        phone.cseq += 1
        datagram, copied = self._request(phone, task, branch)
        now = time.monotonic()
        self._open[branch] = Transaction(
            phone, task, datagram, copied, bool(phone.nonce), challenges, now + 64 * T1_S
        )
        heapq.heappush(self._timers, (now + T1_S, branch))
        self._transmit(datagram)

    def _request(self, phone: Phone, task: Task, branch: str) -> tuple[bytes, tuple[str, ...]]:
        """A request as telephones write it, half of them compact and folded; its From, To, Call-ID, CSeq."""
        register = task.method == "REGISTER"
        uri = f"sip:{DOMAIN}" if register else f"sip:echo@{DOMAIN}"
        me = f"<sip:{phone.user}@{DOMAIN}>"
        sender, to = f"{me};tag={phone.call_id[:8]}", me if register else f"<{uri}>"
        copied = (sender, to, phone.call_id, f"{phone.cseq} {task.method}")
        body = "" if register else "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        names = ("v", "f", "t", "i", "m", "l") if phone.compact else LONG_NAMES
        here = f"127.0.0.1:{self._port}"
        values = [
            f"SIP/2.0/UDP {here};branch={branch};rport",
            *copied[:3],
            f"<sip:{phone.user}@{here}>",
            f"{len(body)}",
        ]
        lines = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
        lines += ["Max-Forwards: 70", f"CSeq: {copied[3]}"]
        if phone.nonce:
            phone.nc += 1
            signature = self._sign(phone, task, uri).header()
            name = "Authorization" if register else "Proxy-Authorization"
            lines.append(f"{name}: " + (signature.replace(", ", ",\r\n ") if phone.compact else signature))
        return "\r\n".join([f"{task.method} {uri} SIP/2.0", *lines, "", body]).encode(), copied

    def _sign(self, phone: Phone, task: Task, uri: str) -> sip.Digest:
        password = {"wrong": "guess", "again": phone.former}.get(task.kind, phone.password)
        cnonce, nc = f"{self._rng.getrandbits(64):016x}", f"{phone.nc:08x}"
        unsigned = sip.Digest(phone.user, DOMAIN, phone.nonce, uri, "", phone.algorithm, "auth", nc, cnonce)
        hashed = sip.ha1(phone.algorithm, phone.user, DOMAIN, password)
        return unsigned.signed(hashed, task.method)

    def _transmit(self, datagram: bytes) -> None:
        if self._rng.random() >= self._loss:
            with contextlib.suppress(BlockingIOError):  # a full buffer is a lost datagram
                self._socket.sendto(datagram, self._server)

    def _retransmit(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            branch = heapq.heappop(self._timers)[1]
            transaction = self._open.get(branch)
            if transaction is None:
                continue
            if now >= transaction.deadline:
                del self._open[branch]
                self._end(transaction, "timeouts", f"no answer in {64 * T1_S:.0f} s")
                continue
            self.results["retransmissions"] += 1
            self._transmit(transaction.datagram)
            doubled = 2 * transaction.interval
            transaction.interval = doubled if transaction.task.method == "INVITE" else min(doubled, T2_S)
            heapq.heappush(self._timers, (now + transaction.interval, branch))

    def _receive(self, datagram: bytes) -> None:
        if self._rng.random() < self._loss:
            return
        response = sip.parse(datagram)
        via = response.vias()[0]
        transaction = self._open.pop(via.parameters.get("branch", ""), None)
        if transaction is None:
            self.results["late_answers"] += 1  # to a request sent twice and answered twice
            return
        phone, task = transaction.phone, transaction.task
        self._check(response, via, transaction)
        if task.method == "INVITE":
            self._acknowledge(transaction, response, via)
        if response.status not in (401, 407):
            self._judge(transaction, response.status)
            return
        name = "www-authenticate" if response.status == 401 else "proxy-authenticate"
        found = (sip.authentication(value) for value in response.all(name))
        offer = next((offer for offer in found if offer["algorithm"] == phone.algorithm), None)
        stale = offer is not None and offer.get("stale") == "true"
        if offer is None or transaction.challenges > 3 or (transaction.signed and not stale):
            self._end(transaction, "failed", f"{response.status} to a signed request")
            return
        self.results["stale_nonces" if stale else "challenges"] += 1
        phone.nonce, phone.nc = offer["nonce"], 0
        self._send(phone, task, transaction.challenges + 1)

    def _check(self, response: sip.Message, via: sip.Via, transaction: Transaction) -> None:
        """What RFC 3261 wants copied into a response, and RFC 3581 added."""
        found = [response.get(name) or "" for name in ("from", "to", "call-id", "cseq")]
        found[1], _, tag = found[1].partition(";tag=")
        if tuple(found) != transaction.copied or not tag or via.parameters.get("rport") != str(self._port):
            self._fail(transaction, f"{response.status} without the request's Via, From, To, Call-ID or CSeq")

    def _acknowledge(self, transaction: Transaction, response: sip.Message, via: sip.Via) -> None:
        """ACK: of the same transaction after a rejection, else of its own (RFC 3261, 17.1.1.3, 13.2.2.4)."""
        branch = via.parameters["branch"] if response.status >= 300 else f"z9hG4bK{next(self._branches):x}"
        lines = [
            f"ACK sip:echo@{DOMAIN} SIP/2.0",
            f"Via: SIP/2.0/UDP 127.0.0.1:{self._port};branch={branch};rport",
            "Max-Forwards: 70",
            *(f"{name}: {response.get(name.lower())}" for name in ("From", "To", "Call-ID")),
            f"CSeq: {transaction.phone.cseq} ACK",
        ]
        self._transmit("\r\n".join([*lines, "Content-Length: 0", "", ""]).encode())

    def _judge(self, transaction: Transaction, status: int) -> None:
        kind = transaction.task.kind
        allowed = {"right": (200,), "new": (200,), "wrong": (403,)}.get(kind, (200, 403))
        if status not in allowed:
            self._end(transaction, "failed", f"{allowed[0]} wanted, {status} found")
            return
        if status == 200 and kind in ("old", "again"):
            self.results["old_accepted" if kind == "old" else "old_accepted_after_new"] += 1
        self._end(transaction, "accepted" if status == 200 else "rejected", "")

    def _end(self, transaction: Transaction, count: str, failure: str) -> None:
        self.results[count] += 1
        if failure:
            self._fail(transaction, failure)
        phone = transaction.phone
        phone.busy = False
        if phone.waiting:
            phone.waiting -= 1
            self._begin(phone)

    def _fail(self, transaction: Transaction, failure: str) -> None:
        user, (method, kind) = transaction.phone.user, transaction.task
        self.failures.append(f"{method} of {user}, {kind} password: {failure}")


# -- the run -------------------------------------------------------------------------------------------------


RESULTS = (
    "requests", "accepted", "rejected", "failed", "timeouts", "challenges", "stale_nonces", "retransmissions",
    "late_answers", "password_changes", "old_accepted", "old_accepted_after_new",
)  # fmt: skip


class RunFailed(Exception):
    """The run cannot go on; nothing of it is left behind."""


@dataclass
class Run:
    """What one run gave: the load generator's counts, and the workers'."""

    results: dict[str, Any]
    ledgers: list[Ledger]
    deaths: int

    def total(self, name: str) -> int:
        return sum(ledger.count(name) for ledger in self.ledgers)

    def column(self) -> dict[str, Any]:
        """The figures of one column of the table."""
        samples = sorted(sample for ledger in self.ledgers for sample in ledger.samples()) or [0]
        return {
            **{name: self.results.get(name, 0) for name in RESULTS},
            "db_queries": self.total("queries"),
            "cache_hits": self.total("hits"),
            "cache_errors": self.total("errors"),
            "absorbed": self.total("absorbed"),
            "lookup_median_us": round(statistics.median(samples) / 1000, 2),
            "lookup_p99_us": round(samples[int(0.99 * len(samples))] / 1000, 2),
            "requests_per_second": round(self.results["requests"] / self.results["seconds"], 1),
            "seconds": round(self.results["seconds"], 2),
            "worker_deaths": self.deaths,
            "messages_per_worker": [ledger.count("messages") for ledger in self.ledgers],
        }


def play(
    options: argparse.Namespace, server: sip.Address, database: Path, pipe: int, stop: prefork.Stop
) -> None:
    """The load generator's process: plays, then writes its results as JSON to `pipe`."""
    load = LoadGenerator(server, database, options.users, options.requests, options.seed, options.loss / 100)
    results = json.dumps(load.run(stop))
    with open(pipe, "w") as stream:
        stream.write(results)


def run(
    options: argparse.Namespace, engine: shmcache.Engine | None, cached: bool, folder: Path, end: float
) -> Run:
    """One run: server, workers, load generator; all gone when it returns. Raises: RunFailed."""
    database = folder / f"{'with' if cached else 'without'}.sqlite"
    subscribers = Subscribers(database)
    phones = plan(options.users, 0, random.Random(options.seed))[0]
    subscribers.create({phone.user: Credential.make(phone.user, phone.password) for phone in phones})
    subscribers.close()  # no connection may be open when the workers are forked
    ledgers = [Ledger(2 * options.requests) for _ in range(options.workers)]
    deaths, text = 0, b""
    with listen() as server, prefork.Children() as children:
        settings = Settings(server, engine, cached, database, os.urandom(32), options.nonce_life)
        for number, ledger in enumerate(ledgers):
            children.spawn(f"worker {number}", partial(serve, settings, ledger))
        reader, writer = os.pipe()
        children.spawn("load generator", partial(play, options, server.getsockname(), database, writer))
        os.close(writer)
        with open(reader, "rb", buffering=0) as results:
            while True:
                if select.select([results], [], [], 0.1)[0]:
                    if not (chunk := results.read(65536)):
                        break
                    text += chunk
                for name, pid, how in children.reap():
                    if name == "load generator":
                        continue
                    deaths += 1
                    print(f"{name} (process {pid}) ended: {how or 'exit status 0'}", file=sys.stderr)
                    if deaths > MAX_DEATHS:
                        raise RunFailed(f"worker deaths: at most {MAX_DEATHS} wanted, {deaths} found")
                    children.spawn(name, partial(serve, settings, ledgers[int(name.split()[1])]))
                if time.monotonic() > end:
                    raise RunFailed(f"deadline: an end within {options.deadline} s wanted, none found")
    if not text:
        raise RunFailed("load generator: results wanted, none found")
    return Run(json.loads(text), ledgers, deaths)


def measure(options: argparse.Namespace) -> tuple[Run, Run]:
    """The run with the cache and the run without; the segment has a name of its own and is removed."""
    end = time.monotonic() + options.deadline
    with prefork.Cleanup() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="password-cache-")))
        engine = None
        if url := URLS[options.form]:  # opened before the fork: the handle works in every worker
            with prefork.blocked():
                engine = shmcache.open(url.format(name=folder.name))
                cleanup.callback(engine.close)
                if options.form != "anon":
                    cleanup.callback(engine.unlink)
        with_cache = run(options, engine, True, folder, end)
        return with_cache, run(options, engine, False, folder, end)


ROWS = {
    "requests": "requests", "accepted": "accepted", "rejected": "rejected (wrong password)",
    "db_queries": "database queries", "requests_per_second": "requests per second",
    "lookup_median_us": "credential lookup, median (us)", "lookup_p99_us": "credential lookup, p99 (us)",
    "challenges": "challenges", "stale_nonces": "stale nonces", "retransmissions": "retransmissions",
    "absorbed": "answered from the stored response", "password_changes": "password changes in the database",
    "old_accepted": "old password accepted, new not yet used",
    "old_accepted_after_new": "old password accepted after the new", "cache_errors": "cache errors",
    "worker_deaths": "workers replaced", "messages_per_worker": "messages per worker", "seconds": "seconds",
}  # fmt: skip


def table(options: argparse.Namespace, left: dict[str, Any], right: dict[str, Any], saved: float) -> str:
    def cell(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"

    lines = [f"{'form ' + options.form:42}{'with the cache':>26}{'without':>26}"]
    lines += [f"{title:42}{cell(left[name]):>26}{cell(right[name]):>26}" for name, title in ROWS.items()]
    return "\n".join([*lines, f"{'database queries saved by the cache':42}{saved:>24.1f} %"])


def number(text: str, most: int = 1_000_000) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"1 to {most} wanted, {text!r} found")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--form", choices=URLS, default="posix", help="where the cache lives; memory: private to each worker")
    add("--workers", type=partial(number, most=256), default=4)
    add("--users", type=number, default=1000)
    add("--requests", type=number, default=12_000, help="per run, signed REGISTER and INVITE")
    add("--loss", type=float, default=0.0, metavar="PERCENT", help="of the datagrams, lost on purpose")
    add("--nonce-life", type=float, default=2.0, metavar="SECONDS", help="until a nonce is stale")
    add("--deadline", type=float, default=55.0, metavar="SECONDS", help="for all of it")
    add("--seed", type=int, default=1)
    add("--json", action="store_true", help="one JSON object in place of the table")
    options = parser.parse_args(argv)
    try:
        with prefork.interruptible():
            with_cache, without = measure(options)
    except prefork.Interrupted as error:
        print(f"ended by {error}", file=sys.stderr)
        return 128 + error.number
    except (RunFailed, OSError, shmcache.ShmCacheError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    left, right = with_cache.column(), without.column()
    saved = 100 * (1 - left["db_queries"] / max(right["db_queries"], 1))
    if options.json:
        report = {"form": options.form, "workers": options.workers, "users": options.users, **left}
        report |= {"rejected_wrong_password": left["rejected"], "saved_percent": round(saved, 2)}
        report |= {"db_queries_with": report.pop("db_queries"), "db_queries_without": right.pop("db_queries")}
        print(json.dumps(report | {"without": right}))
    else:
        print(table(options, left, right, saved))
    failures = with_cache.results["failures"] + without.results["failures"]
    print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
