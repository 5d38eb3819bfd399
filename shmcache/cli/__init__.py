"""The command line. Needs typer and rich (the extra `cli`); everything shown is read through `inspect` and the engines."""

import logging

from . import bench, dump, items, look, manage, manual, reports, servers, snapshots, spread, top
from .app import app

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
    app(prog_name="shmcache")
