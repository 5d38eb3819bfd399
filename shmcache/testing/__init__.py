"""Public conformance suite: what the contract asks of every engine, as a class for pytest.

    class TestMyEngine(shmcache.testing.EngineConformance):
        @pytest.fixture
        def make_engine(self):
            engines = []

            def make(**options):
                engines.append(MyEngine(**options))
                return engines[-1]

            yield make
            for engine in engines:
                engine.close()

Each call of make_engine gives a new, empty engine. A test of a capability the engine does not claim asserts
that the call raises NotSupported. Engines whose clock can be set have `_set_clock(ms)` and `_now_ms()`; for
others set `frozen = False` and `life`, `slack` as in harness.Harness. For readable failures put
`pytest.register_assert_rewrite("shmcache.testing")` before the first import.
"""

from .harness import Harness, in_processes, in_threads, interrupted, needs
from .lifetime import LifetimeTests
from .recipes import RecipeTests
from .store import StoreTests
from .whole import WholeTests

__all__ = ["EngineConformance", "Harness", "in_processes", "in_threads", "interrupted", "needs"]


class EngineConformance(StoreTests, WholeTests, LifetimeTests, RecipeTests):
    """All tests of the contract's sections 3 and 4 that hold for every engine."""
