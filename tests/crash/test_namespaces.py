"""Short legs of `python -m tests.crash namespaces`; a check that cannot run here is skipped with what it misses."""

from __future__ import annotations

import pytest

from tests.crash.children import Missing
from tests.crash.namespaces import CHECKS, run_check


@pytest.mark.parametrize("name", CHECKS)
def test_namespaces(name: str) -> None:
    """What the check's own docstring says holds."""
    try:
        outcome = run_check(name, seed=1, seconds=0.6)
    except Missing as reason:
        pytest.skip(f"{name}: {reason}")
    assert outcome.violations == [], CHECKS[name].__doc__
