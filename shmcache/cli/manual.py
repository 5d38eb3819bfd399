"""man: the manual page, made from what --help is made from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from .. import __version__
from .app import app, command
from .output import EXIT_CODES, Code


@command("man", epilog="  shmcache man | man -l -\n  shmcache man > /usr/local/share/man/man1/shmcache.1")
def man() -> int:
    """Print the manual page, in man(7) markup."""
    sys.stdout.write("\n".join(lines()) + "\n")
    return Code.OK


def lines() -> Iterator[str]:
    """The page, line by line."""
    group: Any = typer.main.get_command(app)
    yield f'.TH SHMCACHE 1 "" "shmcache {__version__}" "User Commands"'
    yield from (".SH NAME", r"shmcache \- see into and work on caches in shared memory, memcached and redis")
    yield from (".SH SYNOPSIS", ".B shmcache", r"\fICOMMAND\fR [\fIOPTION\fR...] [\fIARGUMENT\fR...]")
    yield ".SH DESCRIPTION"
    yield from _text(group.help)
    yield ".SH COMMANDS"
    for name, entry in group.commands.items():
        arguments = " ".join(rf"\fI{_roff(_metavar(p))}\fR" for p in entry.params if p.param_type_name == "argument")
        yield from (f'.SS "{_roff(name)}"', rf"\fB{_roff(name)}\fR [\fIOPTION\fR...] {arguments}".rstrip(), ".PP")
        yield from _text(entry.help)
        for param in entry.params:
            if param.param_type_name == "option" and not param.hidden and param.name != "help":
                yield from _option(param)
        yield from _examples(entry.epilog)
    yield from (".SH EXIT STATUS",)
    for code, text in EXIT_CODES.items():
        yield from (".TP", f".B {code.value}", _roff(text))
    yield ".SH ENVIRONMENT"
    for name, text in (("NO_COLOR", "If set and not empty, no colours."), ("COLUMNS", "Width of tables on a terminal.")):
        yield from (".TP", f".B {name}", text)
    yield ".SH EXAMPLES"
    yield from _examples(group.epilog)


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _option(param: Any) -> Iterator[str]:
    names = ", ".join(rf"\fB{_roff(n)}\fR" for n in (*param.opts, *param.secondary_opts))
    takes = "" if param.is_flag else rf" \fI{_roff(_metavar(param))}\fR"
    yield from (".TP", names + takes, _roff(param.help or ""))


def _examples(epilog: str | None) -> Iterator[str]:
    match = re.search(r"Examples:\n(.*?)(?:\n\n|\Z)", epilog or "", re.DOTALL)
    if match:
        yield from (".PP", ".EX")
        yield from map(_roff, match[1].splitlines())
        yield ".EE"


def _text(text: str | None) -> Iterator[str]:
    for i, paragraph in enumerate(re.split(r"\n\s*\n", (text or "").strip())):
        if i:
            yield ".PP"
        yield _roff(" ".join(paragraph.split()))


def _roff(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + text if text[:1] in ".'" else text
