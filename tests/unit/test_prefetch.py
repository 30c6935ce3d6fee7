"""Reading ahead: order, how far, what is held, and how either side ends the other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest

from devstack.stack import wait_until
from workers.ingest.prefetch import Prefetch


class Item:
    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size


class Closing:
    """What the thread closes."""

    def __init__(self) -> None:
        self.times = 0
        self.thread: threading.Thread | None = None

    def close(self) -> None:
        self.times += 1
        self.thread = threading.current_thread()


class Broken(Exception):  # noqa: N818
    pass


def prefetch(items: Iterable[Item], **changes: Any) -> Prefetch[Item]:
    defaults: dict[str, Any] = {"ahead": 2, "close": lambda: None, "waiting": lambda: None}
    return Prefetch(items, **{**defaults, **changes})


def some(count: int, *, size: int = 1) -> Iterator[Item]:
    return (Item(number, size) for number in range(count))


@pytest.mark.parametrize("count", [0, 1, 50])
def test_every_item_comes_in_order(count: int) -> None:
    with prefetch(some(count)) as items:
        assert [item.number for item in items] == list(range(count))


@pytest.mark.parametrize(
    ("size", "ahead", "ahead_bytes", "expected"),
    [(1, 3, 1000, 3), (1, 1, 1000, 1), (100, 5, 100, 1), (99, 5, 100, 2), (10_000, 5, 100, 1), (0, 4, 1, 4)],
)
def test_no_more_is_made_ahead_than_number_and_bytes_allow(
    size: int, ahead: int, ahead_bytes: int, expected: int
) -> None:
    made = asked = 0
    leads = []

    def making() -> Iterator[Item]:
        nonlocal made
        for item in some(20, size=size):
            made += 1
            leads.append(made - asked)
            yield item

    with prefetch(making(), ahead=ahead, ahead_bytes=ahead_bytes) as waiting:
        items = iter(waiting)
        for taken in range(20):
            wait_until(lambda taken=taken: made >= min(20, taken + expected), "as many are made as may be", seconds=5)
            asked += 1
            assert next(items).number == taken
    assert max(leads) == expected


def test_an_item_that_was_taken_is_not_held_while_the_next_one_is_made() -> None:
    wanted = threading.Event()

    def making() -> Iterator[Item]:
        yield Item(0, 1)
        assert wanted.wait(30)
        yield Item(1, 1)

    with prefetch(making()) as waiting:
        items = iter(waiting)
        held = weakref.ref(next(items))
        wait_until(lambda: held() is None, "the first item is gone", seconds=5)
        wanted.set()
        assert next(items).number == 1


def test_what_the_thread_raises_comes_after_the_items_before_it() -> None:
    def breaking() -> Iterator[Item]:
        yield from some(2)
        raise Broken

    source = Closing()
    with prefetch(breaking(), ahead=3, close=source.close) as waiting:
        wait_until(lambda: source.times > 0, "the thread is at its end", seconds=5)
        items = iter(waiting)
        assert [next(items).number, next(items).number] == [0, 1]
        with pytest.raises(Broken):
            next(items)


def test_the_thread_closes_its_source_once_when_it_is_at_the_end() -> None:
    source = Closing()
    with prefetch(some(3), close=source.close) as items:
        assert len(list(items)) == 3
        wait_until(lambda: source.times > 0, "the source is closed", seconds=5)
    assert source.times == 1
    assert source.thread is not threading.current_thread()


def test_leaving_ends_a_thread_that_waits_for_room() -> None:
    source = Closing()
    with closing(some(10**9)) as endless, prefetch(endless, close=source.close) as items:
        assert next(iter(items)).number == 0
    wait_until(lambda: source.times == 1 and source.thread is not None, "the source is closed", seconds=5)
    assert source.thread is not None
    source.thread.join(5)
    assert not source.thread.is_alive()


def test_what_waiting_raises_ends_the_consumer() -> None:
    never, source = threading.Event(), Closing()

    def silent() -> Iterator[Item]:
        never.wait(30)
        yield from some(1)

    def waiting() -> None:
        raise Broken

    with pytest.raises(Broken), prefetch(silent(), close=source.close, waiting=waiting) as items:
        next(iter(items))
    never.set()
    wait_until(lambda: source.times == 1, "the source is closed", seconds=5)
