"""The processes of the fleet. Settings come from the environment (`settings.py`)."""

from __future__ import annotations

import os
from typing import Annotated

import typer
import uvicorn

from celeryconfig import KICKOFFS, MANIFESTS
from cli.display import fail, reason
from schema.database import DATABASE_ERRORS
from schema.upgrade import upgrade
from settings import settings
from submit_tasks.app import app as celery_app
from submit_tasks.logs import configure_logging


def api(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    processes: Annotated[int, typer.Option(help="How many processes serve.")] = 1,
) -> None:
    """Serve the FHIR API."""
    configure_logging()
    uvicorn.run(
        "api.app:from_environment",
        factory=True,
        host=host,
        port=port,
        workers=processes if processes > 1 else None,
        log_config=None,
        access_log=False,
        server_header=False,
    )


def worker(
    name: Annotated[str, typer.Option(help="Node name, unique on this host.")] = "worker",
    slots: Annotated[int, typer.Option(help="Steps worked on at once, a process each.")] = os.cpu_count() or 1,
    queues: Annotated[str, typer.Option(help="Queues to serve, comma separated.")] = f"{MANIFESTS},{KICKOFFS}",
) -> None:
    """Run a worker node. One small node of its own should serve the queue `sweeps`."""
    celery_app.worker_main(
        [
            *("worker", "--hostname", f"{name}@%h", "--concurrency", str(slots), "--queues", queues),
            *("--loglevel", "INFO", "--events", "--without-mingle", "--without-gossip"),
        ]
    )


def beat() -> None:
    """Run the scheduler of the sweeps. A second one does no harm."""
    celery_app.start(["beat", "--loglevel", "INFO", "--scheduler", "celery.beat:Scheduler", "--pidfile="])


def flower(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5555,
) -> None:
    """Run the Flower dashboard, read-only. Set FLOWER_BASIC_AUTH=user:password before others can reach it."""
    celery_app.start(["flower", f"--address={host}", f"--port={port}", "--read_only=True"])


def migrate() -> None:
    """Bring the database to the present schema. Safe to run from many places at once."""
    try:
        upgrade(settings().database_url)
    except DATABASE_ERRORS as error:
        fail(reason(error))
    typer.echo("The database is up to date.")
