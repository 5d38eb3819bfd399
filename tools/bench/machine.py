"""What a run was made on: processor, kernel, versions, and how much others used of the machine meanwhile."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from . import native

__all__ = ["Watch", "describe", "floors", "version_of"]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return f"{len(names) or os.cpu_count()} x {names[0] if names else platform.machine()}"


def version_of(package: str) -> str:
    """Version of an installed Python package, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def describe() -> dict[str, str]:
    """Processor, memory, kernel, interpreter, huge-page setting."""
    memory = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0")
    return {
        "processor": _processor(),
        "memory": f"{int(memory) >> 10} MiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()})",
        "transparent huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "huge pages of shared memory": _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "msgpack": version_of("msgpack"),
    }


def floors() -> dict[str, float]:
    """Figures of floor.c in ns; empty where no compiler is."""
    try:
        done = subprocess.run([str(native.build("floor"))], capture_output=True, text=True, check=True)
    except (native.CompilerMissing, RuntimeError, subprocess.CalledProcessError):
        return {}
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _ticks() -> tuple[int, int]:
    """Clock ticks all processors were busy, and ticks taken by the hypervisor."""
    values = [int(v) for v in _read("/proc/stat").splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, soft, steal = values
    return user + nice + system + irq + soft, steal


def _own_seconds(pids: list[int]) -> float:
    """Processor time of this process, its finished children, and the processes named."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    for pid in pids:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if len(fields) > 12:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Watch:
    """Between `start` and `stop`: how much of the machine other processes had."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._at, self._ticks, self._own, self._load = time.time(), _ticks(), _own_seconds(self.pids), os.getloadavg()

    def stop(self) -> dict[str, Any]:
        """Seconds, shares of all processors in percent, load before and after."""
        seconds = max(time.time() - self._at, 0.01)
        busy, steal = (now - then for now, then in zip(_ticks(), self._ticks, strict=True))
        hertz, processors = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
        own = _own_seconds(self.pids) - self._own
        return {
            "seconds": round(seconds, 1),
            "own percent": round(100 * own / seconds / processors, 1),
            "others percent": round(100 * max(busy / hertz - own, 0.0) / seconds / processors, 1),
            "stolen percent": round(100 * steal / hertz / seconds / processors, 1),
            "load before": round(self._load[0], 2),
            "load after": round(os.getloadavg()[0], 2),
        }
