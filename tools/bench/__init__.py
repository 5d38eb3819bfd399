"""Measurement: speed beside rivals, hit ratio, memory, growth, instruction counts. Run from the repository's root.

What measures the Python package measures the installed one: the source tree has no compiled core unless it was built in
place, so the tree steps back on the module path.
"""

import sys
from pathlib import Path

__all__: list[str] = []

_ROOT = Path(__file__).resolve().parent.parent.parent
if not any((_ROOT / "shmcache").glob("_core*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
