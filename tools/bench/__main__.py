"""Compares shmcache with a private dict and with other caches, all in one run.

    python -m tools.bench [--peers dict,shmcache,...] [--rounds 5] [--quick] [--out DIRECTORY]

Every round measures every peer in a fresh process of its own; ratios are taken within a round, then their median. Peers
whose package or server is missing are named and left out. The report, in Markdown, goes to stdout; --out writes it with
the figures as JSON and a plot. Needs shmcache and the peers' packages in the interpreter that runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shmcache.bench import Plan

from . import machine, plot, report, servers
from .native import HERE
from .peers import PEERS, UWSGI_CACHE

ROOT = HERE.parent.parent
QUICK = Plan(seconds=0.05, tail_calls=50_000, chunk=10_000)


def _launcher(peer: str) -> str:
    """The program a peer runs inside of, or an empty string when it is missing."""
    name = PEERS[peer].launcher
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or ""


def _missing(peer: str) -> str:
    """Why a peer cannot run here; empty if it can."""
    needs = [name for name in PEERS[peer].needs if importlib.util.find_spec(name) is None]
    if needs:
        return f"Python package {', '.join(needs)} not installed"
    if PEERS[peer].launcher and not _launcher(peer):
        return f"program {PEERS[peer].launcher} not found"
    return ""


def _command(peer: str, request: Path) -> list[str]:
    if not PEERS[peer].launcher:
        return [sys.executable, "-m", "tools.bench.worker", str(request)]
    return [
        _launcher(peer), "--cache2", UWSGI_CACHE, "--pythonpath", str(ROOT), "--home", sys.prefix,
        "--pyrun", str(HERE / "inside.py"), "--pyargv", str(request),
    ]  # fmt: skip


def _ask(peer: str, work: Path, sockets: dict[str, str], plan: Plan, two_seconds: float) -> dict[str, Any]:
    """One peer in a fresh process. Raises: RuntimeError with the end of what it printed."""
    own = work / peer
    request, answer = work / "request.json", work / "answer.json"
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps({
        "peer": peer, "directory": str(own), "sockets": sockets, "plan": asdict(plan), "two_seconds": two_seconds,
        "answer": str(answer),
    }))  # fmt: skip
    done = subprocess.run(_command(peer, request), capture_output=True, text=True, cwd=ROOT)
    shutil.rmtree(own, ignore_errors=True)
    if not answer.exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(f"peer {peer}: an answer wanted, exit status {done.returncode} found:\n{tail}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated: " + ", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a third of the time, more noise")
    parser.add_argument("--out", type=Path, help="directory for bench.json, bench.md and bench.svg")
    args = parser.parse_args(argv)
    unknown = [name for name in args.peers.split(",") if name not in PEERS]
    if unknown:
        parser.error(f"peers: some of {', '.join(PEERS)} wanted, {', '.join(unknown)} found")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every limit is kept, 1 when not."""
    args = _arguments(argv)
    plan, two_seconds = (QUICK, 0.3) if args.quick else (Plan(), 0.5)
    asked = args.peers.split(",")
    missing = {name: why for name in asked if (why := _missing(name))}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    running: dict[str, servers.Server] = {}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shmcache-bench-", dir=memory) as directory:
        work = Path(directory)
        try:
            for name in sorted({PEERS[p].server for p in asked if PEERS[p].server and p not in missing}):
                try:
                    running[name] = servers.start(name, work)
                except (FileNotFoundError, RuntimeError) as e:
                    missing.update({p: str(e) for p in asked if PEERS[p].server == name})
            sockets = {name: server.socket for name, server in running.items()}
            floors = machine.floors()
            watch = machine.Watch([server.process.pid for server in running.values()])
            for number in range(args.rounds):
                made: dict[str, Any] = {}
                for peer in asked:
                    if peer in missing:
                        continue
                    print(f"round {number + 1} of {args.rounds}: {peer}", file=sys.stderr)
                    try:
                        made[peer] = _ask(peer, work, sockets, plan, two_seconds)
                        if peer == "shmcache-semaphore":
                            made[peer]["floors"] = machine.floors()
                    except RuntimeError as e:
                        missing[peer] = str(e)
                rounds.append(made)
            noise = watch.stop()
        finally:
            for server in running.values():
                server.stop()
    data: dict[str, Any] = {
        "machine": machine.describe(), "noise": noise, "floors": floors, "missing": missing, "plan": asdict(plan),
        "versions": {p: {n: machine.version_of(n) for n in PEERS[p].version} for p in asked if p not in missing},
        "servers": {n: f"{s.version}; {s.settings}" for n, s in running.items()}, "rounds": rounds,
    }  # fmt: skip
    page, kept = report.markdown(data)
    print(page)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
        (args.out / "bench.md").write_text(page)
        print(plot.draw(args.out / "bench.json", args.out / "bench.svg"), file=sys.stderr)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
