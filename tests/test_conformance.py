"""The public conformance suite over every form of conftest.FORMS."""

import pytest

from shmcache.testing import EngineConformance


class TestConformance(EngineConformance):
    @pytest.fixture(autouse=True)
    def _form(self, form):
        self.frozen, self.life, self.slack, self.small_option = (
            form.frozen,
            form.life,
            form.slack,
            form.small_option,
        )

    @pytest.fixture
    def make_engine(self, make_engine):
        return make_engine
