"""Commands that bring their own servers: the demo, a stack to play with and data to send it, the benchmark."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from cli.display import console, fail, say

SYSTEM, VALUE = "urn:bulk-submit:demo", "demo"


def demo(
    resources: Annotated[int, typer.Option(help="How many resources the sample provider serves.")] = 100_000,
    workers: Annotated[int, typer.Option(help="Worker nodes, one slot each.")] = 2,
) -> None:
    """From nothing to done: servers, provider, fleet, receipts. Exits 0 only if every figure reconciles."""
    from cli.demo import Demo

    raise typer.Exit(0 if Demo(console, resources=resources, workers=workers).run() else 1)


def up(
    workers: Annotated[int, typer.Option(help="Worker nodes, one slot each.")] = 2,
    port: Annotated[int, typer.Option(help="Port of the API; a free one if it is taken.")] = 8000,
    flower_port: Annotated[int, typer.Option(help="Port of Flower; a free one if it is taken.")] = 5555,
) -> None:
    """Run everything on this machine until interrupted."""
    from devstack.stack import Stack

    ended = _interruption()
    with Stack(api_port=_available(port, "the API"), flower_port=_available(flower_port, "Flower")) as stack:
        stack.register_submitter(SYSTEM, VALUE)
        stack.start(workers=workers)
        say("For other commands, in another shell:")
        variables = {
            "BASE": stack.base_url,
            "SYSTEM": SYSTEM,
            "VALUE": VALUE,
            "DATABASE_URL": stack.settings.database_url,
            "BROKER_URL": stack.settings.broker_url,
            "ARTIFACT_STORE_URL": stack.settings.artifact_store_url,
        }
        for name, text in variables.items():
            say(f"export BULK_SUBMIT_{name}={shlex.quote(text)}")
        say(f"Flower: {stack.flower_url}")
        say(f"Logs: {stack.directory}")
        say("Interrupt to end.")
        ended.wait()


def sample(
    directory: Annotated[Path, typer.Argument(help="Where the files are put; made if it does not exist.")],
    resources: Annotated[int, typer.Option(min=1, help="How many resources.")] = 10_000,
    port: Annotated[int, typer.Option(help="Port to serve on; a free one if it is taken.")] = 8001,
) -> None:
    """Make sample data, and serve it as a Data Provider would until interrupted."""
    from devstack.generator import generate
    from devstack.provider import SampleProvider

    ended = _interruption()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        generate(directory, resources)
    except OSError as error:
        fail(error)
    with SampleProvider(directory, port=_available(port, "the provider")) as provider:
        say(f"Manifest: {provider.url}/manifest.json")
        say("Interrupt to end.")
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


def _interruption() -> threading.Event:
    """What SIGINT and SIGTERM set."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


def _available(port: int, what: str) -> int:
    """The port, or a free one, said aloud, if somebody listens on it."""
    from devstack.servers import free_port, is_free

    if is_free(port):
        return port
    other = free_port()
    say(f"Port {port} is taken: {what} will listen on {other}.")
    return other
