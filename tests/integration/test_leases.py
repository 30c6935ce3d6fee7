"""The lease protocol on a real Postgres: who may claim, who may commit, and what becomes of those who may not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa

from devstack.stack import wait_until
from schema import artifacts, files, leases, submissions
from schema.database import DATABASE_ERRORS, is_disconnect
from schema.files import PlannedFile, Problem
from schema.leases import Lease, LeaseLost, Progress
from settings import Settings
from tests.support.stage import Stage, patient

STEP = "SELECT worker_id, fencing_token, attempts, state FROM steps WHERE id = :id"


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=database_url)) as stage:
        yield stage


@pytest.fixture
def other(stage: Stage) -> Iterator[Stage]:
    """A second connection to the same database."""
    with Stage(stage.settings) as other:
        yield other


def claim(stage: Stage, worker: str = "test/1", *, hint: int = 0) -> Lease | None:
    return leases.claim_next(stage.connection, worker, 30, hint)


def somebody_waits(settings: Settings) -> bool:
    """Whether a session waits for a lock, asked on a connection of its own."""
    with Stage(settings, submitter="observer") as observer:
        return observer.waits_for_lock("test stage")


def publish_lease(stage: Stage) -> Lease:
    """A lease on the publish step of a manifest without files."""
    manifest_id = stage.add_manifest()
    files.finish_plan(stage.connection, stage.claim_of(manifest_id, "test/1"), [])
    return stage.claim_of(manifest_id, "test/1")


def test_a_claim_takes_one_step(stage: Stage) -> None:
    manifest_id = stage.add_manifest()
    stage.add_manifest()
    lease = stage.claim("node/7")
    assert (lease.manifest_id, lease.kind, lease.attempts, lease.previous_worker) == (manifest_id, "plan", 1, None)
    held = stage.rows("SELECT id, worker_id, fencing_token FROM steps WHERE worker_id IS NOT NULL")
    assert held == [(lease.step_id, "node/7", lease.fencing_token)]
    assert stage.rows("SELECT status FROM manifests ORDER BY id") == [("processing",), ("pending",)]


def test_every_step_is_claimed_by_one_of_many_threads(stage: Stage) -> None:
    for _ in range(4):
        plan = stage.claim_of(stage.add_manifest(), "test/1")
        listed = [PlannedFile("output", f"http://provider.test/{number}.ndjson") for number in range(50)]
        files.finish_plan(stage.connection, plan, listed)
    start = threading.Barrier(8)

    def claim_all(worker: str) -> list[int]:
        with Stage(stage.settings) as own:
            start.wait(10)
            return [lease.step_id for lease in iter(lambda: claim(own, worker), None)]

    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim_all, [f"node/{number}" for number in range(8)]))
    times = Counter(step_id for steps in claimed for step_id in steps)
    assert times == Counter(step_id for (step_id,) in stage.rows("SELECT id FROM steps WHERE kind = 'ingest'"))
    assert len(times) == 200
    assert stage.rows("SELECT DISTINCT fencing_token, attempts FROM steps WHERE kind = 'ingest'") == [(1, 1)]
    assert sum(1 for steps in claimed if steps) > 1


def test_the_token_rises_with_every_claim_and_is_never_reset(stage: Stage) -> None:
    first = stage.ingest_lease()
    stage.write(first, patient("a"))
    leases.release(stage.connection, first, delay=0, give_back=True, reason="leaving")
    second = stage.claim()
    stage.expire(second)
    third = stage.claim()
    stage.expire(third)
    leases.expire(stage.connection, 10)
    fourth = stage.claim()
    assert {lease.step_id for lease in (second, third, fourth)} == {first.step_id}
    assert [lease.fencing_token for lease in (first, second, third, fourth)] == [1, 2, 3, 4]


def test_only_a_lease_that_ran_out_is_claimed_by_another(stage: Stage) -> None:
    stage.add_manifest()
    lease = stage.claim("first/1")
    assert claim(stage, "second/1") is None
    stage.expire(lease)
    taken = stage.claim("second/1")
    assert (taken.step_id, taken.previous_worker, taken.attempts) == (lease.step_id, "first/1", 2)


def test_a_lease_that_ran_out_unnoticed_still_serves_its_holder(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.expire(lease)
    stage.write(lease, patient("a"))
    assert claim(stage) is None


@pytest.mark.parametrize(
    "hidden",
    ["ready_at = clock_timestamp() + interval '1 hour'", "state = 'waiting'", "state = 'done'", "state = 'failed'"],
)
def test_a_step_that_is_not_due_is_not_claimed(stage: Stage, hidden: str) -> None:
    stage.add_manifest()
    stage.execute(f"UPDATE steps SET {hidden} WHERE kind = 'plan'")
    assert claim(stage) is None
    stage.execute("UPDATE steps SET state = 'ready', ready_at = clock_timestamp() WHERE kind = 'plan'")
    assert claim(stage) is not None


@pytest.mark.parametrize("status", ["completed", "failed", "replaced", "stopped"])
def test_a_step_of_a_manifest_that_ended_is_not_claimed(stage: Stage, status: str) -> None:
    stage.execute("UPDATE manifests SET status = :status WHERE id = :id", status=status, id=stage.add_manifest())
    assert claim(stage) is None


def test_a_step_that_somebody_has_locked_is_passed_over(stage: Stage, other: Stage) -> None:
    stage.add_manifest()
    younger = stage.add_manifest()
    with other.connection.begin():
        other.connection.exec_driver_sql("SELECT 1 FROM steps ORDER BY id LIMIT 1 FOR UPDATE")
        assert stage.claim().manifest_id == younger


def test_a_step_of_a_manifest_stopped_during_the_claim_is_not_claimed(stage: Stage, other: Stage) -> None:
    stage.add_manifest()
    with ThreadPoolExecutor(1) as pool:
        with other.connection.begin():
            other.connection.exec_driver_sql("UPDATE manifests SET status = 'stopped'")
            claimed = pool.submit(claim, stage)
            wait_until(lambda: somebody_waits(stage.settings), "the claim waits for the manifest", seconds=10)
        assert claimed.result(10) is None
    assert stage.rows("SELECT DISTINCT fencing_token FROM steps") == [(0,)]


def test_the_oldest_manifest_of_a_tenant_goes_first_whatever_the_hint(stage: Stage) -> None:
    oldest, youngest = stage.add_manifest(), stage.add_manifest()
    assert stage.claim(hint=youngest).manifest_id == oldest
    assert stage.claim(hint=0).manifest_id == youngest


def add_tenant(stage: Stage, name: str) -> tuple[int, int]:
    """Another tenant and its submitter."""
    with stage.connection.begin():
        tenant_id = submissions.add_tenant(stage.connection, name)
        submitter_id = submissions.add_submitter(stage.connection, tenant_id, "urn:test", "south", ignore_meta=False)
    return tenant_id, submitter_id


def add_manifest_of(stage: Stage, tenant_id: int, submitter_id: int, number: int) -> int:
    """A manifest of another tenant."""
    with stage.connection.begin():
        submission = submissions.hold_submission(
            stage.connection, tenant_id, submitter_id, f"south-{number}", owner_subject=None, request_url=None
        )
        return submissions.add_manifest(
            stage.connection,
            submission,
            manifest_url=f"http://provider.test/south/{number}",
            replaces_url=None,
            kickoff_digest=b"digest",
            parameters=submissions.FetchParameters(None, None, [], [], [], None),
        )


def test_the_hint_decides_between_tenants_with_equal_shares(stage: Stage) -> None:
    stage.add_manifest()
    hinted = add_manifest_of(stage, *add_tenant(stage, "south"), 1)
    assert stage.claim(hint=hinted).manifest_id == hinted


def test_tenants_take_turns_however_much_one_of_them_has_waiting(stage: Stage) -> None:
    for _ in range(6):
        stage.add_manifest()
    tenant = add_tenant(stage, "south")
    for number in range(2):
        add_manifest_of(stage, *tenant, number)
    claimed = [stage.claim().tenant_id for _ in range(6)]
    assert claimed == [stage.tenant_id, tenant[0], stage.tenant_id, tenant[0], stage.tenant_id, stage.tenant_id]


def test_a_frozen_hold_on_one_tenant_s_manifest_keeps_no_other_tenant_waiting(stage: Stage, other: Stage) -> None:
    held = stage.add_manifest()
    free = add_manifest_of(stage, *add_tenant(stage, "south"), 1)
    with other.connection.begin():
        other.connection.execute(sa.text("SELECT 1 FROM manifests WHERE id = :id FOR NO KEY UPDATE"), {"id": held})
        claimed = claim(stage, hint=held)
        assert claimed is not None
        assert claimed.manifest_id == free
        assert claim(stage, hint=held) is None
    assert stage.claim(hint=held).manifest_id == held


def test_a_tenant_of_weight_three_gets_three_of_four_steps(stage: Stage) -> None:
    tenant = add_tenant(stage, "south")
    stage.execute("UPDATE tenants SET weight = 3 WHERE id = :id", id=tenant[0])
    for number in range(8):
        stage.add_manifest()
        add_manifest_of(stage, *tenant, number)
    claimed = Counter(stage.claim().tenant_id for _ in range(8))
    assert claimed == {tenant[0]: 6, stage.tenant_id: 2}


def test_a_tenant_at_its_cap_waits_while_others_go_on(stage: Stage) -> None:
    tenant = add_tenant(stage, "south")
    stage.execute("UPDATE tenants SET max_leased_steps = 1 WHERE id = :id", id=stage.tenant_id)
    for number in range(2):
        stage.add_manifest()
        add_manifest_of(stage, *tenant, number)
    held = list(iter(lambda: claim(stage), None))
    assert Counter(lease.tenant_id for lease in held) == {tenant[0]: 2, stage.tenant_id: 1}
    [own] = [lease for lease in held if lease.tenant_id == stage.tenant_id]
    leases.release(stage.connection, own, delay=3600, give_back=True, reason="leaving")
    assert stage.claim().tenant_id == stage.tenant_id


def test_a_renewal_extends_the_lease_from_now(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.expire(lease)
    with stage.connection.begin():
        orders = leases.renew(stage.connection, lease, 100)
    assert orders == leases.Orders(cancelled=False, drain=False)
    query = "SELECT extract(epoch FROM lease_expires_at - clock_timestamp())::int FROM steps WHERE id = :id"
    [(seconds,)] = stage.rows(query, id=lease.step_id)
    assert 90 < seconds <= 100
    assert claim(stage) is None


def test_a_renewal_brings_the_orders_to_leave_and_to_stop(stage: Stage) -> None:
    lease = stage.ingest_lease("node@host/3")
    stage.execute("INSERT INTO fleet_workers (name, pid, slots, drain) VALUES ('node@host', 1, 1, true)")
    with stage.connection.begin():
        assert leases.renew(stage.connection, lease, 30) == leases.Orders(cancelled=False, drain=True)
    stage.execute("UPDATE manifests SET status = 'stopped'")
    with stage.connection.begin():
        assert leases.renew(stage.connection, lease, 30) == leases.Orders(cancelled=True, drain=True)


def end_file(stage: Stage, lease: Lease) -> None:
    files.finish_file(stage.connection, lease, [Problem("error", "exception", "gone")])


def fence(stage: Stage, lease: Lease) -> None:
    with stage.connection.begin():
        leases.hold_manifest(stage.connection, lease)
        leases.fence(stage.connection, lease, Progress(lease.cursor_bytes, lease.cursor_bytes + 10, 1, created=1), 30)


def note_validator(stage: Stage, lease: Lease) -> None:
    files.note_validator(stage.connection, lease, '"stale"')


def write_batch(stage: Stage, lease: Lease) -> None:
    stage.write(lease, patient("stale"), b"not JSON")


def renew(stage: Stage, lease: Lease) -> None:
    with stage.connection.begin():
        if leases.renew(stage.connection, lease, 100).cancelled:
            raise LeaseLost


def hold_step(stage: Stage, lease: Lease) -> None:
    with stage.connection.begin():
        leases.hold_manifest(stage.connection, lease)
        leases.hold_step(stage.connection, lease)


def end_plan(stage: Stage, lease: Lease) -> None:
    files.finish_plan(stage.connection, lease, [PlannedFile("output", "http://provider.test/stale")], notes=["stale"])


def end_manifest(stage: Stage, lease: Lease) -> None:
    files.finish_manifest(stage.connection, lease, "completed")


def announce_artifact(stage: Stage, lease: Lease) -> int:
    return artifacts.record(
        stage.connection,
        lease,
        submission_id=1,
        type="summary",
        resource_type=None,
        part=0,
        path=f"{lease.step_id}/{lease.fencing_token}",
        seconds=30,
    )


def complete_artifact(stage: Stage, lease: Lease) -> None:
    [(artifact_id,)] = stage.rows("SELECT coalesce(max(id), 0) FROM artifacts")
    artifacts.complete(
        stage.connection,
        lease,
        artifact_id,
        line_count=1,
        byte_count=1,
        stored_bytes=1,
        sha256=b"stale",
        severity_counts=None,
        seconds=30,
    )


def plan_lease(stage: Stage) -> Lease:
    return stage.claim_of(stage.add_manifest(), "test/1")


def publish_lease_with_artifact(stage: Stage) -> Lease:
    lease = publish_lease(stage)
    announce_artifact(stage, lease)
    return lease


def ingest_lease(stage: Stage) -> Lease:
    return stage.ingest_lease()


Operation = Callable[[Stage, Lease], object]
OPERATIONS: list[tuple[Callable[[Stage], Lease], Operation]] = [
    (plan_lease, end_plan),
    (ingest_lease, end_file),
    (ingest_lease, fence),
    (ingest_lease, note_validator),
    (ingest_lease, write_batch),
    (ingest_lease, renew),
    (ingest_lease, hold_step),
    (publish_lease, end_manifest),
    (publish_lease, announce_artifact),
    (publish_lease_with_artifact, complete_artifact),
]


def taken_over(stage: Stage, lease: Lease) -> None:
    stage.expire(lease)
    stage.claim_of(lease.manifest_id, "test/2")


def taken_over_by_the_same_worker(stage: Stage, lease: Lease) -> None:
    stage.expire(lease)
    stage.claim_of(lease.manifest_id, lease.worker_id)


def swept(stage: Stage, lease: Lease) -> None:
    stage.expire(lease)
    leases.expire(stage.connection, 10)


def released(stage: Stage, lease: Lease) -> None:
    leases.release(stage.connection, lease, delay=0, give_back=False, reason="test")


def ended(stage: Stage, lease: Lease) -> None:
    with stage.connection.begin():
        leases.finish(stage.connection, lease, "done")


def stopped(stage: Stage, lease: Lease) -> None:
    stage.execute("UPDATE manifests SET status = 'stopped' WHERE id = :id", id=lease.manifest_id)


LOSSES = [taken_over, taken_over_by_the_same_worker, swept, released, ended, stopped]


@pytest.mark.parametrize(("give", "operation"), OPERATIONS, ids=[operation.__name__ for _, operation in OPERATIONS])
def test_an_operation_under_a_lost_lease_changes_nothing(
    stage: Stage, give: Callable[[Stage], Lease], operation: Operation
) -> None:
    operation(stage, give(stage))
    for lose in LOSSES:
        lease = give(stage)
        lose(stage, lease)
        before = stage.dump()
        with pytest.raises(LeaseLost):
            operation(stage, lease)
        assert stage.dump() == before, lose.__name__


@pytest.mark.parametrize("lose", [taken_over, taken_over_by_the_same_worker, swept, released, ended])
def test_a_lost_lease_cannot_be_released(stage: Stage, lose: Callable[[Stage, Lease], None]) -> None:
    lease = stage.ingest_lease()
    lose(stage, lease)
    before = stage.dump()
    assert leases.release(stage.connection, lease, delay=0, give_back=True, reason="test") is False
    assert stage.dump() == before


def test_a_released_step_is_claimed_at_once_and_its_attempt_given_back(stage: Stage) -> None:
    lease = stage.ingest_lease()
    assert leases.release(stage.connection, lease, delay=0, give_back=True, reason="leaving")
    assert stage.rows(STEP, id=lease.step_id) == [(None, 1, 0, "ready")]
    again = stage.claim()
    assert (again.step_id, again.attempts, again.fencing_token) == (lease.step_id, 1, 2)


def test_a_step_put_off_keeps_its_attempt_and_waits_for_its_delay(stage: Stage) -> None:
    lease = stage.ingest_lease()
    leases.release(stage.connection, lease, delay=3600, give_back=False, reason="timeout")
    assert claim(stage) is None
    stage.execute("UPDATE steps SET ready_at = ready_at - interval '1 hour'")
    assert stage.claim().attempts == 2


def test_attempts_are_claims_since_the_cursor_last_moved(stage: Stage) -> None:
    lease = stage.ingest_lease()
    for attempts in (2, 3):
        stage.expire(lease)
        lease = stage.claim()
        assert lease.attempts == attempts
    stage.write(lease, patient("a"))
    stage.expire(lease)
    assert stage.claim().attempts == 1


def test_a_claim_begins_where_the_last_commit_ended(stage: Stage) -> None:
    lease = stage.ingest_lease()
    progress = stage.write(lease, patient("a"), patient("b"))
    stage.expire(lease)
    taken = stage.claim()
    assert (taken.cursor_bytes, taken.cursor_lines) == (progress.end_byte, 2)
    stage.write(taken, patient("c"))
    assert stage.rows("SELECT cursor_lines, created FROM steps WHERE id = :id", id=lease.step_id) == [(3, 3)]


def test_claiming_a_step_ends_the_open_transaction_of_its_former_holder(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()
    other.connection.begin()
    leases.enter(other.connection, lease)
    other.connection.exec_driver_sql("UPDATE manifest_files SET url = 'http://stale.test'")
    stage.expire(lease)
    assert stage.claim().step_id == lease.step_id
    stage.execute("UPDATE manifest_files SET url = 'http://provider.test'")
    with pytest.raises(DATABASE_ERRORS) as failure:
        leases.fence(other.connection, lease, Progress(0, 10, 1), 30)
    assert is_disconnect(failure.value)
    assert stage.rows("SELECT url FROM manifest_files") == [("http://provider.test",)]


def test_evicting_ends_nobody_who_works_on_another_step(stage: Stage, other: Stage) -> None:
    mine, theirs = stage.ingest_lease(), stage.ingest_lease()
    with other.connection.begin():
        leases.enter(other.connection, theirs)
        assert leases.evict(stage.connection, mine) == 0
        assert leases.evict(stage.connection, replace(theirs, step_id=theirs.step_id + (1 << 32))) == 0
        leases.hold_manifest(other.connection, theirs)
        leases.fence(other.connection, theirs, Progress(0, 10, 1), 30)
    assert stage.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=theirs.step_id) == [(10,)]


def test_a_step_id_past_32_bits_is_evicted_too(stage: Stage, other: Stage) -> None:
    stage.execute(f"ALTER TABLE steps ALTER COLUMN id RESTART WITH {(7 << 32) + 4_000_000_000}")
    lease = stage.ingest_lease()
    assert lease.step_id > 7 << 32
    other.connection.begin()
    leases.enter(other.connection, lease)
    assert leases.evict(stage.connection, lease) == 1
    with pytest.raises(DATABASE_ERRORS):
        other.connection.rollback()


def test_after_a_lost_commit_a_batch_that_landed_is_told_from_one_that_did_not(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()
    assert leases.cursor_after_lost_commit(other.connection, lease) == 0
    progress = stage.write(lease, patient("a"))
    assert leases.cursor_after_lost_commit(other.connection, lease) == progress.end_byte


def test_after_a_lost_commit_a_batch_left_open_is_rolled_back(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()
    other.connection.begin()
    leases.enter(other.connection, lease)
    leases.hold_manifest(other.connection, lease)
    leases.fence(other.connection, lease, Progress(0, 10, 1), 30)
    assert leases.cursor_after_lost_commit(stage.connection, lease) == 0
    with pytest.raises(DATABASE_ERRORS):
        other.connection.commit()
    assert stage.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=lease.step_id) == [(0,)]


def test_after_a_lost_commit_one_still_under_way_is_waited_for(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()
    with ThreadPoolExecutor(1) as pool:
        with other.connection.begin():
            leases.fence(other.connection, lease, Progress(0, 10, 1), 30)
            cursor = pool.submit(leases.cursor_after_lost_commit, stage.connection, lease)
            wait_until(lambda: somebody_waits(stage.settings), "the reader waits for the commit", seconds=10)
        assert cursor.result(10) == 10


def test_after_a_lost_commit_a_holder_whose_step_was_taken_learns_it(stage: Stage) -> None:
    lease = stage.ingest_lease()
    taken_over(stage, lease)
    with pytest.raises(LeaseLost):
        leases.cursor_after_lost_commit(stage.connection, lease)


def test_a_heartbeat_does_not_wait_for_an_open_batch(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()
    with other.connection.begin():
        leases.enter(other.connection, lease)
        leases.hold_manifest(other.connection, lease)
        renew(stage, lease)
        leases.fence(other.connection, lease, Progress(0, 10, 1), 30)


def test_stopping_waits_for_the_commit_under_way_and_lets_none_come_after_it(stage: Stage, other: Stage) -> None:
    lease = stage.ingest_lease()

    def stop() -> list[int]:
        with Stage(stage.settings) as own, own.connection.begin():
            [(submission_id,)] = own.connection.exec_driver_sql("SELECT submission_id FROM submissions").all()
            submission = submissions.find_submission(own.connection, own.tenant_id, own.submitter_id, submission_id)
            assert submission is not None
            return submissions.revoke(own.connection, submission, "stopped")

    with ThreadPoolExecutor(1) as pool:
        with other.connection.begin():
            leases.enter(other.connection, lease)
            leases.hold_manifest(other.connection, lease)
            leases.fence(other.connection, lease, Progress(0, 10, 1), 30)
            revoked = pool.submit(stop)
            wait_until(lambda: somebody_waits(stage.settings), "the stop waits for the commit", seconds=10)
            assert not revoked.done()
        assert revoked.result(10) == [lease.manifest_id]
    with pytest.raises(LeaseLost):
        stage.write(replace(lease, cursor_bytes=10, cursor_lines=1), patient("late"))
    assert stage.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=lease.step_id) == [(10,)]


def test_every_turn_of_a_lease_is_in_its_timeline(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.expire(lease)
    leases.expire(stage.connection, 10)
    again = stage.claim("test/2")
    leases.release(stage.connection, again, delay=0, give_back=True, reason="this worker is leaving")
    last = stage.claim("test/3")
    end_file(stage, last)
    events = stage.rows(
        "SELECT event, worker_id, fencing_token, reason FROM lease_events WHERE step_id = :id ORDER BY id",
        id=lease.step_id,
    )
    assert events == [
        ("claimed", "test/1", 1, None),
        ("expired", "test/1", 1, None),
        ("claimed", "test/2", 2, None),
        ("released", "test/2", 2, "this worker is leaving"),
        ("claimed", "test/3", 3, None),
        ("failed", "test/3", 3, "gone"),
    ]
