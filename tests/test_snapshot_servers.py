"""Snapshots between shared memory and servers, by the command line as a person would do it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcache
from shmcache import snapshot

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from .cli_help import on_terminal, run

VALUES: dict[str | bytes, Any] = {
    "text": "ann", "long": "ü" * 5000, "none": None, "yes": True, "real": -0.5, "count": -7, "huge": 10**40, "empty": "",
    "map": {"a": [1, b"\x00", None], "b": {"c": 1.5}}, b"\xff\x00\t ": b"\x00\xff", "k" * 300: "a key that no server takes",
    "with space\n": b"", "large": b"x" * 300_000,
}  # fmt: skip
LIFE: dict[str | bytes, int] = {"text": 1000, "map": 40 * 86400, b"\xff\x00\t ": 60}


@pytest.fixture
def full(unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    """A System V segment of one item of each kind."""
    engine = shmcache.open(f"sysv:///{unique_name()}", size="8M")
    for key, value in VALUES.items():
        engine.set(key, value, LIFE.get(key))
    try:
        yield engine
    finally:
        engine.unlink()
        engine.close()


def there_and_back(full: shmcache.Engine, url: str, tmp_path: Path, name: str) -> None:
    out, back = str(tmp_path / "out.snap"), str(tmp_path / "back.snap")
    assert run("save", f"sysv:{full.url.path}", out).code == 0
    result = run("load", url, out, "--json")
    assert (result.code, result.objects) == (0, [{"items": len(VALUES), "expired": 0, "skipped": 0, "refused": 0}])
    assert run("save", url, back).code == 0
    shmcache.open(f"posix:///{name}", size="16M", guards=2).close()
    assert run("load", f"posix:{name}", back, "--json").objects[0]["items"] == len(VALUES)
    with shmcache.open(f"posix:///{name}", mode="a") as other:
        assert set(other.keys()) == set(VALUES)
        for key, value in VALUES.items():
            assert (type(other.get(key)), other.get(key)) == (type(value), value)
            left = other.ttl(key)
            assert left is not None
            if key in LIFE:
                assert LIFE[key] - 60 < left <= LIFE[key] + 1  # memcached rounds up to whole seconds
            else:
                assert left == math.inf
        assert other.incr("count") == -6
        other.unlink()


@pytest.mark.parametrize("server", ["memcached", "redis"])
def test_servers(
    server: str, full: shmcache.Engine, tmp_path: Path, unique_name: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    """From System V into a server and back: the same keys, values, types and lifetimes."""
    address = request.getfixturevalue(f"start_{server}")()
    there_and_back(full, f"{server}:snap://{address}/{'0' if server == 'redis' else ''}?health=no", tmp_path, unique_name())


def test_remaining(
    full: shmcache.Engine, tmp_path: Path, unique_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """load --remaining gives the lifetime left when saved; without it what is over by then is left out."""
    path, url = str(tmp_path / "s.snap"), f"posix:///{unique_name()}"
    assert run("save", f"sysv:{full.url.path}", path).code == 0
    now = snapshot.unix_time()
    monkeypatch.setattr(snapshot, "unix_time", lambda: now + 5000)
    for options, expired in (((), 2), (("--remaining",), 0)):
        assert run("load", f"{url}?mode=c&size=8M", path, "--json", *options).objects[0]["expired"] == expired
        assert run("rm", url).code == 0


def test_a_bar_on_a_terminal(full: shmcache.Engine, tmp_path: Path, unique_name: Callable[[], str]) -> None:
    """save and load show how far they are on a terminal, and nothing of it elsewhere."""
    path = str(tmp_path / "s.snap")
    assert "saving" in on_terminal("save", f"sysv:{full.url.path}", path)
    url = f"posix:///{unique_name()}"
    assert "loading" in on_terminal("load", f"{url}?mode=c&size=8M", path)
    result = run("save", url, path)
    assert result.err == f"shmcache: saved {len(VALUES)} items\n"
    assert run("rm", url).code == 0
