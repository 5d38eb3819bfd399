"""The report: warnings drawn from numbers, and a page that stands alone."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import shmcache
from shmcache import report, report_html
from shmcache.catalog import Found
from shmcache.distribution import Histogram
from shmcache.inspect import Guard, View, locate
from shmcache.report import Report, collect

from .browser_help import picture

VOID = {"meta", "line", "rect", "polygon", "polyline"}


class Parsed(HTMLParser):
    """Checks nesting and keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def view(unique_name: Callable[[], str]) -> Iterator[View]:
    """A view of a segment of 1,000 items, one with a key that looks like markup."""
    engine = shmcache.open(f"posix:///{unique_name()}", size="4M", guards=2)
    for i in range(997):
        engine.set(f"user:{i}", "secret" * (i % 40), ttl=60 if i % 2 else None)
    engine.set("<script>alert(1)</script>\x1b", "v" * 5000)
    engine.set(b"\xff<b>", "v" * 4900)
    engine.set("largest", "v" * 6000)
    found = locate(f"posix:{engine.url.path}")
    assert isinstance(found, Found)
    try:
        with View(found) as opened:
            yield opened
    finally:
        engine.unlink()
        engine.close()


@pytest.fixture
def sound(view: View) -> Report:
    return collect(view, interval=0)


def titles(found: Report, **stats: int) -> list[tuple[str, str]]:
    changed = dataclasses.replace(found, stats={**found.stats, **stats})
    return [(w.level, w.title) for w in report.warnings(changed)]


def test_collect(view: View) -> None:
    """A report holds rates over the interval, a survey, shards, guards and this process."""
    engine = shmcache.engine(f"posix:{view.found.name}")
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            engine.get("largest")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        found = collect(view, interval=0.3, points=3)
    finally:
        stop.set()
        thread.join()
    assert (len(found.points), len(found.shards), len(found.guards), found.survey.items) == (3, 2, 2, 1000)
    assert found.rates["hits"] > 0
    assert all(point.rates["hits"] > 0 for point in found.points)
    assert os.getpid() in [p.pid for p in found.processes]
    assert found.survey.biggest[0].key == "largest"


def test_a_sound_segment_has_no_warnings(sound: Report) -> None:
    """A segment with nothing wrong has no warnings."""
    assert sound.warnings == []


@pytest.mark.parametrize(("stats", "level", "words"), [
    ({"evicted": 100, "evicted_before_ttl": 62}, "poor", "62% of evictions hit items younger than their lifetime"),
    ({"no_space": 5}, "poor", "5 writes found no space"),
    ({"corrupt": 1200}, "poor", "1,200 reads met a damaged item"),
    ({"guard_timeouts": 3}, "poor", "3 writes gave up waiting for a guard"),
    ({"recoveries": 2}, "note", "2 shards were recovered after a writer's death"),
    ({"hits": 100, "misses": 1900}, "poor", "Only 5% of 2,000 reads were hits"),
    ({"leases_full": 7}, "note", "The lease table was full 7 times"),
])  # fmt: skip
def test_warnings_from_counters(stats: dict[str, int], level: str, words: str, sound: Report) -> None:
    """Each costly counter has a warning that names its numbers."""
    assert titles(sound, **stats) == [(level, words)]


def test_a_larger_size_is_named(sound: Report) -> None:
    """Early evictions come with the size that would have held the last hour's set, up to 16 times the segment's."""
    created = sound.header["created_ns"] / 1e9
    stats, header = {**sound.stats, "evicted": 10, "evicted_before_ttl": 10}, {**sound.header, "size": 64 << 20}
    few = dataclasses.replace(sound, stats=stats, header=header, taken=created + 7200)
    many = dataclasses.replace(few, stats={**few.stats, "evicted": 400_000, "evicted_before_ttl": 400_000})
    sizes = [report.size_wanted(r) or 0 for r in (few, many)]
    assert 64 << 20 < sizes[0] < sizes[1]
    assert all(size % (1 << 20) == 0 for size in sizes)
    assert f"{sizes[1] >> 20}M would have held the last hour's set" in report.warnings(many)[0].text
    young = dataclasses.replace(many, taken=created + 1200)
    assert "would have held what was stored in the 20 minutes since it was made" in report.warnings(young)[0].text
    most = dataclasses.replace(few, stats={**few.stats, "evicted": 10**9, "evicted_before_ttl": 10**9})
    assert report.size_wanted(most) is None
    assert "more than 16 times its size would have held" in report.warnings(most)[0].text


