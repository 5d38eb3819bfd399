"""Builds and runs the C harnesses: step, pause, flip. Legs run two at a time; figures are those the programs print."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.core.build import CORE, HERE, LEGS, Leg, build

__all__ = ["SOURCES", "add_commands", "build_harness", "legs", "run_legs", "run_program"]

SOURCES: Final = (HERE / "rig.c", Path(__file__).parent / "scene.c")
MORE: Final = {"flip": ("image.c",), "fuzz": ("image.c",)}
"""What single harnesses need beside these."""

SANITIZERS: Final = "gcc sanitizers"


def build_harness(name: str, leg: Leg, directory: Path, *, core: Path = CORE) -> Path:
    """Compile one harness with the core at `core`; returns the program."""
    path = directory / f"{name}-{leg.name.replace(' ', '_')}"
    more = [Path(__file__).parent / file for file in (*MORE.get(name, ()), f"{name}.c")]
    return build(path, leg, [*SOURCES, *more], core=core)


def legs(names: Sequence[str]) -> list[Leg]:
    """The named compiler legs that are installed here."""
    return [leg for leg in LEGS if leg.name in names and not leg.missing]


def run_program(program: Path, arguments: Sequence[str], timeout: float) -> tuple[bool, str]:
    """Whether it ended with 0 within `timeout` seconds, and what it printed."""
    with subprocess.Popen([str(program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            text, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            process.kill()
            text, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return False, f"{text}no end within {timeout:g} s\n"
    return process.returncode == 0, text


def run_legs(
    name: str,
    wanted: Sequence[Leg],
    arguments: Callable[[Leg], Sequence[str]],
    *,
    jobs: int = 2,
    timeout: float = 86400.0,
    core: Path = CORE,
    quiet: bool = False,
) -> tuple[int, str]:
    """Run a harness under each leg; how many failed, and what they printed. `timeout` in seconds a leg."""
    with tempfile.TemporaryDirectory(prefix=f"shmcache-{name}-") as directory, ThreadPoolExecutor(jobs) as pool:

        def run(leg: Leg) -> tuple[bool, str]:
            program = build_harness(name, leg, Path(directory), core=core)
            return run_program(program, [*arguments(leg), "--label", leg.name], timeout)

        bad, texts = 0, []
        for leg, (ok, text) in zip(wanted, pool.map(run, wanted), strict=True):
            bad += not ok
            texts.append(text if ok else f"{text}FAILED: {name} under {leg.name}\n")
            if not quiet:
                sys.stdout.write(texts[-1])
                sys.stdout.flush()
        return bad, "".join(texts)


def _sums(name: str, text: str) -> None:
    """The totals over all legs, of the numbers that stand before each word."""
    sums: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith((f"{name} ", f"{name}:")):
            for number, word in re.findall(
                r"(\d+) (crash states|double-crash states|changed|repaired|schedules|images|violations)", line
            ):
                sums[word] = sums.get(word, 0) + int(number)
    print(f"{name} in all: " + ", ".join(f"{number:,} {word}" for word, number in sums.items()))


def _supported() -> bool:
    if platform.machine() != "x86_64":
        print(f"skipped: single-stepping by the trap flag is written for x86_64, this is {platform.machine()}")
        return False
    return True


def _timed(options: argparse.Namespace) -> list[str]:
    return ["--seed", str(options.seed), *(["--seconds", str(int(options.seconds))] if options.seconds else [])]


def _step(options: argparse.Namespace) -> int:
    if not _supported():
        return 0
    wanted = legs(options.legs or ["gcc -O0", "gcc -O2", "gcc -O3", "clang -O2"])
    more = [
        *(["--most", str(options.most)] if options.most else []),
        *(["--double", str(options.double)] if options.double else []),
    ]
    bad, text = run_legs("step", wanted, lambda leg: [*_timed(options), *more], jobs=options.jobs)
    _sums("step", text)
    return bad


def _pause(options: argparse.Namespace) -> int:
    if not _supported():
        return 0
    bad, text = run_legs("pause", legs(options.legs or ["gcc -O2", "clang -O2"]), lambda leg: _timed(options), jobs=options.jobs)
    _sums("pause", text)
    return bad


def _flip(options: argparse.Namespace) -> int:
    def arguments(leg: Leg) -> list[str]:
        seed = ["--seed", str(options.seed), "--from", str(options.start)]
        if options.images:
            return [*seed, "--images", str(options.images // (10 if leg.name == SANITIZERS else 1))]
        return [*seed, "--seconds", str(int(options.seconds))]

    wanted = legs(options.legs or ["gcc -O2", SANITIZERS])
    bad, text = run_legs("flip", wanted, arguments, jobs=options.jobs)
    if options.live:
        more, live = run_legs("flip", legs(["gcc -O2"]), lambda leg: ["--seed", str(options.seed), "--live", str(options.live)])
        bad, text = bad + more, text + live
    _sums("flip", text)
    return bad


def _mutants(options: argparse.Namespace) -> int:
    from tests.crash.mutants import run_all

    return run_all(options.seed, options.seconds, options.only)


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-commands of this module."""
    jobs = min(2, os.cpu_count() or 1)
    step = command("step", "a writer killed at every instruction, and its repairer (R1, R2)", 25.0)
    step.add_argument("--most", type=int, default=200, help="states of one operation judged one by one before sampling; 0 = all")
    step.add_argument("--double", type=int, default=0, help="at every n-th state single-step the repair, too")
    step.set_defaults(run=_step)
    pause = command("pause", "a reader stopped at every instruction while its memory is recycled (R7)", 20.0)
    pause.set_defaults(run=_pause)
    flip = command("flip", "mutated images and a live mutator (R8)", 20.0)
    flip.add_argument("--images", type=int, default=0, help="so many images instead of --seconds; a tenth under the sanitizers")
    flip.add_argument("--start", type=int, default=0, help="first image, to replay one")
    flip.add_argument("--live", type=int, default=10, help="seconds of a mutator beside live processes")
    flip.set_defaults(run=_flip)
    for sub in (step, pause, flip):
        sub.add_argument("--legs", action="append", choices=[leg.name for leg in LEGS])
        sub.add_argument("--jobs", type=int, default=jobs)
    mutants = command("mutants", "seeded protocol bugs, and which harness finds each (R3)", 12.0)
    mutants.add_argument("--only", help="one mutant")
    mutants.set_defaults(run=_mutants)
