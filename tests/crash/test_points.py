"""Crash points: nothing of them in a product build, and a short leg of what is done with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.core.build import CORE
from tests.crash.points_build import MACRO, ordinary_object


def test_nothing_is_left_in_a_product_build(tmp_path: Path) -> None:
    """The extension's object code is the same byte by byte with the lines of the points taken out."""
    bare = tmp_path / "core"
    shutil.copytree(CORE, bare)
    taken = 0
    for file in bare.glob("*.c"):
        text, n = MACRO.subn("", file.read_text())
        file.write_text(text)
        taken += n
        assert "SC_CRASH" not in text, file.name
    assert taken > 50
    assert ordinary_object(bare, tmp_path / "bare.o") == ordinary_object(CORE, tmp_path / "core.o")
