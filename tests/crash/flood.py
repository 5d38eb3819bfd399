"""Keys chosen by an attacker (S1): what they cost beside ordinary ones, in one run.

The keys of an attack collide under a hash that can be computed without the segment's secret (flood.c). They, and ordinary keys
of the same length, are stored and read in turns; the figure is the ratio of the 99th percentiles, the median over rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from shmcache import inspect
from shmcache.engines.shm import ShmEngine
from shmcache.url import Url
from tests.core.build import CORE
from tests.crash.storm import Outcome

__all__ = ["HASHES", "add_commands", "attack_keys", "ordinary_keys", "places"]

HASHES: Final = ("fnv1a", "xxh64", "segment")
N_KEYS: Final = 2000
MOST: Final = 1.2
"""Ratio of percentiles that counts as found."""


def attack_keys(n: int) -> dict[str, list[str]]:
    """`n` colliding keys for each of HASHES; gcc compiles the program that looks for them."""
    with tempfile.TemporaryDirectory(prefix="shmcache-flood-") as directory:
        program = Path(directory) / "flood"
        source = Path(__file__).parent / "flood.c"
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", f"-I{CORE}"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(program)], check=True)
        run = [subprocess.run([program, name, str(n)], check=True, capture_output=True, text=True) for name in HASHES]
        return {name: done.stdout.split() for name, done in zip(HASHES, run, strict=True)}


def ordinary_keys(n: int) -> list[str]:
    return [f"user{i * 7919:012d}" for i in range(n)]


def places(cache: ShmEngine) -> dict[object, tuple[int, int]]:
    """Shard and bucket of each key."""
    with inspect.View(inspect.locate(f"@{cache._attachment.shm_id}")) as view:
        return {item.key: (item.shard, item.bucket) for item in view.items()}


def _p99(call: Callable[[str], Any], keys: Sequence[str]) -> float:
    clock, taken = time.perf_counter_ns, []
    for key in keys:
        begun = clock()
        call(key)
        taken.append(clock() - begun)
    taken.sort()
    return float(taken[int(len(taken) * 0.99)])


def flood(seed: int, rounds: int) -> list[Outcome]:
    """One outcome per hash: ratios of get and set."""
    outcomes = []
    ordinary, value = ordinary_keys(N_KEYS), b"v" * 100
    for name, attack in attack_keys(N_KEYS).items():
        cache = ShmEngine.from_url(Url.parse("anon:crash-flood://"), size=8 << 20, guards=1)
        ratios: dict[str, list[float]] = {"get": [], "set": []}
        calls: dict[str, Callable[[str], Any]] = {"set": lambda key, c=cache: c.set(key, value), "get": cache.get}  # type: ignore[misc]
        gc.disable()
        for _ in range(rounds):
            for what, call in calls.items():
                both = [(_p99(call, attack), _p99(call, ordinary)) for _ in range(3)]
                ratios[what].append(min(a for a, _ in both) / min(o for _, o in both))
        gc.enable()
        found = {what: statistics.median(each) for what, each in ratios.items()}
        lines = [
            f"{what}: p99 at most {MOST} times that of ordinary keys wanted, {ratio:.2f} found"
            for what, ratio in found.items() if ratio > MOST
        ]  # fmt: skip
        if lost := sum(cache.get(key) != value for key in attack):
            lines.append(f"{N_KEYS} keys of the attack readable wanted, {lost} missed")
        outcomes.append(Outcome(f"flood {name}", {f"{what} p99 ratio": f"{r:.2f}" for what, r in found.items()}, lines))
        cache.close()
    return outcomes


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-commands of this module."""
    parser = command("flood", "keys that collide in an unkeyed hash beside ordinary ones (S1)", 0.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.set_defaults(run=lambda options: sum(outcome.report() for outcome in flood(options.seed, options.rounds)))
