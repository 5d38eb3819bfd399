"""The server of password_cache.py: subscribers in SQLite, their credentials in the cache, SIP answers.

I1  A signed request costs at most one database query: with the cache never more than without it.
I2  A cache that fails costs queries, never a request: its errors count as misses.
I3  A retransmitted request is not judged again: any worker sharing the cache repeats the stored response
    (RFC 3261, 17.2). With private caches only the worker that gave it can.

Not here: TCP, TLS, stored registrations, calls (a good INVITE gets 200 and nothing more), nonce counts.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import mmap
import socket
import sqlite3
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import prefork
import sip

import shmcache

DOMAIN = "example.org"
"""The one domain served, and the realm; with several, the keys would have to name the domain too."""

CREDENTIAL_TTL_S = 1200
"""The tutorial's lifetime: how long at most a removed subscriber or an old password stays good."""

CLAIM_TTL_S = 2.0
"""Over the time one request takes, under the 32 s a client tries: a killed worker's is judged again."""

TRANSACTION_TTL_S = 32.0
"""Timer J of RFC 3261, 64 * T1: as long as a client may retransmit."""

IDLE_US = 200_000
"""How long a worker without work waits before it looks whether it shall stop."""

COUNTS = (
    "messages", "faults", "challenges", "stale", "absorbed", "accepted", "wrong", "unknown", "hits",
    "queries", "errors", "unsendable",
)  # fmt: skip
_TAKEN = len(COUNTS)


class Ledger:
    """What one worker counted, in memory shared with its parent: it outlives the worker, however that ends.

    Written by one worker, read by its parent. After the counts: the times of `samples` credential lookups in
    ns, cache and database together, without the digest's arithmetic; later ones are left out.
    """

    def __init__(self, samples: int) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * (_TAKEN + 1 + samples))).cast("Q")

    def add(self, name: str) -> None:
        self._words[COUNTS.index(name)] += 1

    def count(self, name: str) -> int:
        return self._words[COUNTS.index(name)]

    def sample(self, elapsed_ns: int) -> None:
        place = _TAKEN + 1 + self._words[_TAKEN]
        if place < len(self._words):
            self._words[place] = elapsed_ns
            self._words[_TAKEN] += 1

    def samples(self) -> list[int]:
        return self._words[_TAKEN + 1 : _TAKEN + 1 + self._words[_TAKEN]].tolist()


class Credential(NamedTuple):
    """HA1 of one subscriber per algorithm, in hex. Cached as one str, `md5:sha256`; never the password."""

    md5: str
    sha256: str

    @classmethod
    def make(cls, user: str, password: str) -> Credential:
        return cls(*(sip.ha1(name, user, DOMAIN, password) for name in ("MD5", "SHA-256")))

    def proves(self, digest: sip.Digest, method: str) -> bool:
        return digest.matches(self.md5 if digest.algorithm == "MD5" else self.sha256, method)


