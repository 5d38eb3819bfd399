"""health: what this machine's processes know of their memcached and Redis servers."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import health
from ..engine import Engine
from ..health import Health
from ..url import Host, Url
from .app import Json, command, engine_of, output
from .output import Code, Column, human_seconds, human_time

SERVERS = [
    Column("server"), Column("state", style=lambda state: "" if state == health.UP else "bold red"),
    Column("since", human_time), Column("tried_ago", human_seconds, right=True, drop=1), Column("probes", right=True, drop=2),
    *(Column(name, right=True, drop=3) for name in ("changes", "downs", "ups", "offs")), Column("error", drop=4),
]  # fmt: skip


@command("health", epilog=(
    "  shmcache health\n"
    "  shmcache health --health posix:///health-33 --json\n"
    "  shmcache health --set 10.0.0.1:11211 down"
))  # fmt: skip
def health_(
    store: Annotated[
        str | None, typer.Option("--health", metavar="STORE", help="Name or URL of the store; default: this user's own.")
    ] = None,
    change: Annotated[
        tuple[str, str] | None,
        typer.Option("--set", metavar="HOST up|down", help="Take a server out for all workers, or put it back in."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show which servers answer: state, since when, last error and probe, and how often each change of state happened.

    States: up; down (one worker asks it per retry interval); off (taken out by --set: nobody asks it). A server that never failed
    has no line. HOST is as in this table, without the scheme where that is unique; of a server that has no line memcached://HOST:PORT
    or redis://HOST:PORT. One put back in is down until the next call of a worker has asked it, and emptied it where that worker's
    engine has flush_on_rejoin.
    """
    if change is not None and change[1] not in ("up", "down"):
        raise ValueError(f"--set: up or down wanted, {change[1]!r} found")
    text = health.default_url() if store is None else store
    if store is None and change is None:  # of whatever size it is
        text = str(Url.parse(text).without_options())
    with engine_of(text, "r" if change is None else "c" if store is None else "a") as engine:
        if change is not None:
            scheme, host = _named(engine, change[0])
            Health(engine, scheme=scheme).set_server(host, change[1] == "up", probe=True)
        rows = health.snapshot(engine)
    names = [{"state": "status"}.get(column.name, column.name) for column in SERVERS]
    output(as_json).rows(SERVERS, (tuple(row[name] for name in names) for row in rows))
    return Code.OK


def _named(engine: Engine, text: str) -> tuple[str, Host]:
    """Scheme and address of a server given as a URL, or as a line of the table names it."""
    if "://" in text:
        url = Url.parse(text)
        if url.scheme not in ("memcached", "redis") or len(url.hosts) != 1 or not (url.hosts[0].is_unix or url.hosts[0].port):
            raise ValueError(f"--set: memcached://HOST:PORT or redis://HOST:PORT wanted, {text!r} found")
        return url.scheme, url.hosts[0]
    known = [tuple(row["server"].split(" ", 1)) for row in health.snapshot(engine)]
    servers = [(scheme, Url.parse(f"{scheme}://{address}/").hosts[0]) for scheme, address in known]
    found = [(scheme, host) for scheme, host in servers if text in (f"{scheme} {host}", str(host), host.name)]
    if len(found) != 1:
        names = ", ".join(f"{scheme} {host}" for scheme, host in servers)
        raise ValueError(f"--set: one of {names or 'no servers'}, or memcached://HOST:PORT wanted, {text!r} found")
    return found[0]
