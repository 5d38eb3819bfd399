"""save and load: snapshots of a cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, BinaryIO, cast

import typer

from .. import inspect, snapshot
from ..url import Url
from .app import Json, Look, Target, command, engine_of, output, view_of
from .output import Code, message, progress_bar

File = Annotated[str, typer.Argument(metavar="FILE", help="The snapshot; - for stdout or stdin.")]


@command(
    "save", epilog="  shmcache save sessions sessions.snap\n  shmcache save redis://host/0 - | ssh other shmcache load sessions -"
)
def save(
    target: Look,
    file: File,
    match: Annotated[str, typer.Option("--match", "-m", metavar="GLOB", help="Only keys that match.")] = "*",
    as_json: Json = False,
) -> int:
    """Write the live items to a file that `load` reads. Its mode is 0600; an old file stays until the new one is whole.

    Values are in it as they are, so guard it like the cache. Items written meanwhile may be in it or not.
    """
    found = inspect.locate(target)
    with contextlib.ExitStack() as stack:
        if isinstance(found, Url):
            source: Any = stack.enter_context(engine_of(target, "r"))
            total = int(source.stats()["items"])
        else:
            source = stack.enter_context(view_of(found))
            total = source.stats()["items"]
        progress = stack.enter_context(progress_bar("saving", total))
        to: Any = file
        if file == "-":
            sys.stdout.flush()
            to = sys.stdout.buffer
        summary = snapshot.save(source, to, match=match, progress=progress)
    if as_json and file != "-":
        output(True).json({"items": summary.items, "skipped": summary.skipped})
    else:
        message(f"saved {summary.items} items" + (f", {summary.skipped} went meanwhile" if summary.skipped else ""))
    return Code.OK


@command("load", epilog=(
    "  shmcache load sessions sessions.snap\n"
    "  shmcache load 'posix:///new?mode=c&size=256M' sessions.snap --remaining\n"
    "  shmcache load memcached://host/ sessions.snap"
))  # fmt: skip
def load(
    target: Target,
    file: File,
    remaining: Annotated[
        bool, typer.Option("--remaining", help="Give items the lifetime they had left when saved, not their old end.")
    ] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Store the good part of a damaged file.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Keep items that are already there; to run a load again.")] = False,
    as_json: Json = False,
) -> int:
    """Store the items of a snapshot in any engine, over what is there.

    The whole file is checked before anything is stored. Ends with 5 when it is damaged, with 7 when items did not fit.
    """
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_opened(file))
        engine = stack.enter_context(engine_of(target, "a", snapshot.RawCodec()))
        progress = stack.enter_context(progress_bar("loading", os.fstat(source.fileno()).st_size))
        summary = snapshot.load(source, engine, remaining=remaining, partial=partial, add=add, progress=progress)
    if as_json:
        output(True).json({key: value for key, value in asdict(summary).items() if key != "damaged"})
    parts = [f"{n} {word}" for word in ("expired", "skipped", "refused") if (n := getattr(summary, word))]
    message(f"loaded {summary.items} items" + "".join(f", {part}" for part in parts))
    if summary.damaged:
        message(summary.damaged)
        return Code.DAMAGED
    return Code.NO_ROOM if summary.refused else Code.OK


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file != "-":
        with open(file, "rb") as opened:
            yield opened
        return
    with tempfile.TemporaryFile() as spool:  # it is read twice
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.seek(0)
        yield cast(BinaryIO, spool)
