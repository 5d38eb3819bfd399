"""The commands that only look: ls, info, stats, guards, check. They attach read-only and take no guard."""

from __future__ import annotations

import contextlib
import enum
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from .. import inspect, processes
from ..catalog import Found, list_segments
from ..errors import LayoutMismatch, NotSupported, SegmentInvalid, ShmCacheError
from ..inspect import Guard, View, Worker
from ..repair import repair
from ..url import Url
from .app import Json, Look, command, engine_of, followed, output, view_of, viewed
from .output import (
    Code,
    Column,
    Format,
    code_of,
    human_bytes,
    human_seconds,
    human_share,
    human_time,
    message,
)


def _bad(word: Any) -> str:
    return "" if word in ("ok", "free", "held", "copy") else "bold red" if word in ("dead", "invalid") else "yellow"


LS = [
    Column("key", drop=2), Column("shmid", drop=1), Column("owner"), Column("perms"), Column("bytes", human_bytes, right=True),
    Column("nattch", right=True), Column("status", style=_bad), Column("name"), Column("form"), Column("items", right=True),
    Column("fill", human_share, right=True),
]  # fmt: skip


@command("ls", epilog="  shmcache ls\n  shmcache ls --json | jq -r 'select(.nattch == 0).name'")
def ls(as_json: Json = False) -> int:
    """List segments, with the columns of ipcs -m, then name, form, items, and fill (share of pages in use).

    key and shmid are those of System V segments, nattch of POSIX ones the processes that /proc shows to this user. status: ok,
    removed, no-semaphores, unreadable, unfinished (its creator is at work or died), other-layout, invalid.
    """
    found = list_segments()
    counts = processes.attached_counts(found)
    output(as_json).rows(LS, (_ls_row(f, n) for f, n in zip(found, counts, strict=True)))
    return Code.OK


def _ls_row(found: Found, nattch: int | None) -> tuple[Any, ...]:
    items = fill = None
    view: View | None = None
    with contextlib.suppress(ShmCacheError, OSError):
        view = View(found) if found.header else None
    try:
        word = inspect.status(found, view)
        if view is not None:
            stats = view.stats()
            items, fill = stats["items"], _fill(stats)
    finally:
        if view is not None:
            view.close()
    key = f"0x{found.shm_key:08x}" if found.shm_id >= 0 else None
    shm_id = found.shm_id if found.shm_id >= 0 else None
    owner, perms = processes.user_name(found.uid), f"{inspect.permissions(found):o}"
    return key, shm_id, owner, perms, found.size, nattch, word, found.name, found.form, items, fill


def _fill(stats: Mapping[str, Any]) -> float:
    return round(1 - stats["pages_free"] / stats["pages"], 4) if stats["pages"] else 0.0


INFO_HUMAN = {
    "bytes": human_bytes, "size": human_bytes, "max_value": human_bytes, "item_size": human_bytes, "page_size": human_bytes,
    "created": human_time, "clean_period": human_seconds, "default_ttl": human_seconds, "fill": human_share,
}  # fmt: skip


@command("info", epilog="  shmcache info sessions\n  shmcache info ./copy.bin --json")
def info(target: Look, as_json: Json = False) -> int:
    """Show what a segment is: name, owner, creator, settings, geometry, semaphores, attached processes.

    Of a segment that is damaged, of another layout, or not readable it shows what the system knows and what is wrong, and ends
    with 5 or 4. Of another engine it shows URL, engine_id and capabilities.
    """
    found = inspect.locate(target)
    if isinstance(found, Url):
        with engine_of(target, "r") as engine:
            flags = [flag.name for flag in type(engine.capabilities) if flag in engine.capabilities]
            output(as_json).record(
                {"engine_id": engine.engine_id, "url": str(engine.url.without_options()), "capabilities": flags,
                 "default_ttl": engine.default_ttl},
                {"default_ttl": human_seconds, "capabilities": " ".join},
            )  # fmt: skip
        return Code.OK
    code = Code.OK
    try:
        with view_of(found) as view:
            record = _facts(found, view) | _header_facts(view)
    except (SegmentInvalid, LayoutMismatch, PermissionError) as error:
        record, code = _facts(found, None) | {"problem": str(error)}, code_of(error)
    record["processes"] = [f"{p.pid} {p.command} ({p.state})" for p in processes.attached(found)]
    output(as_json).record(record, {**INFO_HUMAN, "processes": lambda value: ", ".join(value) or "-"})
    return code


def _facts(found: Found, view: View | None) -> dict[str, Any]:
    return {
        "name": found.name,
        "form": found.form,
        "status": inspect.status(found, view),
        "key": f"0x{found.shm_key:08x}" if found.shm_id >= 0 else None,
        "shmid": found.shm_id if found.shm_id >= 0 else None,
        "owner": processes.user_name(found.uid),
        "perms": f"{inspect.permissions(found):o}",
        "bytes": found.size,
    }


