"""A plot of a run: bars of ns a call on a logarithmic scale, one group per workload.

    python -m tools.bench.plot bench.json bench.svg
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shmcache.bench import WORKLOADS

from .native import HERE

__all__ = ["draw", "main"]


def draw(figures: Path, target: Path) -> str:
    """Write an SVG or PNG, by the target's suffix; says what it did, or that matplotlib is missing.

    A process of its own draws: matplotlib keeps its font files open.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return f"plot {target}: left out, Python package matplotlib not installed"
    command = [sys.executable, "-m", "tools.bench.plot", str(figures.resolve()), str(target.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    if done.returncode != 0:
        return f"plot {target}: left out, {(done.stderr.strip() or 'no words').splitlines()[-1]}"
    return f"plot {target}: written"


def main(argv: Sequence[str]) -> int:
    """Command line of the drawing process."""
    _draw(json.loads(Path(argv[1]).read_text()), Path(argv[2]))
    return 0


def _draw(data: dict[str, Any], target: Path) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    rounds = data["rounds"]
    peers = list(dict.fromkeys(peer for made in rounds for peer in made))
    figure, axes = pyplot.subplots(figsize=(13, 5.5))
    width = 0.86 / max(len(peers), 1)
    for place, peer in enumerate(peers):
        at, heights, below, above = [], [], [], []
        for group, name in enumerate(WORKLOADS):
            found = [made[peer]["timings"][name]["ns"] for made in rounds if name in made.get(peer, {}).get("timings", {})]
            if not found:
                continue
            at.append(group + (place - len(peers) / 2) * width)
            heights.append(median(found))
            below.append(median(found) - min(found))
            above.append(max(found) - median(found))
        axes.bar(at, heights, width, yerr=[below, above], label=peer, error_kw={"elinewidth": 0.7})
    axes.set_yscale("log")
    axes.set_ylabel("ns a call, median of rounds")
    axes.set_xticks(range(len(WORKLOADS)), list(WORKLOADS), rotation=20)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(ncols=6, fontsize=8, loc="upper left")
    axes.set_title(f"{data['machine']['processor']}, {data['machine']['python'].split(' (')[0]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
