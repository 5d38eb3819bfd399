"""top: a live screen of one segment. It looks only: no guard, no statistics, no use bits."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import inspect
from ..arguments import compile_glob
from ..distribution import Survey, survey
from ..inspect import Item, View
from .app import Json, Look, command, followed, output
from .look import hit_ratio
from .output import Code, Column, human_bytes, human_plain, human_seconds, human_share

RATES = ("hits", "misses", "sets", "deletes", "expired", "evicted", "guard_waits", "corrupt")
SAMPLE = 20_000
"""Items looked at for the key table, about 50 ms of work; a larger cache is sampled."""
OTHER_LINES = 13
"""Lines of a frame that are no keys, the last one of the screen included."""
KEYS_EVERY = 2.0
"""Seconds between two looks at the keys."""


@dataclass
class _Screen:
    """What the keys of the keyboard change."""

    hot: bool = True
    glob: str = "*"
    typing: str | None = None  #: a filter being typed
    height: int = 24  #: lines of the terminal


@command("top", epilog="  shmcache top sessions\n  shmcache top sessions --json --count 10 --interval 1")
def top(
    target: Look,
    interval: Annotated[float, typer.Option("--interval", "-i", metavar="SECONDS", help="Between two frames.", min=0.1)] = 1.0,
    count: Annotated[int | None, typer.Option("--count", "-n", metavar="N", help="End after N frames.", min=1)] = None,
    as_json: Json = False,
) -> int:
    """Watch a segment: rates, hit ratio, fill, guards that are held, and the most used or largest keys.

    Keys: q ends, s switches between most used and largest keys, f filters keys by a glob (Enter applies, an empty one shows all).
    Of a cache of more than 20,000 items the key table is taken from a sample. Without a terminal it prints one line of rates an
    interval, like `stats --watch`.
    """
    with followed(target, "top") as current:
        if as_json or not sys.stdout.isatty():
            columns = [Column(name) for name in ("time", *RATES, "hit_ratio", "items", "fill", "guards_held")]
            output(as_json).rows(columns, _lines(current, interval, count), live=True)
            return Code.OK
        with _keyboard() as keyboard, Live(console=Console(), screen=True, auto_refresh=False) as live:
            screen, frames = _Screen(), 0
            view, then = current(), time.monotonic()
            before, keys, looked = view.stats(), survey(view, sample=SAMPLE, top=200), then
            while count is None or frames < count:
                until = then + interval
                while (left := until - time.monotonic()) > 0:
                    if not all(_press(screen, key) for key in keyboard(left)):
                        return Code.OK
                now, seen = time.monotonic(), view
                if (view := current()) is not seen:
                    before, looked = dict.fromkeys(before, 0), 0.0
                if now - looked >= KEYS_EVERY:
                    keys, looked = survey(view, sample=SAMPLE, top=200), now
                stats = view.stats()
                screen.height = live.console.size.height
                live.update(_frame(view, stats, before, now - then, keys, screen), refresh=True)
                before, then, frames = stats, now, frames + 1
    return Code.OK


def _lines(current: Callable[[], View], interval: float, count: int | None) -> Iterator[tuple[Any, ...]]:
    view, then, n = current(), time.monotonic(), 0
    before = view.stats()
    while count is None or n < count:
        time.sleep(interval)
        seen, view = view, current()
        if view is not seen:
            before = dict.fromkeys(before, 0)
        stats, now, n = view.stats(), time.monotonic(), n + 1
        rates = [round((stats[k] - before[k]) / (now - then), 3) for k in RATES]
        held = sum(g.state != "free" for g in view.guards())
        fill = round(1 - stats["pages_free"] / stats["pages"], 4)
        yield round(time.time(), 3), *rates, _ratio(stats, before), stats["items"], fill, held
        before, then = stats, now


def _ratio(stats: dict[str, int], before: dict[str, int]) -> float | None:
    return hit_ratio({k: stats[k] - before[k] for k in ("hits", "misses")})


def _press(screen: _Screen, pressed: str) -> bool:
    """Apply a key; False for the one that ends."""
    if screen.typing is not None:
        if pressed in "\r\n":
            screen.glob, screen.typing = screen.typing or "*", None
        elif pressed in "\x7f\b":
            screen.typing = screen.typing[:-1]
        elif pressed == "\x1b":
            screen.typing = None
        elif pressed.isprintable():
            screen.typing += pressed
        return True
    if pressed == "s":
        screen.hot = not screen.hot
    elif pressed == "f":
        screen.typing = ""
    return pressed not in "qQ\x03\x04"


@contextlib.contextmanager
def _keyboard() -> Iterator[Any]:
    """A function that gives the keys pressed, waiting at most so many seconds. The terminal is put back at the end."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def read(seconds: float) -> str:
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        return os.read(fd, 64).decode("utf-8", "ignore") or "q"  # nothing to read: the terminal is gone

    try:
        tty.setcbreak(fd)
        yield read
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _frame(view: View, stats: dict[str, int], before: dict[str, int], seconds: float, keys: Survey, screen: _Screen) -> Group:
    header, found = view.header, view.found
    age = human_seconds(int(time.time() - inspect.created_at(header)))
    used = 1 - stats["pages_free"] / stats["pages"]
    live, dead, word = human_bytes(stats["bytes"]), human_bytes(stats["dead_bytes"]), inspect.status(found, view)
    head = Text.assemble(
        (f"{found.form}:{human_plain(found.name)}", "bold"), "  ",
        (word, "green" if word in ("ok", "copy") else "bold red"),
        f"\n{human_bytes(header['size'])}  {stats['items']:,} items  {live} live  {dead} dead  {header['n_shards']} guards  ",
        f"made {age} ago",
        overflow="ellipsis", no_wrap=True,
    )  # fmt: skip
    rates = Table.grid(padding=(0, 2))
    rates.add_column(no_wrap=True)
    for _ in RATES:
        rates.add_column(justify="right", min_width=7, no_wrap=True)
    rates.add_row("", *(Text(name.replace("guard_", ""), style="dim") for name in RATES))
    now = (Text(f"{(stats[n] - before[n]) / seconds:,.0f}", style=_alarm(n, stats, before)) for n in RATES)
    rates.add_row(Text("a second", style="dim"), *now)
    ratios = Text(f"hit ratio  now {human_share(_ratio(stats, before))}   since creation {human_share(hit_ratio(stats))}")
    guards = _guards(view)
    return Group(head, Text(), rates, ratios, _bar("fill", used), guards, Text(), _keys(keys, screen), _footer(keys, screen))


