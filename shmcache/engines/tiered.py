"""tiered:// - a near cache (L1: shared memory or memory) in front of a far one (L2: memcached, redis, ...).
Driver: none.

L2 has the truth: every write goes there, and counters, tokens, locks, lifetimes and iteration are its own. L1
has copies, each of which dies at most `l1_ttl` seconds after L2 was asked for it, and before its item does.
Before L2 is written, or read for a copy, a mark that nobody else has is put into L1 in the copy's place, and
a copy is stored only over the maker's own mark, by cas. A mark lives `hold` = min(1, l1_ttl / 5) seconds, a
copy l1_ttl - hold: tiered_near.py.

I1  After a write has returned, no process that uses this L1 reads anything older, killed and stopped writers
    included: a mark sends readers to L2, and a late filler finds its mark gone. (A write that gets no room in
    L1 for its mark, or takes longer than `hold`, and then cannot remove the copy either, leaves it to I2.)
I2  After a write on another machine, a reader here sees anything older for less than l1_ttl seconds: a copy
    is made within `hold` of its mark, the mark stands before L2 is asked, and the copy lives l1_ttl - hold.
I3  An expired item is not read from a copy: a copy lives `hold` less than its item had left.
I4  Of the processes on one L1 that miss a key at once, one asks L2 and the others wait for its copy, `hold`
    seconds at most; then, or if there is none, they ask L2 themselves.
I5  An int is never copied, so a counter read by `get` is L2's.

Keys in L1: 0xFF `T`, 16 hex digits of both engines, key. An engine opened by its id may have other users
too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from .. import url as _url
from ..arguments import DEFAULT, MISS, Key, Ttl, check_number, lifetime
from ..codec import get_codec, pack
from ..engine import Capability, Engine
from ..errors import EngineDown, LockTimeout, ValueTooLarge
from ..url import Parser, Url
from .tiered_far import FarItems
from .tiered_near import DIRECT, FILL, MARK, NEEDED, Near, is_mark

__all__ = ["TieredEngine"]


def tier(name: str, value: Any) -> Engine | Url | str:
    """An option that names an engine: an open engine, the id of one, or the URL of one to open."""
    if isinstance(value, (Engine, Url)):
        return value
    word = _url.text(name, value)
    return Url.parse(word) if "://" in word else word


class TieredEngine(FarItems):
    """Two engines as one; see the head of the module for what is promised.

    Args: l1, l2: an engine, its id (`posix:sessions`), or its URL, %-escaped inside a URL; an engine that was
    not open before is closed by `close()`. Give both the same codec. l1_ttl: seconds that a copy may be older
    than L2, 0.01 to 86,400. on_down: "raise" EngineDown when L2 is down and L1 has no copy, or "miss": reads
    miss, set, add, replace, append, prepend, delete and touch answer False, the many-key calls report all
    keys, the rest raises. (An L2 opened with on_down=miss answers so by itself.) default_ttl: seconds; not
    given = L2's. max_value: bytes of an encoded value; not given = L2's limit.
    Raises: ValueError for a tier that is not open, lacks what it needs, or is both. A write raises
    LockTimeout or GuardLost of L1 before L2 is touched.
    """

    OPTIONS: ClassVar[dict[str, Parser]] = {
        "l1": tier,
        "l2": tier,
        "l1_ttl": _url.seconds(0.01, 86_400),
        "on_down": _url.choice("raise", "miss"),
        "default_ttl": _url.seconds(),
        "max_value": _url.size(1),
    }

    def __init__(
        self,
        l1: Engine,
        l2: Engine,
        *,
        url: Url | None = None,
        l1_ttl: float = 5.0,
        on_down: str = "raise",
        default_ttl: float | None = None,
        max_value: int | None = None,
        owned: tuple[Engine, ...] = (),
    ) -> None:
        if l1 is l2:
            raise ValueError(f"option 'l1': another engine than l2 wanted, {l1.engine_id!r} found as both")
        missing = NEEDED & ~l1.capabilities
        if missing or l1._readonly:
            lacks = "a writable one" if not missing else f"{missing.name}"
            raise ValueError(f"option 'l1': {lacks} wanted, engine {l1.engine_id!r} found without it")
        self.url = Url("tiered") if url is None else url
        self.engine_id = self.url.engine_id
        self._l1, self._l2, self._owned = l1, l2, owned
        self.default_ttl = l2.default_ttl if default_ttl is None else lifetime(default_ttl)
        self.max_value = max_value
        self._miss = on_down == "miss" or l2._miss
        both = f"{self.engine_id} {l2.engine_id} {l2.url}".encode()
        self._head = b"\xffT" + hashlib.blake2b(both, digest_size=8).hexdigest().encode()
        self._near = Near(l1, self._head, l1_ttl)
        self._closed = False
        self._counts = dict.fromkeys(
            ("hits", "misses", "sets", "deletes", "l1_hits", "l1_fills", "l1_waits", "down"), 0
        )

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> TieredEngine:
        """Open both tiers where they are URLs, and put one before the other."""
        from .. import registry

        if url.hosts or url.user is not None or url.path:
            raise ValueError(f"url {url}: tiered:group://?l1=...&l2=... wanted, a host or path found")
        owned: list[Engine] = []
        try:
            for name in ("l1", "l2"):
                given = options.get(name)
                if given is None:
                    raise ValueError(f"option {name!r}: an engine_id or URL wanted, none found")
                known = registry.opened()
                if isinstance(given, str):
                    if given not in known:
                        raise ValueError(
                            f"option {name!r}: the id of an open engine wanted, {given!r} found;"
                            f" open are: {', '.join(sorted(known)) or 'none'}"
                        )
                    options[name] = known[given]
                elif isinstance(given, Url):
                    options[name] = registry.open(given)
                    if given.engine_id not in known:
                        owned.append(options[name])
            return cls(url=url, owned=tuple(owned), **options)
        except BaseException:
            for engine in owned:
                engine.close()
            raise

    def close(self) -> None:
        self._closed = True
        for engine in self._owned:
            engine.close()

    # -- writing to both --

    def _write(
        self, name: bytes, call: Callable[[], Any], value: Any = MISS, left: float | None = None
    ) -> Any:
        """Write to L2 by `call()` between mark and copy; what it returns. value: what L2 then has, if that is
        True."""
        mark = self._near.plant(name)
        settled = False
        try:
            answer = call()
            if value is not MISS and answer is True and left != 0.0:
                settled = self._near.settle(name, mark, value, left)
            return answer
        finally:
            if not settled:
                self._near.drop(name)

    # -- reading --

    def get(self, key: Key, default: Any = None) -> Any:
        name = self._name(key)
        found = self._near.look(name)
        if found is MISS or (type(found) is bytes and found.startswith(MARK)):
            found = self._fetch(name, found)
        else:
            self._counts["l1_hits"] += 1
        if found is MISS:
            self._counts["misses"] += 1
            return default
        self._counts["hits"] += 1
        return found

    def _fetch(self, name: bytes, found: Any) -> Any:
        """The value from L2, or from the copy that somebody is about to make; MISS if absent."""
        key = name[len(self._head) :]
        if found is MISS:
            mark = self._near.plant_fill(name)
            if mark is not None:
                return self._fill(name, key, mark)
            found = self._near.look(name)
        if type(found) is bytes and found.startswith(FILL):
            self._counts["l1_waits"] += 1
            found = self._near.wait(name, found)
        if found is MISS or is_mark(found):
            return self._far(self._l2.get, key, MISS, down=MISS)
        self._counts["l1_hits"] += 1
        return found

    def _fill(self, name: bytes, key: bytes, mark: bytes) -> Any:
        value: Any = MISS
        left: float | None = 0.0
        try:
            pair = self._far(self._get_left, key, down=None)
            if pair is not None:
                value, left = pair
        finally:
            if self._near.settle(name, mark, value, left) and value is not MISS:
                self._counts["l1_fills"] += 1
        return value

    def _get_left(self, key: bytes) -> tuple[Any, float] | None:
        """`(value, seconds left)` from L2: of one moment where L2 can, else the lifetime is asked for after
        the value, so that it is that of the value or of a newer one."""
        one_step: Callable[[Key], tuple[Any, float] | None] | None = getattr(self._l2, "_get_left", None)
        if one_step is not None:
            return one_step(key)
        value = self._l2.get(key, MISS)
        if value is MISS:
            return None
        left = self._l2.ttl(key) if self._can(Capability.TTL) else None
        if left is None:
            return value, 0.0  # gone meanwhile, or not to be known: no copy
        return value, left if self._can(Capability.SUBSECOND) else left - 1.0

    def _copy(self, name: bytes) -> Any:
        """The copy, or MISS; marks are none."""
        found = self._near.look(name)
        return MISS if is_mark(found) else found

    def _peek(self, key: Key) -> Any:
        found = self._copy(self._name(key))
        return self._far(self._l2._peek, key, down=MISS) if found is MISS else found

    def __contains__(self, key: Key) -> bool:
        return self._copy(self._name(key)) is not MISS or bool(
            self._far(self._l2.__contains__, key, down=False)
        )

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The hits as a dict under the keys as given: copies first, then one get_many of L2 for the rest,
        copied where L2 tells value and lifetime together. Waits for no filler."""
        given = [(key, self._name(key)) for key in keys]
        names = list(dict.fromkeys(name for _, name in given))
        found = self._near.look_many(names)
        copies = {name for name in names if not is_mark(found.get(name, DIRECT))}
        self._counts["l1_hits"] += len(copies)
        values = {name: found[name] for name in copies}
        absent = [name for name in names if name not in copies]
        values |= self._fetch_many(absent, [name for name in absent if name not in found])
        hits = {key: values[name] for key, name in given if name in values}
        self._counts["hits"] += len(hits)
        self._counts["misses"] += len(given) - len(hits)
        return hits

    def _fetch_many(self, absent: list[bytes], unmarked: list[bytes]) -> dict[bytes, Any]:
        """L2's values for the names; those without a mark in L1 are copied."""
        size = len(self._head)
        one_step = getattr(self._l2, "_get_left_many", None)
        marks: dict[bytes, bytes] = {}
        for name in unmarked if one_step is not None else ():
            if (mark := self._near.plant_fill(name)) is not None:
                marks[name] = mark
        pairs: dict[bytes, tuple[Any, float]] = {}
        try:
            if one_step is not None and absent:
                pairs = self._far(one_step, [name[size:] for name in absent], down={})
            elif absent:
                plain = self._far(self._l2.get_many, [name[size:] for name in absent], down={})
                pairs = {key: (value, 0.0) for key, value in plain.items()}
        finally:
            for name, mark in marks.items():
                value, left = pairs.get(name[size:], (MISS, 0.0))
                self._counts["l1_fills"] += self._near.settle(name, mark, value, left) and value is not MISS
        return {self._head + key: value for key, (value, _) in pairs.items()}

    # -- writing --

    def _life_of(self, ttl: Ttl, expire_at: float | None) -> tuple[float | None, Ttl]:
        """Seconds that an item shall live, and the ttl to give to L2."""
        left = lifetime(ttl, expire_at, self.default_ttl)
        return left, self.default_ttl if ttl is DEFAULT and expire_at is None else ttl

    def _check_value(self, value: Any) -> None:
        self._l2._check_value(value)
        if self.max_value is not None:
            length = len(pack(value, getattr(self._l2, "_codec", None) or get_codec())[1])
            if length > self.max_value:
                raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {length} found")

    def _store(
        self,
        call: Callable[..., Any],
        key: Key,
        value: Any,
        *args: Any,
        ttl: Ttl,
        expire_at: float | None,
        **far: Any,
    ) -> Any:
        """A call of L2 that stores `value`, with the copy."""
        name = self._name(key)
        left, far_ttl = self._life_of(ttl, expire_at)
        if self.max_value is not None:
            self._check_value(value)
        done = self._write(
            name, lambda: self._far(call, key, value, *args, far_ttl, expire_at=expire_at, **far), value, left
        )
        self._counts["sets"] += done is True
        return done

    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._store(self._l2.set, key, value, ttl=ttl, expire_at=expire_at, down=False))

    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._store(self._l2.add, key, value, ttl=ttl, expire_at=expire_at, down=False))

    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._store(self._l2.replace, key, value, ttl=ttl, expire_at=expire_at, down=False))

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        done: bool | None = self._store(self._l2.cas, key, value, token, ttl=ttl, expire_at=expire_at)
        return done

    def set_many(
        self, mapping: Mapping[Key, Any], ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> list[Key]:
        """Store several; the keys not stored for want of room, guard or server, of either tier."""
        left, far_ttl = self._life_of(ttl, expire_at)
        pairs = list(mapping.items())
        names = {key: self._name(key) for key, _ in pairs}
        for _, value in pairs:
            self._check_value(value)
        marks: dict[Key, bytes | None] = {}
        failed: list[Key] = []
        for key, _ in pairs:
            try:
                marks[key] = self._near.plant(names[key])
            except (LockTimeout, EngineDown):
                failed.append(key)
        done: set[Key] = set()
        try:
            wanted = {key: mapping[key] for key in marks}
            refused = self._l2.set_many(wanted, far_ttl, expire_at=expire_at)
            done = set(wanted) - set(refused)
            failed += refused
        finally:
            for key, mark in marks.items():
                copied = (
                    key in done and left != 0.0 and self._near.settle(names[key], mark, mapping[key], left)
                )
                if not copied:
                    self._near.drop(names[key])
        self._counts["sets"] += len(done)
        return failed

    def incr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        name = self._name(key)
        left, far_ttl = self._life_of(ttl, expire_at)
        step = check_number(delta, "delta")

        def count() -> int | None:
            counted: int | None = self._far(
                self._l2.incr, key, step, initial=initial, ttl=far_ttl, expire_at=expire_at
            )
            return counted

        near = self._near.look(name)
        if type(near) is bytes and near == DIRECT:  # as long as that stands there is no copy to outdate
            return count()
        mark = self._near.plant(name)
        number: int | None = None
        try:
            number = count()
            return number
        finally:
            if number is None or left == 0.0 or not self._near.settle(name, mark, number, None):
                self._near.drop(name)

    def append(self, key: Key, data: str | bytes) -> bool:
        return self._join(self._l2.append, key, data)

    def prepend(self, key: Key, data: str | bytes) -> bool:
        return self._join(self._l2.prepend, key, data)

    def _join(self, call: Callable[..., Any], key: Key, data: str | bytes) -> bool:
        name = self._name(key)
        if self.max_value is not None and type(data) in (str, bytes):
            # looked at before the call, not with it: two at once may pass the limit together
            old = self._l2._peek(key)
            if type(old) is type(data):
                self._check_value(old + data)  # type: ignore[operator]
        return bool(self._write(name, lambda: self._far(call, key, data, down=False)))

    def delete(self, key: Key) -> bool:
        name = self._name(key)
        gone = bool(self._write(name, lambda: self._far(self._l2.delete, key, down=False)))
        self._counts["deletes"] += gone
        return gone

    def delete_many(self, keys: Iterable[Key]) -> int:
        """Remove several; how many existed in L2. Raises: LockTimeout, GuardLost before anything is removed
        there."""
        wanted = list(keys)
        names = [self._name(key) for key in wanted]
        try:
            for name in names:
                self._near.plant(name)
            count = int(self._far(self._l2.delete_many, wanted, down=0))
        finally:
            self._near.drop_all(names)
        self._counts["deletes"] += count
        return count

    def delete_match(self, glob: Key) -> int:
        """Remove the items of L2 whose key matches (fnmatchcase); how many; and every copy that does."""
        count = self._l2.delete_match(glob)
        self._near.drop_match(glob.encode("utf-8", "surrogateescape") if isinstance(glob, str) else glob)
        self._counts["deletes"] += count
        return count

    def pop(self, key: Key, default: Any = None) -> Any:
        name = self._name(key)
        value = self._write(name, lambda: self._far(self._l2.pop, key, MISS, down=MISS))
        self._counts["deletes"] += value is not MISS
        return default if value is MISS else value

    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        name, far_ttl = self._name(key), self._life_of(ttl, expire_at)[1]
        call = self._l2.touch
        return bool(self._write(name, lambda: self._far(call, key, far_ttl, expire_at=expire_at, down=False)))

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        name, far_ttl = self._name(key), self._life_of(ttl, expire_at)[1]
        call = self._l2.gat
        return self._write(
            name, lambda: self._far(call, key, far_ttl, default, expire_at=expire_at, down=default)
        )

    def clear(self) -> None:
        """Remove everything from L2, then this engine's copies from L1. Raises: what either raises."""
        try:
            self._l2.clear()
        finally:
            self._near.drop_match(b"*")

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        value = self.get(key, MISS)  # a copy is of a fresh item
        if value is not MISS:
            return value, True
        found: tuple[Any, bool] | None = self._far(self._l2._get_grace, key, down=None)
        return found

    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        name = self._name(key)
        self._check_value(value)
        call = self._l2._set_grace
        return bool(
            self._write(name, lambda: self._far(call, key, value, ttl, grace, down=False), value, ttl)
        )
