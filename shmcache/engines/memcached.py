"""memcached:// - one memcached or several. Driver: pymemcache.

I1  A call ends within connect_timeout + timeout, whatever the server does: each exchange has one deadline, not
    one per packet. Who probes a server that was down takes at most that again. (Resolving a host name is up to
    the system; give addresses. A list of keys may take 60 s while bytes keep coming. A call that asks several servers
    takes that for each that fails, once: from then on it is down.)
I2  After anything but a complete, well-formed answer the connection is closed: no call reads another's answer.
    An idle connection on which something arrived, the end included, is not used.
I3  A command is sent once; only a read that lost its connection, on a server that answers, is sent again.
I4  A socket belongs to one call at a time and to the process that opened it; a forked child closes its copies
    and opens its own.
I5  What the server does not answer is EngineDown or the answer of on_down=miss. The driver's exceptions are
    `__cause__` only, and no message has a value in it.

What is done with items: memcached_items.py, memcached_counters.py and memcached_whole.py; how they lie there: memcached_wire.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, TypeVar

from pymemcache import exceptions as driver  # type: ignore[import-untyped]
from pymemcache.client.base import Client  # type: ignore[import-untyped]
from pymemcache.client.rendezvous import RendezvousHash  # type: ignore[import-untyped]

from .. import url as _url
from ..arguments import lifetime
from ..codec import Codec, codec_option, get_codec
from ..errors import EngineDown, NoSpace, NotSupported, ShmCacheError, ValueTooLarge
from ..health import DOWN, OFF, RETRY_INTERVAL, Health, OnChange, Ticket, health_option
from ..url import MAX_TTL, Host, Parser, Url
from . import memcached_wire as wire
from .memcached_stream import Stream
from .memcached_whole import MemcachedWhole
from .memcached_wire import Reply

__all__ = ["MemcachedEngine"]

PORT: Final = 11211
CHUNK_REQUESTS: Final = 100
CHUNK_BYTES: Final = 65_536
"""Of requests sent before their answers are read. More would let both sides wait for the other to read."""
IDLE: Final = 64
"""Connections kept open per server and process when nobody uses them; a thread uses one at a time."""
_BROKEN: Final = (driver.MemcacheError, OSError)
_T = TypeVar("_T")


class Link(Client):  # type: ignore[misc]
    """One connection. `limit`: the moment, in time.monotonic(), at which everything on it ends."""

    def __init__(self, host: Host, connect_timeout: float, timeout: float) -> None:
        address = host.name if host.is_unix else (host.name, host.port)
        super().__init__(address, connect_timeout=connect_timeout, timeout=timeout, default_noreply=False)
        self.limit = math.inf
        self.connected = False

    def _connect(self) -> None:
        self.close()
        end = min(time.monotonic() + self.connect_timeout, self.limit)
        places: list[Any] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self.server)]
        if isinstance(self.server, tuple):
            host, port = self.server
            places = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        error: OSError | None = None
        for family, kind, protocol, _, address in places:
            plain = socket.socket(family, kind, protocol)
            try:
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError("timed out")
                plain.settimeout(left)
                plain.connect(address)
                if family != socket.AF_UNIX:
                    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as failure:
                plain.close()
                error = failure
            except BaseException:
                plain.close()
                raise
            else:
                self.sock = Stream(plain)
                self.connected = True
                return
        raise error or OSError(f"no address of {self.server!r}")

    def start(self, seconds: float | None = None) -> Stream:
        """The stream, connected, with `timeout` seconds from now on, or as many as given, of which no more than
        `timeout` without a byte."""
        if self.sock is None:
            self._connect()
        stream: Stream = self.sock
        stream.patience, stream.looked = self.timeout, False
        stream.end = min(time.monotonic() + (self.timeout if seconds is None else seconds), self.limit)
        return stream

    def exchange(self, requests: bytes, count: int) -> list[Reply]:
        """See Stream.exchange."""
        return self.start().exchange(requests, count)

    def lines(self, command: bytes, last: bytes = b"MN", seconds: float | None = None) -> list[bytes]:
        """See Stream.lines."""
        return self.start(seconds).lines(command, last)


class _Server:
    """One server: its name and its idle connections."""

    def __init__(self, host: Host, make: Callable[[Host], Link]) -> None:
        self.host = host
        self._make = make
        self._idle: deque[Link] = deque()
        self._pid = os.getpid()

    def take(self) -> Link:
        """A connection for one call: an idle one, the last used first, or a new one, not yet connected."""
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        while self._idle:
            try:
                link = self._idle.pop()
            except IndexError:  # another thread took it
                break
            if link.sock is not None and link.sock.quiet():
                return link
            link.close()
        return self._make(self.host)

    def give(self, link: Link) -> None:
        if link.sock is None or link.sock.tainted or len(self._idle) >= IDLE:
            link.close()
        else:
            link.limit = math.inf
            self._idle.append(link)

    def close(self) -> None:
        idle, self._idle = self._idle, deque()
        for link in idle:
            link.close()


class _Ring:
    """Rendezvous hashing with weights: a server that goes takes its own keys along and moves no other."""

    def __init__(self, servers: Sequence[_Server], weights: Sequence[float]) -> None:
        self._servers = servers
        self._names = [str(server.host).encode() for server in servers]
        self._weights = weights
        self._all = [str(i) for i in range(len(servers))]
        self._hash = RendezvousHash(self._all, hash_function=self._score)

    def _score(self, text: str, seed: int) -> float:
        """-weight / ln(u), u uniform in (0, 1): the share of the keys is the share of the weights."""
        number, _, key = text.partition("-")
        i = int(number)
        digest = hashlib.blake2b(self._names[i] + b" " + key.encode("latin-1"), digest_size=7).digest()
        return self._weights[i] / -math.log((int.from_bytes(digest, "big") + 0.5) / 2**56)

    def pick(self, route: bytes, without: set[int]) -> int:
        """The number of the server of a wire key; -1 if all are left out."""
        if len(self._all) == 1:
            return -1 if without else 0
        ring = self._hash
        if without:
            nodes = [node for node in self._all if int(node) not in without]
            if not nodes:
                return -1
            ring = RendezvousHash(nodes, hash_function=self._score)
        return int(ring.get_node(route.decode("latin-1")))


def _weights(name: str, value: Any) -> tuple[float, ...]:
    """Positive numbers, `,`-separated or as an iterable."""
    weights = tuple(
        float(word)
        for word in _url.words(name, [str(v) for v in value] if not isinstance(value, str) else value)
    )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"option {name!r}: numbers over 0 wanted, {weights} found")
    return weights


class MemcachedEngine(MemcachedWhole):
    """An engine on memcached 1.6 or later, several servers with weighted rendezvous hashing.

    Args: url: `memcached:group://host[:port],.../`, `memcached:///run/a.sock`. timeout: seconds for an exchange
    of request and answer; connect_timeout: until the connection stands. max_item: bytes of the server's
    largest item (its -I), key and 64 bytes included. weights: one number per server. failover: whether the keys
    of a server that is down move to the others until it is back; without it they are down. retry_interval:
    seconds between probes of a server that is down, negative = never. flush_on_rejoin: empty a server that
    comes back before it is used: what it missed makes it stale. health: where this machine's processes share
    what they know of the servers: an engine URL, an open engine, yes (posix:///health-<euid>), or no (each
    process for itself). on_change: callable(host, port, old, new, error), see health.Health. prefix: stands
    before every key. on_down: "raise" EngineDown, or "miss": reads miss, set, add, replace, append, prepend,
    delete and touch answer False, the many-key calls report all keys; incr, cas, lock, clear and iteration
    raise anyway. long_keys: "hash", or "raise" KeyTooLong. kamailio: MD5 for keys of 250 bytes or more, and
    decimal values with client flags 0 are ints. default_ttl: seconds, None = for ever. codec: see
    codec.get_codec; with "pickle" whoever can write to the server can run code here.

    Lifetimes are whole seconds, never shorter than asked and up to one longer; beyond 30 days they go by the
    wall clocks of both machines. Iteration is there where every
    server allows `lru_crawler metadump`. `clear` empties the servers, leases included; with a prefix it
    removes key by key, and needs iteration. `stats`: hits, misses, sets, deletes and down are this process's,
    the rest the servers'. A token of `cas` does not outlive the server's restart.
    """

    OPTIONS: ClassVar[dict[str, Parser]] = {
        "timeout": _url.seconds(0.001, 3600),
        "connect_timeout": _url.seconds(0.001, 3600),
        "max_item": _url.size(1, 2**30),
        "weights": _weights,
        "failover": _url.boolean,
        "retry_interval": _url.seconds(-MAX_TTL, MAX_TTL),
        "flush_on_rejoin": _url.boolean,
        "health": health_option,
        "on_change": _url.keyword_only(_url.function),
        "prefix": _url.text,
        "on_down": _url.choice("raise", "miss"),
        "long_keys": _url.choice("hash", "raise"),
        "kamailio": _url.boolean,
        "default_ttl": _url.seconds(),
        "codec": codec_option,
    }

    def __init__(
        self,
        url: Url,
        *,
        timeout: float = 1.0,
        connect_timeout: float = 2.0,
        max_item: int = 2**20,
        weights: tuple[float, ...] = (),
        failover: bool = False,
        retry_interval: float = RETRY_INTERVAL,
        flush_on_rejoin: bool = False,
        health: Any = True,
        on_change: OnChange | None = None,
        prefix: str = "",
        on_down: str = "raise",
        long_keys: str = "hash",
        kamailio: bool = False,
        default_ttl: float | None = None,
        codec: Codec | str = "msgpack",
    ) -> None:
        self.url = url
        self.engine_id = url.engine_id
        self.default_ttl = lifetime(default_ttl)
        self.max_item = max_item
        self._codec = get_codec(codec)
        self._keys = wire.Keys(prefix, long_keys, kamailio)
        self._kamailio = kamailio
        self._miss = on_down == "miss"
        self._failover, self._flush = failover, flush_on_rejoin
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._patience = timeout + connect_timeout
        self._counts = dict.fromkeys(("hits", "misses", "sets", "deletes", "down"), 0)
        self._closed = False
        self._iterable: bool | None = None
        hosts = _hosts(url)
        if weights and len(weights) != len(hosts):
            raise ValueError(
                f"option 'weights': {len(hosts)} numbers wanted, one per server, {len(weights)} found"
            )
        self._servers = [_Server(host, self._link) for host in hosts]
        self._n_groups = len(hosts)
        self._ring = _Ring(self._servers, weights or (1.0,) * len(hosts))
        self.health = Health(
            health, scheme="memcached", servers=hosts, retry_interval=retry_interval, on_change=on_change
        )

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> MemcachedEngine:
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<MemcachedEngine {self.engine_id!r} on {', '.join(str(server.host) for server in self._servers)}>"

    def close(self) -> None:
        self._closed = True
        for server in self._servers:
            server.close()

    def set_server(self, host: str, status: bool) -> bool:
        """Take a server out for all workers of this machine (False: its keys are down, or move with failover), or
        put it back in (True). Nobody probes what is out.

        Args: host: as in the URL, `10.0.0.1:11211`; without the port where that is unique. Returns: whether it
        was a change. Raises: ValueError for an unknown server; with flush_on_rejoin, EngineDown if the server
        that shall come back cannot be emptied, and it stays out.
        """
        found = [server for server in self._servers if host in (str(server.host), server.host.name)]
        if len(found) != 1:
            known = ", ".join(str(server.host) for server in self._servers)
            raise ValueError(f"set_server: one of {known} wanted, {host!r} found")
        server = found[0]
        if status and self._flush and self.health.status(server.host).status in (DOWN, OFF):
            error = self._probe(server, flush=True)
            if error is not None:
                raise self._down(server, error)
        return self.health.set_server(server.host, status)

    # -- asking --

    def _owner(self, name: bytes) -> int:
        return self._ring.pick(name, set())

    def _name(self, number: int) -> str:
        return str(self._servers[number].host)

    def _link(self, host: Host) -> Link:
        return Link(host, self._connect_timeout, self._timeout)

    def _down(self, server: _Server, error: BaseException, detail: str = "") -> EngineDown:
        down = EngineDown(
            f"{self.engine_id}: memcached server {server.host}: an answer within {self._timeout:g} s wanted,"
            f" {type(error).__name__} ({error}) found{detail}"
        )
        down.__cause__ = error
        return down

    def _probe(self, server: _Server, flush: bool, limit: float = math.inf) -> BaseException | None:
        """Ask the server for its version on a connection of its own, and empty it: the error, or None."""
        link = self._link(server.host)
        link.limit = limit
        try:
            link.start()
            link.version()
            if flush:
                link.start()
                link.flush_all()
        except _BROKEN as error:
            return error
        finally:
            link.close()
        return None

    def _run(
        self, number: int, act: Callable[[Any], _T], again: bool, seconds: float
    ) -> tuple[_T, None] | tuple[None, EngineDown]:
        """`act` on a connection to server `number`, within `seconds` from its admission: its answer, or why the
        server is down. The silence of a server that had less than `_patience` is not held against it.

        Raises: EngineDown where the connection was lost and the server is not down.
        """
        if self._closed:
            raise ShmCacheError(f"engine {self.engine_id!r}: an open engine wanted, a closed one found")
        server = self._servers[number]
        try:
            ticket: Ticket = self.health.admit(server.host, lambda: self._probe(server, self._flush))
        except EngineDown as error:
            return None, error
        link = server.take()
        link.limit = limit = time.monotonic() + seconds
        try:
            answer = act(link)
        except _BROKEN as error:
            link.close()
            failure = error
        except BaseException:
            link.close()
            raise
        else:
            server.give(link)
            return answer, None
        if (
            link.connected
            and not isinstance(failure, TimeoutError)
            and self._probe(server, False, limit) is None
        ):
            if again:
                return self._run(number, act, False, limit - time.monotonic())
            raise self._down(
                server, failure, "; the server answers others, whether this was done is not known"
            )
        if seconds >= self._patience or not isinstance(failure, TimeoutError):
            self.health.failed(server.host, ticket, failure)
        return None, self._down(server, failure)

    def _ask(self, route: bytes, *requests: bytes, again: bool = False) -> list[Reply]:
        data, count = b"\r\n".join(requests) + b"\r\n", len(requests)
        without = set[int]()
        number = self._ring.pick(route, without)
        while True:
            replies, down = self._run(number, lambda link: link.exchange(data, count), again, self._patience)
            if replies is not None:
                answer: list[Reply] = replies
                return answer
            without.add(number)
            number = self._ring.pick(route, without) if self._failover else -1
            if number < 0:
                assert down is not None
                raise down

    def _ask_many(
        self, requests: Sequence[tuple[bytes, Sequence[bytes]]], again: bool = False
    ) -> list[list[Reply] | EngineDown]:
        answers: list[list[Reply] | EngineDown] = [[]] * len(requests)
        pending, without = list(range(len(requests))), set[int]()
        while pending:
            groups: dict[int, list[int]] = {}
            for i in pending:
                groups.setdefault(self._ring.pick(requests[i][0], without), []).append(i)
            groups.pop(-1, None)  # all servers are down: the last one's error stays
            pending = []
            for number, members in groups.items():
                for chunk in self._chunks(requests, members):
                    if self._ask_chunk(number, requests, chunk, answers, again) and self._failover:
                        without.add(number)
                        pending += chunk
        return answers

    @staticmethod
    def _chunks(requests: Sequence[tuple[bytes, Sequence[bytes]]], members: list[int]) -> Iterator[list[int]]:
        chunk: list[int] = []
        count = size = 0
        for i in members:
            more = sum(map(len, requests[i][1]))
            if chunk and (count + len(requests[i][1]) > CHUNK_REQUESTS or size + more > CHUNK_BYTES):
                yield chunk
                chunk, count, size = [], 0, 0
            chunk.append(i)
            count, size = count + len(requests[i][1]), size + more
        yield chunk

    def _ask_chunk(
        self,
        number: int,
        requests: Sequence[tuple[bytes, Sequence[bytes]]],
        chunk: list[int],
        answers: list[list[Reply] | EngineDown],
        again: bool,
    ) -> bool:
        """One exchange, its answers put into `answers`: whether the server is down."""
        texts = [text for i in chunk for text in requests[i][1]]
        data, count = b"\r\n".join(texts) + b"\r\n", len(texts)
        try:
            replies, down = self._run(number, lambda link: link.exchange(data, count), again, self._patience)
        except EngineDown as error:
            for i in chunk:
                answers[i] = error
            return False
        at = 0
        for i in chunk:
            if replies is None:
                assert down is not None
                answers[i] = down
            else:
                answers[i] = replies[at : (at := at + len(requests[i][1]))]
        return replies is None

    def _refused(self, reply: Reply) -> Exception:
        text = (reply.flags[0] if reply.flags else b"").decode("utf-8", "replace")
        error: Exception
        if reply.code == b"SE" and "too large" in text:
            error = ValueTooLarge(
                f"value: an item of the server's size limit wanted, a larger one found (max_item is {self.max_item})"
            )
        elif reply.code == b"SE" and "out of memory" in text.lower():
            error = NoSpace(
                f"{self.engine_id}: memory for the item wanted, none found; the server dropped what it had"
            )
        elif reply.code == b"SE" or "Too many open" in text:
            error = EngineDown(f"{self.engine_id}: an answer wanted, SERVER_ERROR ({text[:80]}) found")
            error.__cause__ = driver.MemcacheServerError(text)
        elif reply.code == b"ER":
            error = NotSupported(
                f"{self.engine_id}: memcached 1.6 with meta commands wanted, ERROR {text[:80]} found"
            )
            error.__cause__ = driver.MemcacheUnknownCommandError(text)
        else:
            error = ShmCacheError(
                f"{self.engine_id}: an answer that fits wanted, {reply.code.decode()} {text[:80]} found"
            )
            error.__cause__ = driver.MemcacheClientError(text)
        return error


def _hosts(url: Url) -> tuple[Host, ...]:
    """The servers of a URL, with their ports."""
    if url.user is not None or (url.hosts and url.path):
        raise ValueError(
            f"url: memcached:group://host[:port],.../ without user and database wanted, {url} found"
        )
    path = url.unix_path
    hosts = url.hosts or ((Host(path),) if path else (Host("127.0.0.1"),))
    full = tuple(host if host.is_unix or host.port else Host(host.name, PORT) for host in hosts)
    if len(set(full)) != len(full):
        raise ValueError(f"url: each server once wanted, one twice found in {url}")
    return full
