"""Harnesses that kill, stop, single-step and scribble. Run from the repository root; `shmcache` is the installed one.

`python -m` puts the root first, where the package lies without its extension; here it goes last.
"""

import sys
from pathlib import Path

_root = str(Path(__file__).resolve().parents[2])
sys.path[:] = [p for p in sys.path if p not in ("", _root)] + [_root]
