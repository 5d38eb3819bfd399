"""Runs the C tests of the core with several compilers and prints a table: `python -m tests.core.run [--rounds N]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.core.build import HERE, LEGS, Leg, build

PROGRAMS = {"random_ops": ("rig.c", "random_ops.c"), "facts": ("rig.c", "facts.c")}


@dataclass(frozen=True, slots=True)
class Result:
    """What one program said under one compiler."""

    program: str
    leg: str
    ok: bool
    seconds: float
    text: str


def run_leg(leg: Leg, program: str, arguments: list[str], directory: Path, *, timeout: float = 900.0) -> Result:
    """Build and run one program; a compiler's refusal and a time-out (seconds) are failures, not exceptions."""
    path = build(directory / f"{program}-{leg.name.replace(' ', '_')}", leg, [HERE / name for name in PROGRAMS[program]])
    begun = time.monotonic()
    try:
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=timeout, check=False)
        ok, text = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        ok, text = False, f"no end within {timeout:g} s\n{error.stdout!r}"
    return Result(program, leg.name, ok, time.monotonic() - begun, text)


def main() -> int:
    """0 if every program passed under every compiler found here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each shape of random_ops")
    parser.add_argument("--ops", type=int, default=4000, help="operations a round")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    arguments = ["--rounds", str(options.rounds), "--ops", str(options.ops), "--seed", str(options.seed)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="shmcache-core-") as name:
        for leg in LEGS:
            for program in PROGRAMS:
                if leg.missing:
                    print(f"{leg.name:18} {program:12} skipped: {leg.compiler} is not installed")
                    continue
                result = run_leg(leg, program, arguments if program == "random_ops" else [], Path(name))
                print(f"{leg.name:18} {program:12} {'ok' if result.ok else 'FAILED':7} {result.seconds:6.1f} s")
                if not result.ok:
                    bad += 1
                    print(result.text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
