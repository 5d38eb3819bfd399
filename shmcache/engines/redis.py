"""redis:// rediss:// redis+unix:// redis+cluster:// - Redis, one server or a cluster. Driver: redis-py.

I1  The driver never sends anything twice, so no counter counts double. A script goes by its hash; its text is
    sent after the server said that it does not know it, that is, did nothing.
I2  What the server does not answer is EngineDown (or the answer of on_down=miss). Of a write that met it in
    mid-reply nobody knows whether it was done.
I3  Sockets belong to the process that opened them: a forked child opens its own.
I4  The driver's exceptions are `__cause__` only, and no message has a value or a password in it.
I5  A server that did not answer one worker of this machine is down for all of them (health.py): they get
    EngineDown at once, and one asks it again per retry interval.
I6  After an interrupted call no connection of this client is used again: no call reads another's answer.

What is sent: redis_items.py; how it lies there: redis_wire.py. `clear`, iteration and `len` walk the keys
under `prefix`; without one that is the whole database, which then should be this cache's own. Locks and
counters want a server that does not evict them: `maxmemory-policy noeviction`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Final

import redis
from redis import exceptions as driver
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from .. import url as _url
from ..arguments import lifetime
from ..codec import Codec, codec_option, get_codec
from ..engine import Engine
from ..errors import EngineDown, NoSpace, ShmCacheError
from ..health import RETRY_INTERVAL, Health, OnChange, Ticket, health_option
from ..url import MAX_TTL, Host, Parser, Url
from . import redis_wire as wire
from .redis_items import RAISE, RedisItems, any_form
from .redis_link import timed, tls_arguments

__all__ = ["RedisEngine"]

PORT: Final = 6379
MAX_VALUE: Final = 512 * 2**20 - 2**16
"""Default of max_value: the server's limit (proto-max-bulk-len, 512 MiB) less room for what stands before."""
DOWN_CODES: Final = frozenset(
    ("LOADING", "MASTERDOWN", "READONLY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS")
)
"""Errors by which a server says that it cannot serve: it is down for us."""
CONTAINERS: Final = frozenset(
    ("ACL", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DEBUG", "FUNCTION", "LATENCY", "MEMORY", "MODULE")
) | {"OBJECT", "PUBSUB", "SCRIPT", "SLOWLOG", "XGROUP", "XINFO"}
"""First words of commands of two words, which the driver takes as one."""
LOOK_INTERVAL: Final = 1.0
"""Seconds between two questions for a cluster's layout while a node is down: a failover takes as long as
cluster-node-timeout, seconds."""


class RedisEngine(RedisItems):
    """An engine in a Redis server, version 6.0 or later, or in a Redis cluster.

    Args: url: `redis:group://[user:password@]host[:port]/[database]`, `redis+unix:///path` (or
    `redis+unix://[/path]/database`), `redis+cluster://host[:port],...`, the nodes asked first. timeout,
    connect_timeout: seconds until an answer is complete, and until a connection stands; in a cluster a failed
    call then asks the other nodes for the new layout, each within the same bounds. prefix: stands before
    every key. on_down: "raise" EngineDown, or "miss": reads miss, set, add, replace, append, prepend, delete
    and touch answer False, the many-key calls report all keys; incr, cas, lock, clear and iteration raise
    anyway. health, retry_interval, on_change: see health.Health. default_ttl: seconds, None = for ever.
    max_value: bytes of an encoded value. codec: see codec.get_codec; with "pickle" whoever can write to the
    server can run code here. tls: speak TLS (rediss always does). tls_ca, tls_cert, tls_key: PEM files.
    tls_verify: no = any certificate will do.
    """

    OPTIONS: ClassVar[dict[str, Parser]] = {
        "timeout": _url.seconds(0.001, 3600),
        "connect_timeout": _url.seconds(0.001, 3600),
        "prefix": _url.text,
        "on_down": _url.choice("raise", "miss"),
        "health": health_option,
        "retry_interval": _url.seconds(-MAX_TTL, MAX_TTL),
        "on_change": _url.keyword_only(_url.function),
        "default_ttl": _url.seconds(),
        "max_value": _url.size(1, MAX_VALUE),
        "codec": codec_option,
        "tls": _url.boolean,
        "tls_ca": _url.text,
        "tls_cert": _url.text,
        "tls_key": _url.text,
        "tls_verify": _url.boolean,
    }

    def __init__(
        self,
        url: Url,
        *,
        timeout: float = 1.0,
        connect_timeout: float = 2.0,
        prefix: str = "",
        on_down: str = "raise",
        health: bool | str | Engine = True,
        retry_interval: float = RETRY_INTERVAL,
        on_change: OnChange | None = None,
        default_ttl: float | None = None,
        max_value: int = MAX_VALUE,
        codec: Codec | str = "msgpack",
        **tls: Any,
    ) -> None:
        self.url, self.engine_id = url, url.engine_id
        self.default_ttl = lifetime(default_ttl)
        self.max_value = max_value
        self._codec = get_codec(codec)
        self._keys = wire.Keys(prefix)
        self._miss = on_down == "miss"
        self._closed = False
        self._cluster = url.scheme == "redis+cluster"
        self._connect, self._hosts = _connector(url, prefix, timeout, connect_timeout, tls)
        self._server = ",".join(map(_label, self._hosts))
        self.health = Health(
            health, scheme="redis", servers=self._hosts, retry_interval=retry_interval, on_change=on_change
        )
        self._made: tuple[int, Any] | None = None  # process id and its client
        self._making: dict[int, threading.Lock] = {}  # by process id
        self._looked = 0.0  # monotonic seconds: when a cluster was last asked for its layout, for a node down
        self._counts = dict.fromkeys(("hits", "misses", "sets", "deletes", "incrs", "touches", "down"), 0)

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> RedisEngine:
        """Open. Nothing is sent before the first call, so a server that is down is met there."""
        return cls(url, **options)

    def close(self) -> None:
        made, self._made, self._closed = self._made, None, True
        if made is not None and made[0] == os.getpid():
            made[1].close()

    def set_server(self, host: str, status: bool) -> bool:
        """Take a server out for all workers of this machine (False), or put it back in (True). Nobody probes
        what is out.

        Args: host: as in the URL, `10.0.0.1:6379`, without the port where that is unique; of a cluster any
        `name:port`. Returns: whether it was a change. Raises: ValueError for an unknown server.
        """
        found = [known for known in self._hosts if host in (str(known), known.name)]
        if self._cluster and not found:
            found = [Host(one.name, one.port or PORT) for one in Url.parse(f"redis://{host}").hosts]
        if len(found) != 1:
            raise ValueError(f"set_server: one of {self._server} wanted, {host!r} found")
        return self.health.set_server(found[0], status)

    # -- talking to the server --

    def _client(self) -> Any:
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        if self._closed:
            raise ShmCacheError(f"engine {self.engine_id!r}: an open one wanted, closed found")
        pid = os.getpid()
        with self._making.setdefault(pid, threading.Lock()):  # a lock of the parent's may be held for ever
            made = self._made
            if made is None or made[0] != pid:
                self._made = made = pid, self._seed() if self._cluster else self._connect(self._hosts)
        return made[1]

    def _seed(self) -> Any:
        """The client of a cluster, from the seeds that are not known to be down."""
        tickets: dict[Host, Ticket] = {}
        for host in self._hosts:
            try:
                tickets[host] = self.health.admit(host, functools.partial(self._probe, host))
            except EngineDown:
                if host is self._hosts[-1] and not tickets:
                    raise
        try:
            return self._connect(tuple(tickets))
        except Exception as error:
            if _silent(error):
                for host, ticket in tickets.items():
                    self.health.failed(host, ticket, error)
            raise

    def _probe(self, host: Host) -> BaseException | None:
        """Ask one server whether it is there, on a connection of its own."""
        try:
            with contextlib.closing(self._connect((host,), alone=True)) as client:
                client.ping()
        except Exception as error:
            return error if _silent(error) else None
        return None

    def _target(
        self, client: Any, name: bytes | None, at: dict[str, Any]
    ) -> tuple[Host | None, dict[str, Any]]:
        """The server that a command goes to (None: the driver chooses), and how to tell the driver."""
        if not self._cluster:
            return self._hosts[0], at
        node = at.get("target_nodes")
        if name is not None:
            node = client.nodes_manager.get_node_from_slot(client.keyslot(name))
        return (None, at) if node is None else (Host(node.host, node.port), {"target_nodes": node})

    def _admit(
        self, client: Any, name: bytes | None, at: dict[str, Any]
    ) -> tuple[Host | None, Ticket | None, dict[str, Any]]:
        """The server, what its health was, and how to tell the driver; EngineDown if it is down. A cluster
        may have put another in its place: it is asked once a second."""
        host, at = self._target(client, name, at)
        if host is None:
            return None, None, at
        try:
            return host, self.health.admit(host, functools.partial(self._probe, host)), at
        except EngineDown:
            if not self._cluster or time.monotonic() - self._looked < LOOK_INTERVAL:
                raise
            self._looked = time.monotonic()
            client.nodes_manager.initialize()
            if name is None or self._target(client, name, at)[0] == host:
                raise
            return self._admit(client, name, at)

    def _try(
        self, talk: Callable[[Any, dict[str, Any]], Any], down: Any, name: bytes | None = None, **at: Any
    ) -> Any:
        """What `talk(client, at)` returns; the driver's exceptions as ours. name: a key, to find the server
        by."""
        host = ticket = None
        try:
            client = self._client()
            host, ticket, at = self._admit(client, name, at)
            return talk(client, at)
        except Exception as error:
            ours = error if isinstance(error, ShmCacheError) else self._error(error, host)
            if isinstance(ours, EngineDown):
                self._counts["down"] += 1
                if isinstance(error, driver.RedisClusterException) and _silent(error):
                    self._made = None  # it knows no node that answers: begin again with the seeds
                if host is not None and ticket is not None and _silent(error) and _is_of(error, host):
                    self.health.failed(host, ticket, error)
                if self._miss and down is not RAISE:
                    return down
            if ours is error:
                raise
            raise ours from error
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Use no connection of this client again: a call was interrupted, and an answer may still come on one. Those
        that other threads use go when they are done."""
        made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            clients = [made[1]]
            if self._cluster:
                clients = [node.redis_connection for node in made[1].get_nodes() if node.redis_connection is not None]
            for client in clients:
                client.connection_pool.disconnect(inuse_connections=False)

    def _run(
        self, *command: Any, down: Any = RAISE, takes: Callable[[Any], bool] = any_form, **at: Any
    ) -> Any:
        def talk(client: Any, at: dict[str, Any]) -> Any:
            return _of_form(takes, client.execute_command(*command, **at))

        return self._try(talk, down, _key_of(command), **at)

    def _run_script(
        self, script: wire.Script, names: Sequence[bytes], *args: Any, down: Any = RAISE, **at: Any
    ) -> Any:
        def talk(client: Any, at: dict[str, Any]) -> Any:
            call = (len(names), *names, *args)
            try:
                reply = client.execute_command("EVALSHA", script.sha, *call, **at)
            except driver.NoScriptError:
                reply = client.execute_command("EVAL", script.text, *call, **at)
            return _of_form(script.takes, reply)

        return self._try(talk, down, names[0] if names else None, **at)

    def raw(self, command: str, *args: Any) -> Any:
        """The driver's answer to any command, such as `raw("HGETALL", "h")` or `raw("HGETALL h")`: bytes,
        int, list, dict, None. No prefix is added, nothing is encoded. Raises: ShmCacheError for what driver
        or server refuse; EngineDown, also for a command that takes longer than `timeout`, which does not make
        the server down for others."""
        if not isinstance(command, str):
            raise TypeError(f"command: str wanted, {type(command).__name__} found")
        if not command.strip():
            raise ValueError(f"command: a word wanted, {command!r} found")
        words = command.split()
        if len(words) > 1 and words[0].upper() in CONTAINERS:
            words[:2] = [" ".join(words[:2])]
        try:
            return self._client().execute_command(*words, *args)
        except ShmCacheError:
            raise
        except Exception as error:
            raise self._error(error, None) from error
        except BaseException:
            self._abandon()
            raise

    def _nodes(self) -> list[dict[str, Any]]:
        if not self._cluster:
            return [{}]
        nodes = self._try(lambda client, at: client.get_primaries(), RAISE)
        return [{"target_nodes": node} for node in nodes]

    def _get_chunk(self, names: list[bytes]) -> Iterable[bytes | None]:
        if self._cluster:
            return super()._get_chunk(names)

        def takes(reply: Any) -> bool:
            return type(reply) is list and len(reply) == len(names) and all(map(wire.is_text, reply))

        found: list[bytes | None] = self._run("MGET", *names, down=[None] * len(names), takes=takes)
        return found

    def _batch(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        replies: list[Any] = [None] * len(commands)
        try:
            groups = self._groups_of(commands)
        except EngineDown as error:
            return [error] * len(commands)
        for pipeline, at, places in groups:
            for place in places:
                pipeline.execute_command(*commands[place])
            try:
                found = self._try(functools.partial(_execute, pipeline), RAISE, **at)
            except EngineDown as error:
                found = [error] * len(places)
            for place, reply in zip(places, found, strict=True):
                refused = isinstance(reply, Exception)
                replies[place] = self._again(commands[place], reply) if refused else reply
        return replies

    def _groups_of(self, commands: Sequence[tuple[Any, ...]]) -> list[tuple[Any, dict[str, Any], list[int]]]:
        """For each server: a pipeline, the server as `_admit` takes it, and the places of its commands."""

        def talk(client: Any, at: dict[str, Any]) -> list[tuple[Any, dict[str, Any], list[int]]]:
            groups: dict[str, tuple[Any, dict[str, Any], list[int]]] = {}
            for place, command in enumerate(commands):
                node = client.nodes_manager.get_node_from_slot(client.keyslot(_key_of(command)))
                if node.name not in groups:
                    pipeline = client.get_redis_connection(node).pipeline(transaction=False)
                    groups[node.name] = pipeline, {"target_nodes": node}, []
                groups[node.name][2].append(place)
            return list(groups.values())

        if not self._cluster:
            return [(self._client().pipeline(transaction=False), {}, list(range(len(commands))))]
        groups: list[tuple[Any, dict[str, Any], list[int]]] = self._try(talk, RAISE)
        return groups

    def _again(self, command: tuple[Any, ...], error: Exception) -> Any:
        """The reply to a command of a batch that the server refused, where it did nothing; else our
        exception."""
        try:
            if isinstance(error, driver.NoScriptError):
                return self._run("EVAL", wire.BY_SHA[command[1]].text, *command[2:])
            if isinstance(error, (driver.AskError, driver.TryAgainError)):  # MovedError is an AskError
                return self._run(*command)
        except ShmCacheError as ours:
            return ours
        if isinstance(error, ShmCacheError):
            return error
        mapped = self._error(error, None)
        mapped.__cause__ = error
        return mapped

    def _error(self, error: Exception, host: Host | None) -> ShmCacheError:
        """Our exception for one of the driver, the socket, or the parser that met a garbled reply."""
        server = self._server if host is None else _label(host)
        code = str(error).partition(" ")[0].lstrip("-")
        code = code if code.isupper() else "ERR"  # which the driver leaves out; the rest may show a value
        if isinstance(error, driver.OutOfMemoryError) or code == "OOM":
            return NoSpace(f"redis {server}: room wanted, maxmemory found")
        if isinstance(error, driver.RedisClusterException) and not (
            error.__cause__ or error.__context__ or isinstance(error, driver.SlotNotCoveredError)
        ):
            return ShmCacheError(
                f"redis {server}: a command for one node wanted, {type(error).__name__} found"
            )
        refused = (
            isinstance(error, (driver.ResponseError, driver.DataError)) or type(error) is driver.RedisError
        )
        cannot = (driver.ClusterError, driver.ReadOnlyError, driver.TryAgainError)
        if refused and not isinstance(error, cannot) and code not in DOWN_CODES:
            return ShmCacheError(f"redis {server}: an answer wanted, error {code} found")
        name = type(error).__name__
        reason = (name if code == "ERR" else code) if refused else f"{name}: {error}"[:200]
        return EngineDown(f"redis server {server}: an answer wanted, none found ({reason})")


def _key_of(command: Sequence[Any]) -> bytes:
    name: bytes = command[3 if command[0] in ("EVALSHA", "EVAL") else 1]
    return name


def _silent(error: BaseException) -> bool:
    """Whether no server answered, as opposed to one that refuses us or is not ready."""
    answered = (
        driver.ResponseError,
        driver.AuthenticationError,
        driver.AuthorizationError,
        driver.BusyLoadingError,
        driver.MaxConnectionsError,
        ShmCacheError,
    )
    if type(error) is driver.RedisError:  # the driver's own complaint
        return False
    if isinstance(error, driver.RedisClusterException):  # no layout: because of what a node said before
        before = error.__cause__ or error.__context__
        return before is not None and _silent(before)
    return not isinstance(error, answered)


def _is_of(error: BaseException, host: Host) -> bool:
    """False for an error of another server, to which a cluster sent the driver on."""
    link = getattr(error, "connection", None)
    return link is None or (getattr(link, "host", host.name), getattr(link, "port", host.port)) == (
        host.name,
        host.port,
    )


def _label(host: Host) -> str:
    return host.name if host.is_unix else str(host)


def _of_form(takes: Callable[[Any], bool], reply: Any) -> Any:
    if not takes(reply):
        raise driver.InvalidResponse(f"a reply of another type, {type(reply).__name__}")
    return reply


def _execute(pipeline: Any, client: Any, at: dict[str, Any]) -> list[Any]:
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return replies


def _connector(
    url: Url, prefix: str, timeout: float, connect_timeout: float, tls: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Host, ...]]:
    """A function that makes the driver's client for some of the hosts, and the hosts. With `alone=True` it
    makes one for the first host, also of a cluster.

    Raises: ValueError for a URL or options that go together with no server.
    """
    cluster = url.scheme == "redis+cluster"
    hosts, database = url.hosts, url.path
    if not hosts and url.scheme == "redis+unix" and url.unix_path is not None:
        hosts, database = (Host(url.unix_path),), ""
    hosts = hosts or (Host("127.0.0.1"),)
    if len(hosts) > 1 and not cluster:
        raise ValueError(f"url {url}: one host wanted, {len(hosts)} found (a cluster is redis+cluster://)")
    if any(host.is_unix is not (url.scheme == "redis+unix") for host in hosts):
        wanted = "a socket" if url.scheme == "redis+unix" else "a host"
        raise ValueError(f"url {url}: {wanted} wanted, {', '.join(map(str, hosts))} found")
    if database not in ("", "0") and (cluster or not (database.isdecimal() and len(database) < 6)):
        raise ValueError(
            f"url {url}: {'database 0' if cluster else 'a database number'} wanted, {database!r} found"
        )
    if cluster and "{}" in prefix:
        raise ValueError(f"option 'prefix': no empty hash tag wanted, '{{}}' found in {prefix!r}")
    arguments: dict[str, Any] = {
        "username": url.user or None,
        "password": url.password,
        "socket_timeout": timeout,
        "socket_connect_timeout": connect_timeout,
        "redis_connect_func": lambda connection: timed(connection, timeout, cluster),
        "protocol": 2,
        "max_connections": 2**31,
    }
    arguments |= tls_arguments(url.scheme == "rediss" or tls.pop("tls", False), tls)
    hosts = tuple(host if host.is_unix else Host(host.name, host.port or PORT) for host in hosts)

    def connect(chosen: tuple[Host, ...], alone: bool = False) -> Any:
        no_retry = Retry(NoBackoff(), 0)
        if cluster and not alone:
            nodes = [ClusterNode(host.name, host.port) for host in chosen]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, retry=no_retry, require_full_coverage=False, **arguments)
        at: dict[str, Any] = {"host": chosen[0].name, "port": chosen[0].port}
        if chosen[0].is_unix:
            at = {"unix_socket_path": chosen[0].name}
        return redis.Redis(**at, db=int(database or 0), retry=no_retry, **arguments)

    return connect, hosts
