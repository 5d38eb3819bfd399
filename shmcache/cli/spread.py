"""distribution and bigkeys: what lies in a segment, in numbers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..distribution import survey
from .app import Json, Look, command, output, viewed
from .output import Code, Column, Format, human_bytes, human_plain, human_seconds, message

BAR = 40
_UNIT = {"size": human_bytes, "ttl": human_seconds, "age": human_seconds}

Sample = Annotated[int | None, typer.Option("--sample", metavar="N", help="Look at about N items, not at all.", min=1)]


@command("distribution", epilog="  shmcache distribution sessions\n  shmcache distribution sessions --sample 10000 --json")
def distribution(target: Look, sample: Sample = None, as_json: Json = False) -> int:
    """Show histograms: value sizes, lifetimes left, ages, entries used a bucket, probe length, use
    classes, lanes, types.

    probe_length is how many buckets a read of the key looks at, one cache line each: its home, or its home and the other one.
    A class holds values from `from` up to, not including, `below`. ttl without either: items that never expire.
    """
    with viewed(target, "distribution") as view:
        seen = survey(view, top=1, sample=sample)
    out, rows = output(as_json), list(seen.rows())
    if out.format is not Format.TABLE:
        out.rows([Column(n) for n in ("histogram", "from", "below", "items", "bytes")], iter(rows))
    else:
        most = {name: max(n for h, _, _, n, _ in rows if h == name) or 1 for name in {row[0] for row in rows}}
        columns = [
            Column("histogram"), Column("class"), Column("items", right=True), Column("bytes", human_bytes, right=True),
            Column(""),
        ]  # fmt: skip
        out.rows(columns, ((h, _class(h, low, high), n, b, "█" * -(-n * BAR // most[h])) for h, low, high, n, b in rows if n))
    if seen.share < 1:
        message(f"seen: {seen.share:.1%} of the segment")
    return Code.OK


def _class(name: str, low: Any, high: Any) -> str:
    if low is None:
        return "never"
    if name not in _UNIT:
        return human_plain(low)
    unit = _UNIT[name]
    return f">= {unit(low)}" if high is None else f"< {unit(high)}"


@command("bigkeys", epilog="  shmcache bigkeys sessions -n 5\n  shmcache bigkeys sessions --hot")
def bigkeys(
    target: Look,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", help="How many.", min=1)] = 10,
    hot: Annotated[bool, typer.Option("--hot", help="The most used ones: by use class, then size.")] = False,
    sample: Sample = None,
    as_json: Json = False,
) -> int:
    """List the keys with the largest values."""
    with viewed(target, "bigkeys") as view:
        seen = survey(view, top=count, sample=sample)
    columns = [
        Column("key"), Column("type"), Column("size", human_bytes, right=True), Column("use", right=True),
        Column("ttl", human_seconds, right=True), Column("age", human_seconds, right=True),
    ]  # fmt: skip
    output(as_json).rows(columns, ((i.key, i.type, i.size, i.use, i.ttl, i.age) for i in (seen.hottest if hot else seen.biggest)))
    if seen.share < 1:
        message(f"seen: {seen.share:.1%} of the segment")
    return Code.OK
