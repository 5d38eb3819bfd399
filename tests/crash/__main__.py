"""`python -m tests.crash NAME [options]`: the crash harnesses, each with a seed that replays a failure."""

from __future__ import annotations

import argparse
import sys

from tests.crash import flood, fuzz, namespaces, native, points, processes, recovery, rivals, scribble, shims, soak, stopped
from tests.crash.storm import storm

FORMS = ("posix", "sysv")
GUARDS = ("fast", "semaphore")


def _storm(options: argparse.Namespace) -> int:
    bad = 0
    for form in [options.form] if options.form else FORMS:
        for guard in [options.guard] if options.guard else GUARDS:
            for evict in (False, True):
                bad += storm(
                    form, guard, seconds=options.seconds, seed=options.seed, evict=evict, workers=options.workers,
                    kills=options.kills,
                ).report()  # fmt: skip
    return bad


def main() -> int:
    """0 if the harness found nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)

    def command(name: str, help: str, seconds: float) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--seed", type=int, default=1)
        sub.add_argument("--seconds", type=float, default=seconds, help="time of each leg; 0 = everything")
        return sub

    storm_parser = command("storm", "random SIGKILLs against a ledger (R4)", 20.0)
    survivors = command("survivors", "all workers but one killed at once (R5)", 20.0)
    for sub in (storm_parser, survivors):
        sub.add_argument("--form", choices=(*FORMS, "anon"))
        sub.add_argument("--guard", choices=GUARDS)
        sub.add_argument("--workers", type=int, default=3)
    storm_parser.add_argument("--kills", type=int, help="end after so many kills instead of --seconds")
    processes.add_commands(command, survivors)
    native.add_commands(command)
    shims.add_commands(command)
    flood.add_commands(command)
    namespaces.add_commands(command)
    fuzz.add_commands(command)
    points.add_commands(command)
    stopped.add_commands(command)
    soak.add_commands(command)
    rivals.add_commands(command)
    recovery.add_commands(command)
    scribble.add_commands(command)
    storm_parser.set_defaults(run=_storm)
    options = parser.parse_args()
    return 1 if options.run(options) else 0


if __name__ == "__main__":
    sys.exit(main())
