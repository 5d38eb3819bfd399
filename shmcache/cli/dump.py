"""The dump command: what lies in a cache, as it is walked."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from .. import inspect
from ..arguments import MISS, compile_glob
from ..codec import get_codec, pack
from ..engine import Engine
from ..errors import NotSupported, ShmCacheError
from ..inspect import Item, View
from ..url import Url
from .app import Json, Look, Values, command, engine_of, output, seconds_left, view_of
from .output import Code, Column, Format, human_bytes, human_seconds, shown


def _state(word: Any) -> str:
    return {"expired": "dim", "torn": "yellow", "corrupt": "bold red"}.get(word, "")


COLUMNS = [
    Column("key"),
    Column("type"),
    Column("size", human_bytes, right=True),
    Column("age", human_seconds, right=True),
    Column("ttl", human_seconds, right=True),
    Column("use", right=True, drop=1),
    Column("cas", right=True, drop=3),
    Column("lane", drop=2),
    Column("shard", right=True, drop=4),
    Column("bucket", right=True, drop=5),
    Column("state", style=_state),
]
ENGINE_COLUMNS = [
    Column("key"),
    Column("type"),
    Column("size", human_bytes, right=True),
    Column("ttl", human_seconds, right=True),
]
VALUE = Column("value")

SORTS = ("key", "size", "age", "ttl", "use", "cas", "shard")


@command("dump", epilog=(
    "  shmcache dump sessions --match 'user:*' --limit 20\n"
    "  shmcache dump sessions --sort -size --limit 10      the ten largest\n"
    "  shmcache dump sessions --values --format csv > sessions.csv\n"
    "  shmcache dump ./copy.bin --expired --json"
))  # fmt: skip
def dump(
    target: Look,
    match: Annotated[str, typer.Option("--match", "-m", metavar="GLOB", help="Only keys that match (fnmatchcase).")] = "*",
    sort: Annotated[
        str, typer.Option("--sort", "-s", metavar="[-]COLUMN", help=f"Sort by {', '.join(SORTS)}; - for descending.")
    ] = "",
    limit: Annotated[int | None, typer.Option("--limit", "-n", metavar="N", help="At most N items.", min=0)] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Also expired items that still lie there.")] = False,
    values: Values = False,
    fmt: Annotated[
        Format | None,
        typer.Option("--format", "-f", metavar="FORMAT", help="table (default on a terminal), tsv, json, csv, msgpack."),
    ] = None,
    as_json: Json = False,
    header: Annotated[bool, typer.Option("--header/--no-header", help="The line of column names.")] = True,
) -> int:
    """List items: key, type, size, age, lifetime left, use class, CAS version, lane, shard, bucket, state.

    size is that of the stored value in bytes, age that of the item's page and ttl are in seconds (empty or null: never expires),
    use runs from 0 to 3, lane says which log the item lies in. Values are hidden without --values. The output streams; --sort
    keeps what it prints in memory, so give it a --limit on a large cache. An entry that leads to no item has no key and the
    state corrupt. A narrow terminal leaves out columns. Other engines than segments give key, type, size and ttl, at one or two
    requests an item.
    """
    matches = None if match == "*" else compile_glob(match)
    out = output(as_json, fmt)
    out.header = header
    found = inspect.locate(target)
    if isinstance(found, Url):
        with engine_of(target, "r") as engine:
            rows, columns = _engine_rows(engine, match, values), list(ENGINE_COLUMNS)
            rows = itertools.chain(list(itertools.islice(rows, 1)), rows)  # a refusal comes before the line of names
            return _print(out, columns, rows, sort, limit, values)
    with view_of(found) as view:
        rows = (_row(item) for item in view.items(matches, expired=expired))
        add = _adder(view, out.format is Format.JSON, out.format is Format.MSGPACK) if values else None
        return _print(out, list(COLUMNS), rows, sort, limit, values, add)


def _row(i: Item) -> tuple[Any, ...]:
    return i.key, i.type, i.size, i.age, i.ttl, i.use, i.cas, i.lane, i.shard, i.bucket, i.state


def _print(
    out: Any, columns: list[Column], rows: Iterator[tuple[Any, ...]], sort: str, limit: int | None, values: bool,
    add: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> int:  # fmt: skip
    if sort:
        rows = _sorted(rows, columns, sort, limit)
    elif limit is not None:
        rows = _first(rows, limit)
    if values:
        columns.append(VALUE)
    if add is not None:
        rows = map(add, rows)
    out.rows(columns, rows)
    return Code.OK


def _first(rows: Iterator[tuple[Any, ...]], limit: int) -> Iterator[tuple[Any, ...]]:
    if limit:
        for n, row in enumerate(rows, 1):
            yield row
            if n >= limit:
                return


def _sorted(rows: Iterator[tuple[Any, ...]], columns: list[Column], sort: str, limit: int | None) -> Iterator[tuple[Any, ...]]:
    name, names = sort.lstrip("-"), [c.name for c in columns]
    if name not in SORTS or name not in names:
        known = ", ".join(n for n in SORTS if n in names)
        raise ValueError(f"sort: one of {known}, or - and one of them, wanted, {sort!r} found")
    at = names.index(name)

    def rank(row: tuple[Any, ...]) -> Any:
        value = row[at]
        if name == "key":
            return b"" if value is None else value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        return float("inf") if value is None else value

    if limit is None:
        return iter(sorted(rows, key=rank, reverse=sort.startswith("-")))
    return iter((heapq.nlargest if sort.startswith("-") else heapq.nsmallest)(limit, rows, key=rank))


def _adder(view: View, for_json: bool, raw: bool) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    def add(row: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            value = view.value(row[0]) if row[0] is not None else MISS
        except (ShmCacheError, NotSupported):
            return *row, None if for_json or raw else f"<{row[1]} that does not decode here>"
        if value is MISS:
            return *row, None
        return *row, value if for_json or raw else shown(value)

    return add


def _engine_rows(engine: Engine, match: str, values: bool) -> Iterator[tuple[Any, ...]]:
    """Rows of an engine without a segment. The size is that of the value as the shared-memory engines encode it."""
    codec = get_codec()
    size: int | None
    for key, value in engine.items(match):
        try:
            ttl = engine.ttl(key)
        except NotSupported:
            ttl = None
        try:
            flags, data = pack(value, codec)
            kind, size = inspect.TYPES[flags], len(data)
        except TypeError:
            kind, size = type(value).__name__, None
        row = key, kind, size, seconds_left(ttl)
        yield (*row, value) if values else row