def _header_facts(view: View) -> dict[str, Any]:
    h, stats = view.header, view.stats()
    facts = {
        "header_name": h["name"],
        "uuid": h["uuid"].hex(),
        "layout_version": h["layout_version"],
        "created": round(inspect.created_at(h), 3),
        "creator_pid": h["creator_pid"],
        "creator": processes.user_name(h["creator_uid"]),
        "this_boot": h["boot_id"] == inspect.boot_id(),
        "sem_key": f"0x{h['sem_key'] & 0xFFFFFFFF:08x}",
        "sem_id": h["sem_id"],
        "n_sems": h["n_sems"],
        "semaphores": view.sem_problem or "ok",
    }
    facts |= {name: value for name, value in inspect.settings(h).items() if name != "perms"}
    facts |= {"page_size": h["page_size"], "pages": stats["pages"], "pages_free": stats["pages_free"], "fill": _fill(stats)}
    return facts | {"items": stats["items"], "workers_used": stats["slots_used"]}


# -- stats ---------------------------------------------------------------------------------------------------------------------


class StatsFormat(enum.StrEnum):
    TABLE = "table"
    TSV = "tsv"
    JSON = "json"
    PROMETHEUS = "prometheus"


RATES = ("hits", "misses", "sets", "deletes", "expired", "evicted", "guard_waits", "corrupt")
Watch = Annotated[
    float | None, typer.Option("--watch", "-w", metavar="SECONDS", help="Print rates every SECONDS, until ^C.", min=0.05)
]
Count = Annotated[int | None, typer.Option("--count", "-n", metavar="N", help="End --watch after N lines.", min=1)]


