"""A `bulk-submit` command whose wall clock is wrong: `python -m devstack.skewed HOURS COMMAND ...`.

Patched before anything else is imported: `time.time`, `time.time_ns`, and `now` and `utcnow` of `datetime.datetime`, in
this process and in those it forks. Not patched: monotonic clocks (a wall clock that is wrong leaves them right), file
times, and what C libraries ask the kernel themselves.
"""

from __future__ import annotations

import datetime
import runpy
import sys
import time
from typing import Any


class _AnyDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _true_datetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _true_datetime)


_true_datetime = datetime.datetime


def skew(hours: float) -> None:
    """Let this process's wall clock go ahead by so many hours, or behind."""
    seconds = hours * 3600
    offset = datetime.timedelta(hours=hours)
    true_time, true_time_ns = time.time, time.time_ns

    class Skewed(_true_datetime, metaclass=_AnyDatetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return _true_datetime.now(tz) + offset

        @classmethod
        def utcnow(cls) -> Any:
            return _true_datetime.now(datetime.UTC).replace(tzinfo=None) + offset

    Skewed.__name__ = Skewed.__qualname__ = "datetime"
    Skewed.__module__ = "datetime"
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)
    datetime.datetime = Skewed  # type: ignore[misc]


if __name__ == "__main__":
    skew(float(sys.argv.pop(1)))
    runpy.run_module("cli", run_name="__main__")
