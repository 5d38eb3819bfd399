"""A clock that the tests move, for engines that take one."""

from __future__ import annotations


class Clock:
    """Seconds that pass when told so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
