"""The command line on terminals and in pipes, its help, and how it writes keys and values."""

# ruff: noqa: F811
from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shmcache
from shmcache import inspect

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from rich.console import Console

from shmcache.cli.output import EXIT_CODES, Code, escape, human_seconds, json_value, unescape
from shmcache.cli.top import OTHER_LINES, _frame, _press, _Screen
from shmcache.distribution import survey
from shmcache.inspect import View

from .cli_help import name_of, on_terminal, posix, run  # noqa: F401


def test_exit_codes_are_in_help() -> None:
    """Every exit code is in --help, also in each command's."""
    for args in (("--help",), ("dump", "--help"), ("rm", "--help")):
        text = re.sub(r"\s+", " ", run(*args).out)
        for code, meaning in EXIT_CODES.items():
            assert f"{code.value} {meaning}" in text


def test_manual_page() -> None:
    """The manual page names every command, option and exit code, and man(1) finds nothing wrong with it."""
    result = run("man")
    commands = re.findall(r'^\.SS "([a-z]+)"$', result.out, re.MULTILINE)
    assert {"ls", "info", "stats", "dump", "check", "guards", "get", "set", "rm", "gc", "save", "load", "top", "report"} <= set(
        commands
    )
    assert r"\fB\-\-match\fR" in result.out
    assert all(f".B {code.value}\n" in result.out for code in EXIT_CODES)
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-T", "ascii"], input=result.out, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""


