"""Whole segments: clean, clear, resize, rm, gc."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from .. import catalog, inspect, segment
from ..catalog import Found
from ..engine import Engine
from ..engines.shm import ShmEngine
from ..errors import NotSupported, SegmentNotOurs, ShmCacheError
from ..url import Url
from .app import Json, Target, command, output, view_of, writable
from .output import Code, code_of, message, progress_bar, told


@command("clean", epilog="  shmcache clean sessions")
def clean(
    target: Target,
    limit: Annotated[int | None, typer.Option("--limit", "-n", metavar="N", help="At most N items.", min=0)] = None,
    as_json: Json = False,
) -> int:
    """Give back the memory of expired items, one sweep, and print how many there were."""
    with writable(target) as cache:
        sweep = getattr(cache, "clean", None)
        if sweep is None:
            raise NotSupported(f"clean: an engine that sweeps by hand wanted, {cache.engine_id} found")
        n = sweep(limit)
    out = output(as_json)
    if as_json:
        out.json({"cleaned": n})
    else:
        out.line(str(n))
    return Code.OK


@command("clear", epilog="  shmcache clear sessions")
def clear(target: Target, as_json: Json = False) -> int:
    """Remove every item, at once and without asking. The segment stays."""
    with writable(target) as cache:
        cache.clear()
    if as_json:
        output(True).json({"cleared": True})
    return Code.OK


@command("resize", epilog="  shmcache resize sessions --size 256M\n  shmcache resize sessions --item-size 100 --guards 16")
def resize(
    target: Target,
    size: Annotated[str | None, typer.Option("--size", "-s", metavar="SIZE", help="Of the whole segment: 256M, 1G.")] = None,
    buckets: Annotated[int | None, typer.Option("--buckets", metavar="N", help="In all shards together.")] = None,
    guards: Annotated[int | None, typer.Option("--guards", metavar="N", help="Shards, a power of two.")] = None,
    item_size: Annotated[int | None, typer.Option("--item-size", metavar="BYTES", help="Expected average item.")] = None,
    max_value: Annotated[str | None, typer.Option("--max-value", metavar="SIZE", help="Largest value.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Worker slots.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Writers held up at most so long.")] = 5.0,
    as_json: Json = False,
) -> int:
    """Replace a segment by one of another size with the same items, while it is in use.

    Needs room for both. Items, lifetimes, counters and locks go over; who has the old one attached follows with its next call.
    A smaller segment leaves out what was used least, and says how many items; with eviction=none it is refused. What is not
    given scales with the size, or stays where the segment was created with it. Killed at any point, this leaves the old segment
    or the new one, whole; `shmcache gc` removes the rest.
    """
    if all(value is None for value in (size, buckets, guards, item_size, max_value, workers)):
        raise ValueError("resize: --size or another geometry wanted, none found")
    found = inspect.locate(target)
    if isinstance(found, Url) or found.form not in ("posix", "sysv"):
        what = found.scheme if isinstance(found, Url) else found.form
        raise NotSupported(f"resize: a posix or sysv segment wanted, {what} found")
    if not found.header:
        view_of(found).close()  # raises what is wrong with it
    with (
        ShmEngine.from_url(Url(found.form, path=found.name), mode="a", owners=(found.uid,)) as cache,
        progress_bar("copying", cache._n_groups) as draw,
    ):
        done = cache.resize(
            size, buckets=buckets, guards=guards, item_size=item_size, max_value=max_value, workers=workers, timeout=timeout,
            progress=None if draw is None else lambda copied, groups: draw(copied),
        )  # fmt: skip
    if as_json:
        output(True).json(asdict(done))
    else:
        lost = "".join(f", {n} {word}" for n, word in ((done.left_out, "left out"), (done.corrupt, "corrupt")) if n)
        message(f"{done.old_size} to {done.size} bytes, {done.items} items{lost}; writers waited {done.pause * 1000:.1f} ms")
    return Code.OK


@command("rm", epilog="  shmcache rm sessions\n  shmcache rm --force broken @32769")
def rm(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Segments: name, URL, or @shmid.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Also what has no sound header.")] = False,
    as_json: Json = False,
) -> int:
    """Remove segments and their semaphores. Who has one attached may go on reading; its next write raises GuardLost.

    Of several the others are removed when one cannot be; the exit code is that of the last that could not.
    """
    code, out = Code.OK, output(as_json)
    for text in targets:
        try:
            found = inspect.locate(text)
            if isinstance(found, Url) or found.form == "file":
                raise ValueError(f"rm: a segment wanted, {text!r} found")
            _remove(found, force)
        except (ShmCacheError, OSError, ValueError) as error:
            message(told(error))
            code = code_of(error)
            continue
        if as_json:
            out.json({"removed": found.name, "form": found.form})
        else:
            out.line(f"removed\t{found.form}:{found.name}")
    return code


def _remove(found: Found, force: bool) -> None:
    euid = os.geteuid()
    if euid not in (0, found.uid):
        raise SegmentNotOurs(f"rm: a segment of uid {euid} wanted, one of uid {found.uid} found: {found.form}:{found.name}")
    if not found.header and not force:
        raise inspect.invalid(found, "; --force removes it all the same")
    if found.header and found.form in ("posix", "sysv"):
        try:
            engine: Engine = ShmEngine.from_url(Url(found.form, path=found.name), mode="a", owners=(found.uid,))
        except ShmCacheError:  # no semaphores, another namespace: nobody can be told
            segment.remove(found)
            return
        try:
            engine.unlink()
        finally:
            engine.close()
    else:
        segment.remove(found)


@command("gc", epilog="  shmcache gc --dry-run")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    grace: Annotated[float, typer.Option("--grace", metavar="SECONDS", help="Spare what is younger.", min=0)] = 60.0,
    as_json: Json = False,
) -> int:
    """Remove what dead processes left: files of creators killed half-way, semaphores whose segment is gone.

    Sound segments are never removed, used or not; `shmcache rm` does that.
    """
    out = output(as_json)
    for line in catalog.gc(grace, dry_run=dry_run):
        if as_json:
            out.json({"removed": line, "dry_run": dry_run})
        else:
            out.line(line)
    return Code.OK
