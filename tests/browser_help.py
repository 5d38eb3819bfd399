"""Pictures of pages, taken by a headless browser."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "google-chrome")


@dataclass
class Picture:
    width: int
    height: int
    corner: str  #: colour of the pixel at the top left, as #rrggbb
    data: bytes


def browser() -> str:
    """A browser on the PATH; skips where there is none, fails where everything is asked for."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        reason = f"no headless browser: one of {', '.join(PROGRAMS)} wanted on the PATH"
        if os.environ.get("SHMCACHE_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def picture(url: str, directory: Path, *, dark: bool = False, width: int = 1180, height: int = 2000) -> Picture:
    """What the browser shows of a page; `directory` takes the browser's profile and the file."""
    to, scheme = directory / "picture.png", 0 if dark else 1
    subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/profile", "--hide-scrollbars",
         f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={to}", url],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    data = to.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    w, h = struct.unpack_from(">II", data, 16)
    at, pixels = 8, b""
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        pixels += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    first = zlib.decompressobj().decompress(pixels, 4)  # the filter byte, then the first pixel as it is, whatever the filter
    return Picture(w, h, f"#{first[1:4].hex()}", data)