class Subscribers:
    """The subscriber table, in OpenSIPS's columns. A connection belongs to the process that made it."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF")

    def create(self, credentials: dict[str, Credential]) -> None:
        self._db.execute(
            "CREATE TABLE subscriber (id INTEGER PRIMARY KEY, username CHAR(64) NOT NULL,"
            " domain CHAR(64) NOT NULL, password CHAR(25) NOT NULL DEFAULT '', ha1 CHAR(64) NOT NULL,"
            " ha1_sha256 CHAR(64) NOT NULL, UNIQUE (username, domain))"
        )
        insert = "INSERT INTO subscriber (username, domain, ha1, ha1_sha256) VALUES (?, ?, ?, ?)"
        self._db.execute("BEGIN")
        self._db.executemany(insert, [(user, DOMAIN, *known) for user, known in credentials.items()])
        self._db.execute("COMMIT")

    def find(self, user: str) -> Credential | None:
        query = "SELECT ha1, ha1_sha256 FROM subscriber WHERE username = ? AND domain = ?"
        row = self._db.execute(query, (user, DOMAIN)).fetchone()
        return None if row is None else Credential(*row)

    def change(self, user: str, credential: Credential) -> None:
        query = "UPDATE subscriber SET ha1 = ?, ha1_sha256 = ? WHERE username = ? AND domain = ?"
        self._db.execute(query, (*credential, user, DOMAIN))

    def close(self) -> None:
        self._db.close()


class Verdict(enum.Enum):
    """The end of one signed request; the value names its count in the ledger."""

    ACCEPTED = "accepted"
    WRONG = "wrong"
    UNKNOWN = "unknown"


class Verifier:
    """Judges by the credential in the cache, else in the database. `cache` None: always in the database."""

    def __init__(self, cache: shmcache.Engine | None, subscribers: Subscribers, ledger: Ledger) -> None:
        self._cache, self._subscribers, self._ledger = cache, subscribers, ledger

    def judge(self, user: str, proves: Callable[[Credential], bool]) -> Verdict:
        """Whether the credential of `user` satisfies `proves`; one database query at most.

        One from the cache that does not is dropped (the password may have changed) and the database asked, as
        after any miss; one from the database that does not is final.
        """
        key = f"passwd_{user}"
        start = time.perf_counter_ns()
        cached = self._fetch(key)
        elapsed = time.perf_counter_ns() - start
        if cached is not None and proves(cached):
            self._ledger.add("hits")
            self._ledger.sample(elapsed)
            return Verdict.ACCEPTED
        start = time.perf_counter_ns()
        if cached is not None:
            self._drop(key)
        found = self._subscribers.find(user)
        self._ledger.add("queries")
        if found is not None:
            self._store(key, found)
        self._ledger.sample(elapsed + time.perf_counter_ns() - start)
        if found is None:
            return Verdict.UNKNOWN
        return Verdict.ACCEPTED if proves(found) else Verdict.WRONG

    def _fetch(self, key: str) -> Credential | None:
        try:
            value = None if self._cache is None else self._cache.get(key)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")
            return None
        return None if value is None else Credential(*value.split(":"))

    def _drop(self, key: str) -> None:
        try:
            if self._cache is not None:
                self._cache.delete(key)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")

    def _store(self, key: str, credential: Credential) -> None:
        try:
            if self._cache is not None:
                self._cache.set(key, ":".join(credential), ttl=CREDENTIAL_TTL_S)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")


class Registrar:
    """Answers SIP requests, one datagram at a time.

    Args: transactions: holds the responses for retransmitted requests. key: the run's secret, 32 bytes, the
    same in every worker.
    """

    def __init__(
        self,
        verifier: Verifier,
        transactions: shmcache.Engine,
        nonces: sip.Nonces,
        key: bytes,
        ledger: Ledger,
    ) -> None:
        self._verifier, self._transactions, self._nonces = verifier, transactions, nonces
        self._key, self._ledger = key, ledger

    def answer(self, datagram: bytes, source: sip.Address, now: float) -> tuple[bytes, sip.Address] | None:
        """The response and where it goes; `now`: Unix time in seconds.

        None for what gets none: ACK, responses, what is not SIP, a copy of a request another worker is at.
        """
        self._ledger.add("messages")
        try:
            request = sip.parse(datagram)
        except ValueError:
            self._ledger.add("faults")
            return None
        if not request.method or request.method == "ACK":
            return None
        response = self._respond(request, datagram, source, now)
        return (response, request.target(source)) if response else None

    def _respond(
        self, request: sip.Message, datagram: bytes, source: sip.Address, now: float
    ) -> bytes | None:
        # The same request gets the same tag from every worker (RFC 3261, 8.2.7), and nobody can foretell it.
        tag = hmac.digest(self._key, datagram, "sha256").hex()[:16]

        def reply(status: int, *extra: tuple[str, str], reason: str = "") -> bytes | None:
            return request.reply(status, source, tag, extra, reason)

        if request.fault:
            self._ledger.add("faults")
            return (
                reply(505)
                if request.fault == "version"
                else reply(400, reason=f"Bad Request: {request.fault}")
            )
        if request.method not in ("REGISTER", "INVITE"):
            return reply(405, ("Allow", "REGISTER, INVITE, ACK"))
        www = request.method == "REGISTER"
        try:
            identity = sip.Uri.parse(sip.NameAddress.parse(request.get("to" if www else "from") or "").uri)
            digest = _own(request.all("authorization" if www else "proxy-authorization"))
        except ValueError:
            self._ledger.add("faults")
            return reply(400)
        if identity.host != DOMAIN or not identity.user:
            return reply(404)
        key = "tx_" + hashlib.sha256(datagram).hexdigest()  # a retransmission is the same byte for byte
        if digest is not None and (earlier := self._earlier(key)) is not None:
            return earlier or None
        state = sip.NonceState.FORGED if digest is None else self._nonces.judge(digest.nonce, now)
        if digest is None or state is not sip.NonceState.GOOD:
            stale = state is sip.NonceState.STALE
            self._ledger.add("stale" if stale else "challenges")
            name, nonce = "WWW-Authenticate" if www else "Proxy-Authenticate", self._nonces.make(now)
            offers = [(name, sip.challenge(DOMAIN, nonce, algorithm, stale)) for algorithm in sip.ALGORITHMS]
            return reply(401 if www else 407, *offers)
        if digest.uri != request.uri:
            return reply(400, reason="Bad Request: digest uri differs from Request-URI")  # RFC 7616, 3.4.6
        if digest.username != identity.user:
            return reply(403)
        if not self._claim(key):
            return self._earlier(key) or None
        verdict = self._verifier.judge(identity.user, lambda known: known.proves(digest, request.method))
        self._ledger.add(verdict.value)
        if verdict is Verdict.ACCEPTED:
            bindings = [("Contact", value) for value in request.all("contact")] if www else []
            response = reply(200, *(bindings or [("Contact", f"<sip:{DOMAIN}>")]))
        else:
            response = reply(403 if verdict is Verdict.WRONG else 404)
        self._keep(key, response or b"")
        return response

    def _earlier(self, key: str) -> bytes | None:
        """The response given to this request before; empty: another worker is at it; None: it is new."""
        try:
            found = self._transactions.get(key)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")
            return None
        if found is not None:
            self._ledger.add("absorbed")
        return found if isinstance(found, bytes) else None

    def _claim(self, key: str) -> bool:
        """Whether the request is this worker's to judge: no other has claimed it."""
        try:
            return self._transactions.add(key, b"", ttl=CLAIM_TTL_S)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")
            return True

    def _keep(self, key: str, response: bytes) -> None:
        try:
            self._transactions.set(key, response, ttl=TRANSACTION_TTL_S)
        except shmcache.ShmCacheError:
            self._ledger.add("errors")


