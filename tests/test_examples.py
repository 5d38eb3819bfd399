"""Whole runs of the examples, over every form: their figures, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import replay_trace

import shmcache

EXAMPLES = Path(replay_trace.__file__).parent
FORMS = ("memory", "posix", "sysv", "anon")

# -- whole runs --------------------------------------------------------------------------------------------


def start(name: str, *options: str, folder: Path) -> subprocess.Popen[str]:
    """An example as a process group of its own, with its temporary files in `folder`."""
    command = [sys.executable, str(EXAMPLES / name), *options]
    environment = os.environ | {"TMPDIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """stdout and stderr of a process that must end with `status`, and leave nothing of its group behind."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, err
    return out, err


def run_json(name: str, *options: str, folder: Path) -> dict[str, Any]:
    found = json.loads(finish(start(name, *options, "--json", folder=folder))[0])
    assert isinstance(found, dict)
    assert list(folder.iterdir()) == []
    return found


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Poll until `condition`; the process ending first is a failure."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits to be collected has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def segments(name: str) -> list[str]:
    """What of a segment is left in /dev/shm."""
    return [found.name for found in Path("/dev/shm").iterdir() if name in found.name]


SMALL = ("--users", "40", "--requests", "800")


@pytest.mark.parametrize("form", FORMS)
def test_password_cache(form: str, tmp_path: Path) -> None:
    """Four workers accept every right password; a shared cache saves 80 % of the queries."""
    found = run_json("password_cache.py", "--form", form, "--nonce-life", "0.2", *SMALL, folder=tmp_path)
    assert (found["form"], found["workers"], found["requests"]) == (form, 4, 800)
    assert found["accepted"] + found["rejected_wrong_password"] == 800
    assert found["failed"] == found["timeouts"] == found["cache_errors"] == found["worker_deaths"] == 0
    assert found["rejected_wrong_password"] > 0
    assert found["password_changes"] == 2
    assert len(found["messages_per_worker"]) == 4
    assert found["without"]["old_accepted"] == found["without"]["old_accepted_after_new"] == 0
    if found["retransmissions"] == found["without"]["retransmissions"] == 0:
        assert found["db_queries_without"] == 800
        assert found["db_queries_with"] + found["cache_hits"] == 800
    if form == "memory":
        assert 40 < found["db_queries_with"] <= found["db_queries_without"]
    else:
        assert found["saved_percent"] >= 80
        assert found["old_accepted"] == 2
        assert found["old_accepted_after_new"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_lost_datagrams(form: str, tmp_path: Path) -> None:
    """With 3 % of the datagrams lost all requests end; workers with a shared cache judge each once."""
    options = ("--loss", "3", "--users", "60", "--requests", "300")
    found = run_json("password_cache.py", "--form", form, *options, folder=tmp_path)
    assert found["accepted"] + found["rejected"] == 300
    assert found["retransmissions"] > 0
    if form != "memory" and found["cache_errors"] == found["without"]["cache_errors"] == 0:
        assert found["absorbed"] > 0
        assert found["db_queries_without"] == 300
        assert found["db_queries_with"] + found["cache_hits"] == 300


def test_table(tmp_path: Path) -> None:
    """Without --json the figures come as a table."""
    out, _ = finish(start("password_cache.py", "--form", "memory", *SMALL, folder=tmp_path))
    for title in (
        "requests",
        "accepted",
        "rejected",
        "database queries",
        "requests per second",
        "median",
        "p99",
    ):
        assert title in out
    assert "%" in out.splitlines()[-1]


@pytest.mark.parametrize("form", FORMS)
def test_worker_killed(form: str, tmp_path: Path) -> None:
    """A killed worker is named on stderr and replaced, and every request still gets its answer."""
    process = start("password_cache.py", "--form", form, "--requests", "4000", "--json", folder=tmp_path)
    wait_for(lambda: len(children(process.pid)) == 5, process)
    os.kill(victim := children(process.pid)[0], signal.SIGKILL)
    out, err = finish(process)
    found = json.loads(out)
    assert f"(process {victim}) ended: SIGKILL" in err
    assert found["worker_deaths"] == 1
    assert found["accepted"] + found["rejected"] == 4000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(form: str, number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C or SIGTERM ends the run with 128 + n and leaves no process, file or segment."""
    process = start("password_cache.py", "--form", form, "--requests", "100000", folder=tmp_path)
    wait_for(lambda: len(children(process.pid)) == 5, process)
    started, (folder,) = children(process.pid), tmp_path.iterdir()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it: to the whole group
    else:
        process.send_signal(number)
    _, err = finish(process, 128 + number)
    assert err == f"ended by {number.name}\n"
    assert all(gone(pid) for pid in started)
    assert list(tmp_path.iterdir()) == []
    assert segments(folder.name) == []
    if form in ("posix", "sysv"):
        with pytest.raises((OSError, shmcache.ShmCacheError)):
            shmcache.open(f"{form}:///{folder.name}", mode="a")


def test_parent_killed(tmp_path: Path) -> None:
    """Workers and load generator end by themselves when their parent is killed."""
    process = start("password_cache.py", "--form", "memory", "--requests", "100000", folder=tmp_path)
    wait_for(lambda: len(children(process.pid)) == 5, process)
    started = children(process.pid)
    process.kill()
    process.wait()
    while not all(gone(pid) for pid in started):
        time.sleep(0.01)
    finish(process, -signal.SIGKILL)


def test_deadline(tmp_path: Path) -> None:
    """A run that does not end in time is given up with status 1 and nothing left."""
    options = ("--form", "memory", "--requests", "100000", "--deadline", "0.3")
    _, err = finish(start("password_cache.py", *options, folder=tmp_path), 1)
    assert "deadline: an end within 0.3 s wanted" in err
    assert list(tmp_path.iterdir()) == []


# -- replay ------------------------------------------------------------------------------------------------

Row = tuple[int, int, int, int, int]


def write_trace(path: Path, rows: list[Row]) -> Path:
    """SCT1 of (second, key, size, ttl, operation)."""
    n, keys = len(rows), len({row[1] for row in rows})
    columns = [struct.pack(f"<{n}I", *(row[place] for row in rows)) for place in range(4)]
    operations, lengths = bytes(row[4] for row in rows), bytes([20] * n)
    path.write_bytes(struct.pack("<4sIQ", b"SCT1", keys, n) + b"".join(columns) + operations + lengths)
    return path


def make_rows(n: int = 9000) -> list[Row]:
    """Requests over 50 s with lifetimes of 2 s or none; each key is read and written, or a counter."""
    rng, rows, numbers = random.Random(7), [], dict[int, int]()
    for i in range(n):
        key = min(int(rng.paretovariate(0.7)), 900)
        key = numbers.setdefault(key, len(numbers))
        operation = 3 if key % 5 == 4 else rng.choices((0, 1, 2), (8, 1, 1))[0]
        rows.append((i * 50 // n, key, rng.randint(1, 300), rng.choice((0, 2)), operation))
    return rows


def expected_misses(rows: list[Row]) -> tuple[int, int]:
    """Reads and misses with an unlimited cache."""
    deadlines: dict[int, float] = {}
    reads = misses = 0
    for second, key, _, ttl, operation in rows:
        deadline = second + ttl if ttl else float("inf")
        hit = deadlines.get(key, -1) > second
        reads += operation in (0, 3)
        misses += operation in (0, 3) and not hit
        if operation == 2:
            deadlines.pop(key, None)
        elif operation == 1 or not hit:
            deadlines[key] = deadline
    return reads, misses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [1, 3])
def test_replay(form: str, workers: int, tmp_path: Path) -> None:
    """Split by keys, any number of workers misses what one unlimited cache does on the trace's clock."""
    rows = make_rows()
    trace = write_trace(tmp_path / "small.sct", rows)
    (folder := tmp_path / "tmp").mkdir()
    options = (str(trace), "--form", form, "--workers", str(workers), "--size", "16M", "--lead", "0")
    found = run_json("replay_trace.py", *options, folder=folder)
    assert (found["requests"], found["clock"], found["evicted"], found["refused"]) == (9000, "logical", 0, 0)
    assert (found["reads"], found["misses"]) == expected_misses(rows)
    assert found["miss_ratio"] == round(found["misses"] / found["reads"], 4)


def test_replay_split_requests(tmp_path: Path) -> None:
    """Split by requests, all requests of the limit are replayed, each by one worker."""
    rows = make_rows()
    trace = write_trace(tmp_path / "small.sct", rows)
    (folder := tmp_path / "tmp").mkdir()
    options = (str(trace), "--url", "memory://", "--split", "requests", "--workers", "2", "--limit", "5000")
    found = run_json("replay_trace.py", *options, folder=folder)
    assert (found["requests"], found["reads"]) == (5000, expected_misses(rows[:5000])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"SCT2" + data[4:], "magic|Input format"),
        (lambda data: data[:-1], "bytes for 10 requests wanted"),
        (lambda data: data[:4] + b"\0" * 4 + data[8:], "keys under 0"),
        (lambda data: data[:10], "wanted"),
    ],
)
def test_no_trace(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    """A file that is no SCT1 trace is refused with the field and both values."""
    path = write_trace(tmp_path / "small.sct", make_rows(10))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises((ValueError, lzma.LZMAError), match=message):
        replay_trace.Trace.load(path)
