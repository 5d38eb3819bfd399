"""Whole segments: clean, clear, rm, gc."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .. import catalog, inspect, segment
from ..catalog import Found
from ..engine import Engine
from ..engines.shm import ShmEngine
from ..errors import NotSupported, SegmentNotOurs, ShmCacheError
from ..url import Url
from .app import Json, Target, command, output, writable
from .output import Code, code_of, message, told


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
