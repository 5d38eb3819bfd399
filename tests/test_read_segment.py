"""The C program that reads segments by layout.h alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcache
from shmcache.catalog import Found
from shmcache.inspect import locate

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "read_segment.c"

if shutil.which("cc") is None or not SOURCE.exists():
    pytest.skip("no C compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("c") / "read_segment"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "shmcache" / "_core")]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(path)], check=True)
    return str(path)


def listed(program: str, what: str) -> dict[str, tuple[str, int, str]]:
    done = subprocess.run([program, what], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len({row[0] for row in rows}) == len(rows)
    return {key: (kind, int(size), left) for key, kind, size, left in rows}


@pytest.mark.parametrize("scheme", ["posix", "sysv"])
def test_it_lists_what_lives(scheme: str, program: str, unique_name: Callable[[], str]) -> None:
    """The program finds every live item of either form, small and large, with type, size and lifetime, and no expired one."""
    engine = shmcache.open(f"{scheme}:///{unique_name()}", size="8M", guards=4)
    try:
        engine.set("text", "abc", ttl=100)
        engine.set(b"\xff\\", b"12")
        engine.set("number", 7)
        engine.set("large", b"x" * 300_000)
        engine.set("k" * 60_000, [1])
        engine.set("over", 1, expire_at=1)
        for i in range(3000):
            engine.set(f"many:{i}", i)
        engine.delete("many:7")
        found = locate(f"{scheme}:{engine.url.path}")
        assert isinstance(found, Found)
        rows = listed(program, f"/dev/shm/shmcache.{found.name}" if scheme == "posix" else f"@{found.shm_id}")
    finally:
        engine.unlink()
        engine.close()
    assert rows["number"] == ("int", 8, "-")
    assert rows["text"][:2] == ("str", 3)
    assert 90_000 < int(rows["text"][2]) <= 100_001
    assert rows[r"\xff\x5c"] == ("bytes", 2, "-")
    assert rows["large"] == ("bytes", 300_000, "-")
    assert rows["k" * 60_000] == ("codec", 2, "-")
    assert {f"many:{i}" for i in range(3000) if i != 7} < set(rows)
    assert not {"over", "many:7"} & set(rows)


def test_cleared_items_are_gone(program: str, unique_name: Callable[[], str]) -> None:
    """After clear() the program lists what was stored since."""
    engine = shmcache.open(f"posix:///{unique_name()}", size="1M")
    try:
        engine.set("old", 1)
        engine.clear()
        engine.set("new", 2)
        assert list(listed(program, f"/dev/shm/shmcache.{engine.url.path}")) == ["new"]
    finally:
        engine.unlink()
        engine.close()


def test_a_copy_and_other_files(program: str, unique_name: Callable[[], str], tmp_path: Path) -> None:
    """A copy is read; a cut or foreign file is refused with a reason."""
    engine = shmcache.open(f"posix:///{unique_name()}", size="1M")
    try:
        engine.set("k", 1)
        data = Path(f"/dev/shm/shmcache.{engine.url.path}").read_bytes()
    finally:
        engine.unlink()
        engine.close()
    copy = tmp_path / "copy.bin"
    copy.write_bytes(data)
    assert list(listed(program, str(copy))) == ["k"]
    for bad in (data[:500_000], b"x" * 8192, data[:100], b"", data[:8] + b"\x63" + data[9:]):
        copy.write_bytes(bad)
        done = subprocess.run([program, str(copy)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr
    assert subprocess.run([program], capture_output=True, check=False).returncode == 2
