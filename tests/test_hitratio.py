"""The replay of traces through the core: exact miss counts, and what the reader of traces accepts."""

from __future__ import annotations

import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_ROOT = str(Path(__file__).parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # at the end: the package under test stays the installed one

from tools.bench import hitratio, limits, native, traces  # noqa: E402

GET, SET, DELETE, INCR = range(4)
KIB = 1 << 10

# trace: total bytes, missed GET and INCR. A change of policy changes them: look at the twelve real traces, then record what
# `python tests/test_hitratio.py` prints.
MISSES = {
    "skewed": {256 * KIB: 33579, 1024 * KIB: 9200},
    "lifetimes": {256 * KIB: 45668, 1024 * KIB: 31890},
    "mixture": {256 * KIB: 33323, 1024 * KIB: 14434},
}


@pytest.fixture(scope="module", autouse=True)
def driver() -> None:
    """A C compiler builds the driver; without one the replay is skipped by name, or fails under SHMCACHE_CI=1."""
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        reason = "replay driver: no C compiler on the PATH"
        if os.environ.get("SHMCACHE_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    native.build("replay")


def draws(seed: int) -> Iterator[int]:
    """16-bit numbers, the same on every machine."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) & (2**64 - 1)
        yield seed >> 48


def skewed() -> traces.Requests:
    """Read-through of 6,000 keys, a few of them frequent, of 20 to 800 bytes, no lifetime."""
    made, draw = traces.Requests(), draws(1)
    for i in range(60_000):
        key = (next(draw) * next(draw) * next(draw) * 6000) >> 48
        made.add(i // 200, key, 20 + key * 2654435761 % 781, klen=16 + key % 30)
    return made


def lifetimes() -> traces.Requests:
    """Sets and gets of items that live for 5 s to 20 minutes beside items that live for good."""
    made, draw = traces.Requests(), draws(2)
    for i in range(60_000):
        key = (next(draw) * next(draw) * 5000) >> 32
        ttl = (0, 5, 60, 1200)[key % 4]
        made.add(i // 50, key, 50 + key * 40503 % 1500, ttl, SET if next(draw) < 8192 else GET, klen=20)
    return made


def mixture() -> traces.Requests:
    """Counters, deletes, a scan that comes by, and values up to a tenth of the cache."""
    made, draw = traces.Requests(), draws(3)
    for i in range(50_000):
        what = next(draw) % 10
        if what < 3:
            made.add(i // 100, 8000 + (next(draw) * next(draw) * 900 >> 32), 8, 600, INCR, klen=24)
        elif what == 3:
            made.add(i // 100, 10_000 + i, 300, 0, GET, klen=30)
        else:
            key = (next(draw) * next(draw) * 4000) >> 32
            size = 20_000 if key % 100 == 7 else 60 + key * 40503 % 500
            made.add(i // 100, key, size, 0, DELETE if next(draw) < 1000 else GET, klen=18)
    return made


@pytest.mark.parametrize("size", [256 * KIB, 1024 * KIB])
@pytest.mark.parametrize("make", [skewed, lifetimes, mixture], ids=lambda make: make.__name__)
def test_exact_misses(make: Callable[[], traces.Requests], size: int, tmp_path: Path) -> None:
    """The core misses exactly as often as recorded, on three synthetic traces at two sizes."""
    flat, name = tmp_path / "flat.sct", make.__name__
    make().write(flat)
    found = hitratio.replay(flat, name, size, item_size=256, guards=1)
    assert found.misses == MISSES[name][size]
    assert (found.repaired, found.refused, found.no_space) == (0, 0, 0)
    assert found.moved_over <= found.largest + 512


def test_replay_repeats(tmp_path: Path) -> None:
    """Two replays of a trace count the same, whatever the machine does meanwhile."""
    flat = tmp_path / "flat.sct"
    mixture().write(flat)
    one, two = (hitratio.replay(flat, "mixture", 256 * KIB) for _ in range(2))
    assert (one.misses, one.bytes_moved, one.evicted) == (two.misses, two.bytes_moved, two.evicted)


def test_infinite_cache_misses_each_key_once(tmp_path: Path) -> None:
    """A segment with room for all misses each key of a trace without lifetimes once."""
    flat = tmp_path / "flat.sct"
    trace = skewed()
    trace.write(flat)
    found = hitratio.replay(flat, "skewed", 64 << 20)
    assert found.misses == found.keys == len(set(trace.key))
    assert (found.live_items, found.evicted) == (found.keys, 0)


def test_lifetime_ends_at_the_second(tmp_path: Path) -> None:
    """An item set at second t with a lifetime of n s is there until second t+n-1 and gone at t+n; a counter keeps its end."""
    trace = traces.Requests()
    for t in (3, 4, 5, 6, 7, 8):
        trace.add(t, 0, 100, 3, GET)
    for t in (8, 9, 10, 11):
        trace.add(t, 1, 8, 2, INCR)
    trace.write(tmp_path / "flat.sct")
    assert hitratio.replay(tmp_path / "flat.sct", "ttl", 256 * KIB).misses == 2 + 2


def test_values_above_a_quarter_of_a_shard_are_refused(tmp_path: Path) -> None:
    """A value that cannot be stored is missed every time, and counted."""
    trace = traces.Requests()
    for t in range(5):
        trace.add(t, 0, 100_000)
    trace.write(tmp_path / "flat.sct")
    found = hitratio.replay(tmp_path / "flat.sct", "large", 256 * KIB)
    assert (found.misses, found.refused) == (5, 5)


def test_expired_memory_is_all_given_back(tmp_path: Path) -> None:
    """Once everything has expired and two clean periods have passed, refilling 85 % of the segment evicts nothing."""
    trace, size, item = traces.Requests(), 8 << 20, 1000
    n_items = size * 85 // 100 // item
    for key in range(n_items):
        trace.add(0, key, item - 20, 60, SET, klen=20)
    for t in range(61, 61 + 2 * hitratio.CLEAN_PERIOD_MS // 1000):
        trace.add(t, n_items, 100, 1, SET)
    for key in range(n_items):
        trace.add(trace.t[-1], n_items + 1 + key, item - 20, 0, SET, klen=20)
    trace.write(tmp_path / "flat.sct")
    found = hitratio.replay(tmp_path / "flat.sct", "refill", size, item_size=item)
    assert found.evicted == 0
    assert found.live_items >= n_items


def test_large_values_come_back_with_small_ones_between(tmp_path: Path) -> None:
    """In 8 MiB, one shard, a value of 10 B to 1.8 MB is still there after 2,000 sets of 300 B."""
    sizes = (10, 1000, 30_000, 100_000, 400_000, 900_000, 1_300_000, 1_800_000)
    trace = traces.Requests()
    for number, size in enumerate(sizes):
        trace.add(number, number, size)
        for other in range(2000):
            trace.add(number, 1000 + number * 2000 + other, 300, op=SET)
        trace.add(number, number, size)
    trace.write(tmp_path / "flat.sct")
    found = hitratio.replay(tmp_path / "flat.sct", "large", 8 << 20, guards=1, item_size=256)
    assert found.asked - found.misses == len(sizes)


def test_csv_and_compressed_traces_are_read(tmp_path: Path) -> None:
    """CSV with or without a line of names and xz-compressed SCT1 give the same flat trace."""
    rows = "alpha,100,0,GET\nbeta,5,60,set\nalpha,100,0,0\ngamma,8,,INCR\n"
    (tmp_path / "a.csv").write_text(rows)
    (tmp_path / "b.csv").write_text("t,op,key,size,ttl\n" + "".join(
        f"0,{op},{key},{size},{ttl}\n" for key, size, ttl, op in (row.split(",") for row in rows.split())
    ))  # fmt: skip
    wanted = traces.Requests()
    for key, size, ttl, op, klen in ((0, 100, 0, GET, 5), (1, 5, 60, SET, 4), (0, 100, 0, GET, 5), (2, 8, 0, INCR, 5)):
        wanted.add(0, key, size, ttl, op, klen)
    wanted.write(tmp_path / "wanted.sct")
    (tmp_path / "c.sct.xz").write_bytes(lzma.compress((tmp_path / "wanted.sct").read_bytes()))
    for name in ("a.csv", "b.csv", "c.sct.xz", "wanted.sct"):
        traces.flatten(tmp_path / name, tmp_path / "flat")
        assert (tmp_path / "flat").read_bytes() == (tmp_path / "wanted.sct").read_bytes(), name


@pytest.mark.parametrize("row", ["k,1,0,FETCH", "k,-1,0,GET", "k,x,0,GET", "k,1,0,7", "k,1,-5,GET", "k,1", f"k,{1 << 28},0,GET"])
def test_bad_csv_names_its_line(row: str) -> None:
    """A row that is no request is refused with its line number."""
    with pytest.raises(ValueError, match=r"csv line 2: .* wanted, .* found"):
        traces.read_csv(["k,1,0,GET", row])


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is no trace is refused by magic in Python and by its length in the driver."""
    (tmp_path / "x.sct").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="magic b'SCT1' wanted"):
        traces.flatten(tmp_path / "x.sct", tmp_path / "flat")
    (tmp_path / "flat").write_bytes(b"SCT1" + bytes(9) + b"\1" + bytes(50))
    with pytest.raises(RuntimeError, match="SCT1"):
        hitratio.replay(tmp_path / "flat", "x", 256 * KIB)


def test_command_line_prints_figures_beside_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a block per trace and size, and JSON with what is kept; a missing path is status 2."""
    trace = skewed()
    trace.write(tmp_path / "zipf09.sct")
    hitratio.main([str(tmp_path), "--item-size", "256", "--guards", "1"])
    text = capsys.readouterr().out
    assert "zipf09 8 MiB: limit 0.477" in text
    assert "zipf09 16 MiB: limit 0.436" in text
    hitratio.main([str(tmp_path), "--size", "256K", "--json"])
    assert '"misses"' in capsys.readouterr().out
    assert hitratio.main([str(tmp_path / "nowhere")]) == 2
    assert "nothing found" in capsys.readouterr().err


def test_twelve_traces_have_limits_at_two_sizes() -> None:
    """Each known trace has a limit at two sizes, above what an infinite cache misses."""
    assert len(limits.TRACES) == 12
    for name in limits.TRACES:
        small, large = limits.limits_of(name)
        assert small.size < large.size
        assert small.miss > large.miss > large.infinite
    assert limits.limits_of("unknown") == []


@pytest.mark.parametrize(("text", "size"), [("8M", 8 << 20), ("512k", 512 << 10), ("1GiB", 1 << 30), ("256", 256)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    """Sizes take K, M and G."""
    assert hitratio.parse_size(text) == size


if __name__ == "__main__":  # prints what MISSES is to say
    with tempfile.TemporaryDirectory() as directory:
        for maker in (skewed, lifetimes, mixture):
            maker().write(Path(directory) / "flat.sct")
            for total in (256 * KIB, 1024 * KIB):
                print(maker.__name__, total, hitratio.replay(Path(directory) / "flat.sct", "", total, 256, 1).misses)
