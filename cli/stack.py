"""Commands that bring their own servers, by the extra `embedded`: the demo, a stack to play with, the benchmark."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def demo(
    resources: Annotated[int, typer.Option(help="How many resources the sample provider serves.")] = 100_000,
    workers: Annotated[int, typer.Option(help="Worker nodes, one slot each.")] = 2,
) -> None:
    """From nothing to done: servers, provider, fleet, receipts. Exits 0 only if every figure reconciles."""
    from cli.demo import Demo

    raise typer.Exit(0 if Demo(console, resources=resources, workers=workers).run() else 1)


def up(workers: Annotated[int, typer.Option(help="Worker nodes, one slot each.")] = 2) -> None:
    """Run everything on this machine until interrupted."""
    from devstack.stack import Stack

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Stack() as stack:
        stack.register_submitter("urn:bulk-submit:demo", "demo")
        stack.start(workers=workers)
        console.print(f"FHIR base   {stack.base_url}")
        console.print("submitter   urn:bulk-submit:demo | demo")
        console.print(f"Flower      {stack.flower_url}")
        console.print(f"Postgres    {stack.settings.database_url}")
        console.print(f"logs        {stack.directory}")
        console.print("Interrupt to end.")
        ended.wait()


def bench(
    resources: Annotated[int, typer.Option(help="How many resources to ingest.")] = 200_000,
    workers: Annotated[str, typer.Option(help="Numbers of workers to try, comma separated.")] = "1,2",
    lines_per_file: Annotated[int, typer.Option(help="Lines in one file, at most.")] = 20_000,
    repeat: Annotated[int, typer.Option(help="Runs of each kind; the medians are shown.")] = 3,
) -> None:
    """Measure ingest, HTTP to commit, beside raw binary COPY of the same rows in the same run."""
    from devstack.benchmark import run

    numbers = [int(number) for number in workers.split(",")]
    run(console, resources=resources, workers=numbers, lines_per_file=lines_per_file, repeat=repeat)
