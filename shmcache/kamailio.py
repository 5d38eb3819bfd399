"""The pseudo-variables of Kamailio's memcached module as mappings, over any engine.

    from shmcache.kamailio import mct, mcinc, mcdec, mctex, modparam

    modparam("memcached", "servers", "10.0.0.1:11211")
    mct["test"] = 1             # $mct(test) = 1;                 mct["test", 60] = 1   with a lifetime in seconds
    mct["test"]                 # 1; None if absent
    mct["test"] = None          # $mct(test) = $null;  deletes
    mcinc["cnt"] = 1            # $mcinc(cnt) = 1;  adds to the number that is there
    mcdec["cnt"] = 1
    mctex["test"] = 10          # $mctex(test) = 10;  expires in 10 s from now

I1  Nothing here raises for what the cache, its server or a value does: it is logged, counted in `errors`, and
    reads None. Only a module parameter of a wrong name or value raises.
I2  No state but the parameters and the engine; the engine decides about processes, threads and fork.

As the module does: `mcinc`, `mcdec` and `mctex` need an int on the right and a key that is there; a lifetime
over 30 days is a Unix time. Other than the module: counters are signed, so `mcdec` goes below zero where the
module stops at 0; `mctex` is one step, where the module reads and writes back; several servers may be given.
With `servers`, the engine reads and writes what a Kamailio on the same memcached does: MD5 for keys of 250
bytes or more, ints as decimal text with client flags 0 or 2, text with client flags 1.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from .arguments import DEFAULT, Key
from .engine import Engine
from .errors import NotANumber
from .registry import engine as opened_engine
from .registry import open as open_engine
from .registry import opened

__all__ = ["Module", "mcdec", "mcinc", "mct", "mctex", "modparam", "module"]

MONTH: Final = 30 * 86_400
"""A larger lifetime is a Unix time, in memcached and in its module."""

_log = logging.getLogger("shmcache")
_T = TypeVar("_T")


class Module:
    """The module with its parameters and its four pseudo-variables `mct`, `mcinc`, `mcdec`, `mctex`.

    Args: servers: `host[:port]`, `/run/a.sock`, several separated by commas; or an engine URL, an engine_id, or
    an open engine. expire: seconds of items stored without a lifetime of their own, 0 = for ever, over 30 days =
    a Unix time. mode: 0 = a value is overwritten, 1 = it is written once, and later writes fail. timeout:
    milliseconds for connecting, and for an answer; for `servers` that are hosts.
    Raises: TypeError and ValueError for these. The engine is opened at the first use.
    """

    def __init__(
        self,
        servers: str | Engine = "localhost:11211",
        expire: int = 10_800,
        mode: int = 0,
        timeout: int = 5_000,
    ) -> None:
        self.errors = 0
        """Operations that failed; not exact between threads."""
        self._engine: Engine | None = None
        self.servers: str | Engine = servers
        self.expire = self.mode = self.timeout = 0
        values = {"servers": servers, "expire": expire, "mode": mode, "timeout": timeout}
        for name, value in values.items():
            self.modparam(name, value)
        self.mct = _Values(self)
        self.mcinc = _Counter(self, 1)
        self.mcdec = _Counter(self, -1)
        self.mctex = _Lifetimes(self)

    def modparam(self, name: str, value: Any) -> None:
        """Set one parameter. Another `servers` lets the next use open another engine; the one before stays
        open."""
        if name == "servers":
            if not isinstance(value, (str, Engine)) or value == "":
                raise TypeError(
                    f"modparam {name!r}: hosts, an engine URL or an engine wanted, {value!r:.40} found"
                )
            self.servers, self._engine = value, None
            return
        bounds = {"expire": (0, 2**32 - 1), "mode": (0, 1), "timeout": (1, 3_600_000)}
        if name not in bounds:
            raise ValueError(f"modparam: one of servers, {', '.join(bounds)} wanted, {name!r} found")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"modparam {name!r}: int wanted, {type(value).__name__} found")
        low, high = bounds[name]
        if not low <= value <= high:
            raise ValueError(f"modparam {name!r}: {low} to {high} wanted, {value} found")
        setattr(self, name, value)
        if name == "timeout":
            self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine behind the variables, opened if it is not yet. Raises what opening raises."""
        engine = self._engine
        if engine is None or engine._closed:
            self._engine = engine = self._open()
        return engine

    def _open(self) -> Engine:
        servers = self.servers
        if isinstance(servers, Engine):
            return servers
        if "://" in servers:
            return open_engine(servers)
        if servers in opened() or (":" in servers and not servers.rpartition(":")[2].isdigit()):
            return opened_engine(servers)
        hosts = [
            f"[{host}]" if host.startswith("/") else host for host in servers.replace(" ", "").split(",")
        ]
        group = re.sub(r"[^A-Za-z0-9.]+", "-", f"kamailio-{servers}-{self.timeout}")
        seconds = self.timeout / 1000
        url = f"memcached:{group}://{','.join(hosts)}/"
        return open_engine(url, timeout=seconds, connect_timeout=seconds, kamailio=True)

    def attempt(self, what: str, key: Any, act: Callable[[Engine], _T]) -> _T | None:
        """`act` on the engine; None if it fails, which is logged and counted."""
        try:
            return act(self.engine)
        except Exception as error:  # availability first: the script goes on
            self.failed(what, key, f"{type(error).__name__}: {error}")
            return None

    def failed(self, what: str, key: Any, why: str) -> None:
        self.errors += 1
        _log.error("%s(%.80s): %.400s", what, key, why)

    @staticmethod
    def lifetime(seconds: Any) -> dict[str, Any]:
        """A lifetime of the module's as keyword arguments of an engine's."""
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"lifetime: seconds as a number wanted, {type(seconds).__name__} found")
        return {"expire_at": seconds} if seconds > MONTH else {"ttl": seconds}


