"""Sweeps: leases that ran out are cleared, and hands are called for what is due, without a message too many."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis

import celeryconfig
from devstack.servers import free_port
from devstack.stack import wait_until
from schema import files, fleet, leases, sweeps
from schema.database import DATABASE_ERRORS
from schema.files import PlannedFile
from schema.leases import Progress
from settings import Settings
from submit_tasks.app import app
from submit_tasks.sweeps import SWEEPS
from tests.support.stage import Stage

HELD = "SELECT worker_id FROM steps WHERE worker_id IS NOT NULL ORDER BY id"
SWEEP = "from submit_tasks.sweeps import sweep_leases; sweep_leases()"
SWEEP_BESIDE_ANOTHER = """
from schema import leases
from schema.database import create_engine
from settings import settings
from submit_tasks.sweeps import LOCKS, sweep_leases

engine = create_engine(settings(), application="other sweep", pooled=False)
with engine.connect() as other, other.begin():
    assert leases.only_one(other, LOCKS["leases"])
    sweep_leases()
"""


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=database_url)) as stage:
        yield stage


@pytest.fixture
def other(stage: Stage) -> Iterator[Stage]:
    """A second connection to the same database."""
    with Stage(stage.settings) as other:
        yield other


def test_leases_that_ran_out_are_cleared_and_the_others_kept(stage: Stage) -> None:
    first, _, third = (stage.ingest_lease(f"test/{number}") for number in range(3))
    stage.expire(first)
    stage.expire(third)
    assert leases.expire(stage.connection, 10) == [first.manifest_id, third.manifest_id]
    assert stage.rows(HELD) == [("test/1",)]
    assert leases.expire(stage.connection, 10) == []
    events = stage.rows("SELECT step_id, worker_id, fencing_token FROM lease_events WHERE event = 'expired'")
    assert sorted(events) == [(lease.step_id, lease.worker_id, 1) for lease in (first, third)]
    assert stage.claim().step_id == first.step_id


def test_no_more_than_the_limit_are_cleared_the_oldest_first(stage: Stage) -> None:
    held = [stage.ingest_lease(f"test/{number}") for number in range(3)]
    for lease in reversed(held):
        stage.expire(lease)
    assert leases.expire(stage.connection, 2) == [held[2].manifest_id, held[1].manifest_id]
    assert stage.rows(HELD) == [("test/0",)]


def test_the_open_transaction_of_a_lease_that_ran_out_is_ended_though_it_locks_the_row(
    stage: Stage, other: Stage
) -> None:
    lease = stage.ingest_lease()
    other.connection.begin()
    leases.enter(other.connection, lease)
    leases.hold_manifest(other.connection, lease)
    stage.execute("UPDATE steps SET lease_expires_at = clock_timestamp() WHERE id = :id", id=lease.step_id)
    leases.fence(other.connection, lease, Progress(0, 10, 1), 30)
    wait_until(lambda: leases.expire(stage.connection, 10) == [lease.manifest_id], "the lease is cleared", seconds=10)
    with pytest.raises(DATABASE_ERRORS):
        other.connection.commit()
    assert stage.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=lease.step_id) == [(0,)]


def test_the_open_transaction_of_a_lease_that_lasts_is_left_alone(stage: Stage, other: Stage) -> None:
    lasting, over = stage.ingest_lease(), stage.ingest_lease()
    stage.expire(over)
    with other.connection.begin():
        leases.enter(other.connection, lasting)
        assert leases.expire(stage.connection, 10) == [over.manifest_id]
        leases.fence(other.connection, lasting, Progress(0, 10, 1), 30)
    assert stage.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=lasting.step_id) == [(10,)]


def test_what_is_due_has_one_id_for_each_step_oldest_first(stage: Stage) -> None:
    three_files = stage.ingest_lease(files_listed=3)
    leases.release(stage.connection, three_files, delay=0, give_back=True, reason="test")
    later, stopped, delayed = (stage.add_manifest() for _ in range(3))
    held, over = stage.ingest_lease(), stage.ingest_lease()
    stage.expire(over)
    ages = {three_files.manifest_id: 30, over.manifest_id: 20, later: 10, held.manifest_id: 40, stopped: 50}
    for manifest_id, age in ages.items():
        stage.execute(
            "UPDATE steps SET ready_at = clock_timestamp() - make_interval(secs => :age) WHERE manifest_id = :id",
            age=age,
            id=manifest_id,
        )
    stage.execute("UPDATE manifests SET status = 'stopped' WHERE id = :id", id=stopped)
    stage.execute("UPDATE steps SET ready_at = 'infinity' WHERE manifest_id = :id", id=delayed)
    due = [three_files.manifest_id] * 3 + [over.manifest_id, later]
    assert leases.due_manifests(stage.connection, 100) == due
    assert leases.due_manifests(stage.connection, 4) == due[:4]


def test_only_another_tenants_due_steps_ask_a_hand_to_make_room(stage: Stage) -> None:
    mine = stage.ingest_lease(files_listed=2)
    assert not leases.others_wait(stage.connection, mine)
    theirs = replace(mine, tenant_id=stage.other_tenant())
    assert leases.others_wait(stage.connection, theirs)


def test_of_two_that_want_a_lock_one_gets_it_until_it_ends(stage: Stage, other: Stage) -> None:
    with stage.connection.begin():
        assert leases.only_one(stage.connection, 7)
        with other.connection.begin():
            assert not leases.only_one(other.connection, 7)
            assert leases.only_one(other.connection, 8)
    with other.connection.begin():
        assert leases.only_one(other.connection, 7)


def test_the_slots_of_nodes_not_seen_lately_do_not_count(stage: Stage) -> None:
    fleet.report(stage.connection, "up@host", 1, 3, started=True)
    fleet.report(stage.connection, "gone@host", 1, 50, started=True)
    stage.execute("UPDATE fleet_workers SET last_seen_at = now() - interval '1 minute' WHERE name = 'gone@host'")
    assert fleet.slots(stage.connection) == 3


class Sweeper:
    """Runs the sweep as its own process does, and reads what it has sent."""

    def __init__(self, stage: Stage, broker_url: str) -> None:
        self._environment = {
            **os.environ,
            "BULK_SUBMIT_DATABASE_URL": stage.settings.database_url,
            "BULK_SUBMIT_BROKER_URL": broker_url,
        }
        self._redis = redis.Redis.from_url(broker_url)

    def run(self, script: str = SWEEP) -> None:
        subprocess.run([sys.executable, "-c", script], env=self._environment, check=True, timeout=60)

    def messages(self) -> list[dict[str, Any]]:
        """The messages that wait, in the order they were sent."""
        return [json.loads(raw) for raw in reversed(self._redis.lrange("manifests", 0, -1))]

    def ids(self) -> list[int]:
        """The arguments of the messages that wait."""
        return [json.loads(base64.b64decode(message["body"]))[0][0] for message in self.messages()]


@pytest.fixture
def sweeper(stage: Stage, broker_url: str) -> Sweeper:
    return Sweeper(stage, broker_url)


def test_a_sweep_clears_what_ran_out_and_calls_a_hand_for_it(stage: Stage, sweeper: Sweeper) -> None:
    lease = stage.ingest_lease()
    stage.expire(lease)
    sweeper.run()
    assert stage.rows(HELD) == []
    assert sweeper.ids() == [lease.manifest_id]
    [message] = sweeper.messages()
    assert message["headers"]["task"] == "submit_tasks.process_manifest"
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[lease.manifest_id], {}]
    assert message["headers"]["eta"] is None


def test_a_sweep_sends_no_more_messages_than_there_are_slots(stage: Stage, sweeper: Sweeper) -> None:
    plan = stage.claim_of(stage.add_manifest(), "test/1")
    files.finish_plan(stage.connection, plan, [PlannedFile("output", f"http://p.test/{n}") for n in range(5)])
    fleet.report(stage.connection, "node@host", 1, 3, started=True)
    sweeper.run()
    assert sweeper.ids() == [plan.manifest_id] * 3
    sweeper.run()
    assert len(sweeper.ids()) == 3


def test_a_sweep_with_nothing_due_sends_nothing(stage: Stage, sweeper: Sweeper) -> None:
    stage.ingest_lease()
    sweeper.run()
    assert sweeper.ids() == []
    assert len(stage.rows(HELD)) == 1


def test_a_sweep_beside_another_does_nothing(stage: Stage, sweeper: Sweeper) -> None:
    stage.expire(stage.ingest_lease())
    before = stage.dump()
    sweeper.run(SWEEP_BESIDE_ANOTHER)
    assert stage.dump() == before
    assert sweeper.ids() == []


def test_a_sweep_leaves_its_report(stage: Stage, sweeper: Sweeper) -> None:
    stage.expire(stage.ingest_lease())
    fleet.report(stage.connection, "node@host", 1, 3, started=True)
    sweeper.run()
    with stage.connection.begin():
        [record] = sweeps.records(stage.connection)
    assert (record.name, record.failures) == ("leases", 0)
    assert record.report == {"expired": 1, "slots": 3, "due": 1, "called": 1, "more": 0}


def test_without_a_broker_leases_are_cleared_and_nobody_is_called(stage: Stage) -> None:
    stage.expire(stage.ingest_lease())
    Sweeper(stage, f"redis://127.0.0.1:{free_port()}/0").run()
    assert stage.rows(HELD) == []
    assert stage.rows("SELECT report ->> 'called', failures FROM sweeps") == [("0", 0)]


def test_every_sweep_is_scheduled_on_its_own_queue_whatever_the_clocks_say() -> None:
    app.loader.import_default_modules()
    schedule = celeryconfig.beat_schedule.values()
    assert {entry["task"] for entry in schedule} == {f"submit_tasks.sweep_{name}" for name in SWEEPS}
    assert {entry["task"] for entry in schedule} <= set(app.tasks)
    for entry in schedule:
        assert entry["options"] == {"queue": "sweeps"}
