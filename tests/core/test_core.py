"""The C tests of the core, without Python, under each compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.build import LEGS, Leg
from tests.core.run import run_leg

QUICK = [
    pytest.param(leg, program, id=f"{leg.name}-{program}")
    for leg in LEGS
    for program in ("facts", "random_ops")
    if (leg.name, program) == ("gcc -O2 scalar", "facts") or leg.name in ("gcc -O2", "clang -O2", "gcc sanitizers")
]


@pytest.mark.parametrize(("leg", "program"), QUICK)
def test_core(leg: Leg, program: str, tmp_path: Path) -> None:
    """The program finds nothing wrong."""
    if leg.missing:
        pytest.skip(f"{leg.compiler} is not installed")
    result = run_leg(leg, program, ["--rounds", "1"] if program == "random_ops" else [], tmp_path)
    assert result.ok, result.text
