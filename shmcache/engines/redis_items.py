"""The operations of the Redis engine, over a way to send commands and scripts that redis.py supplies. No
driver is imported here.

I1  An operation is one command or one script of redis_wire; the many-key calls are one of these for each key.
I2  Every method that has an answer for on_down=miss names it as `down=`; the others raise EngineDown.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from ..arguments import DEFAULT, MISS, Key, Ttl, check_key, check_number, compile_glob, lifetime
from ..codec import STR, Codec, pack
from ..engine import Capability, Engine
from ..errors import CounterOverflow, EngineDown, NoSpace, NotANumber, ValueTooLarge
from . import redis_wire as wire

__all__ = ["CHUNK", "RAISE", "RedisItems"]

CHUNK: Final = 500
"""Keys in one message of a many-key call, and in one page of a scan: about 1 ms of the server's time."""
RAISE: Final = object()
"""`down=` of a call that raises EngineDown whatever on_down is."""


def any_form(reply: Any) -> bool:
    return True


class RedisItems(Engine):
    """Section 3 of the contract in commands and scripts. A subclass sends them."""

    capabilities = ~Capability(0)
    max_value: int
    _codec: Codec
    _keys: wire.Keys
    _miss: bool
    _counts: dict[str, int]

    # -- what a subclass supplies --

    def _run(
        self, *command: Any, down: Any = RAISE, takes: Callable[[Any], bool] = any_form, **at: Any
    ) -> Any:
        """The reply to one command. down: the answer where the server gives none and on_down is miss. takes:
        whether a reply is of the form that the command has; another one counts as none. at: one of
        `_nodes`."""
        raise NotImplementedError

    def _run_script(
        self, script: wire.Script, names: Sequence[bytes], *args: Any, down: Any = RAISE, **at: Any
    ) -> Any:
        """The reply to one script; as `_run`."""
        raise NotImplementedError

    def _batch(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies to several commands, in order; an exception, one of ours, for what failed. The name of
        the key is the second word, of EVALSHA the fourth."""
        raise NotImplementedError

    def _nodes(self) -> list[dict[str, Any]]:
        """What `at` may be, for commands that every server of keys has to get."""
        raise NotImplementedError

    # -- arguments --

    def _script(self, script: wire.Script, key: Key, *args: Any, down: Any = RAISE) -> Any:
        """One script on the item of `key`."""
        return self._run_script(script, (self._keys.name(check_key(key)),), *args, down=down)

    def _encode(self, value: Any) -> bytes:
        stored = wire.encode(value, self._codec)
        length = len(stored) - (wire.HEADER if stored[:1] == b"\x0e" else 0)
        if length > self.max_value:
            raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {length} found")
        return stored

    def _check_value(self, value: Any) -> None:
        self._encode(value)

    def _px(self, ttl: Ttl, expire_at: float | None) -> str:
        """A lifetime as the scripts take it: ms, '' for ever, '0' over."""
        left = lifetime(ttl, expire_at, self.default_ttl)
        return "" if left is None else str(math.ceil(left * 1000 - 1e-6))

    def _found(self, stored: bytes | None, default: Any) -> Any:
        """The value of a counted read."""
        self._counts["misses" if stored is None else "hits"] += 1
        return default if stored is None else wire.decode(stored, self._codec)

    # -- reading --

    def _read(self, key: Key) -> bytes | None:
        """The stored form without soft deadline."""
        name = self._keys.name(check_key(key))
        stored: bytes | None = self._run("GET", name, down=None, takes=wire.is_text)
        if stored is None or not wire.is_graced(stored):
            return stored
        return self._read_graced(key)

    def _read_graced(self, key: Key) -> bytes | None:
        """The same by a script, which looks at the soft deadline and answers alone: what a GET brought before
        only told which form it is."""
        found = self._script(wire.READ, key, down=None)
        return None if found is None else found[0]

    def get(self, key: Key, default: Any = None) -> Any:
        return self._found(self._read(key), default)

    def _peek(self, key: Key) -> Any:
        stored = self._read(key)
        return MISS if stored is None else wire.decode(stored, self._codec)

    def __contains__(self, key: Key) -> bool:
        return self.ttl(key) is not None

    def gets(self, key: Key, default: Any = None) -> Any:
        stored = self._script(wire.GETS, key, os.urandom(8), down=None)
        value = self._found(stored, MISS)
        return default if value is MISS else (value, wire.token(stored))

    def ttl(self, key: Key) -> float | None:
        left = self._script(wire.TTL, key, down=-2)
        return None if left == -2 else _seconds(left)

    def _get_left(self, key: Key) -> tuple[Any, float] | None:
        """`(value, seconds left)`, both of one moment, inf if it never expires; None if absent. Counts as
        `get`."""
        found = self._script(wire.READ, key, down=None)
        value = self._found(None if found is None else found[0], MISS)
        return None if value is MISS else (value, _seconds(found[1]))

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The hits as a dict under the keys as given; an MGET for each 500 keys, in a cluster a GET each."""
        pairs = [(key, self._keys.name(check_key(key))) for key in keys]
        found: dict[Key, Any] = {}
        for chunk in _chunks(pairs):
            for (key, _), stored in zip(chunk, self._get_chunk([name for _, name in chunk]), strict=True):
                if stored is not None and wire.is_graced(stored):
                    stored = self._read_graced(key)
                value = self._found(stored, MISS)
                if value is not MISS:
                    found[key] = value
        return found

    def _get_chunk(self, names: list[bytes]) -> Iterable[bytes | None]:
        return self._replies([("GET", name) for name in names], None, wire.is_text)

    def _get_left_many(self, keys: Iterable[Key]) -> dict[Key, tuple[Any, float]]:
        """The hits as `_get_left` gives them, under the keys as given."""
        pairs = [(key, self._keys.name(check_key(key))) for key in keys]
        found: dict[Key, tuple[Any, float]] = {}
        for chunk in _chunks(pairs):
            commands = [("EVALSHA", wire.READ.sha, 1, name) for _, name in chunk]
            for (key, _), reply in zip(chunk, self._replies(commands, None, wire.is_pair), strict=True):
                value = self._found(None if reply is None else reply[0], MISS)
                if value is not MISS:
                    found[key] = value, _seconds(reply[1])
        return found

    def _replies(
        self, commands: Sequence[tuple[Any, ...]], down: Any, takes: Callable[[Any], bool]
    ) -> list[Any]:
        """`_batch`, raising the first exception; with on_down=miss `down` for what got no answer."""
        replies = self._batch(commands)
        for place, reply in enumerate(replies):
            if isinstance(reply, EngineDown) and self._miss:
                replies[place] = down
            elif isinstance(reply, Exception):
                raise reply
            elif not takes(reply):
                found = type(reply).__name__
                raise EngineDown(
                    f"engine {self.engine_id}: the reply to {commands[0][0]} wanted, {found} found"
                )
        return replies

    # -- storing --

    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        name, px = self._keys.name(check_key(key)), self._px(ttl, expire_at)
        return self._store(_set(name, self._encode(value), px))

    def _store(self, command: tuple[Any, ...]) -> bool:
        done = self._run(*command, down=None) is not None
        self._counts["sets"] += done
        return done

    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._put("0", key, value, ttl, expire_at)

    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._put("1", key, value, ttl, expire_at)

    def _put(self, live: str, key: Key, value: Any, ttl: Ttl, expire_at: float | None) -> bool:
        check_key(key)
        px = self._px(ttl, expire_at)
        done = bool(self._script(wire.PUT, key, live, self._encode(value), px, down=0))
        self._counts["sets"] += done
        return done

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        check_key(key)
        px, stored = self._px(ttl, expire_at), self._encode(value)
        if not isinstance(token, bytes):  # of another engine
            return None if self._script(wire.TTL, key) == -2 else False
        whole = "0" if len(token) == wire.HEADER and token[:1] == b"\x0e" else "1"
        done = self._script(wire.CAS, key, token, whole, stored, px)
        self._counts["sets"] += done == 1
        return None if done == -1 else done == 1

    def set_many(
        self, mapping: Mapping[Key, Any], ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> list[Key]:
        """Store several, 500 to a message; the keys not stored for want of room or server. Raises: what a bad
        key, value or ttl raises, before anything is stored."""
        px = self._px(ttl, expire_at)
        names = [self._keys.name(check_key(key)) for key in mapping]
        commands = [
            _set(name, self._encode(value), px) for name, value in zip(names, mapping.values(), strict=True)
        ]
        failed: list[Key] = []
        for chunk in _chunks(list(zip(mapping, commands, strict=True))):
            for (key, _), reply in zip(chunk, self._batch([command for _, command in chunk]), strict=True):
                if isinstance(reply, (EngineDown, NoSpace)):
                    failed.append(key)
                elif isinstance(reply, Exception):
                    raise reply
        self._counts["sets"] += len(commands) - len(failed)
        return failed

    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        check_key(key)
        done = self._script(wire.TOUCH, key, self._px(ttl, expire_at), "0", down=None) is not None
        self._counts["touches"] += done
        return done

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        check_key(key)
        stored = self._script(wire.TOUCH, key, self._px(ttl, expire_at), "1", down=None)
        self._counts["touches"] += stored is not None
        return self._found(stored, default)

    def append(self, key: Key, data: str | bytes) -> bool:
        return self._join("append", key, data)

    def prepend(self, key: Key, data: str | bytes) -> bool:
        return self._join("prepend", key, data)

    def _join(self, side: str, key: Key, data: str | bytes) -> bool:
        check_key(key)
        if type(data) not in (str, bytes):
            raise TypeError(f"data: str or bytes wanted, {type(data).__name__} found")
        flags, packed = pack(data, self._codec)
        if len(packed) > self.max_value:
            raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {len(packed)} more found")
        done = self._script(
            wire.JOIN, key, side, bytes((flags,)), packed, os.urandom(8), self.max_value, down=0
        )
        if done == -1:
            kind = "str" if flags == STR else "bytes"
            raise TypeError(f"value of {key!r:.80}: {kind} like the data wanted, another type found")
        if done < 0:
            raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {-2 - done} found")
        self._counts["sets"] += done
        return bool(done)

    def incr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        check_key(key)
        px, step = self._px(ttl, expire_at), check_number(delta, "delta")
        total = ""
        if initial is not None:
            number = check_number(initial, "initial") + step
            total = str(number) if -(2**63) <= number < 2**63 else "over"
        new = self._script(wire.INCR, key, step, total, px)
        if new == b"nan":
            raise NotANumber(f"incr {key!r:.80}: int wanted, a value of another type found")
        if new == b"over":
            raise CounterOverflow(
                f"incr {key!r:.80}: a number and a result of -2**63 to 2**63-1 wanted, one beyond it found"
            )
        self._counts["incrs"] += 1
        return None if new is None else int(new)

    # -- removing --

    def delete(self, key: Key) -> bool:
        done = bool(self._script(wire.DELETE, key, down=0))
        self._counts["deletes"] += done
        return done

    def pop(self, key: Key, default: Any = None) -> Any:
        stored = self._script(wire.POP, key, down=None)
        self._counts["deletes"] += stored is not None
        return self._found(stored, default)

    def delete_many(self, keys: Iterable[Key]) -> int:
        """Remove several, 500 to a message; how many existed. Raises: EngineDown, some may be gone then."""
        names = [self._keys.name(check_key(key)) for key in keys]
        count = sum(
            sum(self._replies([("EVALSHA", wire.DELETE.sha, 1, name) for name in chunk], 0, wire.is_number))
            for chunk in _chunks(names)
        )
        self._counts["deletes"] += count
        return count

    def delete_match(self, glob: Key) -> int:
        """Remove the items whose key matches (fnmatchcase); how many. Page by page of a scan."""
        matches, count = compile_glob(glob), 0
        for page in self._pages():
            keys = [self._keys.key(name) for name, _ in page]
            count += self.delete_many(filter(matches, keys))
        return count

    def clear(self) -> None:
        """Remove every key under the prefix, of any type, page by page; leases stay. In a cluster, EngineDown
        says that the nodes before the one that is down were cleared."""
        for at in self._nodes():
            cursor: Any = 0
            while True:
                cursor = self._scan(wire.WIPE, cursor, at)[0]
                if int(cursor) == 0:
                    break

    # -- walking --

    def _scan(self, script: wire.Script, cursor: Any, at: dict[str, Any]) -> list[Any]:
        page: list[Any] = self._run_script(
            script, (), cursor, self._keys.pattern, CHUNK, self._keys.leases, **at
        )
        return page

    def _pages(self) -> Iterator[list[tuple[bytes, int]]]:
        """Pages of (name, bytes of the stored value), each name once: SCAN itself may give a name again."""
        seen: set[bytes] = set()
        for at in self._nodes():
            cursor: Any = 0
            while True:
                cursor, *rest = self._scan(wire.SCAN, cursor, at)
                pairs = zip(rest[::2], rest[1::2], strict=True)
                page = [(name, size) for name, size in pairs if name not in seen]
                seen.update(name for name, _ in page)
                yield page
                if int(cursor) == 0:
                    break

    def keys(self, match: Key = "*") -> Iterator[Key]:
        """The keys that match the glob (fnmatchcase), of strings only; a page of a scan is read when the one
        before is used up. In a cluster that moves slots meanwhile a key may be missed."""
        matches = compile_glob(match)
        names = (name for page in self._pages() for name, _ in page)
        return (key for key in map(self._keys.key, names) if matches(key))

    def _scan_keys(self, group: int) -> list[Key]:
        return [self._keys.key(name) for page in self._pages() for name, _ in page]

    def __len__(self) -> int:
        return sum(map(len, self._pages()))

    def _stats(self) -> dict[str, Any]:
        """Counts of this process; items and bytes (of keys and stored values) by a scan, 0 while it is
        down."""
        items = size = 0
        try:
            for page in self._pages():
                items += len(page)
                size += sum(len(name) + length for name, length in page)
        except EngineDown:
            items = size = 0
        return {**self._counts, "items": items, "bytes": size}

    # -- grace and leases --

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        found = self._script(wire.GRACE, key, down=None)
        value = self._found(None if found is None else found[0], MISS)
        return None if value is MISS else (value, found[1] == 1)

    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        name = self._keys.name(check_key(key))
        stored = wire.grace_head(grace) + self._encode(value)
        return self._store(_set(name, stored, str(math.ceil((ttl + grace) * 1000 - 1e-6))))

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        owner = int.from_bytes(os.urandom(8), "little") >> 1
        if owners is not None:
            owners.append(owner)
        fence = self._run_script(wire.LEASE_TAKE, self._keys.lease(name), owner, math.ceil(lease * 1000))
        return False if fence is None else (owner, int(fence))

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        names = self._keys.lease(name)[:1]
        return bool(self._run_script(wire.LEASE_EXTEND, names, owner, math.ceil(lease * 1000)) == 1)

    def _lease_release(self, name: bytes, owner: int) -> bool:
        return bool(self._run_script(wire.LEASE_RELEASE, self._keys.lease(name)[:1], owner) == 1)

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        """Ask whether the lease is there, after 1 ms, then after twice as long up to 20 ms."""
        end, step = time.monotonic() + timeout, 0.001
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(step, left))
            if not self._run("EXISTS", self._keys.lease(name)[0]):
                return
            step = min(step * 2, 0.02)


def _set(name: bytes, stored: bytes, px: str) -> tuple[Any, ...]:
    """The command that stores: SET, or for a lifetime that is over the removal."""
    if px == "0":
        return "UNLINK", name
    return ("SET", name, stored, "PX", px) if px else ("SET", name, stored)


def _seconds(ms: int) -> float:
    return math.inf if ms == -1 else ms / 1000


def _chunks(things: list[Any]) -> Iterator[list[Any]]:
    return (things[start : start + CHUNK] for start in range(0, len(things), CHUNK))
