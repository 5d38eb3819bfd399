"""Which servers answer: one table of server states for all workers of a machine.

A record per server lies in a small store, any engine that is shared: by default a shared-memory segment of the
user's own, `posix:///health-<euid>`. No record means up. Whoever finds a server dead writes it down; from then
on nobody on this machine waits for that server but one prober per retry interval.

    up --failed--> down --probe answered--> up          off: by an operator's set_server, no probes
    up, down, off --set_server--> off or up

I1  Every change of a record is one cas or add against the record that led to it: of several workers that find
    the same thing one makes the change, and a failure seen before a recovery does not undo it.
I2  A probe is preceded by such a change of `tried`, which is its lease: one worker probes per interval, and
    if it dies the next one does, an interval later.
I3  Who makes a change logs it, counts it in the record and calls its own on_change; others only see it.
I4  What fails for want of this process's or machine's own means (OWN) says nothing of the server, and changes no
    record.
I5  The table is a hint: with no store, or with one that fails, each process keeps its own records in memory,
    and says so in one log line. A store that was removed is made anew; workers that dropped privileges use the
    default store of the user they are.

Times in records are seconds of the boot-time clock, the same for all processes; `since` is wall time, for
people. Deliberately not here: connections, and what a probe consists of.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .engine import Capability, Engine
from .errors import EngineDown, GuardLost, LockTimeout, ShmCacheError
from .url import Host, boolean

__all__ = [
    "DOWN",
    "OFF",
    "RETRY_INTERVAL",
    "UP",
    "Health",
    "Record",
    "Ticket",
    "default_url",
    "health_option",
    "snapshot",
]

UP: Final = "up"
DOWN: Final = "down"
OFF: Final = "off"

RETRY_INTERVAL: Final = 15.0
"""Seconds between two probes of a server that is down: the default of PECL memcache."""
NOW: Final = -1.0
"""`tried` of a server that an operator wants to be probed at once."""
DUE: Final = "put back in: the next call asks it"
"""`error` of such a server."""
KEYS: Final = "health "
"""Start of the records' keys, followed by scheme and host: the store may hold other items."""
SPREAD: Final = 0.1
"""An interval is up to so much longer, at random, so that machines which lost a server together do not probe
it together."""
OWN: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN)
)
"""errno of what a process or machine is short of: descriptors, memory, ports; EAGAIN: room in the backlog of a unix
socket. One worker that leaks descriptors shall not take a server from all."""
ERROR_TEXT: Final = 200
"""Characters of an error kept in a record: a line of a terminal, three times over."""

OnChange = Callable[[str, "int | None", str, str, "BaseException | None"], Any]
"""(host, port, old state, new state, error or None); states are UP, DOWN, OFF."""

_log = logging.getLogger("shmcache")
_said: dict[str, object] = {}


def default_url() -> str:
    """URL of the store used without another: a segment of 1 MiB that belongs to this user."""
    return f"posix:///health-{os.geteuid()}?size=1M&item_size=512"


def health_option(name: str, value: Any) -> Any:
    """Option parser: an engine URL, an open engine, yes (the default store), or no (each process for itself)."""
    if isinstance(value, Engine) or (isinstance(value, str) and "://" in value):
        return value
    try:
        return boolean(name, value)
    except (TypeError, ValueError):
        raise ValueError(
            f"option {name!r}: an engine URL, yes or no wanted, {str(value)[:40]!r} found"
        ) from None


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Record(NamedTuple):
    """State of one server, as stored: a list in this order."""

    status: str = UP
    since: float = 0.0  # Unix time of the last change of status
    error: str = ""  # of the failure that made it down, or of the last probe
    downs: int = 0  # changes to down, and so on
    ups: int = 0
    offs: int = 0
    probes: int = 0
    tried: float = 0.0  # boot-time seconds of the failure or the start of the last probe
    spread: float = 1.0  # factor of this interval

    @classmethod
    def read(cls, stored: Any) -> Record:
        """A stored value; what is no record counts as up, and the next change replaces it."""
        if isinstance(stored, list) and [*map(type, stored)] == _KINDS and stored[0] in (UP, DOWN, OFF):
            return cls(*stored)
        return _NEVER_FAILED

    @property
    def changes(self) -> int:
        return self.downs + self.ups + self.offs


_NEVER_FAILED: Final = Record()
_KINDS: Final = [*map(type, _NEVER_FAILED)]


class Ticket(NamedTuple):
    """What `admit` saw: give it to `failed`, so that only a failure of this state counts."""

    record: Record
    token: Any  # None: no record