def _alarm(name: str, stats: dict[str, int], before: dict[str, int]) -> str:
    return "bold red" if name == "corrupt" and stats[name] > before[name] else "bold"


def _bar(name: str, share: float, width: int = 40) -> Text:
    full = round(share * width)
    return Text.assemble(f"{name}  ", ("█" * full, "cyan"), ("░" * (width - full), "dim"), f" {human_share(share)}")


def _guards(view: View) -> Text:
    held = [g for g in view.guards() if g.state != "free"]
    if not held:
        return Text("guards  all free", style="dim")
    words = ", ".join(f"shard {g.shard} {g.state} by {g.pid} {human_plain(g.command)}" for g in held[:4])
    more = f" and {len(held) - 4} more" if len(held) > 4 else ""
    style = "bold red" if any(g.state in ("dead", "stopped") for g in held) else "yellow"
    return Text(f"guards  {words}{more}", no_wrap=True, overflow="ellipsis", style=style)


def _keys(keys: Survey, screen: _Screen) -> Table:
    table = Table(title="most used keys" if screen.hot else "largest keys", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("size", "use", "ttl", "age", "type", "key"):
        table.add_column(name, justify="left" if name in ("key", "type") else "right", no_wrap=True, overflow="ellipsis")
    matches = compile_glob(screen.glob)
    chosen: list[Item] = [i for i in (keys.hottest if screen.hot else keys.biggest) if i.key is not None and matches(i.key)]
    for i in chosen[: max(screen.height - OTHER_LINES, 1)]:
        table.add_row(
            human_bytes(i.size), str(i.use), human_seconds(i.ttl), human_seconds(i.age), i.type, Text(human_plain(i.key))
        )
    return table


def _footer(keys: Survey, screen: _Screen) -> Text:
    if screen.typing is not None:
        return Text(f"filter: {screen.typing}▏", style="bold")
    seen = "" if keys.share == 1 else f"   keys from {keys.share:.1%} of the segment"
    shown = "" if screen.glob == "*" else f"   filter {screen.glob}"
    return Text(f"q quit   s most used/largest   f filter{shown}{seen}", style="dim", no_wrap=True, overflow="ellipsis")
