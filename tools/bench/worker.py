"""One peer, measured in a process of its own; started by tools.bench. The answer is a JSON file too: some peers
run inside another program, which prints its own lines.

    python -m tools.bench.worker REQUEST    a JSON file: peer, directory, sockets, plan, two_seconds, answer
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shmcache.bench import OBJECT, WORKLOADS, Field, Plan, measure, tail, tails, work

from .peers import PEERS, Context
from .together import together

__all__ = ["main", "run"]


def _codec(plan: Plan) -> dict[str, float]:
    """What msgpack alone takes for the small dict, in the same kind of loop."""
    msgpack = importlib.import_module("msgpack")
    data = [msgpack.packb(OBJECT)] * plan.chunk
    values = [OBJECT] * plan.chunk

    def loop(call: Any, arguments: list[Any]) -> float:
        def passed() -> int:
            for argument in arguments:
                call(argument)
            return len(arguments)

        return measure(passed, plan.seconds).ns

    return {"packb": loop(msgpack.packb, values), "unpackb": loop(msgpack.unpackb, data), "empty": loop(_nothing, values)}


def _nothing(_value: Any) -> None:
    return None


def _full_segment(plan: Plan) -> dict[str, Any]:
    """Percentiles of set on a segment that evicts at every set, for values of 100 B and 4 KiB."""
    shmcache = importlib.import_module("shmcache")
    out = {}
    for size, label in ((100, "set-evict"), (4096, "set-evict-4k")):
        engine = shmcache.open(f"anon:evict{size}://", size="16M")
        calls = plan.tail_calls // (4 if size > 100 else 1)
        keys = [f"new_user{i:07d}" for i in range(calls + 200_000)]
        value = bytes(size)
        for key in keys[calls:]:
            engine.set(key, value)
        out[label] = asdict(tail(engine.set, keys[:calls], (value,)))
        engine.close()
    return out


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Everything one peer is asked for; figures as plain numbers."""
    peer = PEERS[request["peer"]]
    plan = Plan(**request["plan"])
    context = Context(Path(request["directory"]), request["sockets"])
    context.directory.mkdir(parents=True, exist_ok=True)
    subject = peer.open(context)
    try:
        f = Field.fill(subject, plan)
        timings: dict[str, Any] = {}
        for name in WORKLOADS:
            if peer.workloads is None or name in peer.workloads:
                timing = work(f, name)
                if timing is not None:
                    timings[name] = asdict(timing)
        found: dict[str, Any] = {"name": subject.name, "notes": subject.notes, "timings": timings}
        if peer.workloads is None:
            found["tails"] = {name: asdict(t) for name, t in tails(f).items()}
        if request["peer"] == "shmcache":
            found["tails"].update(_full_segment(plan))
            found["codec"] = _codec(plan)
        if peer.two and subject.set is not None:
            found["together"] = {
                kind: [together(f, kind, n, request["two_seconds"]) for n in (1, 2)] for kind in ("mixed", "set")
            }
    finally:
        subject.close()
    return found


def main(argv: Sequence[str]) -> int:
    """Command line of the process a run starts."""
    request = json.loads(Path(argv[1]).read_text())
    Path(request["answer"]).write_text(json.dumps(run(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
