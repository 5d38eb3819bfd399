"""Replays traces through the core with a clock of its own and prints what it kept, beside the limits.

    python -m tools.bench.hitratio TRACES [--trace NAME] [--size 8M] [--guards N] [--item-size auto|N] [--json]

TRACES is a directory or a file (formats: tools/bench/traces.py). A known trace runs at its two sizes, any other at the
sizes given. Every combination of guards (0: the core's own number) and item size (auto: the trace's mean payload, key and
value, over its distinct keys) is a column; `*` marks a figure beyond its limit. Values above a quarter of a shard cannot be
stored, so traces with large values need one guard, or a larger segment.

The replay is one process of C without the Python layer; the counts do not depend on the machine or its load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import native, traces
from .limits import MIB, Limit, limits_of

__all__ = ["CLEAN_PERIOD_MS", "Figures", "main", "parse_size", "replay"]

CLEAN_PERIOD_MS = 600_000
FLAG_HEADER_ONLY = 1
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


@dataclass(frozen=True)
class Figures:
    """What one replay counted. Ratios are plain numbers, sizes bytes."""

    trace: str
    size: int
    guards: int
    guards_asked: int
    item_size: int
    item_size_asked: int
    mean_payload: int
    buckets: int
    requests: int
    keys: int
    asked: int
    misses: int
    refused: int
    no_space: int
    live_items: int
    live_bytes: int
    bytes_set: int
    bytes_moved: int
    evicted: int
    evicted_index: int
    expired: int
    repaired: int
    max_steps: int
    max_moved: int
    moved_over: int
    max_value: int
    largest: int
    seconds: float

    @property
    def miss(self) -> float:
        """Missed GET and INCR over all GET and INCR, cold misses included."""
        return self.misses / self.asked if self.asked else 0.0

    @property
    def utilisation(self) -> float:
        """Key and value bytes of live, unexpired items over the whole segment, at the end."""
        return self.live_bytes / self.size

    @property
    def amplification(self) -> float:
        """Bytes written over bytes set."""
        return (self.bytes_set + self.bytes_moved) / self.bytes_set if self.bytes_set else 1.0

    @property
    def overhead(self) -> float:
        """Segment bytes over live items, less their mean payload."""
        return (self.size - self.live_bytes) / self.live_items if self.live_items else 0.0


def parse_size(text: str) -> int:
    """`8M` to bytes. Raises: ValueError."""
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = digits[-1:] if digits[-1:] in "KMG" else ""
    number = digits.removesuffix(unit) if unit else digits
    if not number.isdigit():
        raise ValueError(f"size: digits with K, M or G wanted, {text!r} found")
    return int(number) << _UNITS[unit]


def replay(
    flat: Path, trace: str, size: int, item_size: int = 0, guards: int = 0, seed: int = 1, header_only: bool = False
) -> Figures:
    """Replay a flat SCT1 file once.

    Args:
        size: bytes of the whole segment.
        item_size: bytes of a mean item's key and value; 0 takes the trace's.
        guards: 0 takes the core's choice.
        seed: varies the segment's hash key.

    Raises: RuntimeError with the driver's message; it ends with status 3 when a hit gave other bytes than were stored.
    """
    program = native.build("replay")
    command = [str(program), str(flat), *map(str, (size, item_size, guards, seed, CLEAN_PERIOD_MS))]
    done = subprocess.run([*command, str(FLAG_HEADER_ONLY * header_only)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"replay of {trace}: exit status 0 wanted, {done.returncode} found: {done.stderr.strip()}")
    counted: dict[str, Any] = json.loads(done.stdout)
    counted = {k: v for k, v in counted.items() if k in Figures.__dataclass_fields__}
    return Figures(trace=trace, guards_asked=guards, item_size_asked=item_size, **counted)


def _met(f: Figures, limit: Limit | None) -> dict[str, bool]:
    """Which limits a replay keeps; work per set is bounded on every trace."""
    met = {"work": f.moved_over <= f.largest + 512}
    if limit is not None:
        met["miss"] = round(f.miss, 3) <= limit.miss
        if limit.utilisation is not None:
            met["utilisation"] = round(f.utilisation, 2) >= limit.utilisation
        if limit.amplification is not None:
            met["amplification"] = round(f.amplification, 2) <= limit.amplification
    return met


def _column(asked: tuple[int, int]) -> str:
    item, guards = asked
    return f"item {item or 'auto'}, guards {guards or 'default'}"


def _line(f: Figures, limit: Limit | None) -> str:
    met = _met(f, limit)

    def mark(what: str) -> str:
        return " " if met.get(what, True) else "*"

    return (
        f"{f.item_size:>6} {f.guards:>3}  {f.miss:>7.4f}{mark('miss')} {f.utilisation:>5.2f}{mark('utilisation')}"
        f"{f.amplification:>6.2f}{mark('amplification')} {f.overhead:>8.1f} {f.size / max(f.live_items, 1):>9.1f} "
        f"{f.evicted_index:>8} {f.refused:>6} {f.max_steps:>6} {f.max_moved >> 10:>7}{mark('work')} {f.seconds:>6.1f}"
    )


_HEADS = "  item grd     miss   util  wr.amp  overhead bytes/item idx.evic refuse  steps moved K       s"


def report(rows: Sequence[Figures], limits: dict[tuple[str, int], Limit]) -> Iterable[str]:
    """The text table: a block per trace and size, a line per combination; then the limits kept by each combination."""
    score: dict[tuple[int, int], list[str]] = {}
    at: tuple[str, int] | None = None
    for f in rows:
        limit = limits.get((f.trace, f.size))
        if (f.trace, f.size) != at:
            at = (f.trace, f.size)
            yield ""
            wanted = f"limit {limit.miss:.3f}, infinite {limit.infinite:.3f}" if limit else "no limit"
            if limit:
                wanted += "".join(f", {name} {value:.3f}" for name, value in limit.rivals)
                wanted += f", utilisation >= {limit.utilisation:.2f}" if limit.utilisation else ""
                wanted += f", write amplification <= {limit.amplification:.1f}" if limit.amplification else ""
            yield f"{f.trace} {f.size / MIB:g} MiB: {wanted} ({f.requests} requests, {f.keys} keys, mean {f.mean_payload} B)"
            yield _HEADS
        yield _line(f, limit)
        kept = score.setdefault((f.item_size_asked, f.guards_asked), [])
        kept.extend(f"{f.trace}/{f.size // MIB} {what}" for what, good in _met(f, limit).items() if not good)
    yield ""
    for asked, broken in score.items():
        yield f"{_column(asked)}: " + (f"{len(broken)} beyond: {', '.join(broken)}" if broken else "every limit kept")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.hitratio", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--trace", action="append", help="only this one; may be repeated")
    parser.add_argument("--size", action="append", type=parse_size, help="total bytes, e.g. 8M; may be repeated")
    parser.add_argument("--guards", action="append", type=int, help="0: the core's choice; may be repeated (0 and 1)")
    parser.add_argument("--item-size", action="append", help="bytes or auto; may be repeated (256 and auto)")
    parser.add_argument("--seed", type=int, default=1, help="of the segment's hash key")
    parser.add_argument("--integrity", choices=("full", "header"), default="full")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second of a CSV without a column t")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when the first combination asked for keeps every limit, 1 when not, 2 for bad input."""
    args = _arguments(argv)
    guards: list[int] = args.guards or [0, 1]
    items = [0 if text == "auto" else parse_size(text) for text in args.item_size or ["256", "auto"]]
    try:
        native.build("replay")
        paths = [p for p in traces.find(args.traces) if not args.trace or traces.name_of(p) in args.trace]
    except (OSError, RuntimeError) as e:
        print(e, file=sys.stderr)
        return 2
    rows: list[Figures] = []
    limits: dict[tuple[str, int], Limit] = {}
    with tempfile.TemporaryDirectory(dir=native.cache_dir()) as work, ThreadPoolExecutor(args.jobs) as pool:
        for path in paths:
            name, flat = traces.name_of(path), Path(work) / "flat.sct"
            try:
                traces.flatten(path, flat, args.rate)
            except (OSError, ValueError) as e:
                print(e, file=sys.stderr)
                return 2
            known = {limit.size: limit for limit in limits_of(name)}
            limits.update({(name, size): limit for size, limit in known.items()})
            sizes: list[int] = args.size or list(known) or [8 * MIB, 64 * MIB]
            asked = [(size, item, guard) for size in sizes for item in items for guard in guards]
            one = partial(replay, flat, name, seed=args.seed, header_only=args.integrity == "header")
            futures = [pool.submit(one, size, item, guard) for size, item, guard in asked]
            rows.extend(future.result() for future in futures)
    if args.json:
        known_limits = [{"trace": t, **asdict(limit)} for (t, _), limit in limits.items()]
        figures = [
            {**asdict(f), "miss": f.miss, "utilisation": f.utilisation, "amplification": f.amplification,
             "met": _met(f, limits.get((f.trace, f.size)))} for f in rows
        ]  # fmt: skip
        print(json.dumps({"limits": known_limits, "figures": figures}, indent=1))
    else:
        print("\n".join(report(rows, limits)))
    first = [f for f in rows if (f.item_size_asked, f.guards_asked) == (items[0], guards[0])]
    return 0 if all(all(_met(f, limits.get((f.trace, f.size))).values()) for f in first) else 1


if __name__ == "__main__":
    sys.exit(main())
