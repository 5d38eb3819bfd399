"""Short legs of the crash harnesses. The full-length ones: `python -m tests.crash NAME --help`."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import pytest

from tests.core.build import ROOT
from tests.crash.__main__ import main
from tests.crash.fuzz import CORPUS, LEG, QUICK, fuzz
from tests.crash.mutants import MUTANTS, Mutant, seed_bug
from tests.crash.native import legs, run_legs
from tests.crash.processes import cycles, forks, survivors
from tests.crash.scribble import scribble
from tests.crash.shims import shims
from tests.crash.soak import soak
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
    assert shims(["--share", "0.008", "--seconds", "1"]) == 0, capfd.readouterr().out


def test_fuzz(tmp_path: Path) -> None:
    """Segment images and operations that libFuzzer makes of the corpus crash nothing and give no foreign value."""
    if LEG.missing and not os.environ.get("SHMCACHE_REQUIRE_ALL"):
        pytest.skip(f"{LEG.compiler} is not installed")
    outcome = fuzz(seconds=5, seed=1, directory=tmp_path, leg=QUICK)
    assert outcome.violations == []
    assert int(outcome.figures["inputs"].replace(",", "")) > len(list(CORPUS.iterdir()))


@pytest.mark.parametrize(("form", "guard"), [("posix", "fast"), ("sysv", "semaphore")])
def test_scribble(form: str, guard: str) -> None:
    """Random bytes over a live segment cost workers that use the whole API misses and typed errors."""
    outcome = scribble(form, guard, seconds=4, seed=1)
    assert outcome.violations == []
    assert outcome.figures["hits"] > 0


def test_soak() -> None:
    """Workers that come and go leave memory, free pages and live items as they were."""
    outcome = soak("posix", "fast", operations=1e6, restarts=100, seconds=5, seed=1)
    assert outcome.violations == []


def test_the_contract_names_what_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each test and each command of DESIGN.md's crash contract is there."""
    text = (ROOT / "DESIGN.md").read_text().partition("## 10. Crash contract")[2].partition("\n## 11")[0]
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    tests = set(re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", text))
    assert len(tests) > 12
    assert [name for name in tests if name not in files and f"def {name}(" not in sources] == []
    for name in set(re.findall(r"`python -m tests\.crash (\w+)", text)):
        monkeypatch.setattr("sys.argv", ["tests.crash", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.name))
def test_mutant_applies(mutant: Mutant, tmp_path: Path) -> None:
    """The seeded bug still has its place in the sources."""
    assert seed_bug(mutant, tmp_path).is_dir()