def test_completion_of_segment_names(posix: shmcache.Engine) -> None:
    """The shell completes commands and segment names."""
    env = {
        **os.environ,
        "_SHMCACHE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"shmcache info {name_of(posix)[:-1]}",
        "COMP_CWORD": "2",
    }
    done = subprocess.run([sys.executable, "-m", "shmcache"], capture_output=True, text=True, cwd="/", env=env, check=False)
    assert name_of(posix) in done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Each shell has a script that asks the program; what bash makes of it completes commands."""
    env = {**os.environ, "_SHMCACHE_COMPLETE": f"source_{shell}"}
    program = [sys.executable, "-c", "from shmcache.cli import main; main()"]
    script = subprocess.run(program, capture_output=True, text=True, cwd="/", env=env, check=True).stdout
    assert f"_SHMCACHE_COMPLETE=complete_{shell}" in script
    if shell == "bash":
        ask = 'COMP_WORDS=(shmcache distr); COMP_CWORD=1; _shmcache_completion "$0"; echo "${COMPREPLY[@]}"'
        command = str(Path(sys.executable).with_name("shmcache"))
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}", command], capture_output=True, text=True, cwd="/", check=True)
        assert done.stdout.split() == ["distribution"]


def test_report(posix: shmcache.Engine, tmp_path: Path) -> None:
    """report writes a page of mode 0600, or prints it."""
    page = tmp_path / "r.html"
    assert run("report", name_of(posix), "-o", str(page), "--interval", "0").code == 0
    assert page.stat().st_mode & 0o777 == 0o600
    assert run("report", name_of(posix), "-o", "-", "--interval", "0").out.startswith("<!doctype html>")


def test_a_closed_pipe_is_quiet(posix: shmcache.Engine) -> None:
    """A reader that goes away ends the command with 141 and no message."""
    with shmcache.open(posix.url, mode="a") as engine:
        for i in range(2000):
            engine.set(f"key:{i:060}", i)
    shell = [sys.executable, "-m", "shmcache", "dump", name_of(posix)]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == Code.PIPE


def test_a_terminal_gets_a_table(posix: shmcache.Engine) -> None:
    """On a terminal dump prints a table with colours within its width; the sizes are readable, the keys escaped."""
    text = on_terminal("dump", name_of(posix), "--values")
    assert "\x1b[1m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 90
    assert "never" in plain
    assert r"esc\x1b[31m" in plain
    assert "\x1b[31m" not in text


def test_no_color(posix: shmcache.Engine) -> None:
    """NO_COLOR takes the colours away."""
    text = on_terminal("guards", name_of(posix), NO_COLOR="1")
    assert "free" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


def test_top_without_a_terminal(posix: shmcache.Engine) -> None:
    """top prints a line of rates an interval where there is no terminal."""
    (row,) = run("top", name_of(posix), "--count", "1", "--interval", "0.1", "--json").objects
    assert (row["hits"], row["items"], row["guards_held"]) == (0, 5, 0)


def test_top_on_a_terminal(posix: shmcache.Engine) -> None:
    """top shows rates, fill, guards and the most used keys on a screen of its own, and gives the old one back."""
    text = on_terminal("top", name_of(posix), "--count", "2", "--interval", "0.1")
    assert "hit ratio" in text
    assert "guards  all free" in text
    assert "user:2" in text
    assert text.index("\x1b[?1049h") < text.index("\x1b[?1049l")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (60, 16)])
def test_top_fills_the_screen(width: int, height: int, posix: shmcache.Engine) -> None:
    """A frame has room for the footer below the keys, whatever the size of the screen, and no line is wrapped."""
    with shmcache.open(posix.url, mode="a") as engine:
        for i in range(100):
            engine.set(f"key:{i}", "x" * i)
    console = Console(width=width, height=height, file=io.StringIO())
    with View(inspect.locate(name_of(posix))) as view:  # type: ignore[arg-type]
        screen = _Screen(height=height, glob="key:*")
        seen, stats = survey(view, top=200, sample=50), view.stats()
        lines = console.render_lines(_frame(view, stats, stats, 1.0, seen, screen), pad=False)
    text = ["".join(segment.text for segment in line).rstrip() for line in lines]
    assert len(text) == height - 1
    assert text[-1].startswith("q quit   s most used/largest")
    assert text[0] == f"posix:{name_of(posix)}  ok"
    assert sum("key:" in line for line in text[:-1]) == height - OTHER_LINES


def test_top_keys() -> None:
    """s switches the key table, f takes a filter up to Enter, q ends."""
    screen = _Screen()
    assert all(_press(screen, key) for key in "sfus*")
    assert (screen.hot, screen.typing) == (False, "us*")
    assert _press(screen, "\n")
    assert (screen.glob, screen.typing) == ("us*", None)
    assert not _press(screen, "q")


def test_missing_packages_are_named(tmp_path: Path) -> None:
    """Without typer the command says what to install and ends with 2."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    shell = [sys.executable, "-m", "shmcache", "ls"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(shell, capture_output=True, text=True, cwd="/", env=env, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'shmcache[cli]'" in done.stderr


def test_library_does_not_import_the_command_line() -> None:
    """import shmcache loads neither typer nor rich."""
    code = "import sys, shmcache; print([m for m in ('typer', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "key", ["plain", "ta\tb", "back\\slash", "\x1b[0m", "ü€😀", "\u202e\x85", b"\xff\xfe\\x", b"ok", "\\xff"]
)
def test_escape_is_reversible(key: str | bytes) -> None:
    """unescape gives back the bytes of what escape printed, and what it printed is printable."""
    text = escape(key)
    assert text.isprintable()
    assert unescape(text) == (key if isinstance(key, bytes) else key.encode())


def test_json_values() -> None:
    """What JSON cannot say has a form all the same."""
    value = json_value({1: (b"\x00", float("nan")), "s": {2}, "t": 3 + 4j})
    assert json.loads(json.dumps(value)) == {"1": [{"base64": "AA=="}, "nan"], "s": [2], "t": "(3+4j)"}


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "never"), (0.25, "0.2s"), (59, "59s"), (61.5, "1m01s"), (3600, "1h00m"), (90000, "1d01h"), (-61, "-1m01s"),
])  # fmt: skip
def test_human_seconds(seconds: float | None, text: str) -> None:
    """Lifetimes are shown in two units at most."""
    assert human_seconds(seconds) == text
