"""What the memcached engine does with whole servers: clear, stats, raw commands and iteration.

Iteration asks for `lru_crawler metadump`, a list of all keys of a server, and then whether each is alive. It
is there where every server allows that. A key is given by the server it belongs to, once; what an item's
digest hides is read from its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import unquote_to_bytes

from ..arguments import Key, key_text
from ..engine import Capability
from ..errors import EngineDown, NotSupported
from . import memcached_wire as wire
from .memcached_counters import MemcachedCounters

__all__ = ["MemcachedWhole"]

DUMP_TIME: Final = 60.0
"""Seconds for a list of all keys of a server; half a million took 3 with 1.6.18 on a busy machine."""
DUMP_CHUNK: Final = 100
"""Keys asked for at once, whether they are alive."""
COUNT_ITEMS: Final = 10_000
"""Up to so many items on the servers, stats() counts the live ones and their bytes by a scan of 0.1 s; beyond,
it gives the servers' numbers, which have leases in them, and what expired or was flushed and not yet swept."""

_NOT_RAW: Final = frozenset(
    ("set", "add", "replace", "append", "prepend", "cas", "ms", "watch", "quit", "shutdown", "lru_crawler")
)
_T = TypeVar("_T")


class MemcachedWhole(MemcachedCounters):
    """See memcached.MemcachedEngine."""

    _ALWAYS: ClassVar[Capability] = ~(Capability.SUBSECOND | Capability.ITERATE)
    _iterable: bool | None

    # -- what memcached.py adds --

    def _run(
        self, number: int, act: Callable[[Any], _T], again: bool, seconds: float
    ) -> tuple[_T, None] | tuple[None, EngineDown]:
        """`act` on a connection (memcached.Link) to server `number`, within `seconds`: its answer, or why the
        server is down."""
        raise NotImplementedError

    def _owner(self, name: bytes) -> int:
        """The number of the server that a wire key belongs to."""
        raise NotImplementedError

    def _name(self, number: int) -> str:
        raise NotImplementedError

    # -- asking servers --

    def _on(self, number: int, act: Callable[[Any], _T], seconds: float = 0.0) -> _T:
        """`act` on a connection to one server, `seconds` longer than a call may take. Reads only."""
        answer, down = self._run(number, act, True, self._patience + seconds)
        if down is not None:
            raise down
        return answer  # type: ignore[return-value]

    def _each(self, act: Callable[[Any], _T]) -> list[_T]:
        """`act` on every server; EngineDown, after the others, if one is down."""
        answers: list[_T] = []
        down: list[EngineDown] = []
        for number in range(self._n_groups):
            try:
                answers.append(self._on(number, act))
            except EngineDown as error:
                down.append(error)
        if down:
            raise down[0]
        return answers

    # -- clear, raw, stats --

    def clear(self) -> None:
        """Empty the servers, leases included; EngineDown if one did not answer, the others are empty then.

        With a prefix: remove, key by key, what begins with it. NotSupported for a server that refuses
        flush_all, or with a prefix one that cannot list its keys.
        """
        if self._keys.prefix:
            self.delete_match("*")
            return
        for answer in self._each(lambda link: link.lines(b"flush_all")):
            if answer != [b"OK"]:
                raise NotSupported(f"clear: a server that allows flush_all wanted, {answer[:1]} found")

    def raw(self, command: str, *args: Any) -> Any:
        """The lines of the server's answer to a command of one line, as bytes: `raw("stats", "slabs")`. With
        several servers a dict of that by server.

        Raises: TypeError for a command that is no str; ValueError for control characters, a command with data, and one
        whose answer has no end.
        """
        if not isinstance(command, str):
            raise TypeError(f"command: str wanted, {type(command).__name__} found")
        words = [word.decode("utf-8") if isinstance(word, bytes) else str(word) for word in (command, *args)]
        line = " ".join(words)
        name = line.split(" ")[0]
        if not name or name in _NOT_RAW or any(ord(c) < 32 or ord(c) == 127 for c in line):
            raise ValueError(f"raw: a command of one line without data wanted, {line[:40]!r} found")
        answers = self._each(lambda link: link.lines(line.encode()))
        if len(answers) == 1:
            return answers[0]
        return {self._name(number): answer for number, answer in enumerate(answers)}

    def _raw_error(self, answer: Any) -> str | None:
        for lines in answer.values() if isinstance(answer, dict) else [answer]:
            if lines and lines[0].split(b" ")[0] in (b"ERROR", b"CLIENT_ERROR", b"SERVER_ERROR"):
                return str(lines[0][:80].decode("utf-8", "replace"))
        return None

    def _stats(self) -> dict[str, Any]:
        found: dict[str, Any] = {**self._counts, "servers": self._n_groups, "servers_down": 0}
        found |= dict.fromkeys(("items", "bytes", "expired", "evicted"), 0)
        for number in range(self._n_groups):
            try:
                lines = self._on(number, lambda link: link.lines(b"stats"))
            except EngineDown:
                found["servers_down"] += 1
                continue
            stats = {line.split(b" ")[1]: line.split(b" ")[2] for line in lines if line.count(b" ") == 2}

            def number_of(*names: bytes, stats: dict[bytes, bytes] = stats) -> int:
                return sum(int(stats.get(name, b"0")) for name in names)

            found["items"] += number_of(b"curr_items")
            found["bytes"] += number_of(b"bytes")
            found["evicted"] += number_of(b"evictions")
            found["expired"] += number_of(b"reclaimed", b"crawler_reclaimed")
        if (
            not found["servers_down"]
            and found["items"] <= COUNT_ITEMS
            and Capability.ITERATE in self.capabilities
        ):
            live = [pair for number in range(self._n_groups) for pair in self._live_keys(number)]
            found["items"], found["bytes"] = len(live), sum(size for _, size in live)
        return found

    # -- iteration --

    @property
    def capabilities(self) -> Capability:  # type: ignore[override]
        """ITERATE is asked of the servers when it first matters; while one of them is down it is missing."""
        if self._iterable is None and not self._closed:
            self._iterable = self._can_iterate()
        return self._ALWAYS | Capability.ITERATE if self._iterable else self._ALWAYS

    def _can(self, flag: Capability) -> bool:
        """What could not be asked is not denied: the call then meets the server that is down."""
        return flag in self._ALWAYS or flag in self.capabilities or (flag == Capability.ITERATE and self._iterable is None)

    def _can_iterate(self) -> bool | None:
        """Whether all servers list their keys; None while one of them cannot be asked."""
        try:
            answers = self._each(lambda link: link.lines(b"lru_crawler metadump 63", b"END"))
        except EngineDown:
            return None
        return all(not lines or lines[-1].startswith((b"key=", b"BUSY")) for lines in answers)

    def _dump(self, number: int) -> dict[bytes, int]:
        """The wire keys on a server, some of which may have expired, and the bytes of their items."""
        for _ in self._attempts("keys", b"*"):
            lines = self._on(
                number, lambda link: link.lines(b"lru_crawler metadump hash", b"END", DUMP_TIME), DUMP_TIME
            )
            if not lines or lines[-1].startswith(b"key="):
                found = {}
                for line in lines:
                    key, *words = line.split(b" ")
                    sizes = [int(word[5:]) for word in words if word.startswith(b"size=")]
                    found[unquote_to_bytes(key[4:])] = sum(sizes)
                return found
            if not lines[-1].startswith(b"BUSY"):
                raise NotSupported(f"iteration: lru_crawler metadump wanted, {lines[-1][:80]!r} found")
        raise AssertionError("unreachable: _attempts raises")

    def _scan_keys(self, group: int) -> list[Key]:
        """The live keys of server number `group` that belong there; EngineDown if it is down."""
        return [key_text(key) for key, _ in self._live_keys(group)]

    def _live_keys(self, number: int) -> list[tuple[bytes, int]]:
        """Key and bytes of the live items on a server that belong there."""
        sizes, names = self._dump(number), []
        for name in sizes:
            known = self._keys.digested(name) or self._keys.true(name) is not None
            if known and self._owner(name) == number:
                names.append(name)
        found = []
        for start in range(0, len(names), DUMP_CHUNK):
            for name, key in self._alive(number, names[start : start + DUMP_CHUNK]):
                found.append((key, sizes[name]))
        return found

    def _alive(self, number: int, names: list[bytes]) -> list[tuple[bytes, bytes]]:
        """Those wire keys that are alive, with their keys."""
        data = b"".join(
            b"mg %b f t u%b\r\n" % (name, b" v" if self._keys.digested(name) else b"") for name in names
        )
        replies = self._on(number, lambda link: link.exchange(data, len(names)))
        found = []
        for name, reply in zip(names, replies, strict=True):
            key = self._keys.true(name) or wire.open_envelope(reply.data)[0]
            item = self._item(reply, key, self._keys.digested(name))
            if key and item is not None and item.live:
                found.append((name, key))
        return found
