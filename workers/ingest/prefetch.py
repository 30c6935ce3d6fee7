"""Reading ahead: a thread fills a short queue while its consumer is busy with the database."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from settings import MEBIBYTE

POLL_SECONDS = 0.2
AHEAD_BYTES = 8 * MEBIBYTE


class Sized(Protocol):
    """An item that knows how much memory it takes, about, in bytes."""

    @property
    def size(self) -> int:
        """Bytes."""


Item = TypeVar("Item", bound=Sized)


class Prefetch(Generic[Item]):
    """Iterates over `items` in a thread, at most `ahead` items ahead.

    No item is made while those that wait have `ahead_bytes` or more. What the thread raises is raised to the consumer,
    after the items before it. The thread calls `close` when it ends, because what it reads from is its own; leaving the
    context tells it to. While the consumer waits for an item, `waiting` is called several times a second, and may
    raise.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        ahead: int,
        close: Callable[[], None],
        waiting: Callable[[], None],
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._items = items
        self._ahead = ahead
        self._ahead_bytes = ahead_bytes
        self._close = close
        self._waiting = waiting
        self._changed = threading.Condition()
        self._ready: deque[Item] = deque()
        self._ready_bytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._left = False
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while self._has_next():
            yield self._take()

    def _has_next(self) -> bool:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._ready or self._ended, POLL_SECONDS):
                    if not self._ready and self._error is not None:
                        raise self._error
                    return bool(self._ready)
            self._waiting()

    def _take(self) -> Item:
        with self._changed:
            item = self._ready.popleft()
            self._ready_bytes -= item.size
            self._changed.notify_all()
            return item

    def _fill(self) -> None:
        try:
            items = iter(self._items)
            while self._wanted():
                try:
                    item = next(items)
                except StopIteration:
                    break
                self._put(item)
                del item  # it is the consumer's now: not to be held while the next one is made
        except BaseException as error:  # noqa: BLE001 - handed to the consumer
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._close()

    def _wanted(self) -> bool:
        """Waits until there is room for an item. False: the consumer has left."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._left or (len(self._ready) < self._ahead and self._ready_bytes < self._ahead_bytes)
            )
            return not self._left

    def _put(self, item: Item) -> None:
        with self._changed:
            self._ready.append(item)
            self._ready_bytes += item.size
            self._changed.notify_all()
