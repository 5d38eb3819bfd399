"""Short legs of the crash harnesses. The full-length ones: `python -m tests.crash NAME --help`."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from tests.crash.mutants import MUTANTS, Mutant, seed_bug
from tests.crash.native import legs, run_legs
from tests.crash.processes import cycles, forks, survivors
from tests.crash.shims import shims
from tests.crash.storm import storm

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="single-stepping is written for x86_64")


@x86
def test_step() -> None:
    """A writer, or its repairer, killed at any instruction leaves the old or the new value and every other item."""
    bad, text = run_legs(
        "step", legs(["gcc -O2", "clang -O2"]), lambda leg: ["--seconds", "20", "--most", "60", "--double", "150"], quiet=True
    )
    assert bad == 0, text


@x86
def test_pause() -> None:
    """A reader stopped at any instruction while its item is replaced returns a version that stood there."""
    bad, text = run_legs("pause", legs(["gcc -O2", "clang -O2"]), lambda leg: ["--seconds", "10"], quiet=True)
    assert bad == 0, text


def test_flip() -> None:
    """A mutated segment gives no foreign value and crashes nobody."""
    bad, text = run_legs("flip", legs(["gcc -O2", "gcc sanitizers"]), lambda leg: ["--seconds", "8"], quiet=True)
    assert bad == 0, text


def test_live_mutator() -> None:
    """A scribbler beside two readers and a writer crashes none of them."""
    bad, text = run_legs("flip", legs(["gcc -O2"]), lambda leg: ["--live", "5"], quiet=True)
    assert bad == 0, text


@pytest.mark.parametrize(
    ("form", "guard", "evict"),
    [("posix", "fast", False), ("sysv", "semaphore", False), ("posix", "semaphore", True), ("sysv", "fast", True)],
)
def test_storm(form: str, guard: str, evict: bool) -> None:
    """Random SIGKILLs lose nothing that was acknowledged."""
    outcome = storm(form, guard, seconds=6, seed=1, evict=evict)
    assert outcome.violations == []
    assert outcome.figures["kills"] > 0


@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_survivors(guard: str) -> None:
    """A worker goes on when all others are killed at once."""
    assert survivors("posix", guard, seconds=3, seed=1).violations == []


@pytest.mark.parametrize(("form", "guard"), [("posix", "fast"), ("sysv", "semaphore")])
def test_cycles(form: str, guard: str) -> None:
    """Attaching, detaching and dying attached leave nothing behind."""
    assert cycles(form, guard, seconds=3, seed=1).violations == []


@pytest.mark.parametrize(("form", "guard"), [("posix", "fast"), ("sysv", "semaphore")])
def test_forks(form: str, guard: str) -> None:
    """Children forked while threads write neither hang nor hold anything of their parent's."""
    assert forks(form, guard, seconds=3, seed=1).violations == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the preloaded library is compiled with gcc")
def test_shims(capfd: pytest.CaptureFixture[str]) -> None:
    """A system call that fails, a missing SEM_UNDO and clocks that jump cost a typed error at most, and leave nothing."""
    assert shims(["--share", "0.03", "--seconds", "1.5"]) == 0, capfd.readouterr().out


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.name))
def test_mutant_applies(mutant: Mutant, tmp_path: Path) -> None:
    """The seeded bug still has its place in the sources."""
    assert seed_bug(mutant, tmp_path).is_dir()
