"""`GET /metrics`: what the fleet does and when it was last swept, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
import requests
import sqlalchemy as sa
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from devstack.servers import EmbeddedPostgres, EmbeddedRedis
from schema import fleet, leases
from schema.database import create_engine
from submit_tasks import sweeps
from tests.support.api import Api, issues, manifest

NAMES = {
    "bulk_submit_due_steps",
    "bulk_submit_leased_steps",
    "bulk_submit_fleet_workers",
    "bulk_submit_fleet_slots",
    "bulk_submit_queue_messages",
    "bulk_submit_sweep_age_seconds",
    "bulk_submit_sweep_duration_seconds",
    "bulk_submit_sweep_failures",
    "bulk_submit_sweep_last_count",
}


@pytest.fixture
def api(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Api]:
    with Api(database_url, tmp_path, broker_url=broker_url) as api:
        yield api


def scrape(api: Api, **headers: str) -> requests.Response:
    return api.get(f"{api.public_url}/metrics", **headers)


def samples(api: Api) -> dict[tuple[str, ...], float]:
    """Every sample: its name without the prefix, and its labels' values."""
    answer = scrape(api)
    assert answer.status_code == 200
    return {
        (sample.name.removeprefix("bulk_submit_"), *sample.labels.values()): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("accept", "media_type", "read"),
    [
        ("*/*", "text/plain", parse),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text", parse_openmetrics),
    ],
)
def test_every_metric_has_its_help_and_kind_in_either_format(
    api: Api, accept: str, media_type: str, read: Callable[[str], Iterator[Metric]]
) -> None:
    sweeps.run("fleet", api.settings)
    answer = scrape(api, Accept=accept)
    assert answer.headers["Content-Type"].startswith(f"{media_type};")
    families = {family.name: family for family in read(answer.text)}
    assert set(families) == NAMES
    assert {family.type for family in families.values()} == {"gauge"}
    assert all(family.documentation.endswith(".") and family.samples for family in families.values())


def test_each_sweep_shows_its_age_and_what_it_did_last(api: Api) -> None:
    for name in ("fleet", "expired"):
        sweeps.run(name, api.settings)
    api.execute("UPDATE sweeps SET finished_at = finished_at - interval '100 seconds' WHERE name = 'fleet'")
    api.execute("""UPDATE sweeps SET report = '{"workers": 3, "more": 1}', failures = 2, seconds = 1.5
                   WHERE name = 'fleet'""")
    api.execute("INSERT INTO sweeps (name, failures) VALUES ('logs', 4)")
    found = samples(api)
    assert 100 <= found["sweep_age_seconds", "fleet"] < 130
    assert 0 <= found["sweep_age_seconds", "expired"] < 30
    assert found["sweep_duration_seconds", "fleet"] == 1.5
    assert (found["sweep_last_count", "fleet", "workers"], found["sweep_last_count", "fleet", "more"]) == (3, 1)
    assert found["sweep_last_count", "expired", "objects"] == 0
    assert [found["sweep_failures", name] for name in ("fleet", "expired", "logs")] == [2, 0, 4]
    assert ("sweep_age_seconds", "logs") not in found


def test_steps_nodes_and_messages_are_counted(api: Api, redis_server: EmbeddedRedis) -> None:
    for number in range(3):
        issues(api.submit(manifest(f"s{number}", f"http://provider.test/{number}.json")), 200)
    api.execute("UPDATE steps SET ready_at = clock_timestamp() + interval '1 hour' WHERE manifest_id = 3")
    engine = create_engine(api.settings, application="test metrics", pooled=False)
    with engine.connect() as connection:
        assert leases.claim_next(connection, "test/1", 30, 0) is not None
        fleet.report(connection, "one@host", 1, 3, started=True)
        fleet.report(connection, "two@host", 1, 4, started=True)
        fleet.report(connection, "gone@host", 1, 50, started=True)
    engine.dispose()
    api.execute("UPDATE fleet_workers SET last_seen_at = now() - interval '1 minute' WHERE name = 'gone@host'")
    with redis.Redis.from_url(redis_server.url) as client:
        client.lpush("sweeps", "a message")
    found = samples(api)
    assert [found["due_steps", kind] for kind in ("plan", "ingest", "publish")] == [1, 0, 0]
    assert [found["leased_steps", kind] for kind in ("plan", "ingest", "publish")] == [1, 0, 0]
    assert (found["fleet_workers",], found["fleet_slots",]) == (2, 7)
    assert [found["queue_messages", queue] for queue in ("manifests", "kickoffs", "sweeps")] == [3, 0, 1]
    api.execute("UPDATE steps SET lease_expires_at = clock_timestamp() WHERE worker_id IS NOT NULL")
    found = samples(api)
    assert (found["due_steps", "plan"], found["leased_steps", "plan"]) == (2, 0)


def test_without_a_broker_the_rest_is_told(database_url: str, tmp_path: Path) -> None:
    with Api(database_url, tmp_path) as api:
        found = samples(api)
    assert found["fleet_slots",] == 0
    assert not [name for name in found if name[0] == "queue_messages"]


def test_without_a_database_it_answers_503(api: Api, postgres: EmbeddedPostgres) -> None:
    name = sa.make_url(api.settings.database_url).database
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    [issue] = issues(scrape(api), 503)
    assert issue["code"] == "transient"


def test_a_database_that_does_not_answer_soon_is_not_waited_for(api: Api) -> None:
    with psycopg.connect(api.settings.database_url) as connection:
        connection.execute("LOCK TABLE sweeps")
        answer = scrape(api)
    issues(answer, 503)
    assert answer.elapsed.total_seconds() < 8
    assert scrape(api).status_code == 200
