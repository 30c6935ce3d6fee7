"""The proxy before Postgres: it knows the points of the lease protocol, holds there, delays, and cuts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from devstack.proxy import HAND, KEEPER, Act, Point, PostgresProxy, Trigger
from devstack.stack import wait_until
from schema import leases
from schema.database import create_engine, is_disconnect
from schema.leases import Lease
from settings import Settings
from tests.support.stage import Stage, lines_of, patient
from workers.ingest.write import Origins, write_batch


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(database_url) as running:
        yield running


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=database_url)) as stage:
        yield stage


class Hand:
    """A hand's connection through the proxy, and a thread that writes one batch over it."""

    def __init__(self, proxy: PostgresProxy, stage: Stage, lease: Lease, lines: int = 1) -> None:
        engine = create_engine(Settings(database_url=proxy.url), application=f"{HAND} alpha@host/1-a", pooled=False)
        self.connection = engine.connect()
        body = [patient(f"p{number}", name="N" * 200) for number in range(lines)]
        [self.batch] = stage.reader(lease).batches(lines_of(*body), 0, 1)
        self._lease = lease
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)

    def start(self) -> Hand:
        self._thread.start()
        return self

    def end(self) -> BaseException | None:
        """Wait for the batch; returns what became of it: None when it was committed."""
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.error

    def _write(self) -> None:
        try:
            write_batch(self.connection, self._lease, self.batch, Origins(self._lease), by_key=False, lease_seconds=30)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        finally:
            self.connection.close()


def _cursor(stage: Stage, lease: Lease) -> int:
    [[lines]] = stage.rows("SELECT cursor_lines FROM steps WHERE id = :id", id=lease.step_id)
    return int(lines)


@pytest.mark.parametrize("point", [Point.COPY, Point.FENCE, Point.COMMIT])
def test_holds_a_batch_at_the_point_until_released(proxy: PostgresProxy, stage: Stage, point: Point) -> None:
    lease = stage.ingest_lease()
    held = proxy.add(Trigger(point, Act.HOLD))
    hand = Hand(proxy, stage, lease, lines=1000).start()
    wait_until(lambda: held.fired, f"a hand at {point.value}", seconds=10)

    assert held.fired[0].worker_id == "alpha@host/1-a"
    assert _cursor(stage, lease) == 0
    held.release.set()
    assert hand.end() is None
    assert _cursor(stage, lease) == 1000


def test_held_before_commit_the_step_is_locked_and_before_the_fence_it_is_not(
    proxy: PostgresProxy, stage: Stage
) -> None:
    locked = "SELECT count(*) FROM (SELECT 1 FROM steps WHERE id = :id FOR UPDATE SKIP LOCKED) free"
    for point, free in ((Point.FENCE, 1), (Point.COMMIT, 0)):
        lease = stage.ingest_lease()
        held = proxy.add(Trigger(point, Act.HOLD))
        hand = Hand(proxy, stage, lease).start()
        wait_until(lambda held=held: held.fired, "a hand there", seconds=10)
        assert stage.rows(locked, id=lease.step_id) == [(free,)]
        held.release.set()
        assert hand.end() is None


def test_held_connection_does_not_see_that_the_server_ended_it(proxy: PostgresProxy, stage: Stage) -> None:
    lease = stage.ingest_lease()
    held = proxy.add(Trigger(Point.COMMIT, Act.HOLD))
    hand = Hand(proxy, stage, lease).start()
    wait_until(lambda: held.fired, "a hand at COMMIT", seconds=10)
    assert leases.evict(stage.connection, lease) == 1
    hand._thread.join(0.3)

    assert hand.error is None
    held.release.set()
    error = hand.end()
    assert error is not None
    assert is_disconnect(error)
    assert _cursor(stage, lease) == 0


