"""The application object, the arguments that several commands share, and how a command ends."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Final, ParamSpec
from urllib.parse import quote

import typer

from .. import registry
from ..catalog import Found, list_segments
from ..engine import DEFAULT, Engine
from ..errors import NotSupported, ShmCacheError
from ..inspect import View, locate
from ..url import Url
from .output import EXIT_CODES, EXPECTED, Code, Format, Output, code_of, message, told, unescape

P = ParamSpec("P")

CODES_TEXT: Final = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {text}" for code, text in EXIT_CODES.items())

HELP: Final = """See into and work on caches in shared memory, memcached and redis.

TARGET is an engine URL (posix:///sessions, sysv:///sessions, memcached://host/, redis://host/0), a bare segment name (posix is
looked for before sysv), form:name, @ID for a shared-memory id as ipcs shows it, or, for the commands that only look, the path of
a copy of a segment.

The commands that only look (ls info stats dump guards check top distribution bigkeys report web health get ttl save) attach
read-only, take no guard, and leave statistics and use bits alone: they answer when writers are stopped or dead. Data goes to
stdout, messages to stderr; a terminal gets tables, a pipe gets TSV with raw numbers (bytes, seconds), --json one object a line.
"""

EXAMPLES: Final = """\b
Examples:
  shmcache ls                          every segment, with the columns of ipcs -m
  shmcache dump sessions --limit 20    keys, sizes, lifetimes; values only with --values
  shmcache guards sessions             who holds which guard, and whether it lives
  shmcache check sessions              audit; ends with 5 when something is wrong
  shmcache set sessions user:7 ann --ttl 20m
  cp /dev/shm/shmcache.sessions c.bin; shmcache dump ./c.bin
"""

app = typer.Typer(
    name="shmcache", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=HELP,
    epilog=EXAMPLES + "\n" + CODES_TEXT, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        sys.stdout.write(f"shmcache {__version__}\n")
        raise typer.Exit


def ending(function: Callable[P, int]) -> Callable[P, None]:
    """Turn a command's returned code, or the exception it ends with, into the exit code and a message."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = Code.PIPE
        except KeyboardInterrupt:
            code = Code.INTERRUPTED
        except EXPECTED as error:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            message(told(error))
            code = code_of(error)
        raise typer.Exit(int(code))

    return run


def command(name: str, *, epilog: str = "", numbers: bool = False) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Register a command that returns its exit code. `numbers`: arguments like -5 are no options."""

    def register(function: Callable[P, int]) -> Callable[P, int]:
        settings = {"ignore_unknown_options": True} if numbers else {}
        text = (f"\b\nExamples:\n{epilog}\n\n" if epilog else "") + CODES_TEXT
        app.command(name, epilog=text, context_settings=settings)(ending(function))
        return function

    return register


def _complete(incomplete: str) -> list[str]:
    with contextlib.suppress(Exception):
        return sorted({f.name for f in list_segments() if f.form != "anon" and f.name.startswith(incomplete)})
    return []


Target = Annotated[str, typer.Argument(metavar="TARGET", help="Engine URL, segment name, or @shmid.", autocompletion=_complete)]
Look = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="Engine URL, segment name, @shmid, or path of a copy.", autocompletion=_complete),
]
KeyArg = Annotated[str, typer.Argument(metavar="KEY", help="The key; bytes as the shell passes them.")]
Escaped = Annotated[bool, typer.Option("--escaped", "-e", help=r"KEY is written with escapes, \xNN, as dump shows it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Values = Annotated[bool, typer.Option("--values", help="Show values; they are hidden otherwise.")]


def output(as_json: bool, fmt: Format | None = None) -> Output:
    return Output(Format.JSON if as_json else fmt)


def key_of(text: str, escaped: bool) -> bytes:
    """The key's bytes as the shell passed them, or unescaped."""
    return unescape(text) if escaped else os.fsencode(text)


