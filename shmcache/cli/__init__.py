"""The command line. Needs typer and rich (the extra `cli`); everything shown is read through `inspect` and the engines."""

import contextlib
import logging
import os
import sys

from . import bench, dump, items, look, manage, manual, reports, servers, snapshots, spread, top
from .app import app
from .output import Code, code_of, message, told

__all__ = [
    "app", "bench", "dump", "items", "look", "main", "manage", "manual", "reports", "servers", "snapshots", "spread", "top",
]  # fmt: skip

ORDER = [
    *("ls", "info", "stats", "dump", "guards", "check", "top", "distribution", "bigkeys", "report", "web", "health"),
    *("get", "ttl", "set", "delete", "incr", "touch", "clean", "clear", "resize", "save", "load", "rm", "gc", "bench", "man"),
]
"""The order of --help and the manual page: looking first."""
app.registered_commands.sort(key=lambda entry: ORDER.index(str(entry.name)))


def main() -> None:
    """Run the command of sys.argv; ends by SystemExit with one of output.EXIT_CODES."""
    logging.getLogger("shmcache").addHandler(logging.NullHandler())  # what goes wrong is told once, by the command
    _streams()
    try:
        try:
            app(prog_name="shmcache")
        finally:
            sys.stdout.flush()
    except OSError as error:  # --help and what is wrong with the arguments are written past the commands
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            message(told(error))
        sys.exit(Code.PIPE if isinstance(error, BrokenPipeError) else code_of(error))


def _streams() -> None:
    """A stream that was closed before the start is /dev/null, so that no file opened later has its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                fd = os.open(os.devnull, os.O_RDWR)
                if fd != number:
                    os.dup2(fd, number)
                    os.close(fd)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