@pytest.mark.parametrize(("act", "landed"), [(Act.CUT_BEFORE, 0), (Act.CUT_AFTER, 1)])
def test_cuts_at_commit(proxy: PostgresProxy, stage: Stage, act: Act, landed: int) -> None:
    lease = stage.ingest_lease()
    cut = proxy.add(Trigger(Point.COMMIT, act))
    hand = Hand(proxy, stage, lease).start()
    error = hand.end()

    assert error is not None
    assert is_disconnect(error)
    assert len(cut.fired) == 1
    assert leases.cursor_after_lost_commit(stage.connection, lease) == landed * hand.batch.end_byte
    assert _cursor(stage, lease) == landed


def test_delays_renewals_of_keepers_alone(proxy: PostgresProxy, stage: Stage) -> None:
    lease = stage.ingest_lease()
    proxy.add(Trigger(Point.RENEW, Act.DELAY, times=None, seconds=0.5, application=KEEPER))
    took = {}
    for role in (HAND, KEEPER):
        engine = create_engine(Settings(database_url=proxy.url), application=f"{role} alpha", pooled=False)
        with engine.connect() as connection, connection.begin():
            started = time.monotonic()
            leases.renew(connection, lease, 30)
            took[role] = time.monotonic() - started

    assert took[HAND] < 0.4
    assert took[KEEPER] >= 0.5


def test_skips_and_counts(proxy: PostgresProxy, stage: Stage) -> None:
    lease = stage.ingest_lease()
    cut = proxy.add(Trigger(Point.RENEW, Act.CUT_BEFORE, times=2, skip=1))
    ended = []
    for _ in range(4):
        engine = create_engine(Settings(database_url=proxy.url), application=f"{HAND} alpha", pooled=False)
        with engine.connect() as connection:
            try:
                leases.renew(connection, lease, 30)
            except Exception as error:  # noqa: BLE001 - told apart below
                ended.append(is_disconnect(error))
            else:
                ended.append(False)

    assert ended == [False, True, True, False]
    assert len(cut.fired) == 2


def test_prepared_statements_are_known_by_name(proxy: PostgresProxy, stage: Stage) -> None:
    fence = "UPDATE steps SET cursor_bytes = %s WHERE id = -1"
    with psycopg.connect(proxy.url, application_name=f"{HAND} alpha", prepare_threshold=0) as connection:
        connection.execute(fence, (1,))
        connection.commit()
        held = proxy.add(Trigger(Point.FENCE, Act.CUT_BEFORE))
        with pytest.raises(psycopg.OperationalError):
            connection.execute(fence, (2,))
    assert len(held.fired) == 1


def test_a_commit_without_fence_is_no_point(proxy: PostgresProxy) -> None:
    cut = proxy.add(Trigger(Point.COMMIT, Act.CUT_BEFORE))
    with psycopg.connect(proxy.url, application_name=f"{HAND} alpha") as connection:
        connection.execute("SELECT 1")
        connection.commit()
        connection.execute("UPDATE steps SET cursor_bytes = 1 WHERE id = -1")
        connection.rollback()
        connection.execute("SELECT 1")
        connection.commit()
    assert cut.fired == []


def test_large_answers_and_copies_pass_unchanged(proxy: PostgresProxy) -> None:
    with psycopg.connect(proxy.url) as connection:
        [[body]] = connection.execute("SELECT repeat('é', 500000)").fetchall()
        assert body == "é" * 500_000
        connection.execute("CREATE TEMP TABLE copied (body text)")
        with connection.cursor().copy("COPY copied FROM STDIN") as copy:
            for number in range(2000):
                copy.write_row([f"{number} " + "x" * 997])
        [[count, size]] = connection.execute("SELECT count(*), sum(length(body)) FROM copied").fetchall()
    assert (count, size) == (2000, sum(len(str(number)) + 998 for number in range(2000)))


def test_client_sees_that_the_server_is_gone(proxy: PostgresProxy, database_url: str) -> None:
    with psycopg.connect(proxy.url) as connection, psycopg.connect(database_url) as other:
        pid = connection.info.backend_pid
        other.execute("SELECT pg_terminate_backend(%s)", (pid,))
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