class _Values:
    """$mct: reads, stores and deletes."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, key: Key) -> Any:
        return self._module.attempt("mct", key, lambda engine: engine.get(key))

    def get(self, key: Key, default: Any = None) -> Any:
        """The value; `default` on a miss, and on a failure."""
        value = self[key]
        return default if value is None else value

    def __contains__(self, key: object) -> bool:
        return self[key] is not None  # type: ignore[index]

    def __setitem__(self, key: Key | tuple[Key, int], value: Any) -> None:
        module = self._module
        name, expire = (key[0], key[1]) if isinstance(key, tuple) and len(key) == 2 else (key, module.expire)

        def store(engine: Engine) -> bool:
            if value is None:
                engine.delete(name)
                return True
            put = engine.add if module.mode else engine.set
            return put(name, value, **module.lifetime(expire))

        if module.attempt("mct", name, store) is False:
            module.failed("mct", name, "stored wanted, a value that is there (mode 1) or no server found")

    def __delitem__(self, key: Key) -> None:
        self[key] = None


class _Counter:
    """$mcinc and $mcdec: count. Reading gives the value, as $mct does."""

    def __init__(self, module: Module, sign: int) -> None:
        self._module = module
        self._sign = sign
        self._name = "mcinc" if sign > 0 else "mcdec"

    def __getitem__(self, key: Key) -> Any:
        return self._module.mct[key]

    def __setitem__(self, key: Key, value: int) -> None:
        def count(engine: Engine) -> bool:
            if type(value) is not int:
                raise NotANumber(f"{self._name}: int wanted, {type(value).__name__} found")
            return engine.incr(key, self._sign * value, initial=None) is not None

        if self._module.attempt(self._name, key, count) is False:
            self._module.failed(self._name, key, "a number that is there wanted, none found")


class _Lifetimes:
    """$mctex: gives a new lifetime. Reading gives the value, as $mct does."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, key: Key) -> Any:
        return self._module.mct[key]

    def __setitem__(self, key: Key, seconds: int) -> None:
        module = self._module
        if (
            module.attempt("mctex", key, lambda engine: _touch(engine, key, module.lifetime(seconds)))
            is False
        ):
            module.failed("mctex", key, "a value that is there wanted, none found")


def _touch(engine: Engine, key: Key, lifetime: dict[str, Any]) -> bool:
    return engine.touch(key, lifetime.get("ttl", DEFAULT), expire_at=lifetime.get("expire_at"))


module: Final = Module()
"""The module that the variables below belong to."""
mct: Final = module.mct
mcinc: Final = module.mcinc
mcdec: Final = module.mcdec
mctex: Final = module.mctex


def modparam(name: str, parameter: str, value: Any) -> None:
    """`modparam("memcached", "expire", 3600)`, as in Kamailio's script, for `module`."""
    if name != "memcached":
        raise ValueError(f"modparam: module 'memcached' wanted, {name!r:.40} found")
    module.modparam(parameter, value)
