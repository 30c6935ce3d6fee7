"""Reading ahead: a thread fills a short queue while its consumer is busy with the database."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

POLL_SECONDS = 0.2

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Iterates over `items` in a thread, at most `ahead` items ahead.

    What the thread raises is raised to the consumer, after the items before it. The thread calls `close` when it ends,
    because what it reads from is its own; leaving the context tells it to. While the consumer waits for an item,
    `waiting` is called several times a second, and may raise.
    """

    def __init__(
        self, items: Iterable[Item], *, ahead: int, close: Callable[[], None], waiting: Callable[[], None]
    ) -> None:
        self._items = items
        self._close = close
        self._waiting = waiting
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                item, error = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._waiting()
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer
            self._put((None, error))
        finally:
            self._close()

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(entry, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
