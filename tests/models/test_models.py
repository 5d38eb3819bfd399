"""The models of the guards, the leases and the read protocol hold, and find every error seeded into them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load_runner() -> ModuleType:
    name = "shmcache_models_run"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


runner = _load_runner()


def _unexpected(model: str, *, seeded: bool) -> list[str]:
    """Run the quick cases of one model; returns the table rows of those that came out wrong."""
    missing = runner.missing_tools([model])
    if missing:
        reason = f"model {model} needs {', '.join(missing)}"
        if os.environ.get("SHMCACHE_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    quick = [case for case in runner.CASES if case.model == model and not case.long]
    cases = [case for case in quick if bool(case.seed) is seeded]
    assert cases
    outcomes = list(runner.run_all(cases, quick=True, jobs=1))
    assert len(outcomes) == len(cases)
    return [runner.row(outcome) for outcome in outcomes if not outcome.expected]


@pytest.mark.parametrize("model", runner.MODELS)
def test_model_holds(model: str) -> None:
    """The protocol as designed has no error in its model."""
    assert _unexpected(model, seeded=False) == []


@pytest.mark.parametrize("model", runner.MODELS)
def test_seeded_errors_are_found(model: str) -> None:
    """Every error seeded into a model is found by it."""
    assert _unexpected(model, seeded=True) == []


def test_no_seed_is_left_out() -> None:
    """Every error a model offers is among the cases that run."""
    for model in runner.MODELS:
        used = {case.seed for case in runner.CASES if case.model == model and case.seed}
        assert runner.seeds_offered(model) == used


def test_an_unknown_seed_is_no_success() -> None:
    """A case whose seed its model does not know does not count as an error found."""
    outcome = runner.Outcome(runner.Case("guard", (), "NO_SUCH_SEED"), False, "", 1, 0.0)
    assert not outcome.expected