def test_a_lifetime_counts_an_hour_at_most(sound: Report) -> None:
    """Items that live for days are wanted for the last hour only."""
    created = sound.header["created_ns"] / 1e9
    stats = {**sound.stats, "evicted": 8000, "evicted_before_ttl": 8000, "items": 1000}
    long = dataclasses.replace(sound.survey, ttls=Histogram((86400, 30 * 86400), items=[0, 500, 0]))
    found = dataclasses.replace(sound, stats=stats, survey=long, taken=created + 8 * 3600)
    assert report.size_wanted(found) == 2 * sound.header["size"]


def test_a_stopped_holder_is_the_first_warning(sound: Report) -> None:
    """A guard held by a stopped process, and findings, come before what only costs."""
    guard = sound.guards[0]._replace(state="stopped", pid=4711, alive=True, command="worker")
    found = dataclasses.replace(
        sound, guards=[guard, *sound.guards[1:]], stats={**sound.stats, "no_space": 1}, findings=[{"code": "x", "shard": 0}]
    )
    levels = [w.level for w in report.warnings(found)]
    assert levels == ["bad", "bad", "poor"]
    assert any("kill -CONT 4711" in w.text for w in report.warnings(found))


def test_the_page_stands_alone(view: View) -> None:
    """The page parses, loads nothing, runs nothing, and holds keys escaped and no value."""
    page = report_html.page(collect(view, interval=0.2, points=2))
    parsed = Parsed(page)
    assert "script" not in parsed.tags
    assert not {"src", "href", "onload"} & set(parsed.attributes)
    assert "http" not in page.replace("http-equiv", "")
    assert "secretsecret" not in page
    assert r"<script>alert(1)</script>\x1b" in parsed.text
    assert r"\xff<b>" in parsed.text
    assert all(word in parsed.text for word in ("Memory by shard", "Value sizes", "Lifetime left", "Guards", "Settings"))


def test_the_page_of_a_copy(view: View, tmp_path: Path) -> None:
    """A copy has a page too, without traffic."""
    path = tmp_path / "c.bin"
    path.write_bytes(Path(f"/dev/shm/shmcache.{view.found.name}").read_bytes())
    found = locate(str(path))
    assert isinstance(found, Found)
    with View(found) as copy:
        page = report_html.page(collect(copy))
    assert "Traffic" not in Parsed(page).text


def test_a_damaged_segment(sound: Report) -> None:
    """Findings make the status damaged, and commands in a warning are marked as such."""
    page = report_html.page(dataclasses.replace(sound, findings=[{"code": "item-check", "shard": 0, "text": ""}], warnings=[
        report.Warn("bad", "t", "`shmcache check` says <b>")
    ]))  # fmt: skip
    assert '<span class="chip bad">damaged</span>' in page
    assert "<code>shmcache check</code> says &lt;b&gt;" in page


def test_an_empty_segment(unique_name: Callable[[], str]) -> None:
    """A segment with nothing in it has a page."""
    engine = shmcache.open(f"sysv:///{unique_name()}", size="1M")
    try:
        found = locate(f"sysv:{engine.url.path}")
        assert isinstance(found, Found)
        with View(found) as view:
            page = report_html.page(collect(view, interval=0))
    finally:
        engine.unlink()
        engine.close()
    assert "None: sound" in Parsed(page).text
    assert Parsed(page).text.count("nothing there") == 5


@pytest.mark.parametrize("shards", [1, 16, 64, 256])
def test_shards_of_any_number(shards: int, sound: Report) -> None:
    """The memory map has a bar for each shard."""
    many: dict[str, Any] = {"shards": [{**sound.shards[0], "shard": i} for i in range(shards)]}
    guards: list[Guard] = [sound.guards[0]._replace(shard=i) for i in range(shards)]
    page = report_html.page(dataclasses.replace(sound, guards=guards, **many))
    assert page.count("<title>shard ") == shards


@pytest.mark.parametrize("width", [1180, 520])
def test_in_a_browser(width: int, view: View, tmp_path: Path) -> None:
    """A browser lays the page out in the colours of light and of dark, which its own policy lets it use."""
    page = tmp_path / "r.html"
    page.write_text(report_html.page(collect(view, interval=0.2, points=4)), encoding="utf-8")
    light, dark = (picture(page.as_uri(), tmp_path, dark=dark, width=width) for dark in (False, True))
    grounds = re.findall(r"--ground:(#[0-9a-f]{6})", report_html.STYLE)
    assert [light.corner, dark.corner] == grounds
    assert light.width == dark.width == width
    assert min(len(light.data), len(dark.data)) > 30_000, "a page of words and charts, not a blank one"
