"""The C tests of the core, without Python, under each compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.build import LEGS, Leg
from tests.core.run import run_leg

QUICK = [leg for leg in LEGS if leg.name in ("gcc -O2", "clang -O2", "gcc sanitizers")]


@pytest.mark.parametrize("program", ["facts", "random_ops"])
@pytest.mark.parametrize("leg", QUICK, ids=lambda leg: str(leg.name))
def test_core(leg: Leg, program: str, tmp_path: Path) -> None:
    """The program finds nothing wrong."""
    if leg.missing:
        pytest.skip(f"{leg.compiler} is not installed")
    result = run_leg(leg, program, ["--rounds", "1"] if program == "random_ops" else [], tmp_path)
    assert result.ok, result.text