_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def lifetime_of(text: str | None) -> Any:
    """Seconds of `90`, `1.5s`, `20m`, `2h`, `3d`; None for `never` or 0; DEFAULT where nothing is given."""
    if text is None:
        return DEFAULT
    if text == "never":
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(ms|s|m|h|d)?", text.strip())
    if match is None:
        raise ValueError(f"ttl: seconds, or a number with ms, s, m, h or d, or never wanted, {text!r} found")
    return float(match[1]) * _UNITS[match[2] or ""] or None


@contextlib.contextmanager
def viewed(text: str, what: str) -> Iterator[View]:
    """A read-only view of a segment or a copy. NotSupported for other engines."""
    found = locate(text)
    if isinstance(found, Url):
        raise NotSupported(f"{what}: a segment or a copy of one wanted, an engine of scheme {found.scheme!r} found")
    with view_of(found) as view:
        yield view


@contextlib.contextmanager
def followed(text: str, what: str) -> Iterator[Callable[[], View]]:
    """A function that gives the view of the segment that has the name now; another one once it was removed or replaced."""
    found = locate(text)
    if isinstance(found, Url):
        raise NotSupported(f"{what}: a segment or a copy of one wanted, an engine of scheme {found.scheme!r} found")
    views = [view_of(found)]

    def current() -> View:
        if views[0].removed:
            with contextlib.suppress(ShmCacheError, OSError, ValueError):
                fresh = locate(text)
                if isinstance(fresh, Found) and fresh.header and fresh.header["uuid"] != views[0].header["uuid"]:
                    view = View(fresh)
                    views.pop().close()
                    views.append(view)
        return views[0]

    try:
        yield current
    finally:
        views[0].close()


def view_of(found: Found) -> View:
    """Attach; a segment whose header cannot be believed is SegmentInvalid or LayoutMismatch with what is wrong."""
    if found.header:
        return View(found)
    if found.problem == "Permission denied":
        raise PermissionError(
            f"segment {found.form}:{found.name}: permission to read for uid {os.geteuid()} wanted, perms {found.mode:o} of uid "
            f"{found.uid} found"
        )
    return View(found)


@contextlib.contextmanager
def writable(text: str) -> Iterator[Engine]:
    """The engine, attached for writing. A segment must exist, unless the URL says mode=c."""
    with engine_of(text, "a") as engine:
        yield engine


@contextlib.contextmanager
def readable(text: str) -> Iterator[Engine | View]:
    """A view of a segment or copy (an engine, mode=r, where the URL has options such as prefix=), or another engine."""
    found = locate(text)
    if isinstance(found, Found) and not ("://" in text and Url.parse(text).options):
        with view_of(found) as view:
            yield view
    else:
        with engine_of(text, "r") as engine:
            yield engine


@contextlib.contextmanager
def engine_of(text: str, mode: str, codec: Any = None) -> Iterator[Engine]:
    """The engine, opened with `mode`, and `codec`, where it is a segment and the URL says no other."""
    url = Url.parse(text) if "://" in text else locate(text)
    options: dict[str, Any] = {}
    if isinstance(url, Found):
        if url.form not in ("posix", "sysv"):
            raise NotSupported(f"target: a posix or sysv segment wanted for writing, {url.form}:{url.name} found")
        if not url.header:
            view_of(url).close()  # raises what is wrong with it
        url = Url.parse(f"{url.form}:///{quote(url.name)}")
    elif url.scheme == "anon":
        locate(text)  # raises
    if url.scheme in ("posix", "sysv") and (mode == "r" or "mode" not in url.options):
        url = replace(url, options={k: v for k, v in url.options.items() if k != "mode"})
        options["mode"] = mode
    if url.scheme in ("posix", "sysv") and "codec" not in url.options:
        options["codec"] = codec
    engine = registry.open(url, **options)
    try:
        yield engine
    finally:
        engine.close()


def seconds_left(ttl: float | None) -> float | None:
    """A ttl as JSON and tables show it: None for never."""
    return None if ttl is None or math.isinf(ttl) else ttl
