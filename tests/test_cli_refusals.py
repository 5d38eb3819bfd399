"""What the command line says of targets and arguments that are wrong: one line that names the thing, a code, no traceback."""

# ruff: noqa: F811
from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.output import Code

from .cli_help import cache, name_of, posix, run  # noqa: F401
from .shm_help import run_child

LOOK = ("info", "stats", "dump", "guards", "check", "top", "distribution", "bigkeys", "web")
NOBODY = 65534


def said(code: Code, *args: str) -> str:
    """The message of a command that must end with `code`, one line, and nothing on stdout."""
    result = run(*args)
    assert (result.code, result.out) == (code, ""), (args, result)
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("shmcache: ")
    assert "Traceback" not in result.err
    assert not result.err.startswith("shmcache: [Errno")
    return result.err


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """A directory of files that are no segments."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 5000)
    (tmp_path / "core").write_bytes(b"\x7fELF" + bytes(9000))
    with (tmp_path / "huge").open("wb") as f:
        f.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(("name", "code", "words"), [
    ("dir", Code.USAGE, "a regular file wanted, a directory found"), ("pipe", Code.USAGE, "a regular file wanted, a pipe found"),
    ("absent", Code.NO_SEGMENT, "No such file or directory"), ("empty", Code.DAMAGED, "0 bytes"),
    ("short", Code.DAMAGED, "magic"), ("core", Code.USAGE, "core files hold no segments"), ("huge", Code.DAMAGED, "magic"),
])  # fmt: skip
def test_files_that_are_no_segment(name: str, code: Code, words: str, files: Path) -> None:
    """Each command names the file and what it found in place of a segment."""
    target = str(files / name)
    for command in LOOK:
        if code == Code.DAMAGED and command in ("info", "check"):
            result = run(command, target)
            assert (result.code, words in result.out) == (code, True)
            continue
        text = said(code, command, target)
        assert words in text
        assert target in text


@pytest.mark.parametrize("target", ["none-such", "posix:none-such", "sysv:none-such", "@2147483000", "", "posix:", "x" * 300])
def test_absent_segments(target: str) -> None:
    """A segment that does not exist is named, with where it was looked for."""
    for command in LOOK:
        assert target.lstrip("@") in said(Code.NO_SEGMENT, command, target)


@pytest.mark.parametrize("target", ["posix:///", "posix://host/x", "anon://", "nosuch://x"])
def test_urls_that_name_nothing(target: str) -> None:
    """A URL that cannot name a segment says which part is wrong."""
    assert "wanted" in said(Code.USAGE, "get", target, "k") or "known are" in said(Code.USAGE, "get", target, "k")


@pytest.mark.parametrize("args", [
    ("report", "{}", "--interval", "0", "-o", "{files}/dir"), ("save", "{}", "{files}/dir"), ("load", "{}", "{files}/dir"),
    ("report", "{}", "--interval", "0", "-o", "{files}/none/r.html"), ("save", "{}", "{files}/none/s.snap"),
    ("load", "{}", "{files}/none"),
])  # fmt: skip
def test_files_to_write_and_read(args: tuple[str, ...], files: Path, posix: shmcache.Engine) -> None:
    """A file that cannot be opened is named as it was given; nothing is left beside it."""
    shell = [arg.format(name_of(posix), files=files) for arg in args]
    before = sorted(os.listdir(files))
    text = said(Code.USAGE if shell[-1].endswith("dir") else Code.NO_SEGMENT, *shell)
    assert f"{shell[-1]}: " in text
    assert sorted(os.listdir(files)) == before


@pytest.mark.parametrize(("kind", "value", "wanted"), [
    ("json", "{s3cr3t", "JSON"), ("int", "s3cr3t", "a whole number"), ("float", "s3cr3t", "a number"),
    ("bool", "s3cr3t", "true or false"),
])  # fmt: skip
def test_a_value_is_not_repeated(kind: str, value: str, wanted: str, posix: shmcache.Engine) -> None:
    """A value that does not read as its type is not in the message: it may be a password."""
    text = said(Code.USAGE, "set", name_of(posix), "k", value, "--type", kind)
    assert f"value: {wanted} wanted" in text
    assert "s3cr3t" not in text


def test_two_options_that_exclude_each_other(posix: shmcache.Engine) -> None:
    """Options that mean nothing together are a usage error."""
    assert "both found" in said(Code.USAGE, "stats", name_of(posix), "--lifetimes", "--watch", "1")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_users_segment(cache: shmcache.Engine) -> None:
    """Every command refuses another user's segment with 4, naming both users; info shows what everybody may know."""
    name = f"{cache.url.scheme}:{name_of(cache)}"
    for command in ("ls", "info", "stats"):
        run(command, name)  # what is imported late is imported as root: this user may not read where it lies

    def as_nobody() -> None:
        os.chdir("/")
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for command in (*LOOK[1:], "clean", "clear"):
            text = said(Code.REFUSED, command, name)
            assert f"uid {NOBODY} wanted" in text
            assert "of uid 0 found" in text
        for args in (("get", "k"), ("ttl", "k"), ("set", "k", "v"), ("delete", "k"), ("incr", "k"), ("touch", "k")):
            assert "of uid 0 found" in said(Code.REFUSED, args[0], name, *args[1:])
        assert "uid 0" in said(Code.REFUSED, "rm", "--force", name)
        result = run("info", name, "--json")
        assert (result.code, result.objects[0]["status"], result.objects[0]["owner"]) == (Code.REFUSED, "unreadable", "root")

    run_child(as_nobody)
    assert run("get", name, "user:1").out == "ann\n"


def test_a_port_that_is_taken(posix: shmcache.Engine) -> None:
    """A port that is in use is named."""
    import socket

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert f"{port} found: Address already in use" in said(Code.OTHER, "web", name_of(posix), "--port", str(port))


@pytest.mark.parametrize("target", ["memcached://127.0.0.1:1/?health=no", "redis://127.0.0.1:1/0?health=no"])
def test_a_server_that_is_down(target: str) -> None:
    """A server that does not answer is named, with code 8, and no line of names is printed before."""
    text = said(Code.GONE, "get", target, "k")
    assert "127.0.0.1:1" in text
    assert "127.0.0.1:1" in said(Code.GONE, "dump", target)


@pytest.mark.parametrize("args", [("ls",), ("dump", "{}"), ("report", "{}", "--interval", "0", "-o", "-"), ("--help",), ("man",)])
def test_a_disk_that_is_full(args: tuple[str, ...], posix: shmcache.Engine) -> None:
    """Output that cannot be written ends with 9 and one line."""
    shell = [sys.executable, "-m", "shmcache", *(arg.format(name_of(posix)) for arg in args)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(shell, stdout=full, stderr=subprocess.PIPE, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (Code.OTHER, "shmcache: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, posix: shmcache.Engine) -> None:
    """A command whose streams were closed by its parent does its work; what it would have written there is dropped."""
    for args in (f"dump {name_of(posix)}", f"set {name_of(posix)} closed '{closed}'"):
        done = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m shmcache {args} {closed}"], capture_output=True, text=True, cwd="/", check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), args
    assert run("get", name_of(posix), "closed").out == f"{closed}\n"


def test_every_read_command_is_listed(unique_name: Callable[[], str]) -> None:
    """The commands tried here are those that --help says only look."""
    text = " ".join(run("--help").out.split())
    named = text.partition("only look (")[2].partition(")")[0].split()
    assert set(named) == {*LOOK, "ls", "report", "health", "get", "ttl", "save"}
