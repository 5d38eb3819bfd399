"""bench: how long a call takes on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .. import bench as timing
from .app import Json, command, output, writable
from .output import Code, Column, Format, message, progress_bar

QUICK = timing.Plan(seconds=0.05, chunk=10_000, tail_calls=50_000)
"""A third of the time of the default plan: some seconds, more noise."""

WORK = [
    Column("subject"), Column("workload"), Column("ns", right=True), Column("ratio", right=True), Column("least", right=True),
    Column("most", right=True), Column("passes", right=True),
]  # fmt: skip


@command("bench", epilog="  shmcache bench\n  shmcache bench --quick --json\n  shmcache bench --url memcached://127.0.0.1:11211/")
def bench(
    url: Annotated[str | None, typer.Option("--url", "-u", metavar="TARGET", help="A cache that exists.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", metavar="N", help="Rounds; the middle one counts.", min=1)] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the time, more noise.")] = False,
    as_json: Json = False,
) -> int:
    """Measure calls on this machine, beside a private dict in the same run: nanoseconds a call, ratio to dict, percentiles.

    Each figure is the median over passes of some milliseconds after one to warm up, with the least and the most. Without --url
    an anonymous segment of 192M is made, and is gone at the end. With --url a cache that exists is used as it is: the keys have
    a random prefix and are deleted at the end, but where its memory is short they push other items out. Takes about 20 s.
    """
    plan = QUICK if quick else timing.Plan()
    with contextlib.ExitStack() as stack:
        engine = None if url is None else stack.enter_context(writable(url))
        bar = stack.enter_context(progress_bar("measuring", rounds * len(timing.WORKLOADS) * 2))
        found = timing.run(engine, plan=plan, rounds=rounds, progress=bar)
    out = output(as_json)
    if out.format is Format.JSON:
        out.json(dataclasses.asdict(found))
    elif out.format is Format.TABLE:
        out.line(timing.text(found))
    else:
        message(timing.BIAS)
        out.rows(WORK, _rows(found))
    return Code.OK


def _rows(found: timing.Report) -> Iterator[tuple[Any, ...]]:
    for subject, timings in found.timings.items():
        for name, t in timings.items():
            base = found.timings["dict"].get(name)
            ratio = round(t.ns / base.ns, 3) if base else None
            yield subject, name, round(t.ns, 1), ratio, round(t.least, 1), round(t.most, 1), t.passes
    for subject, tails in found.tails.items():
        for name, tail in tails.items():
            for share in ("p50", "p99", "p999", "p9999"):
                yield subject, f"{name}-{share}", getattr(tail, share), None, None, None, tail.calls
