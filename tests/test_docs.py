"""What the documents show is what the program does."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import shmcache
from shmcache import _core, registry
from shmcache.url import Url, parse_options

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: the package under test stays the installed one

from tools import layout_table, readme_output  # noqa: E402

LS_NAMES = ["key", "shmid", "owner", "perms", "bytes", "nattch", "status", "name", "form", "items", "fill"]


def test_the_readmes_quick_start_runs(unique_name):
    """Every Python block of the README runs, on a segment of its own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("quickstart", unique_name()), "README.md", "exec"), {})


def test_the_readmes_output_is_what_the_commands_print(unique_name):
    """What stands below each command in the README has the lines, columns and words that the command prints."""
    pytest.importorskip("rich")
    name, found = unique_name(), {}
    readme_output.fill(name)

    def show(command):
        found[command] = readme_output.printed(command, name)
        return found[command]

    try:
        text = (ROOT / "README.md").read_text()
        readme_output.remade(text, show)
    finally:
        with shmcache.open(f"posix:///{name}", mode="a") as cache:
            cache.unlink()
    assert {command.split()[1] for command in found} >= {"ls", "dump", "stats", "guards", "check", "distribution"}
    for command, output in found.items():
        shown = re.search(rf"\$ {re.escape(command)}\n(.*?)(?=\$ |```)", text, re.DOTALL)
        assert shown, command
        if command == "shmcache ls":  # columns are left out where other segments have long names
            *_, header, rule, row = shown[1].splitlines()
            assert [w for w in header.split() if w not in LS_NAMES] == []
            assert (set(rule), len(row.split())) == ({"─"}, len(header.split()))
        else:
            assert readme_output.shape(shown[1]) == readme_output.shape(output), command


def test_the_layout_tables_are_those_of_the_header():
    """Offsets, sizes and fields in DESIGN.md are what a compiler makes of layout.h."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    design = (ROOT / "DESIGN.md").read_text()
    assert layout_table.replaced(design) == design, "python -m tools.layout_table writes them"


def test_the_layout_tables_leave_no_gap():
    """Each structure's fields, padding included, follow one another from 0 to the size the header asserts."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    sizes = dict(re.findall(r"static_assert\(sizeof\((sc_\w+)\) == (\d+)", layout_table.HEADER.read_text()))
    for struct in layout_table.STRUCTS:
        at = 0
        for row in layout_table.rows(struct):
            for offset, size in zip(row.offsets, row.sizes, strict=True):
                assert 0 <= offset - at < 8, (struct, row.names)
                at = offset + size
        assert at == int(sizes.get(struct, at)), struct


def test_ci_runs_the_readmes_test_command():
    """.ci/run contains the test command of the README, letter by letter."""
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert commands
    main_job, tests = commands[1].strip().splitlines()
    assert "examples/password_cache.py" in main_job
    assert tests in (ROOT / ".ci" / "run").read_text()


def test_the_limits_named_are_the_limits(unique_name):
    """Smallest segment, value limit of the default segment and worker limit as the README says."""
    assert _core.MIN_SIZE == 256 * 1024
    plan = _core.plan({"size": 64 << 20})
    assert 2**20 <= plan["max_value"] < 2**21
    with pytest.raises(ValueError, match="4096"):
        _core.plan({"size": 64 << 20, "workers": 4097})


def test_every_public_name_has_a_docstring():
    """Functions, classes and public methods of the package say what they do."""
    for name in shmcache.__all__:
        value = getattr(shmcache, name)
        if callable(value) and name not in ("MISS", "DEFAULT"):
            assert value.__doc__, name
    for name in dir(shmcache.Engine):
        if not name.startswith("_") and callable(getattr(shmcache.Engine, name)):
            assert getattr(shmcache.Engine, name).__doc__ or name == "count", name


def test_stats_names_are_complete(unique_name):
    """A shared-memory engine's stats hold every name of STAT_NAMES, none invented twice."""
    from shmcache.engine import STAT_NAMES

    with shmcache.open(f"posix:///{unique_name()}", size="1M") as cache:
        assert set(STAT_NAMES) <= set(cache._stats())
        cache.unlink()


def test_layout_constants_match_the_design():
    """DESIGN.md names the invariants that the core's files name."""
    design = (ROOT / "DESIGN.md").read_text()
    for rule in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "R1", "R2", "R3", "W1", "W2", "W4", "G1", "G2", "G3", "G4", "G5"):
        assert f"| {rule} |" in design


def test_the_readmes_urls_are_urls():
    """Every engine URL of the README parses, with options that its engine knows."""
    urls = re.findall(r"`([a-z+]+(?::[a-z0-9]+)?://[^`]*)`", (ROOT / "README.md").read_text())
    assert {url.partition(":")[0] for url in urls} >= {"posix", "sysv", "memcached", "redis", "redis+cluster", "tiered"}
    for text in urls:
        url = Url.parse(text)
        parse_options(url.scheme, registry._load(url.scheme).OPTIONS, url.options, {})
        for tier in ("l1", "l2"):
            if "://" in url.options.get(tier, ""):
                inner = Url.parse(url.options[tier])
                parse_options(inner.scheme, registry._load(inner.scheme).OPTIONS, inner.options, {})
