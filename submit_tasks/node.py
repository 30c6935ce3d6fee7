"""What a worker node does beside its tasks: logs, a clean spool, a row in `fleet_workers`, and leaving when told to."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import sqlalchemy as sa
import structlog
from celery import bootsteps, signals

from celeryconfig import MANIFESTS
from schema import fleet
from schema.database import DATABASE_ERRORS, create_engine
from settings import settings
from submit_tasks.app import app
from submit_tasks.logs import configure_logging
from workers.draining import order_drain
from workers.receipts.spool import remove_leftovers

log = structlog.get_logger(__name__)

REPORT_SECONDS = 1.0


class _Reporter(threading.Thread):
    """Keeps the node's row fresh for as long as the node lives."""

    def __init__(self, name: str, slots: int) -> None:
        super().__init__(name="fleet-report", daemon=True)
        self._node, self._slots = name, slots
        self._left = threading.Event()

    def run(self) -> None:
        engine = create_engine(settings(), application=f"bulk-submit node {self._node}", pooled=False)
        connection: sa.Connection | None = None
        started, asked = True, False
        while not self._left.is_set():
            try:
                connection = connection or engine.connect()
                drain = fleet.report(connection, self._node, os.getpid(), self._slots, started=started)
                started = False
            except DATABASE_ERRORS as error:
                log.warning("node could not report", error=type(error).__name__)
                _close(connection)
                connection, drain = None, False
            if drain and not asked:
                asked = True
                order_drain()
                os.kill(os.getpid(), signal.SIGTERM)  # as an operator would: the worker ends once its hands are back
            self._left.wait(REPORT_SECONDS)
        try:
            connection = connection or engine.connect()
            fleet.leave(connection, self._node)
        except DATABASE_ERRORS as error:
            log.warning("node could not say that it left", error=type(error).__name__)
        _close(connection)

    def stop(self) -> None:
        self._left.set()
        self.join(timeout=2)


def _close(connection: sa.Connection | None) -> None:
    if connection is not None:
        connection.invalidate()
        connection.close()


_reporters: list[_Reporter] = []


@signals.setup_logging.connect
def _configure_logging(loglevel: int = 20, **_: Any) -> None:
    configure_logging(loglevel)


@signals.worker_init.connect
def _starting(**_: Any) -> None:
    try:
        removed = remove_leftovers(settings())
    except OSError as error:
        log.warning("spool not cleared", error=type(error).__name__)
        return
    if removed:
        log.info("spool cleared of what killed processes left", directories=len(removed))


@signals.worker_ready.connect
def _ready(sender: Any, **_: Any) -> None:
    if MANIFESTS in sender.app.amqp.queues.consume_from:
        _drain_on_quit()
        reporter = _Reporter(sender.hostname, sender.controller.concurrency)
        reporter.start()
        _reporters.append(reporter)


class _Drain(bootsteps.StartStopStep):
    """Tells the hands when the node closes, whoever asked for it: a signal, or a remote `shutdown`."""

    def close(self, _: Any) -> None:
        """Called before the pool is waited for."""
        order_drain()


app.steps["worker"].add(_Drain)


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    order_drain()


def _drain_on_quit() -> None:
    """Celery tells of SIGQUIT only when the time of its soft shutdown is over: the hands are told at once."""
    former = signal.getsignal(signal.SIGQUIT)

    def quit_(number: int, frame: FrameType | None) -> None:
        order_drain()
        if callable(former):
            former(number, frame)

    signal.signal(signal.SIGQUIT, quit_)


@signals.worker_shutdown.connect
def _shutdown(**_: Any) -> None:
    while _reporters:
        _reporters.pop().stop()
