"""What the memcached engine does with items: the contract's methods in meta commands.

I1  Each method that changes an item does so by one command of the server, conditional (cas) where it depends
    on what was read: a lost race is run again, for a bounded time, then LockTimeout. Nothing is lost or doubled.
I2  A write that keeps the lifetime keeps the server's deadline: by a command that does not touch it, or by the
    deadline itself as absolute time of the server's clock.
I3  A value is checked against max_item before it is sent: the server would drop the old one.
I4  With on_down=miss, EngineDown is answered as contract section 4 row 13 says; incr, cas, locks, clear and
    iteration raise it all the same.

Sockets, servers and health: memcached.py. The commands and what lies there: memcached_wire.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..arguments import DEFAULT, MISS, Key, Ttl, check_key, lifetime
from ..codec import BYTES, STR, Codec, pack, unpack
from ..engine import Engine
from ..errors import EngineDown, LockTimeout, NotSupported, ValueTooLarge
from . import memcached_wire as wire
from .memcached_wire import Item, Reply

__all__ = ["MemcachedItems"]


class MemcachedItems(Engine):
    """See memcached.MemcachedEngine, which adds the servers."""

    max_item: int
    _codec: Codec
    _keys: wire.Keys
    _kamailio: bool
    _patience: float
    _miss: bool
    _counts: dict[str, int]

    # -- what memcached.py adds --

    def _ask(self, route: bytes, *requests: bytes, again: bool = False) -> list[Reply]:
        """One reply per request, sent together to the server of the wire key `route`; `again`: reads only, may
        be sent twice."""
        raise NotImplementedError

    def _ask_many(
        self, requests: Sequence[tuple[bytes, Sequence[bytes]]], again: bool = False
    ) -> list[list[Reply] | EngineDown]:
        """`_ask` for many (route, requests): what went well does not wait for what did not."""
        raise NotImplementedError

    def _refused(self, reply: Reply) -> Exception:
        """What to raise for an error line, or for an answer that does not fit the question."""
        raise NotImplementedError

    # -- helpers --

    def _count(self, name: str, by: int = 1) -> None:
        self._counts[name] += by  # not exact between threads

    def _missed(self, error: EngineDown, answer: Any) -> Any:
        """The answer of on_down=miss, or the error."""
        if not self._miss:
            raise error
        self._count("down")
        return answer

    def _item(self, reply: Reply, key: bytes, with_key: bool) -> Item | None:
        if reply.code == b"EN":
            return None
        self._answer(reply, b"VA", b"HD")
        return wire.parse_item(reply, key, with_key, self._kamailio)

    def _load(self, key: bytes, value: bool = True, use: bool = False) -> Item | None:
        """The item under `key`, stale or foreign ones too; without `value` its data may be missing."""
        name, with_key = self._keys.wire(key)
        words = b" v" if value or with_key or self._kamailio else b" s"
        request = b"mg " + name + words + (b" f t c" if use else b" f t c u")
        return self._item(self._ask(name, request, again=True)[0], key, with_key)

    def _live(self, item: Item | None) -> Item | None:
        return item if item is not None and item.live else None

    def _value(self, item: Item) -> Any:
        return unpack(item.flags, item.data, self._codec, wire=True)

    def _pack(self, key: bytes, value: Any) -> tuple[int, bytes]:
        flags, data = pack(value, self._codec, wire=True)
        self._fits(key, len(data))
        return flags, data

    def _fits(self, key: bytes, length: int) -> None:
        name, with_key = self._keys.wire(key)
        total = length + len(name) + wire.OVERHEAD + (2 + len(key) if with_key else 0)
        if total > self.max_item:
            raise ValueTooLarge(
                f"value: an item of at most {self.max_item} bytes wanted (max_item; key and {wire.OVERHEAD} bytes"
                f" included), {total} found"
            )

    def _store(
        self, key: bytes, flags: int, data: bytes, expiry: bytes, words: bytes = b"", grace: int = 0
    ) -> bytes:
        """The command that stores; `words`: its mode and condition, with a blank before each."""
        name, with_key = self._keys.wire(key)
        if with_key:
            data = wire.envelope(key, data)
        client_flags = wire.pack_flags(flags, with_key, grace, self._kamailio)
        return b"ms %b %d F%b T%b%b\r\n%b" % (name, len(data), client_flags, expiry, words, data)

    def _send(self, key: bytes, request: bytes, *codes: bytes) -> bytes:
        """Send one command; its answer, one of `codes`."""
        return self._answer(self._ask(self._keys.wire(key)[0], request)[0], *codes)

    def _answer(self, reply: Reply, *codes: bytes) -> bytes:
        if reply.code not in codes:
            raise self._refused(reply)
        return reply.code

    def _attempts(self, what: str, key: bytes) -> Iterator[int]:
        """Counts attempts that lose a race; LockTimeout when the time is over."""
        end, n = time.monotonic() + self._patience, 0
        while n == 0 or time.monotonic() < end:
            yield n
            n += 1
            if n > 2:
                time.sleep(random.random() * min(0.0002 * n, 0.005))
        raise LockTimeout(
            f"{what} {key[:80]!r}: an attempt that meets no other writer within {self._patience:g} s wanted,"
            f" {n} that did found"
        )

    def _condition(self, item: Item) -> bytes:
        if item.cas == 0:
            raise NotSupported("memcached: a server with cas wanted, one started with -C found")
        return b" C%d" % item.cas

    # -- reading --

    def _get(self, key: Key, words: bytes) -> Item | None:
        data = check_key(key)
        name, with_key = self._keys.wire(data)
        found = self._live(self._item(self._ask(name, b"mg " + name + words, again=True)[0], data, with_key))
        self._count("misses" if found is None else "hits")
        return found

    def get(self, key: Key, default: Any = None) -> Any:
        try:
            item = self._get(key, b" v f t")
        except EngineDown as error:
            return self._missed(error, default)
        return default if item is None else self._value(item)

    def gets(self, key: Key, default: Any = None) -> Any:
        try:
            item = self._get(key, b" v f t c")
        except EngineDown as error:
            return self._missed(error, default)
        if item is None:
            return default
        self._condition(item)
        return self._value(item), -item.cas if item.grace else item.cas

    def _peek(self, key: Key) -> Any:
        try:
            item = self._live(self._load(check_key(key)))
        except EngineDown as error:
            return self._missed(error, MISS)
        return MISS if item is None else self._value(item)

    def __contains__(self, key: Key) -> bool:
        try:
            return self._live(self._load(check_key(key), value=False)) is not None
        except EngineDown as error:
            return bool(self._missed(error, False))

    def ttl(self, key: Key) -> float | None:
        """Seconds the item has at least; up to one more, the server counts in whole seconds."""
        try:
            item = self._live(self._load(check_key(key), value=False))
        except EngineDown as error:
            self._missed(error, None)
            return None
        return None if item is None else wire.seconds_left(item)

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The hits as a dict under the keys as given; one exchange per server and 100 keys. EngineDown if a
        server did not answer, unless on_down=miss."""
        return {key: self._value(item) for key, item in self._get_items(keys)}

    def _get_left(self, key: Key) -> tuple[Any, float] | None:
        """`(value, seconds it surely has)`, both of one moment; None if absent. Counts as `get`."""
        try:
            item = self._get(key, b" v f t")
        except EngineDown as error:
            self._missed(error, None)
            return None
        return None if item is None else (self._value(item), wire.seconds_left(item, 0.0))

    def _get_left_many(self, keys: Iterable[Key]) -> dict[Key, tuple[Any, float]]:
        """The hits as `_get_left` gives them, under the keys as given."""
        return {key: (self._value(item), wire.seconds_left(item, 0.0)) for key, item in self._get_items(keys)}

    def _get_items(self, keys: Iterable[Key]) -> Iterator[tuple[Key, Item]]:
        wanted = [(key, data, *self._keys.wire(data)) for key, data in [(k, check_key(k)) for k in keys]]
        answers = self._ask_many(
            [(name, (b"mg " + name + b" v f t",)) for _, _, name, _ in wanted], again=True
        )
        for (key, data, _, with_key), replies in zip(wanted, answers, strict=True):
            if isinstance(replies, EngineDown):
                self._missed(replies, None)
                continue
            item = self._live(self._item(replies[0], data, with_key))
            self._count("misses" if item is None else "hits")
            if item is not None:
                yield key, item

    # -- storing --

    def _put(
        self, key: Key, value: Any, ttl: Ttl, expire_at: float | None
    ) -> tuple[bytes, int, bytes, bytes]:
        data, left = check_key(key), lifetime(ttl, expire_at, self.default_ttl)
        return data, *self._pack(data, value), wire.expiry(left)

    def _check_value(self, value: Any) -> None:
        self._pack(b"k", value)

    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        data, flags, packed, expiry = self._put(key, value, ttl, expire_at)
        try:
            self._send(data, self._store(data, flags, packed, expiry), b"HD")
        except EngineDown as error:
            return bool(self._missed(error, False))
        self._count("sets")
        return True

    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        data, flags, packed, expiry = self._put(key, value, ttl, expire_at)
        try:
            stored = self._add(data, flags, packed, expiry)
        except EngineDown as error:
            return bool(self._missed(error, False))
        self._count("sets", stored)
        return stored

    def _add(self, key: bytes, flags: int, data: bytes, expiry: bytes) -> bool:
        for _ in self._attempts("add", key):
            if self._send(key, self._store(key, flags, data, expiry, b" ME"), b"HD", b"NS") == b"HD":
                return True
            item = self._load(key, value=False)
            if item is not None:
                if item.live:
                    return False
                if self._swap(key, item, flags, data, expiry):
                    return True
        return False

    def _swap(self, key: bytes, item: Item, flags: int, data: bytes, expiry: bytes, grace: int = 0) -> bool:
        """Put another in the place of exactly `item`: whether it was still there."""
        request = self._store(key, flags, data, expiry, self._condition(item), grace)
        return self._send(key, request, b"HD", b"EX", b"NF") == b"HD"

    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        data, flags, packed, expiry = self._put(key, value, ttl, expire_at)
        try:
            if self._live(self._load(data, value=False)) is None:
                return False
            stored = self._send(data, self._store(data, flags, packed, expiry, b" MR"), b"HD", b"NS") == b"HD"
        except EngineDown as error:
            return bool(self._missed(error, False))
        self._count("sets", stored)
        return stored

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        data, flags, packed, expiry = self._put(key, value, ttl, expire_at)
        if (
            type(token) is not int or token <= 0
        ):  # of an item with grace, which may be stale; or no token at all
            if self._live(self._load(data, value=False)) is None:
                return None
            if type(token) is not int or token == 0:
                return False
        request = self._store(data, flags, packed, expiry, b" C%d" % abs(token))
        code = self._send(data, request, b"HD", b"EX", b"NF")
        self._count("sets", code == b"HD")
        return {b"HD": True, b"EX": False, b"NF": None}[code]

    def set_many(
        self, mapping: Mapping[Key, Any], ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> list[Key]:
        expiry = wire.expiry(lifetime(ttl, expire_at, self.default_ttl))
        pairs = [
            (key, data, *self._pack(data, value))
            for (key, value), data in [(p, check_key(p[0])) for p in mapping.items()]
        ]
        requests = [
            (self._keys.wire(data)[0], (self._store(data, flags, packed, expiry),))
            for _, data, flags, packed in pairs
        ]
        failed = []
        for (key, *_), replies in zip(pairs, self._ask_many(requests), strict=True):
            if isinstance(replies, EngineDown):
                self._count("down")
                failed.append(key)
            elif replies[0].code == b"SE":  # no room
                failed.append(key)
            else:
                self._answer(replies[0], b"HD")
                self._count("sets")
        return failed

    def append(self, key: Key, data: str | bytes) -> bool:
        return self._join(key, data, b" MA")

    def prepend(self, key: Key, data: str | bytes) -> bool:
        return self._join(key, data, b" MP")

    def _join(self, key: Key, addition: str | bytes, mode: bytes) -> bool:
        data = check_key(key)
        if type(addition) not in (str, bytes):
            raise TypeError(f"data: str or bytes wanted, {type(addition).__name__} found")
        flags, packed = pack(addition, self._codec)
        name, with_key = self._keys.wire(data)
        try:
            for _ in self._attempts("append", data):
                whole = with_key and mode == b" MP"  # the true key stands first: the value is replaced
                item, expiry = self._load_exactly(data) if whole else (self._load(data, value=False), b"")
                if item is None or not item.live:
                    return False
                if item.flags != flags:
                    found = {BYTES: "bytes", STR: "str"}.get(item.flags, "another type")
                    raise TypeError(
                        f"value of {key!r:.80}: {type(addition).__name__} like the data wanted, {found} found"
                    )
                self._fits(data, item.size + len(packed))
                if whole:
                    done = self._swap(
                        data, item, flags, packed + item.data, expiry, wire.grace_bits(item.grace)
                    )
                else:
                    request = b"ms %b %d%b%b\r\n%b" % (name, len(packed), mode, self._condition(item), packed)
                    done = self._send(data, request, b"HD", b"NS", b"NF", b"EX") == b"HD"
                if done:
                    self._count("sets")
                    return True
        except EngineDown as error:
            return bool(self._missed(error, False))
        return False

    # -- removing --

    def delete(self, key: Key) -> bool:
        return self._delete_many([check_key(key)]) == 1

    def delete_many(self, keys: Iterable[Key]) -> int:
        """Remove several; how many existed. One exchange per server and 50 keys; EngineDown, when the other
        servers are done, if one did not answer, unless on_down=miss."""
        return self._delete_many([check_key(key) for key in keys])

    def _delete_many(self, keys: list[bytes]) -> int:
        wires = [(key, *self._keys.wire(key)) for key in keys]
        plain = [
            (name, (b"mg " + name + b" f t u", b"md " + name)) for _, name, with_key in wires if not with_key
        ]
        down, count = None, 0
        for replies in self._ask_many(plain):
            if isinstance(replies, EngineDown):
                down = replies
                self._count("down", self._miss)
                continue
            item = self._item(replies[0], b"", False)
            gone = self._answer(replies[1], b"HD", b"NF") == b"HD"
            count += gone and item is not None and item.live
        for key, _, with_key in wires:
            if with_key:  # read first: a clash must not remove another's item
                try:
                    count += self._take(key, MISS) is not MISS
                except EngineDown as error:
                    down = error
        self._count("deletes", count)
        if down is not None and not self._miss:
            raise down
        return count

    def _take(self, key: bytes, default: Any) -> Any:
        """Remove and return, by cas; what is stale goes as well."""
        name, _ = self._keys.wire(key)
        try:
            for _ in self._attempts("pop", key):
                item = self._load(key)
                if item is None or not item.ours:
                    return default
                if self._send(key, b"md " + name + self._condition(item), b"HD", b"EX", b"NF") == b"HD":
                    return self._value(item) if item.live else default
        except EngineDown as error:
            return self._missed(error, default)
        return default

    def pop(self, key: Key, default: Any = None) -> Any:
        value = self._take(check_key(key), MISS)
        self._count("misses" if value is MISS else "hits")
        self._count("deletes", value is not MISS)
        return default if value is MISS else value

    # -- lifetimes --

    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        try:
            return self._touch(key, ttl, expire_at, b" f t u") is not None
        except EngineDown as error:
            return bool(self._missed(error, False))

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        """Touch and get in one step; `default` if absent."""
        try:
            item = self._touch(key, ttl, expire_at, b" v f t")
        except EngineDown as error:
            return self._missed(error, default)
        self._count("misses" if item is None else "hits")
        return default if item is None else self._value(item)

    def _touch(self, key: Key, ttl: Ttl, expire_at: float | None, words: bytes) -> Item | None:
        data, expiry = check_key(key), wire.expiry(lifetime(ttl, expire_at, self.default_ttl))
        name, with_key = self._keys.wire(data)
        for _ in self._attempts("touch", data):
            item = self._load(data, value=False)
            if item is None or not item.live:
                return None
            if item.grace:  # it goes with the new lifetime
                item = self._load(data)
                if item is None or not item.live or self._swap(data, item, item.flags, item.data, expiry):
                    return self._live(item)
                continue
            reply = self._ask(name, b"mg " + name + words + b" T" + expiry)[0]
            touched = self._item(reply, data, with_key) if b"v" in words or not with_key else item
            return None if reply.code == b"EN" else touched
        return None

    def _load_exactly(self, key: bytes) -> tuple[Item | None, bytes]:
        """The item, and what to put after T so that another in its place ends with it.

        The server tells seconds left by ticks of its clock; a tick between reading and storing would add a
        second each time. A clock item, which ends at a known Unix time, read before and after in one exchange,
        turns them into the Unix time of the end; across a tick the two differ, and the exchange is repeated.
        """
        name, with_key = self._keys.wire(key)
        item = self._load(key)
        if item is None or item.left == wire.FOREVER:
            return item, b"0"
        end = wire.clock_item(time.time())
        clock = b"mg %b t N%d" % (self._keys.clock(end), end)
        for _ in self._attempts("clock", key):
            before, reply, after = self._ask(name, clock, b"mg " + name + b" v f t c u", clock, again=True)
            item = self._item(reply, key, with_key)
            if item is None or item.left == wire.FOREVER:
                return item, b"0"
            now = wire.parse_item(before, b"", False, False).left
            if 0 < now == wire.parse_item(after, b"", False, False).left:
                return item, b"%d" % (end - now + item.left)
        raise AssertionError("unreachable: _attempts raises")
