"""Progress, drawn live."""

from __future__ import annotations

from typing import Self

from bulk_submit_client import Progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class ProgressDisplay:
    """A bar for one submission. Use as a context, and call `update` with each answer to a poll."""

    def __init__(self, console: Console, title: str) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bars.add_task(title, total=100.0, text="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, progress: Progress) -> None:
        """Draw what the poll answered."""
        self._bars.update(self._task, completed=progress.percent or 0.0, text=progress.text)

    def finish(self, text: str) -> None:
        """Draw the end."""
        self._bars.update(self._task, completed=100.0, text=text)