class Health:
    """The states of one engine's servers.

    Args: store: True (default_url), False (each process for itself), an engine URL, or an open engine, which
    stays open. scheme: first word of the records' keys; engines of one scheme share what they know of a
    server. servers: those of this engine, for snapshot. retry_interval: seconds between probes; negative =
    never probe: what is down stays down until set_server. on_change: called by the process that makes a
    change, after it; its exceptions are logged. clock: seconds, in place of the boot-time clock.
    """

    def __init__(
        self,
        store: bool | str | Engine = True,
        *,
        scheme: str,
        servers: tuple[Host, ...] = (),
        retry_interval: float = RETRY_INTERVAL,
        on_change: OnChange | None = None,
        clock: Callable[[], float] = _boot_clock,
    ) -> None:
        self._scheme = scheme
        self._servers = servers
        self._interval = retry_interval
        self._on_change = on_change
        self._clock = clock
        self._store = _private()
        self.shared = False
        self._euid = os.geteuid() if store is True else None
        if store is not False:
            self._open(store)

    def _open(self, store: bool | str | Engine) -> None:
        name = store if isinstance(store, str) else default_url()
        try:
            engine = store if isinstance(store, Engine) else _open(name)
            if not engine._can(Capability.CAS):
                engine._unsupported("health", Capability.CAS)
        except (ShmCacheError, OSError, ImportError) as error:
            _say_degraded(name, error)
        except ValueError as error:  # the default store is open with other options
            if store is not True:
                raise
            _say_degraded(name, error)
        else:
            self._store = engine
            self.shared = engine._can(Capability.SHARED)

    # -- the store --

    def _key(self, host: Host) -> str:
        return f"{KEYS}{self._scheme} {host}"

    def _degrade(self, error: BaseException) -> None:
        """From here on this process keeps its own records, unless the store can be made anew."""
        if isinstance(error, GuardLost):
            with contextlib.suppress(ShmCacheError, OSError):
                self._store.reattach()
                return
        failed, self._store, self.shared = self._store, _private(), False
        _say_degraded(failed.engine_id, error)

    def _read(self, host: Host) -> Ticket:
        if self._euid is not None and self._euid != os.geteuid():
            self._euid, self._store, self.shared = os.geteuid(), _private(), False
            self._open(True)
        try:
            found = self._store.gets(self._key(host))
        except (ShmCacheError, OSError) as error:
            self._degrade(error)
            found = None
        if found is None:
            return Ticket(_NEVER_FAILED, None)
        return Ticket(Record.read(found[0]), found[1])

    def _write(self, host: Host, ticket: Ticket, record: Record) -> bool:
        """Store `record` if nothing changed since `ticket`; whether that was so."""
        key, value = self._key(host), list(record)
        for _ in range(2):  # the second time in memory
            try:
                if ticket.token is None:
                    return self._store.add(key, value, None)
                return self._store.cas(key, value, ticket.token, None) is True
            except LockTimeout:  # whoever holds the guard is stopped: the next failure will be written
                return False
            except (ShmCacheError, OSError) as error:
                self._degrade(error)
                ticket = Ticket(ticket.record, None)
        return False

    # -- for engines --

    def admit(self, host: Host, probe: Callable[[], BaseException | None]) -> Ticket:
        """Whether `host` may be asked now: returns if it is up, or if it is down, a probe is due, this caller is
        the one to make it, and it finds the server answering.

        Args: probe: asks the server; None, or the error. It has to end within the engine's timeouts.
        Raises: EngineDown, at once unless this caller probes.
        """
        ticket = self._read(host)
        record = ticket.record
        if record.status == UP:
            return ticket
        if record.status == DOWN and self._due(record):
            mine = record._replace(tried=self._clock(), spread=_spread(), probes=record.probes + 1)
            if mine.error == DUE:
                mine = mine._replace(error="")
            if self._write(host, ticket, mine):
                error = probe()
                return self._probed(host, mine, error)
        raise EngineDown(self._why(host, record))

    def _due(self, record: Record) -> bool:
        if record.tried == NOW:
            return True
        if self._interval < 0:
            return False
        return not 0 <= self._clock() - record.tried < self._interval * record.spread

    def _probed(self, host: Host, mine: Record, error: BaseException | None) -> Ticket:
        ticket = self._read(host)
        theirs = ticket.record
        if theirs != mine:  # set_server meanwhile, or the interval is shorter than the probe took
            if theirs.status == UP:
                return ticket
            raise EngineDown(self._why(host, theirs)) from error
        if error is not None:
            self._write(host, ticket, mine._replace(error=_text(error)))
            raise EngineDown(self._why(host, mine._replace(error=_text(error)))) from error
        if self._write(host, ticket, mine._replace(status=UP, since=time.time(), ups=mine.ups + 1)):
            self._changed(host, mine, UP, None)
        return self._read(host)

    def failed(self, host: Host, ticket: Ticket, error: BaseException) -> None:
        """Note that `host`, asked with `ticket`, did not answer. Of several workers one makes the change."""
        record = ticket.record
        if record.status != UP or _own(error):
            return
        down = record._replace(
            status=DOWN,
            since=time.time(),
            error=_text(error),
            downs=record.downs + 1,
            tried=self._clock(),
            spread=_spread(),
        )
        if self._write(host, ticket, down):
            self._changed(host, record, DOWN, error)

    # -- for operators --

    def set_server(self, host: Host, status: bool, *, probe: bool = False) -> bool:
        """Take a server out for all workers (False: off, nobody asks or probes it) or put it back in (True: up).

        Args: probe: with True, let the next call of any worker ask the server first, whatever its retry_interval,
        and empty it where that engine has flush_on_rejoin: until then it is down. For who has no engine.
        Returns: whether that was a change. Raises: LockTimeout if the store did not take it.
        """
        for _ in range(100):
            ticket = self._read(host)
            old = ticket.record
            new = OFF if not status else DOWN if probe and old.status != UP else UP
            if new == old.status != DOWN:
                return False
            record = old._replace(status=new, error="")
            if new == DOWN:
                record = record._replace(error=DUE, tried=NOW)
            if new != old.status:
                record = record._replace(since=time.time(), **{f"{new}s": getattr(old, f"{new}s") + 1})
            if self._write(host, ticket, record):
                if new != old.status:
                    self._changed(host, old, new, None)
                return True
        raise LockTimeout(f"set_server {host}: state {new!r} wanted, {old.status!r} found after 100 attempts")

    def status(self, host: Host) -> Record:
        """The record of a server, known or not."""
        return self._read(host).record

    def snapshot(self) -> list[dict[str, Any]]:
        """One dict per server of this engine; see the function `snapshot`."""
        return [_row(f"{self._scheme} {host}", self.status(host), self._clock()) for host in self._servers]

    # -- telling --

    def _changed(self, host: Host, old: Record, new: str, error: BaseException | None) -> None:
        if new == DOWN:
            detail = f": {_text(error) if error else DUE}"
        else:
            detail = f" after {max(time.time() - old.since, 0):.1f} s" if old.since else ""
        _log.warning("%s server %s: %s -> %s%s", self._scheme, host, old.status, new, detail)
        if self._on_change is not None:
            try:
                self._on_change(host.name, host.port, old.status, new, error)
            except Exception:
                _log.exception("on_change of %s server %s raised", self._scheme, host)

    def _why(self, host: Host, record: Record) -> str:
        ago = max(time.time() - record.since, 0.0)
        state = "turned off" if record.status == OFF else "down"
        error = f" ({record.error})" if record.error else ""
        if record.status == OFF or self._interval < 0:
            after = "until set_server"
        else:
            left = record.tried + self._interval * record.spread - self._clock()
            after = f"next probe in {max(left, 0.0):.1f} s"
        return (
            f"{self._scheme} server {host}: an answer wanted, {state} for {ago:.1f} s found{error}; {after}"
        )