@command("stats", epilog="  shmcache stats sessions\n  shmcache stats sessions --watch 1")
def stats(
    target: Look,
    lifetimes: Annotated[bool, typer.Option("--lifetimes", help="Also min, mean, max time to expiry: a walk.")] = False,
    watch: Watch = None,
    count: Count = None,
    fmt: Annotated[
        StatsFormat | None,
        typer.Option("--format", "-f", metavar="FORMAT", help="table, tsv, json, or prometheus, which needs prometheus_client."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show counters since the segment's creation, or since the engine was opened, and the hit ratio.

    With --watch: rates a second, one line an interval, and the hit ratio of the interval.
    """
    if fmt is StatsFormat.PROMETHEUS:
        return _prometheus(target)
    if watch and lifetimes:
        raise ValueError("lifetimes, watch: one of the two wanted, both found")
    out = output(as_json, Format(fmt.value) if fmt else None)
    found = inspect.locate(target)
    read: Callable[[], Any]
    with contextlib.ExitStack() as stack:
        if isinstance(found, Url):
            engine = stack.enter_context(engine_of(target, "r"))
            read = engine.stats
            if lifetimes:
                raise NotSupported(f"lifetimes: a segment or a copy of one wanted, scheme {found.scheme!r} found")
        elif watch:
            current = stack.enter_context(followed(target, "stats"))

            def read() -> Any:
                return current().stats()
        else:
            view = stack.enter_context(view_of(found))
            read = view.stats
        if watch:
            columns = [Column(n, lambda v: f"{v:.0f}", right=True) for n in RATES]
            columns.append(Column("hit_ratio", human_share, right=True))
            out.rows(columns, _rates(read, watch, count), live=True)
            return Code.OK
        record = dict(read())
        record["hit_ratio"] = hit_ratio(record)
        if lifetimes:
            record |= _lifetimes(view)
        sizes = dict.fromkeys(("size", "bytes", "dead_bytes", "bytes_set", "bytes_moved", "page_size"), human_bytes)
        times = dict.fromkeys(("ttl_min", "ttl_mean", "ttl_max"), lambda v: "-" if v is None else human_seconds(v))
        out.record(record, {**sizes, **times, "hit_ratio": human_share})
    return Code.OK


def _prometheus(target: str) -> int:
    try:
        from prometheus_client import CollectorRegistry, generate_latest

        from ..prometheus import CacheCollector
    except ModuleNotFoundError as error:
        raise NotSupported(f"format: the package {error.name} wanted for prometheus, none found") from None
    inspect.locate(target)
    registry = CollectorRegistry()
    registry.register(CacheCollector(target))
    sys.stdout.write(generate_latest(registry).decode())
    return Code.OK


def hit_ratio(stats: Mapping[str, Any]) -> float | None:
    """Hits over reads, None before the first read."""
    reads = stats["hits"] + stats["misses"]
    return round(stats["hits"] / reads, 6) if reads else None


def _rates(read: Any, seconds: float, count: int | None) -> Iterator[tuple[Any, ...]]:
    last, then = read(), time.monotonic()
    for _ in itertools.count() if count is None else range(count):
        time.sleep(seconds)
        new, now = read(), time.monotonic()
        if any(new[n] < last[n] for n in RATES):  # another segment has the name by now
            last = dict.fromkeys(RATES, 0)
        rates = tuple(round((new[n] - last[n]) / (now - then), 3) for n in RATES)
        yield *rates, hit_ratio({n: new[n] - last[n] for n in ("hits", "misses")})
        last, then = new, now


def _lifetimes(view: View) -> dict[str, Any]:
    low, high, total, n, forever = float("inf"), 0.0, 0.0, 0, 0
    for item in view.items(content=False):
        if item.ttl is None:
            forever += item.state == "live"
        else:
            low, high, total, n = min(low, item.ttl), max(high, item.ttl), total + item.ttl, n + 1
    some = {"ttl_min": low, "ttl_mean": round(total / n, 3), "ttl_max": high} if n else {}
    return {"items_expiring": n, "items_forever": forever, "ttl_min": None, "ttl_mean": None, "ttl_max": None} | some


# -- guards, check -------------------------------------------------------------------------------------------------------------

GUARDS = [
    Column("shard", right=True), Column("state", style=_bad), Column("pid"), Column("alive"), Column("started", human_time),
    Column("command", drop=2), Column("waiters", drop=3), Column("recoveries", right=True), Column("leases", right=True, drop=4),
    Column("items", right=True), Column("pages_free", right=True, drop=5), Column("version", right=True, drop=6),
]  # fmt: skip


WORKERS = [
    Column("slot", right=True), Column("pid", right=True), Column("held"), Column("started", human_time, drop=4),
    Column("command", drop=2),
    *(Column(n, right=True, drop=d) for n, d in zip(Worker._fields[5:], (0, 0, 0, 0, 5, 5, 3), strict=True)),
]  # fmt: skip


@command("guards", epilog=(
    "  shmcache guards sessions\n  shmcache guards sessions --held\n  shmcache guards sessions --workers   who waited"
))  # fmt: skip
def guards(
    target: Look,
    held: Annotated[bool, typer.Option("--held", help="Only guards, or slots, that somebody holds.")] = False,
    workers: Annotated[bool, typer.Option("--workers", help="Waits, timeouts and reads of each worker slot instead.")] = False,
    as_json: Json = False,
) -> int:
    """Show each shard's guard: free, held, stopped (its owner lives but is stopped) or dead (recovery is due), and the owner.

    A live writer holds a guard for microseconds. Recoveries are counted for each shard; waits and timeouts for each worker slot,
    that is by who waited: a terminal gets their sums too, --workers the slots that were ever used.
    """
    out = output(as_json)
    with viewed(target, "guards") as view:
        if workers:
            out.rows(WORKERS, (_worker_row(w) for w in view.workers() if not held or w.held))
            return Code.OK
        out.rows(GUARDS, (_guard_row(g) for g in view.guards() if not held or g.state != "free"))
        if out.format is Format.TABLE:
            s = view.stats()
            out.line(f"waits {s['guard_waits']:,}  timeouts {s['guard_timeouts']:,}  recoveries {s['recoveries']:,}")
    return Code.OK


def _worker_row(w: Worker) -> tuple[Any, ...]:
    return (w.slot, w.pid, w.held, round(w.started, 2), w.command, *w[5:])


def _guard_row(g: Guard) -> tuple[Any, ...]:
    started = None if g.started is None else round(g.started, 2)
    return (g.shard, g.state, g.pid or None, g.alive, started, g.command, g.waiters, g.recoveries, g.leases, g.items,
            g.pages_free, g.version)  # fmt: skip


CHECK = [Column("code", style=lambda _: "bold red"), Column("shard", right=True), Column("text")]


@command("check", epilog="  shmcache check sessions\n  shmcache check ./copy.bin --json\n  shmcache check --repair sessions")
def check(
    target: Look,
    mend: Annotated[bool, typer.Option("--repair", help="Mend what is found, in a segment that nobody uses.")] = False,
    as_json: Json = False,
) -> int:
    """Audit a segment without changing it: one line a finding, and exit code 5 if there is one.

    On a live segment a finding counts only if three passes over its shard see one. Readers treat a damaged item as a miss; the
    next write to its key mends it. With --repair: one line for each thing mended, then the findings that are left; refused,
    with exit code 6, while any process has the segment attached. Items that cannot be kept are counted.
    """
    out = output(as_json)
    found = inspect.locate(target)
    if mend:
        if isinstance(found, Url):
            raise NotSupported(f"repair: a posix or sysv segment wanted, an engine of scheme {found.scheme!r} found")
        done = repair(found)
        if done.mended or out.format is Format.JSON:
            out.rows(CHECK, ((f["code"], f["shard"], f["text"]) for f in done.mended))
        message(f"{len(done.mended)} mended, {done.moved} items stored anew, {done.lost} lost")
        for finding in done.left:
            message(f"left: shard {finding['shard']}: {finding['code']}: {finding['text']}")
        return Code.DAMAGED if done.left else Code.OK
    if isinstance(found, Url):
        with engine_of(target, "r") as engine:
            findings = engine.check()
    else:
        try:
            with view_of(found) as view:
                findings = view.check()
                if view.sem_problem and found.form != "file":
                    findings.insert(0, {"code": "semaphores", "shard": None, "text": f"semaphores: {view.sem_problem}"})
        except (SegmentInvalid, LayoutMismatch) as error:
            findings = [{"code": "header", "shard": None, "text": str(error)}]
    if findings or out.format is Format.JSON:
        out.rows(CHECK, ((f.get("code"), f.get("shard"), f.get("text")) for f in findings))
    if findings:
        message(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}")
        return Code.DAMAGED
    message("sound: no findings")
    return Code.OK
