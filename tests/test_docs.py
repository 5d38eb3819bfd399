"""What the documents show is what the program does."""

import re
from pathlib import Path

import pytest

import shmcache
from shmcache import _core

ROOT = Path(__file__).parent.parent


def test_the_readmes_quick_start_runs(unique_name):
    """Every Python block of the README runs, on a segment of its own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("quickstart", unique_name()), "README.md", "exec"), {})


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
