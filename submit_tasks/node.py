"""What a worker node does beside its tasks: logs, a row in `fleet_workers`, and leaving when it is told to."""

from __future__ import annotations

import os
import threading
from typing import Any

import structlog
from celery import signals

from celeryconfig import MANIFESTS
from schema import fleet
from schema.database import DATABASE_ERRORS, create_engine
from settings import settings
from submit_tasks.logs import configure_logging
from workers.draining import order_drain

log = structlog.get_logger(__name__)

REPORT_SECONDS = 5.0


class _Reporter(threading.Thread):
    """Keeps the node's row fresh for as long as the node lives."""

    def __init__(self, name: str, slots: int) -> None:
        super().__init__(name="fleet-report", daemon=True)
        self._node, self._slots = name, slots
        self._left = threading.Event()

    def run(self) -> None:
        engine = create_engine(settings(), application=f"bulk-submit node {self._node}", pooled=False)
        started = True
        while True:
            try:
                with engine.connect() as connection:
                    fleet.report(connection, self._node, os.getpid(), self._slots, started=started)
                    started = False
                    if self._left.wait(REPORT_SECONDS):
                        fleet.leave(connection, self._node)
                        return
            except DATABASE_ERRORS as error:
                log.warning("node could not report", error=type(error).__name__)
                if self._left.wait(REPORT_SECONDS):
                    return

    def stop(self) -> None:
        self._left.set()
        self.join(timeout=2)


_reporters: list[_Reporter] = []


@signals.setup_logging.connect
def _configure_logging(loglevel: int = 20, **_: Any) -> None:
    configure_logging(loglevel)


@signals.worker_ready.connect
def _ready(sender: Any, **_: Any) -> None:
    if MANIFESTS in sender.app.amqp.queues.consume_from:
        reporter = _Reporter(sender.hostname, sender.controller.concurrency)
        reporter.start()
        _reporters.append(reporter)


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    order_drain()


@signals.worker_shutdown.connect
def _shutdown(**_: Any) -> None:
    while _reporters:
        _reporters.pop().stop()
