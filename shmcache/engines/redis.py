"""redis:// rediss:// redis+unix:// redis+cluster:// - Redis, one server or a cluster. Driver: redis-py.

I1  An operation is one command or one script; the many-key calls are one of these for each key. The driver
    never sends anything twice, so no counter counts double. A script is sent whole only after the server
    said that it does not know it.
I2  What the server could not answer is EngineDown (or the answer of on_down=miss). Of a write that met it in
    mid-reply nobody knows whether it was done.
I3  Sockets belong to the process that opened them: a forked child opens its own.
I4  The driver's exceptions are `__cause__` only, and no message has a value or a password in it.

Bytes and scripts: redis_wire.py. `clear`, iteration and `len` walk the keys under `prefix`; without one that is
the whole database, which then should be this cache's own. Locks and counters need a server that does not
evict them: `maxmemory-policy noeviction` or volatile-ttl with memory to spare.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import redis
from redis import exceptions as driver
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from .. import url as _url
from ..arguments import DEFAULT, MISS, Key, Ttl, check_key, check_number, compile_glob, lifetime
from ..codec import BYTES, STR, Codec, codec_option, get_codec, pack
from ..engine import Capability, Engine
from ..errors import CounterOverflow, EngineDown, NoSpace, NotANumber, ShmCacheError, ValueTooLarge
from ..url import Host, Parser, Url
from . import redis_wire as wire

__all__ = ["RedisEngine"]

_log = logging.getLogger("shmcache")

PORT: Final = 6379
MAX_VALUE: Final = 512 * 2**20 - 2**16
"""Default of max_value: the server's limit (proto-max-bulk-len, 512 MiB) less room for what stands before."""
CHUNK: Final = 500
"""Keys in one message of a many-key call, and in one page of a scan: about 1 ms of the server's time."""
_DOWN_CODES: Final = ("LOADING", "MASTERDOWN", "READONLY", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS")
_RAISE: Final = object()


class RedisEngine(Engine):
    """An engine in a Redis server, version 6.0 or later, or a Redis cluster.

    Args: url: `redis:group://[user:password@]host[:port]/[database]`, `redis+unix:///path` (or
    `redis+unix://[/path]/database`), `redis+cluster://host[:port],...`, which are the nodes asked first.
    timeout, connect_timeout: seconds of silence, and until a connection stands. In a cluster a failed call
    asks the other nodes for the new layout, each within its own timeouts. prefix: stands before every key.
    on_down: "raise" EngineDown, or "miss": reads miss, set, add, replace, append, prepend, delete and touch
    answer False, the many-key calls report all keys; incr, cas, lock, clear and iteration raise anyway.
    default_ttl: seconds, None = for ever. max_value: bytes of an encoded value. codec: see codec.get_codec;
    with "pickle" whoever can write to the server can run code here. tls: speak TLS (always with rediss).
    tls_ca, tls_cert, tls_key: PEM files. tls_verify: no = any certificate will do.
    """

    OPTIONS: ClassVar[dict[str, Parser]] = {
        "timeout": _url.seconds(0.001, 3600),
        "connect_timeout": _url.seconds(0.001, 3600),
        "prefix": _url.text,
        "on_down": _url.choice("raise", "miss"),
        "default_ttl": _url.seconds(),
        "max_value": _url.size(1, MAX_VALUE),
        "codec": codec_option,
        "tls": _url.boolean,
        "tls_ca": _url.text,
        "tls_cert": _url.text,
        "tls_key": _url.text,
        "tls_verify": _url.boolean,
    }
    capabilities = ~Capability(0)

    def __init__(
        self,
        url: Url,
        *,
        timeout: float = 1.0,
        connect_timeout: float = 2.0,
        prefix: str = "",
        on_down: str = "raise",
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
        self._connect, self._cluster, self._server = _connector(url, prefix, timeout, connect_timeout, tls)
        self._made: tuple[int, Any] | None = None  # process id and its client
        self._down = False
        self._counts = dict.fromkeys(
            ("hits", "misses", "sets", "deletes", "incrs", "touches", "down", "state_changes"), 0
        )

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> RedisEngine:
        """Open; nothing is sent before the first call, so a server that is down is met there."""
        return cls(url, **options)

    def close(self) -> None:
        made, self._made, self._closed = self._made, None, True
        if made is not None and made[0] == os.getpid():
            made[1].close()

    # -- talking to the server --

    def _client(self) -> Any:
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        if self._closed:
            raise ShmCacheError(f"engine {self.engine_id!r}: an open one wanted, closed found")
        client = self._connect()  # two threads at once: both work, the later is kept
        self._made = os.getpid(), client
        return client

    def _try(self, talk: Callable[[Any], Any]) -> Any:
        """What `talk(client)` returns; the driver's exceptions as ours."""
        try:
            reply = talk(self._client())
        except ShmCacheError:
            raise
        except Exception as error:
            raise self._error(error) from error
        if self._down:
            self._turn(False, "it answers")
        return reply

    def _run(self, *command: Any, down: Any = _RAISE) -> Any:
        """One command. down: the answer of on_down=miss, where it has one."""
        try:
            return self._try(lambda client: client.execute_command(*command))
        except EngineDown:
            if self._miss and down is not _RAISE:
                return down
            raise

    def _script(self, script: wire.Script, key: Key, *args: Any, down: Any = _RAISE) -> Any:
        """One script on the item of `key`."""
        return self._run_script(script, [self._keys.name(check_key(key))], *args, down=down)

    def _run_script(self, script: wire.Script, names: list[bytes], *args: Any, down: Any = _RAISE, **at: Any) -> Any:
        def talk(client: Any) -> Any:
            try:
                return client.execute_command("EVALSHA", script.sha, len(names), *names, *args, **at)
            except driver.NoScriptError:
                return client.execute_command("EVAL", script.text, len(names), *names, *args, **at)

        try:
            return self._try(talk)
        except EngineDown:
            if self._miss and down is not _RAISE:
                return down
            raise

    def _batch(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Several commands, each with its key first or, EVALSHA, third, in one message to each server. Replies
        in order; for what failed the exception, one of ours."""
        replies: list[Any] = [None] * len(commands)
        for pipeline, places in self._pipelines(commands):
            try:
                for place in places:
                    pipeline.execute_command(*commands[place])
                found = pipeline.execute(raise_on_error=False)
            except Exception as error:
                self._made = None  # the layout may have changed
                found = [self._error(error)] * len(places)
            for place, reply in zip(places, found, strict=True):
                replies[place] = self._again(commands[place], reply) if isinstance(reply, Exception) else reply
        return replies

    def _pipelines(self, commands: Sequence[tuple[Any, ...]]) -> list[tuple[Any, list[int]]]:
        def talk(client: Any) -> list[tuple[Any, list[int]]]:
            if not self._cluster:
                return [(client.pipeline(transaction=False), list(range(len(commands))))]
            groups: dict[str, tuple[Any, list[int]]] = {}
            for place, command in enumerate(commands):
                name = command[3] if command[0] == "EVALSHA" else command[1]
                node = client.nodes_manager.get_node_from_slot(client.keyslot(name))
                if node.name not in groups:
                    groups[node.name] = client.get_redis_connection(node).pipeline(transaction=False), []
                groups[node.name][1].append(place)
            return list(groups.values())

        pipelines: list[tuple[Any, list[int]]] = self._try(talk)
        return pipelines

    def _again(self, command: tuple[Any, ...], error: Exception) -> Any:
        """The reply to a command that the server refused to run where or as it was sent; else our exception."""
        try:
            if isinstance(error, driver.NoScriptError):
                script = next(s for s in vars(wire).values() if isinstance(s, wire.Script) and s.sha == command[1])
                return self._run("EVAL", script.text, *command[2:])
            if isinstance(error, (driver.AskError, driver.TryAgainError)):  # MovedError is an AskError
                return self._run(*command)
        except ShmCacheError as ours:
            return ours
        if isinstance(error, ShmCacheError):
            return error
        ours = self._error(error)
        ours.__cause__ = error
        return ours

    def _error(self, error: Exception) -> ShmCacheError:
        """Our exception for one of the driver's, of the socket's, or of its parser (a garbled reply)."""
        if isinstance(error, ShmCacheError):
            return error
        code = str(error).partition(" ")[0]
        if isinstance(error, driver.OutOfMemoryError) or code == "OOM":
            return NoSpace(f"redis {self._server}: room wanted, maxmemory found")
        if isinstance(error, (driver.ResponseError, driver.DataError)) and not (
            isinstance(error, (driver.ClusterError, driver.ReadOnlyError, driver.TryAgainError)) or code in _DOWN_CODES
        ):
            return ShmCacheError(f"redis {self._server}: an answer wanted, error {code[:20]!r} found")
        reason = type(error).__name__ if isinstance(error, driver.ResponseError) else str(error)
        self._counts["down"] += 1
        if not self._down:
            self._turn(True, reason)
        return EngineDown(f"redis {self._server}: an answer wanted, none found ({reason[:200]})")

    def _turn(self, down: bool, reason: str) -> None:
        self._down = down
        self._counts["state_changes"] += 1
        (_log.warning if down else _log.info)(
            "engine %s: redis %s is %s: %s", self.engine_id, self._server, "down" if down else "up", reason[:200]
        )

    # -- values and lifetimes --

    def _encode(self, value: Any) -> bytes:
        stored = wire.encode(value, self._codec)
        self._check_size(len(stored) - (wire.HEADER if stored[:1] == b"\x0e" else 0))
        return stored

    def _check_size(self, length: int) -> None:
        if length > self.max_value:
            raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {length} found")

    def _check_value(self, value: Any) -> None:
        self._encode(value)

    def _px(self, ttl: Ttl, expire_at: float | None) -> str:
        """A lifetime as the scripts take it: ms, '' for ever, '0' over."""
        left = lifetime(ttl, expire_at, self.default_ttl)
        return "" if left is None else str(math.ceil(left * 1000 - 1e-6))

    def _decode(self, stored: bytes) -> Any:
        return wire.decode(stored, self._codec)

    def _count(self, name: str, by: int = 1) -> None:
        self._counts[name] += by

    # -- reading --

    def _read(self, key: Key) -> bytes | None:
        """The stored form without soft deadline."""
        stored: bytes | None = self._run("GET", self._keys.name(check_key(key)), down=None)
        if stored is None or wire.grace_inner(stored) is None:
            return stored
        found = self._script(wire.READ, key, down=None)
        return None if found is None else found[0]

    def get(self, key: Key, default: Any = None) -> Any:
        stored = self._read(key)
        self._count("misses" if stored is None else "hits")
        return default if stored is None else self._decode(stored)

    def _peek(self, key: Key) -> Any:
        stored = self._read(key)
        return MISS if stored is None else self._decode(stored)

    def __contains__(self, key: Key) -> bool:
        return self.ttl(key) is not None

    def gets(self, key: Key, default: Any = None) -> Any:
        stored = self._script(wire.GETS, key, os.urandom(8), down=None)
        self._count("misses" if stored is None else "hits")
        return default if stored is None else (self._decode(stored), wire.token(stored))

    def ttl(self, key: Key) -> float | None:
        left = self._script(wire.TTL, key, down=-2)
        return None if left == -2 else math.inf if left == -1 else left / 1000

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The hits as a dict under the keys as given: an MGET for each 500 keys, in a cluster a GET each."""
        found = self._get_left_many(keys, False)
        return {key: value for key, (value, _) in found.items()}

    def _get_left_many(self, keys: Iterable[Key], left: bool = True) -> dict[Key, tuple[Any, float]]:
        """The hits with the seconds each has left (inf: for ever); each pair read at one moment. left: False =
        the seconds are not asked for."""
        pairs = [(key, self._keys.name(check_key(key))) for key in keys]
        found: dict[Key, tuple[Any, float]] = {}
        for start in range(0, len(pairs), CHUNK):
            chunk = pairs[start : start + CHUNK]
            graced = []
            try:
                for (key, name), stored in zip(chunk, [None] * len(chunk) if left else self._get_chunk(chunk), strict=True):
                    if left or (stored is not None and wire.grace_inner(stored) is not None):
                        graced.append((key, name))
                    elif stored is not None:
                        found[key] = self._decode(stored), math.inf
                replies = self._batch([("EVALSHA", wire.READ.sha, 1, name) for _, name in graced]) if graced else []
                for (key, _), reply in zip(graced, replies, strict=True):
                    if isinstance(reply, EngineDown):
                        raise reply
                    if isinstance(reply, list):
                        found[key] = self._decode(reply[0]), math.inf if reply[1] == -1 else reply[1] / 1000
            except EngineDown:
                if not self._miss:
                    raise
        self._count("hits", len(found))
        self._count("misses", len(pairs) - len(found))
        return found

    def _get_chunk(self, chunk: list[tuple[Key, bytes]]) -> list[Any]:
        if not self._cluster:
            stored: list[Any] = self._run("MGET", *(name for _, name in chunk))
            return stored
        replies = self._batch([("GET", name) for _, name in chunk])
        for reply in replies:
            if isinstance(reply, EngineDown):
                raise reply
        return [None if isinstance(reply, Exception) else reply for reply in replies]
