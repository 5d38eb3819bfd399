"""Compile and run the models of this directory: each must hold, and each seeded error must be found.

    python -m tests.models.run [--quick] [--model NAME] [--jobs N]

Needs `spin`, a C compiler (`CC`, default gcc), a C++ compiler (`CXX`, default g++) and the Relacy headers.
Everything is built in a temporary directory that is removed at the end. Exit status: 0 all as expected,
1 not, 2 a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RELACY = "read_protocol"
RELACY_HEADER = Path("relacy/relacy.hpp")

QUICK_RUNS = 200_000  # of a scenario that must hold; the rarest seed shows within 5,000
LONG_RUNS = 5_000_000
SEED_RUNS = 200_000
QUICK_LIMIT_S = 240.0  # a hung tool, not a slow machine: the slowest quick case takes 10 s on an idle core
LONG_LIMIT_S = 3600.0
QUICK_MEMORY_MB = 1500
LONG_MEMORY_MB = 12_000


@dataclass(frozen=True)
class Case:
    """One run of one model.

    Attributes:
        model: file name without its ending.
        options: macros for spin (`N=2`), or for Relacy the scenario alone.
        seed: the deliberate error switched on; empty when the model must hold.
        progress: search for non-progress cycles under weak fairness instead of for bad states.
        long: left out by `--quick`.
    """

    model: str
    options: tuple[str, ...] = ()
    seed: str = ""
    progress: bool = False
    long: bool = False

    @property
    def name(self) -> str:
        """The case in one word group, for tables and test ids."""
        return " ".join((self.model, *self.options, *([self.seed] if self.seed else []))).strip()


@dataclass(frozen=True)
class Outcome:
    """What a run of a `Case` gave.

    Attributes:
        case: what ran.
        broke: True an error was found, False the search ended without one, None it did not end (see `what`).
        what: the error found, or why there is no result; empty when the model holds.
        size: states stored (spin) or executions (Relacy).
        seconds: wall time, compilation included.
    """

    case: Case
    broke: bool | None
    what: str
    size: int
    seconds: float

    @property
    def expected(self) -> bool:
        """True when a seeded error was found, or a model without one held."""
        return self.broke is bool(self.case.seed)


_TWO = ("N=2",)
_THREE = ("N=3", "DEATHS=1")
_BARGE = ("N=3", "DEATHS=1", "QUITS=0", "FIRST_ROUNDS=2")
_APART = ("PLAN=APART",)
_HUNG = ("PLAN=HUNG", "DEATHS=0")

_SPIN_HOLDS = (
    Case("guard", (*_TWO, "ROUNDS=2")),
    Case("guard", (*_THREE, "QUITS=0")),
    Case("guard", (*_TWO, "LIVE"), progress=True),
    Case("guard", (*_TWO, "ROUNDS=2", "LATE_WAKES", "GIVES_BACK_BY_STORE")),
    Case("guard", _THREE, long=True),
    Case("guard", (*_THREE, "LATE_WAKES", "GIVES_BACK_BY_STORE"), long=True),
    Case("guard", _BARGE, long=True),
    Case("guard", ("N=3", "DEATHS=2", "QUITS=0"), long=True),
    Case("guard", (*_TWO, "ROUNDS=3", "DEATHS=3", "QUITS=2"), long=True),
    Case("guard", (*_TWO, "ROUNDS=2", "LIVE"), progress=True, long=True),
    Case("guard_sem"),
    Case("guard_sem", ("ROUNDS=2", "DEATHS=3"), long=True),
    Case("lease", ("PLAN=NESTED", "ENDS=0")),
    Case("lease", ("PLAN=NESTED", "DEATHS=0")),
    Case("lease", _APART),
    Case("lease", _HUNG),
    Case("lease", (*_APART, "DEATHS=2", "ENDS=2"), long=True),
    Case("lease", ("PLAN=NESTED",), long=True),
    Case("lease", ("PLAN=NESTED", "DEATHS=2"), long=True),
)

_SPIN_SEEDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("guard", _TWO, "NO_GENERATION USE_BEFORE_RAISE RAISE_BEFORE_BEACON STEAL_BY_TIMEOUT TAKE_OVER_BY_STORE"),
    ("guard", _TWO, "TAKE_OVER_BY_FREEING TAKE_OVER_DROPS_WAITERS NO_RECOVERY GIVES_BACK_BY_STORE"),
    ("guard", _TWO, "WAIT_WITHOUT_END EXEC_POSTS_NOTHING"),
    ("guard", _THREE, "FORGETS_IT_WAITED QUITS_SILENTLY"),
    ("guard", (*_BARGE, "ONLY_FIRST_STOPS"), "TAKE_OVER_KEEPS_ONLY"),
    ("guard_sem", (), "UNDO_ON_LOCK_ONLY UNDO_ON_UNLOCK_ONLY NO_UNDO SETVAL_AT_ATTACH EXEC_POSTS_NOTHING"),
    ("guard_sem", (), "PID_BEFORE_VALUE DIRTY_CLEARED_FIRST DIRTY_AFTER_FIRST_STORE NO_RECOVERY"),
    ("guard_sem", (), "UNLOCK_BEFORE_CLEAR CLEAR_BEFORE_LAST_STORE CHILD_GIVES_BACK"),
    ("lease", _APART, "OLD_OWNER_LEFT EXTEND_AFTER_END NO_NONCE NO_GENERATION"),
    ("lease", _APART, "FIRST_FREE_SLOT RELEASE_BY_NAME"),
    ("lease", ("PLAN=NESTED",), "NAMES_COLLIDE"),
    ("lease", _HUNG, "END_IGNORED"),
)

_SCENARIOS = ("recycle", "chain", "overwrite", "displace", "repair", "duplicate", "clear", "wipe", "touch", "handover")

_RELACY_SEEDS: tuple[tuple[str, str], ...] = (
    ("recycle", "LIFE_STORE_RELAXED LIFE_LOAD_RELAXED NO_FENCE_AFTER_LIFE NO_FENCE_AFTER_COPY"),
    ("recycle", "COMMIT_RELAXED NO_SECOND_LOOK SECOND_LOOK_RELAXED ENTRY_ONLY"),
    ("recycle", "LIFE_AFTER_BYTES PUBLISH_EARLY"),
    ("chain", "LIFE_BEFORE_ENTRY LIFE_ONLY ENTRY_ONLY LAST_LOOK_RELAXED SECOND_LOOK_RELAXED"),
    ("overwrite", "DELETE_THEN_SET NO_FENCE_AFTER_LIFE COMMIT_RELAXED"),
    ("displace", "NO_MOVES BUMP_BEFORE_COPY BUMP_AFTER_CLEAR BUMP_SOURCE_ONLY BUMP_RELAXED"),
    ("displace", "MOVES_LOAD_RELAXED MOVES_ONE_BIT NO_ORDER_BEFORE_MOVES CLEAR_BEFORE_COPY CLEAR_RELAXED"),
    ("displace", "COPY_RELAXED MOVES_LOADED_LATE"),
    ("repair", "REPAIR_WITHOUT_BUMP NO_MOVES"),
    ("duplicate", "COPY_FORGOTTEN"),
    ("clear", "CLEAR_KEEPS_TAIL FLUSH_IGNORED"),
    ("wipe", "NO_FENCE_BEFORE_WIPE"),
    ("touch", "EXPIRED_UNCHECKED"),
    ("handover", "GENERATION_STORE_RELAXED GENERATION_LOAD_RELAXED TAKE_RELAXED GIVE_BACK_RELAXED"),
)


def _all_cases() -> Iterator[Case]:
    yield from _SPIN_HOLDS
    for scenario in _SCENARIOS:
        yield Case(RELACY, (scenario,))
    for model, options, seeds in _SPIN_SEEDS:
        for seed in seeds.split():
            yield Case(model, options, seed)
    yield Case("guard", (*_TWO, "LIVE"), "NO_GENERATION", progress=True)
    for scenario, seeds in _RELACY_SEEDS:
        for seed in seeds.split():
            yield Case(RELACY, (scenario,), seed)


CASES: tuple[Case, ...] = tuple(_all_cases())
MODELS: tuple[str, ...] = tuple(dict.fromkeys(case.model for case in CASES))


def missing_tools(models: Sequence[str]) -> list[str]:
    """Name what these models need and this machine lacks.

    Args:
        models: names out of `MODELS`.

    Returns:
        One phrase per missing tool; empty when all can run.
    """
    missing = []
    if any(model != RELACY for model in models):
        if shutil.which("spin") is None:
            missing.append("spin (Debian package spin)")
        if shutil.which(_compiler("CC", "gcc")) is None:
            missing.append(f"C compiler {_compiler('CC', 'gcc')}")
    if RELACY in models:
        if shutil.which(_compiler("CXX", "g++")) is None:
            missing.append(f"C++ compiler {_compiler('CXX', 'g++')}")
        if not any((Path(root) / RELACY_HEADER).exists() for root in ("/usr/include", "/usr/local/include")):
            missing.append(f"header {RELACY_HEADER} (Debian package relacy-dev)")
    return missing


def seeds_offered(model: str) -> set[str]:
    """Read from a model's source which errors can be switched on in it.

    Args:
        model: a name out of `MODELS`.

    Returns:
        The names of its seeds.
    """
    if model == RELACY:
        text = (HERE / f"{RELACY}.cpp").read_text(encoding="utf-8")
        return set(re.findall(r'\b(?:seeded|unless)\("([A-Z_]+)"', text))
    text = (HERE / f"{model}.pml").read_text(encoding="utf-8")
    lines = re.findall(r"^#(?:ifdef|ifndef|elif|if)\b(.*seeded.*)$", text, re.MULTILINE)
    return {re.findall(r"\b[A-Z][A-Z_]+\b", line)[0] for line in lines}


def _compiler(variable: str, default: str) -> str:
    return os.environ.get(variable) or default


def build_relacy(work: Path) -> Path:
    """Build `read_protocol.cpp` once; its seeds are chosen at run time.

    Args:
        work: directory for the binary.

    Returns:
        The path of the binary.

    Raises:
        RuntimeError: the compiler failed; the message carries its output.
    """
    binary = work / RELACY
    source = HERE / f"{RELACY}.cpp"
    compile_ = [_compiler("CXX", "g++"), "-std=c++11", "-O1", "-w", "-o", str(binary), str(source)]
    _checked(compile_, work, LONG_LIMIT_S)
    return binary


def run_case(case: Case, work: Path, relacy: Path | None, *, quick: bool) -> Outcome:
    """Run one case.

    Args:
        case: what to run.
        work: an existing directory; spin's files go into a new one inside it, removed before the return.
        relacy: the binary of `build_relacy`; needed by cases of that model only.
        quick: fewer Relacy executions and smaller limits.

    Returns:
        The outcome. A tool that fails, runs out of memory or of time gives `broke=None`, never an exception.
    """
    started = time.monotonic()
    limit_s = QUICK_LIMIT_S if quick else LONG_LIMIT_S
    try:
        if case.model == RELACY:
            if relacy is None:
                raise RuntimeError(f"case '{case.name}' needs the built {RELACY}, found none")
            broke, what, size = _run_relacy(case, relacy, limit_s, quick=quick)
        else:
            with tempfile.TemporaryDirectory(dir=work) as directory:
                broke, what, size = _run_spin(case, Path(directory), limit_s, quick=quick)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return Outcome(case, None, " ".join(str(error).split())[-300:], 0, time.monotonic() - started)
    return Outcome(case, broke, what, size, time.monotonic() - started)


def _run_spin(case: Case, directory: Path, limit_s: float, *, quick: bool) -> tuple[bool, str, int]:
    macros = [f"-D{option}" for option in (*case.options, *([case.seed] if case.seed else []))]
    _checked(["spin", "-a", *macros, str(HERE / f"{case.model}.pml")], directory, limit_s)
    memory = QUICK_MEMORY_MB if quick else LONG_MEMORY_MB
    # No partial order reduction: to it a step on local variables meets nobody, yet `unless` meets every step.
    kind = ["-DNOREDUCE", "-DNP" if case.progress else "-DSAFETY", "-O0" if case.seed else "-O1"]
    if case.long:
        kind.append("-DCOLLAPSE")
    compile_ = [_compiler("CC", "gcc"), "-w", f"-DMEMLIM={memory}", *kind, "-o", "pan", "pan.c"]
    _checked(compile_, directory, limit_s)
    search = ["-l", "-f"] if case.progress else []
    text = _checked([str(directory / "pan"), "-m1000000", *search], directory, limit_s)
    states = re.search(r"^\s*(\d+) states, stored", text, re.MULTILINE)
    errors = re.search(r"errors: (\d+)", text)
    if states is None or errors is None:
        raise RuntimeError(f"pan gave no figures: {text[-300:]}")
    found = re.search(r"^pan:1: (.*?)(?: \(at depth \d+\))?$", text, re.MULTILINE)
    if int(errors.group(1)) > 0:
        return True, found.group(1) if found else "error", int(states.group(1))
    if re.search(r"max search depth too small|out of memory|memory limit|not completed", text):
        raise RuntimeError(f"search not complete after {states.group(1)} states")
    return False, "", int(states.group(1))


def _run_relacy(case: Case, binary: Path, limit_s: float, *, quick: bool) -> tuple[bool, str, int]:
    runs = SEED_RUNS if case.seed else QUICK_RUNS if quick else LONG_RUNS
    command = [str(binary), case.options[0], str(runs), *([case.seed] if case.seed else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    match = re.match(r"(.+) runs (\d+)$", done.stdout.strip())
    if match is None or done.returncode not in (0, 1):
        raise RuntimeError(f"{RELACY} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    broke = done.returncode == 1
    return broke, match.group(1).lower() if broke else "", int(match.group(2))


def _checked(command: Sequence[str], directory: Path, limit_s: float) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {done.stdout}")
    return done.stdout


def run_all(cases: Sequence[Case], *, quick: bool, jobs: int) -> Iterator[Outcome]:
    """Run cases side by side.

    Args:
        cases: what to run.
        quick: see `run_case`.
        jobs: how many at once, at least 1.

    Yields:
        Outcomes in the order of `cases`.

    Raises:
        RuntimeError: the Relacy model does not compile.
    """
    with (
        tempfile.TemporaryDirectory(prefix="models-") as directory,
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        work = Path(directory)
        building = pool.submit(build_relacy, work) if any(case.model == RELACY for case in cases) else None

        def one(case: Case) -> Outcome:
            binary = building.result() if building is not None and case.model == RELACY else None
            return run_case(case, work, binary, quick=quick)

        futures = [pool.submit(one, case) for case in cases]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def row(outcome: Outcome) -> str:
    """Format one outcome as a line of the table."""
    case = outcome.case
    options = " ".join(case.options) + (" progress" if case.progress else "")
    verdict = {True: "error found", False: "holds", None: "no result"}[outcome.broke]
    mark = "ok" if outcome.expected else "NOT AS EXPECTED"
    what = outcome.what if len(outcome.what) <= 44 or not outcome.expected else outcome.what[:41] + "..."
    return (
        f"{case.model:13} {options:56} {case.seed or '-':25} {verdict:11} {outcome.size:>10} "
        f"{outcome.seconds:6.1f} {mark:3} {what}".rstrip()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the models from the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 all as expected, 1 not, 2 a tool is missing.
    """
    parser = argparse.ArgumentParser(prog="tests.models.run", description="Check models and their seeds.")
    parser.add_argument("--quick", action="store_true", help="leave out the large state spaces")
    parser.add_argument("--model", choices=MODELS, action="append", help="this model only; may be repeated")
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="cases at once (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: wanted at least 1, found {options.jobs}")
    models: list[str] = options.model or list(MODELS)
    missing = missing_tools(models)
    if missing:
        print(f"cannot run: missing {', '.join(missing)}", file=sys.stderr)
        return 2
    cases = [case for case in CASES if case.model in models and not (options.quick and case.long)]
    started = time.monotonic()
    print(f"{'model':13} {'options':56} {'seeded error':25} {'result':11} {'states/runs':>10} {'s':>6}")
    outcomes = []
    for outcome in run_all(cases, quick=options.quick, jobs=options.jobs):
        outcomes.append(outcome)
        print(row(outcome), flush=True)
    seeds = [outcome for outcome in outcomes if outcome.case.seed]
    clean = [outcome for outcome in outcomes if not outcome.case.seed]
    held = sum(outcome.expected for outcome in clean)
    found = sum(outcome.expected for outcome in seeds)
    seconds = time.monotonic() - started
    print(f"{held} of {len(clean)} models hold, {found} of {len(seeds)} seeded errors found, {seconds:.0f} s")
    return 0 if all(outcome.expected for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
