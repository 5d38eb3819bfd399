"""libFuzzer over {segment image, operations}: `fuzz`. The corpus lies beside; what the fuzzer finds is kept apart."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.core.build import CORE, Leg
from tests.crash.native import build_harness
from tests.crash.storm import Outcome

__all__ = ["CORPUS", "LEG", "QUICK", "add_commands", "fuzz"]

LEG: Final = Leg("clang libfuzzer", "clang", ("-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"))
QUICK: Final = Leg("clang libfuzzer -O0", "clang", ("-O0", *LEG.flags[1:]))
"""Compiles in less than half the time, for a leg of seconds."""

CORPUS: Final = Path(__file__).parent / "corpus"
HANGS: Final = 20
"""Seconds after which one input counts as a hang; a forged guard owner costs each of its writes 0.2 ms."""


def _figures(text: str) -> dict[str, str]:
    runs, edges = re.findall(r"^Done (\d+) runs", text, re.MULTILINE), re.findall(r" cov: (\d+) ", text)
    return {"inputs": f"{int(runs[-1]):,}" if runs else "-", "edges covered": edges[-1] if edges else "-"}


def fuzz(
    *, seconds: float, seed: int, directory: Path, inputs: Path | None = None, core: Path = CORE, leg: Leg = LEG
) -> Outcome:
    """Fuzz for `seconds` from the corpus, or replay the one file `inputs`; finds of interest go to `directory`/found."""
    program = build_harness("fuzz", leg, directory, core=core)
    (directory / "found").mkdir(exist_ok=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    what = [str(inputs)] if inputs else [
        f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", "-max_len=600", str(directory / "found"), str(CORPUS),
    ]  # fmt: skip
    done = subprocess.run(
        [str(program), f"-timeout={HANGS}", f"-artifact_prefix={directory}/", *what],
        capture_output=True, text=True, env=environment, timeout=seconds + 300, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    found = [] if done.returncode == 0 else [f"ended with {done.returncode}", *text.splitlines()[-60:]]
    for kind in ("crash", "timeout", "oom"):
        found += [f"input (hex): {file.read_bytes().hex()}" for file in directory.glob(f"{kind}-*")]
    return Outcome("fuzz", _figures(text), found)


def _minimize(directory: Path, program: Path) -> None:
    """A small set of inputs that covers what the corpus and `directory`/found cover takes the corpus' place."""
    merged = directory / "merged"
    merged.mkdir()
    subprocess.run(
        [str(program), "-set_cover_merge=1", "-use_counters=0", str(merged), str(CORPUS), str(directory / "found")],
        check=True, capture_output=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    for file in CORPUS.iterdir():
        file.unlink()
    for file in merged.iterdir():
        shutil.copyfile(file, CORPUS / file.name[:12])


def _fuzz(options: argparse.Namespace) -> int:
    if LEG.missing:
        print(f"skipped: {LEG.compiler} is not installed")
        return 0
    with tempfile.TemporaryDirectory(prefix="shmcache-fuzz-") as name:
        directory = Path(name)
        bad = fuzz(seconds=options.seconds, seed=options.seed, directory=directory, inputs=options.replay).report()
        if options.keep and not bad:
            _minimize(directory, directory / f"fuzz-{LEG.name.replace(' ', '_')}")
            sys.stdout.write(f"corpus: {len(list(CORPUS.iterdir()))} inputs\n")
        return bad


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("fuzz", "libFuzzer over segment images and operations, with sanitizers (R8)", 60.0)
    sub.add_argument("--replay", type=Path, help="one input file instead")
    sub.add_argument("--keep", action="store_true", help="minimize what was found into the corpus")
    sub.set_defaults(run=_fuzz)