def snapshot(store: str | Engine | None = None) -> list[dict[str, Any]]:
    """The records in a store, sorted by server: what `shmcache health` shows.

    Args: store: engine URL or open engine; None = default_url().
    Returns: dicts with server, status, since (Unix time), error, downs, ups, offs, probes, changes and
    tried_ago (seconds since the failure or the last probe). A server that never failed has no record.
    Raises: what opening the store raises; NotSupported for one that cannot iterate.
    """
    engine = store if isinstance(store, Engine) else _open(default_url() if store is None else store)
    now = _boot_clock()
    rows = [(str(key), Record.read(value)) for key, value in engine.items(KEYS + "*")]
    return [_row(key.removeprefix(KEYS), record, now) for key, record in sorted(rows)]


def _row(server: str, record: Record, now: float) -> dict[str, Any]:
    row = record._asdict()
    tried, _ = row.pop("tried"), row.pop("spread")
    return {
        "server": server,
        **row,
        "changes": record.changes,
        "tried_ago": max(now - tried, 0.0) if tried > 0 else None,
    }


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_TEXT]


def _own(error: BaseException | None) -> bool:
    while error is not None and getattr(error, "errno", None) not in OWN:
        error = error.__cause__ or error.__context__
    return error is not None


def _spread() -> float:
    return 1.0 + random.random() * SPREAD


def _open(url: str) -> Engine:
    from .registry import open as open_engine  # the registry imports engines, which import this

    return open_engine(url)


def _private() -> Engine:
    from .engines.memory import MemoryEngine

    return MemoryEngine()


def _say_degraded(store: str, error: BaseException) -> None:
    mine = object()
    if _said.setdefault(store, mine) is not mine:
        return
    _log.warning("health: %s cannot be used (%s): each process finds out for itself", store, error)
