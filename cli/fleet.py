"""Commands for those who run the fleet: ask a node to leave, look at the leases of a manifest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import groupby
from typing import Annotated, NoReturn

import sqlalchemy as sa
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schema import fleet, timeline
from schema.database import DATABASE_ERRORS, create_engine
from schema.timeline import LeaseEvent
from settings import settings

console = Console()

BAR_CELLS = 60
HELD, IDLE = "━", "·"
ENDS = {
    "released": ("┤", "yellow"),
    "lost": ("╳", "red"),
    "refused": ("╳", "red"),
    "expired": ("╳", "red"),
    "finished": ("✔", "green"),
    "failed": ("✘", "red"),
}
COLOURS = ("cyan", "magenta", "blue", "bright_green", "bright_yellow", "bright_magenta")


def drain(
    node: Annotated[str, typer.Argument(help="Node name, as NAME or NAME@HOST.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has left; 0: do not wait.")] = 60.0,
) -> None:
    """Ask a worker node to hand back what it holds, at a batch's border, and to end."""
    with _connection("drain") as connection:
        names = fleet.ask_to_leave(connection, node)
        if not names:
            _fail(f"no node {node} is on record")
        console.print(f"asked to leave: {', '.join(names)}")
        begun = time.monotonic()
        while wait and (left := {worker.name for worker in fleet.workers(connection)} & set(names)):
            if time.monotonic() - begun > wait:
                _fail(f"still there after {wait:g} seconds: {', '.join(sorted(left))}")
            time.sleep(0.1)
    if wait:
        console.print(f"gone after {time.monotonic() - begun:.1f} seconds")


def leases(manifest: Annotated[str, typer.Argument(help="Id of a manifest, or its URL (the newest of it).")]) -> None:
    """Draw who held the leases of a manifest's steps, and how each ended."""
    with _connection("leases") as connection, connection.begin():
        found = timeline.find_manifest(connection, manifest)
        if found is None:
            _fail(f"there is no manifest {manifest}")
        events = timeline.of_manifest(connection, *found)
    if not events:
        _fail("nothing is on record: the events of old manifests are swept")
    _draw(found[1], events)


@contextmanager
def _connection(command: str) -> Iterator[sa.Connection]:
    engine = create_engine(settings(), application=f"bulk-submit {command}", pooled=False)
    try:
        with engine.connect() as connection:
            yield connection
    except DATABASE_ERRORS as error:
        _fail(f"the database does not answer ({type(error).__name__})")
    finally:
        engine.dispose()


def _draw(manifest_id: int, events: list[LeaseEvent]) -> None:
    begun, ended = events[0].at, max(event.at for event in events)
    seconds = max((ended - begun).total_seconds(), 0.001)
    workers = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(dict.fromkeys(map(_worker, events)))}
    table = Table(title=f"Manifest {manifest_id}: {seconds:.1f} seconds from {begun:%Y-%m-%d %H:%M:%S} UTC")
    for name in ("step", "leases", "what happened"):
        table.add_column(name, no_wrap=name != "what happened")
    ordered = sorted(events, key=lambda event: event.step_id)
    for step_id, group in groupby(ordered, key=lambda event: event.step_id):
        step = list(group)
        name = f"{step_id} {step[0].kind}" + ("" if step[0].position is None else f" file {step[0].position}")
        table.add_row(name, _bar(step, begun, seconds, workers), _story(step, begun, workers))
    console.print(table)
    for worker, colour in workers.items():
        console.print(Text(f"{HELD} {worker}", style=colour))


def _worker(event: LeaseEvent) -> str:
    return event.worker_id or "nobody"


def _bar(events: list[LeaseEvent], begun: datetime, seconds: float, workers: dict[str, str]) -> Text:
    cells = [(IDLE, "dim")] * BAR_CELLS
    held: tuple[int, int, str] | None = None  # token, first cell and colour of the newest lease, while it is held
    for event in events:
        cell = min(int((event.at - begun).total_seconds() / seconds * BAR_CELLS), BAR_CELLS - 1)
        if event.event == "claimed":
            if held is not None:
                cells[held[1] : cell] = [(HELD, held[2])] * (cell - held[1])
            held = event.fencing_token, cell, workers[_worker(event)]
            cells[cell] = HELD, held[2]
        elif held is not None and event.fencing_token == held[0]:
            cells[held[1] : cell] = [(HELD, held[2])] * (cell - held[1])
            cells[cell] = ENDS[event.event]
            held = None
    if held is not None:
        cells[held[1] :] = [(HELD, held[2])] * (BAR_CELLS - held[1])
    return Text.assemble(*cells)


def _story(events: list[LeaseEvent], begun: datetime, workers: dict[str, str]) -> Text:
    lines = []
    for event in events:
        after = (event.at - begun).total_seconds()
        reason = f" ({event.reason})" if event.reason else ""
        text = f"{after:7.2f} s  token {event.fencing_token}  {event.event}{reason}"
        lines.append(Text(text, style=workers[_worker(event)]))
    return Text("\n").join(lines)


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(1)
