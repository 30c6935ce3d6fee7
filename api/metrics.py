"""`GET /metrics`: what Prometheus asks of the fleet, read from Postgres and the broker when it asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import redis
import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from api.errors import Refusal
from schema import fleet, sweeps
from schema.database import DATABASE_ERRORS, create_engine
from schema.fleet import Load
from schema.sweeps import SweepRecord
from settings import Settings
from submit_tasks.app import app as celery_app

log = structlog.get_logger(__name__)

DATABASE_SECONDS = 2.0
BROKER_SECONDS = 1.0

router = APIRouter()


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """The fleet, its work and its sweeps, in the text formats of Prometheus and OpenMetrics."""
    settings: Settings = request.app.state.settings
    try:
        load, records = _read(settings)
    except DATABASE_ERRORS as error:
        raise Refusal(503, "the database does not answer", code="transient") from error
    registry = CollectorRegistry()
    registry.register(_Fleet(load, records, _queues(settings)))
    encode, media_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), media_type=media_type)


def _read(settings: Settings) -> tuple[Load, list[SweepRecord]]:
    engine = create_engine(settings, application="bulk-submit metrics", pooled=False, answer_within=DATABASE_SECONDS)
    try:
        with engine.begin() as connection:
            return fleet.load(connection), sweeps.records(connection)
    finally:
        engine.dispose()


def _queues(settings: Settings) -> dict[str, int]:
    """The messages that wait, by queue; nothing where the broker does not answer soon."""
    try:
        with redis.Redis.from_url(
            settings.broker_url, socket_connect_timeout=BROKER_SECONDS, socket_timeout=BROKER_SECONDS
        ) as client:
            return {queue.name: int(client.llen(queue.name)) for queue in celery_app.conf.task_queues}
    except (RedisError, OSError, ValueError) as error:
        log.warning("broker not reachable", error=type(error).__name__)
        return {}


class _Fleet(Collector):
    """What was read, as metrics."""

    def __init__(self, load: Load, records: list[SweepRecord], queues: dict[str, int]) -> None:
        self._load = load
        self._records = records
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        load, records = self._load, self._records
        yield _gauge(
            "due_steps",
            f"Steps that wait for a hand, counted among the first {fleet.STEPS_COUNTED} that are open.",
            {(kind,): count for kind, count in load.due.items()},
            ["kind"],
        )
        yield _gauge(
            "leased_steps",
            f"Steps in hand, counted among the first {fleet.STEPS_COUNTED} that are open.",
            {(kind,): count for kind, count in load.leased.items()},
            ["kind"],
        )
        seen = f"seen in the last {fleet.SILENT_SECONDS} seconds"
        yield _gauge("fleet_workers", f"Worker nodes {seen}.", {(): load.workers})
        yield _gauge("fleet_slots", f"Steps that the worker nodes {seen} can work on at once.", {(): load.slots})
        yield _gauge(
            "queue_messages",
            "Messages that wait in the broker; none is given while it does not answer.",
            {(name,): count for name, count in self._queues.items()},
            ["queue"],
        )
        yield _gauge(
            "sweep_age_seconds",
            "Time since the sweep last ended well.",
            {(record.name,): record.age_seconds for record in records},
            ["sweep"],
            unit="seconds",
        )
        yield _gauge(
            "sweep_duration_seconds",
            "How long its last run that ended well took.",
            {(record.name,): record.seconds for record in records},
            ["sweep"],
            unit="seconds",
        )
        yield _gauge(
            "sweep_failures",
            "Runs of the sweep that failed since one ended well.",
            {(record.name,): record.failures for record in records},
            ["sweep"],
        )
        yield _gauge(
            "sweep_last_count",
            "What its last run that ended well did; more is 1 where it left something for the next.",
            {(record.name, what): count for record in records for what, count in sorted(record.report.items())},
            ["sweep", "what"],
        )


def _gauge(
    name: str,
    text: str,
    samples: dict[tuple[str, ...], float | int | None],
    labels: Iterable[str] = (),
    *,
    unit: str = "",
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"bulk_submit_{name}", text, labels=list(labels), unit=unit)
    for values, value in samples.items():
        if value is not None:
            family.add_metric(list(values), value)
    return family
