"""report: one HTML page about a segment."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from typing import Annotated

import typer

from .. import report_html
from ..report import collect
from .app import Look, command, viewed
from .output import Code, message


@command("report", epilog="  shmcache report sessions -o report.html\n  shmcache report ./copy.bin -o report.html")
def report(
    target: Look,
    to: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The page; - for stdout.")] = "report.html",
    interval: Annotated[float, typer.Option("--interval", "-i", metavar="SECONDS", help="How long to watch.", min=0)] = 2.0,
    sample: Annotated[int | None, typer.Option("--sample", metavar="N", help="Survey about N items.", min=1)] = 200_000,
) -> int:
    """Write one self-contained HTML page: memory map, traffic, histograms, keys, guards, settings, warnings in plain words.

    Keys are in it, values are not; its mode is 0600. It needs no network, and follows the reader's light or dark.
    """
    with viewed(target, "report") as view:
        found = collect(view, interval=interval, sample=sample)
    text = report_html.page(found)
    if to == "-":
        sys.stdout.write(text)
    else:
        _write(to, text)
        message(f"wrote {to}: {len(found.warnings)} warning{'' if len(found.warnings) == 1 else 's'}")
    return Code.OK


def _write(path: str, text: str) -> None:
    """Under another name first, so that an old page stays until the new one is whole."""
    fd, made = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.rename(made, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise
