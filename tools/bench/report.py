"""Turns the figures of a run into Markdown: bias, machine, table, limits, percentiles, two processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from shmcache.bench import BIAS, WORKLOADS

__all__ = ["Judged", "judge", "markdown", "number", "spread"]

US = "shmcache"
Round = dict[str, Any]


def number(value: float) -> str:
    """Three significant digits below 100, whole numbers with separators above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: list[float]) -> str:
    """Median, and least and most where they differ."""
    if len(values) < 2:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))}..{number(max(values))})"


def _ns(made: Round, peer: str, name: str) -> float | None:
    found = made.get(peer, {}).get("timings", {}).get(name)
    return None if found is None else float(found["ns"])


def _over(rounds: list[Round], value: Callable[[Round], float | None]) -> list[float]:
    return [v for made in rounds if (v := value(made)) is not None]


def _ratio(peer: str, name: str, base: str = "dict", base_name: str = "") -> Callable[[Round], float | None]:
    def value(made: Round) -> float | None:
        mine, other = _ns(made, peer, name), _ns(made, base, base_name or name)
        return None if mine is None or other is None else mine / other

    return value


def _two(peer: str, kind: str, which: int = 0) -> Callable[[Round], tuple[float, float] | None]:
    """Rates of one process and of two; which: 0 by the clock, 1 by processor time."""

    def value(made: Round) -> tuple[float, float] | None:
        found = made.get(peer, {}).get("together", {}).get(kind)
        return None if found is None else (found[0][which], found[1][which])

    return value


@dataclass(frozen=True)
class Judged:
    """One limit: what it is about, the figure found per round, what it must be and is aimed at."""

    what: str
    found: list[float]
    must: float
    aim: float | None
    unit: str
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether the median keeps what must be."""
        middle = median(self.found)
        return middle >= self.must if self.at_least else middle <= self.must


_TO_DICT = {
    "get": (1.3, 1.0), "get-hot": (2.2, 1.6), "get-4k": (4.0, 3.0), "miss": (3.0, 1.5), "many": (1.0, 0.7), "set": (3.5, None),
    "incr": (3.0, 2.0),
}  # fmt: skip


def _against_codec(codec: str, work: str, base: str, factor: float) -> Callable[[Round], float | None]:
    """work over (the codec alone + factor * base), so that 1 is the limit."""

    def value(made: Round) -> float | None:
        mine, other = _ns(made, US, work), _ns(made, US, base)
        alone = made.get(US, {}).get("codec", {}).get(codec)
        return None if mine is None or other is None or alone is None else mine / (alone + factor * other)

    return value


def judge(data: dict[str, Any]) -> Iterator[Judged]:
    """Every limit this run has figures for."""
    rounds = data["rounds"]
    wanted: list[tuple[str, Callable[[Round], float | None], float, float | None, str, bool]] = []
    for name, (must, aim) in _TO_DICT.items():
        wanted.append((WORKLOADS[name][0], _ratio(US, name), must, aim, "x dict", False))

    def semaphore(made: Round) -> float | None:
        mine, fast = _ns(made, "shmcache-semaphore", "set"), _ns(made, US, "set")
        pair = made.get("shmcache-semaphore", {}).get("floors", {}).get("semop pair with SEM_UNDO")
        return None if mine is None or fast is None or pair is None else mine / (fast + pair)

    wanted.append(("set, semaphore guard", semaphore, 1.1, None, "x (set, fast guard + semop pair)", False))
    wanted += [
        ("get of a small dict", _against_codec("unpackb", "get-object", "get", 1.4), 1.0, None, "x (unpackb + 1.4 get)", False),
        ("set of a small dict", _against_codec("packb", "set-object", "set", 1.4), 1.0, None, "x (packb + 1.4 set)", False),
    ]

    def lived(made: Round) -> float | None:
        mine, plain = _ns(made, US, "get-ttl"), _ns(made, US, "get-hot")
        return None if mine is None or plain is None else mine - plain

    wanted.append(("get of an item with a lifetime", lived, 25.0, None, "ns more than without", False))

    def share(made: Round) -> float | None:
        mine, base = _two(US, "mixed")(made), _two("dict", "mixed")(made)
        return None if mine is None or base is None else mine[1] / base[1]

    def scaling(made: Round) -> float | None:
        mine, base = _two(US, "mixed")(made), _two("dict", "mixed")(made)
        return None if mine is None or base is None else (mine[1] / mine[0]) / (base[1] / base[0])

    def set_scaling(made: Round) -> float | None:
        mine = _two(US, "set")(made)
        return None if mine is None else mine[1] / mine[0]

    wanted += [
        ("two processes, 95 % get: calls", share, 12 / 23, None, "x dict's", True),
        ("two processes, 95 % get: scaling", scaling, 0.9, None, "x dict's", True),
        ("two processes, set only: scaling", set_scaling, 1.6, None, "x one process", True),
    ]
    for label in ("set-evict", "set-evict-4k"):
        for percentile, limit, name in (("p999", 15.0, "p99.9"), ("p9999", 100.0, "p99.99")):

            def end(made: Round, label: str = label, percentile: str = percentile) -> float | None:
                found = made.get(US, {}).get("tails", {}).get(label)
                return None if found is None else float(found[percentile]) / 1000

            wanted.append((f"{_TAILS[label]}, {name}", end, limit, None, "us", False))
    for what, value, must, aim, unit, at_least in wanted:
        found = _over(rounds, value)
        if found:
            yield Judged(what, found, must, aim, unit, at_least)


_TAILS = {
    "get": "get", "set": "set (overwrite)", "set-evict": "set of a new key, full segment",
    "set-evict-4k": "set of 4 KiB under a new key, full segment",
}  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *(line(row) for row in rows)]


def _setting(data: dict[str, Any], names: dict[str, str]) -> list[str]:
    lines = ["## Made on", ""]
    lines += [f"- {what}: {value}" for what, value in data["machine"].items() if value]
    noise = data["noise"]
    lines.append(
        f"- {noise['seconds']} s; of all processors this run used {noise['own percent']} %, other processes "
        f"{noise['others percent']} %, the hypervisor took {noise['stolen percent']} %; load {noise['load before']} before, "
        f"{noise['load after']} after"
    )
    if noise["others percent"] + noise["stolen percent"] > 5:
        lines.append("- **others disturbed this run**: trust the ratios within a round more than the times")
    lines += [f"- {what}: {ns} ns" for what, ns in data["floors"].items()]
    codec = [made[US]["codec"] for made in data["rounds"] if "codec" in made.get(US, {})]
    if codec:
        for key, what in (("packb", "msgpack.packb of the small dict"), ("unpackb", "msgpack.unpackb of it"),
                          ("empty", "an empty Python function in the same loop")):  # fmt: skip
            lines.append(f"- {what}: {number(median([c[key] for c in codec]))} ns")
    for peer, name in names.items():
        versions = ", ".join(f"{n} {v}" for n, v in data["versions"].get(peer, {}).items() if v)
        notes = next((made[peer]["notes"] for made in data["rounds"] if peer in made), "")
        lines.append(f"- {name} ({peer}): " + "; ".join(part for part in (versions, notes) if part))
    lines += [f"- server {name}: {what}" for name, what in data["servers"].items()]
    lines += [f"- **left out**: {peer}: {why.splitlines()[-1]}" for peer, why in data["missing"].items()]
    return lines


def _speed(data: dict[str, Any], names: dict[str, str]) -> list[str]:
    rows = []
    for name, (what, _) in WORKLOADS.items():
        cells = [what]
        for peer in names:
            found = _over(data["rounds"], lambda made, p=peer, n=name: _ns(made, p, n))  # type: ignore[misc]
            cells.append(spread(found) if found else "-")
        rows.append(cells)
    return ["## ns a call: median over rounds (least..most)", "", *_table(["work", *names], rows)]


def _limits(judged: list[Judged]) -> list[str]:
    rows = []
    for j in judged:
        bound = "at least" if j.at_least else "at most"
        aim = "" if j.aim is None else f", aim {number(j.aim)}"
        rows.append([j.what, f"{spread(j.found)} {j.unit}", f"{bound} {number(j.must)}{aim}", "kept" if j.kept else "**missed**"])
    return ["## Limits: median over rounds of the figure within a round", "", *_table(["work", "found", "limit", ""], rows)]


def _percentiles(data: dict[str, Any], names: dict[str, str]) -> list[str]:
    rows = []
    for peer, name in names.items():
        for key, what in _TAILS.items():
            found = [made[peer]["tails"][key] for made in data["rounds"] if key in made.get(peer, {}).get("tails", {})]
            if found:
                values = [spread([f[p] / 1000 for f in found]) for p in ("p50", "p99", "p999", "p9999")]
                rows.append([name, what, *values])
    head = ["store", "call", "p50", "p99", "p99.9", "p99.99"]
    return ["## Single calls, us, the clock's two readings included: median over rounds (least..most)", "", *_table(head, rows)]


def _together(data: dict[str, Any], names: dict[str, str]) -> list[str]:
    rows = []
    for kind, what in (("mixed", "95 % get, 5 % set"), ("set", "set only, own keys")):
        for peer, name in names.items():
            found = [two for made in data["rounds"] if (two := _two(peer, kind)(made)) is not None]
            used = [two for made in data["rounds"] if (two := _two(peer, kind, 1)(made)) is not None]
            if found:
                rows.append([what, name, spread([one / 1e6 for one, _ in found]), spread([two / 1e6 for _, two in found]),
                             spread([two / one for one, two in found]), spread([two / one for one, two in used])])  # fmt: skip
    head = ["work", "store", "one process", "two processes", "scaling", "scaling by processor time"]
    note = (
        "Where other processes take processors away, scaling by the clock falls for everybody; scaling by processor time does "
        "not, but leaves out time asleep, so it says nothing about stores that wait for a server or for a lock by sleeping."
    )
    return ["## Million calls a second, processes forked from one", "", note, "", *_table(head, rows)]


def markdown(data: dict[str, Any]) -> tuple[str, bool]:
    """The report, and whether every limit is kept."""
    rounds = data["rounds"]
    peers: dict[str, str] = {}
    for made in rounds:
        peers.update({peer: found["name"] for peer, found in made.items()})
    names = {peer: name if name != US else peer for peer, name in peers.items()}
    judged = list(judge(data))
    parts = [
        ["# Speed", "", BIAS, "", f"{len(rounds)} rounds, each peer in a fresh process; {data['plan']['items']:,} items of "
         f"{data['plan']['value_size']} bytes under keys of 17 bytes."],
        _speed(data, names), _limits(judged), _together(data, names), _percentiles(data, names), _setting(data, names),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts) + "\n", all(j.kept for j in judged)
