"""The figures a replay is held against, per trace: miss ratios at two total sizes, and a few of memory and write cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MIB", "TRACES", "Limit", "limits_of"]

MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """Limits of one trace at one size; `rivals` are simulated miss ratios at the first of a trace's two sizes."""

    size: int
    miss: float
    infinite: float
    rivals: tuple[tuple[str, float], ...] = ()
    utilisation: float | None = None
    amplification: float | None = None


_RIVALS = ("Belady", "ideal LRU", "memcached 1.6", "Segcache")
# trace: MiB, MiB, miss of an infinite cache, rivals at the first size, limit at either size
_MISS = {
    "scarab": (8, 16, 0.208, (0.218, 0.422, 0.424, 0.344), 0.366, 0.284),
    "orm-busy": (8, 16, 0.030, (0.061, 0.139, 0.144, 0.115), 0.119, 0.079),
    "web12": (16, 32, 0.144, (0.211, 0.367, 0.378, 0.389), 0.324, 0.256),
    "p6": (32, 64, 0.088, (0.319, 0.870, 0.730, 0.598), 0.537, 0.303),
    "webapp": (32, 64, 0.421, (0.421, 0.609, 0.569, 0.514), 0.510, 0.462),
    "tw04": (8, 16, 0.337, (0.337, 0.366, 0.367, 0.380), 0.376, 0.362),
    "overwrite": (8, 16, 0.262, (0.290, 0.531, 0.540, 0.512), 0.492, 0.435),
    "ttlflood": (16, 32, 0.170, (0.219, 0.396, 0.394, 0.404), 0.344, 0.296),
    "zipf09": (8, 16, 0.371, (0.371, 0.533, 0.526, 0.458), 0.477, 0.436),
    "session": (8, 16, 0.107, (0.107, 0.107, 0.195, 0.298), 0.153, 0.116),
    "counters": (8, 16, 0.538, (0.557, 0.646, 0.649, 0.620), 0.668, 0.633),
    "bigval": (64, 256, 0.288, (0.334, 0.626, 0.499, 0.552), 0.503, 0.369),
}
_UTILISATION = {("orm-busy", 8): 0.90, ("zipf09", 8): 0.79, ("overwrite", 16): 0.70}
_AMPLIFICATION = {("zipf09", 8): 1.2, ("overwrite", 8): 1.7, ("session", 8): 2.3}
TRACES = tuple(_MISS)


def limits_of(trace: str) -> list[Limit]:
    """The limits of a known trace, smaller size first; empty for any other."""
    if trace not in _MISS:
        return []
    small, large, infinite, rivals, miss_small, miss_large = _MISS[trace]
    return [
        Limit(
            mib * MIB, miss, infinite, tuple(zip(_RIVALS, rivals, strict=True)) if mib == small else (),
            _UTILISATION.get((trace, mib)), _AMPLIFICATION.get((trace, mib)),
        )
        for mib, miss in ((small, miss_small), (large, miss_large))
    ]  # fmt: skip
