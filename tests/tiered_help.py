"""A far tier that can be stopped in mid-call, and two machines in front of it, all on one clock."""

from __future__ import annotations

import importlib.util
import threading

from shmcache import MISS, EngineDown, Url
from shmcache.engines.memory import MemoryEngine
from shmcache.engines.tiered import TieredEngine

from .clock_help import Clock

CORE = getattr(importlib.util.find_spec("shmcache._core"), "has_location", False)
"""Whether the extension is built."""


class Far(MemoryEngine):
    """An L2 whose calls can be stopped before and after they are done, that counts them, and can be down."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []
        self.hooks = []  # functions of "before" or "after"; the last is taken off and called
        self.down = False
        self._inside = threading.local()

    def _around(self, name, *args, **options):
        if getattr(self._inside, "call", False):
            return getattr(MemoryEngine, name)(self, *args, **options)
        self.calls.append(name)
        if self.down:
            if name == "set_many":
                return list(args[0])
            raise EngineDown("far server: an answer wanted, none found")
        hook = self.hooks.pop() if self.hooks else lambda when: None
        hook("before")
        self._inside.call = True
        try:
            return getattr(MemoryEngine, name)(self, *args, **options)
        finally:
            self._inside.call = False
            hook("after")


def _method(name):
    return lambda self, *args, **options: self._around(name, *args, **options)


for _name in ("get", "set", "add", "cas", "delete", "incr", "append", "touch", "pop", "get_many", "set_many"):
    setattr(Far, _name, _method(_name))


class OneStep(Far):
    """With the value and its lifetime in one step, like Redis."""

    def _get_left(self, key):
        value = self.get(key, MISS)
        return None if value is MISS else (value, MemoryEngine.ttl(self, key))

    def _get_left_many(self, keys):
        return {key: (value, MemoryEngine.ttl(self, key)) for key, value in self.get_many(keys).items()}


class Setup:
    """One far tier and two machines with an L1 each; `engines[i]` are processes on machine i."""

    def __init__(self, far=OneStep, l1_ttl=5.0, **options):
        self.clock = Clock()
        self.far = far(clock=self.clock)
        self.near = [MemoryEngine(clock=self.clock) for _ in range(2)]
        url = Url("tiered", "app")
        self.engines = [TieredEngine(near, self.far, url=url, l1_ttl=l1_ttl, **options) for near in self.near]
        self.engine = self.engines[0]

    def truth(self, key="k"):
        return MemoryEngine._peek(self.far, key)

    def near_keys(self, machine=0):
        return list(self.near[machine].keys())