def _own(values: list[str]) -> sip.Digest | None:
    """The credentials for our realm, None if there are none. Raises: ValueError for unreadable ones."""
    for value in values:
        if sip.authentication(value).get("realm") == DOMAIN:
            return sip.Digest.parse(value)
    return None


def listen() -> socket.socket:
    """The bound socket that all workers inherit by fork and read from, as OpenSIPS's do.

    A datagram wakes one waiting worker, the one that has waited longest: idle workers take what comes,
    whoever sent it, and what a killed worker left in the queue the others answer. SO_REUSEPORT would tie each
    sender to one worker by hash, a gateway's whole load to a single one, and lose a dead worker's queue.
    """
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    # The kernel's own time limit: a Python one polls first, and every datagram would wake every worker.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, IDLE_US))
    return server


class Settings(NamedTuple):
    """What workers need besides their ledger. `engine` None: each opens a private cache. `cached` False:
    credentials always come from the database, only responses are kept. `nonce_life_s`: seconds."""

    socket: socket.socket
    engine: shmcache.Engine | None
    cached: bool
    database: Path
    key: bytes
    nonce_life_s: float


def serve(settings: Settings, ledger: Ledger, stop: prefork.Stop) -> None:
    """A worker: answers what it receives until told to stop."""
    engine = settings.engine or shmcache.open("memory://")
    verifier = Verifier(engine if settings.cached else None, Subscribers(settings.database), ledger)
    nonces = sip.Nonces(settings.key, settings.nonce_life_s)
    registrar = Registrar(verifier, engine, nonces, settings.key, ledger)
    while not stop:
        try:
            datagram, source = settings.socket.recvfrom(65535)
        except BlockingIOError:  # the socket's receive timeout, without work
            continue
        answer = registrar.answer(datagram, source, time.time())
        if answer is not None:
            try:
                settings.socket.sendto(*answer)
            except OSError:  # a Via that names port 0, a full buffer
                ledger.add("unsendable")
