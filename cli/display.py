"""What commands show: progress, drawn live, and why they failed. Nothing of it is read as markup."""

from __future__ import annotations

from typing import NoReturn, Self

import typer
from bulk_submit_client import Progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

console = Console()


def say(text: str, *, style: str | None = None) -> None:
    """Print a text as it is, unbroken: it may come from outside."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def fail(error: object) -> NoReturn:
    """Print what went wrong, and exit with 1."""
    say(str(error), style="red")
    raise typer.Exit(1)


def reason(error: BaseException) -> str:
    """What to tell of a database's error: no statement, and no more than a line."""
    original = getattr(error, "orig", None) or error
    return str(original).partition("\n")[0] or type(original).__name__


class ProgressDisplay:
    """A bar for one submission. Use as a context, and call `update` with each answer to a poll."""

    def __init__(self, console: Console, title: str) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
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
