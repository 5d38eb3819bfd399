"""report and web: an HTML page about a segment, as a file or live."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from .. import report_html
from ..report import collect
from ..snapshot import replacing
from ..web import Live, Server
from .app import Look, command, output, viewed
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
        with replacing(to) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        message(f"wrote {to}: {len(found.warnings)} warning{'' if len(found.warnings) == 1 else 's'}")
    return Code.OK


@command("web", epilog="  shmcache web sessions\n  ssh -L 8080:127.0.0.1:8080 host shmcache web sessions --port 8080")
def web(
    target: Look,
    port: Annotated[int, typer.Option("--port", "-p", metavar="PORT", help="0: any that is free.", min=0, max=65535)] = 0,
    refresh: Annotated[float, typer.Option("--refresh", metavar="SECONDS", help="The page renews itself.", min=1)] = 5.0,
    sample: Annotated[int | None, typer.Option("--sample", metavar="N", help="Survey about N items.", min=1)] = 50_000,
) -> int:
    """Serve the report live to a browser on this machine, and print its URL; ^C ends.

    It listens on 127.0.0.1, answers only who has the token in the URL, and looks only. The page renews itself; traffic is that
    of the last two minutes. The token is new at every start; who can read the terminal or the browser's history has it.
    """
    with viewed(target, "web"):  # what is wrong with it is said before anything listens
        live = Live(target, refresh, sample)
    with contextlib.closing(live), Server(live, port) as server:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            output(False).line(server.url)
            sys.stdout.flush()
            server.serve_forever()
        except KeyboardInterrupt:
            return Code.OK
        finally:
            signal.signal(signal.SIGTERM, before)
    return Code.OK


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
