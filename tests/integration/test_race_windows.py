"""Two sessions at once, one of them stopped at a chosen point of its transaction: who waits, and what stands then."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from devstack.servers import EmbeddedPostgres
from devstack.stack import wait_until
from schema import artifacts, files, leases, resources
from schema.database import create_engine, is_disconnect
from schema.files import PlannedFile
from schema.leases import Lease, LeaseLost
from settings import Settings
from tests.support.stage import COMMIT, Actor, Stage, lines_of, patient
from workers import steps
from workers.artifact_store import ArtifactStore
from workers.ingest.write import Origins
from workers.keeper import Keeper

STEP = "SELECT state, worker_id, fencing_token, cursor_lines FROM steps WHERE id = :id"
FILE = [PlannedFile("output", "http://provider.test/late.ndjson")]


@pytest.fixture(scope="module")
def shared_database(postgres: EmbeddedPostgres, migrated_template: str) -> str:
    return postgres.create_database(f"races_{uuid.uuid4().hex[:12]}", template=migrated_template)


@pytest.fixture
def stage(shared_database: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=shared_database)) as stage:
        stage.clear()
        yield stage


@pytest.fixture
def first(stage: Stage) -> Iterator[Actor]:
    with Actor(stage.settings, "first") as actor:
        yield actor


@pytest.fixture
def second(stage: Stage) -> Iterator[Actor]:
    with Actor(stage.settings, "second") as actor:
        yield actor


def second_waits(stage: Stage, second: Future[Any]) -> None:
    wait_until(lambda: second.done() or stage.waits_for("second", "first"), "the second waits", seconds=10)
    assert not second.done()


def error_of(future: Future[Any]) -> BaseException:
    error = future.exception(20)
    assert error is not None
    return error


def step_of(stage: Stage, lease: Lease) -> tuple[Any, ...]:
    [row] = stage.rows(STEP, id=lease.step_id)
    return row


def stored(stage: Stage) -> int:
    [(rows,)] = stage.rows("SELECT count(*) FROM resource_versions")
    return int(rows)


def claim(stage: Stage) -> Lease | None:
    return leases.claim_next(stage.connection, "late/1", 30, 0)


def sweep(stage: Stage) -> list[int]:
    return leases.expire(stage.connection, 10)


class TestClaimAndClaim:
    @pytest.mark.parametrize("manifests", [1, 2])
    def test_nobody_waits_and_each_gets_another_step(
        self, stage: Stage, first: Actor, second: Actor, manifests: int
    ) -> None:
        added = [stage.add_manifest() for _ in range(manifests)]
        one = first.begin(claim, stop_after=leases._CLAIM)
        other = second.begin(claim).result(10)
        first.go()
        claimed = [lease.manifest_id for lease in (one.result(10), other) if lease]
        assert claimed == added
        assert stage.rows("SELECT count(*) FROM steps WHERE fencing_token = 1") == [(manifests,)]

    def test_a_claim_that_dies_before_its_commit_leaves_nothing(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        stage.add_manifest()
        dying = first.begin(claim, stop_after=leases._CLAIM)
        stage.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'first'")
        first.go()
        assert is_disconnect(error_of(dying))
        lease = second.begin(claim).result(10)
        assert (lease.fencing_token, lease.attempts, lease.previous_worker) == (1, 1, None)


class TestSweepAndRenew:
    def test_a_renewal_waits_for_the_sweep_that_clears_its_lease_and_is_lost(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._CLEAR_EXPIRED)
        renewed = second.begin(lambda own: own.renew(lease))
        second_waits(stage, renewed)
        first.go()
        assert swept.result(10) == [lease.manifest_id]
        assert isinstance(error_of(renewed), LeaseLost)
        assert step_of(stage, lease) == ("ready", None, 1, 0)

    def test_a_sweep_passes_over_a_renewal_under_way(self, stage: Stage, first: Actor, second: Actor) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        renewed = first.begin(lambda own: own.renew(lease), stop_after=leases._RENEW)
        assert second.begin(sweep).result(10) == []
        first.go()
        assert renewed.result(10) == leases.Orders(cancelled=False, drain=False)
        assert sweep(stage) == []
        assert step_of(stage, lease) == ("ready", "test/1", 1, 0)

    def test_a_sweep_that_comes_late_clears_nothing_and_ends_nobody(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._EXPIRED)
        stage.renew(lease)
        batch = second.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._FENCE)
        first.go()
        assert swept.result(10) == []
        second.go()
        assert batch.result(10).created == 1
        assert step_of(stage, lease) == ("ready", "test/1", 1, 1)


class TestSweepAndCommit:
    def test_a_batch_waits_for_the_sweep_that_clears_its_lease_and_leaves_nothing(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._CLEAR_EXPIRED)
        batch = second.begin(lambda own: own.write(lease, patient("a")))
        second_waits(stage, batch)
        first.go()
        assert swept.result(10) == [lease.manifest_id]
        assert isinstance(error_of(batch), LeaseLost)
        assert stored(stage) == 0

    @pytest.mark.parametrize("point", ["_ENTER", "_HOLD_MANIFEST", "_FENCE"])
    def test_a_batch_of_a_lease_that_ran_out_is_ended_wherever_it_stands(
        self, stage: Stage, first: Actor, second: Actor, point: str
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        batch = first.begin(lambda own: own.write(lease, patient("a")), stop_after=getattr(leases, point))
        wait_until(lambda: second.begin(sweep).result(10) == [lease.manifest_id], "the lease is cleared", seconds=10)
        first.go()
        assert is_disconnect(error_of(batch))
        assert (step_of(stage, lease), stored(stage)) == (("ready", None, 1, 0), 0)

    def test_a_batch_that_commits_before_a_late_sweep_looks_again_stands(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._EXPIRED)
        second.begin(lambda own: own.write(lease, patient("a"))).result(10)
        first.go()
        assert swept.result(10) == []
        assert (step_of(stage, lease), stored(stage)) == (("ready", "test/1", 1, 1), 1)


class TestSweepAndClaim:
    def test_a_sweep_that_comes_late_leaves_the_new_holder_alone(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._EXPIRED)
        taken = stage.claim("next/1")
        batch = second.begin(lambda own: own.write(taken, patient("a")), stop_after=leases._HOLD_MANIFEST)
        first.go()
        assert swept.result(10) == []
        second.go()
        assert batch.result(10).created == 1
        assert step_of(stage, lease) == ("ready", "next/1", 2, 1)

    def test_a_claim_passes_over_a_step_that_is_being_swept(self, stage: Stage, first: Actor, second: Actor) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._CLEAR_EXPIRED)
        assert second.begin(claim).result(10) is None
        first.go()
        swept.result(10)
        assert stage.claim().fencing_token == 2

    def test_a_sweep_passes_over_a_step_that_is_being_claimed(self, stage: Stage, first: Actor, second: Actor) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        claimed = first.begin(claim, stop_after=leases._CLAIM)
        assert second.begin(sweep).result(10) == []
        first.go()
        assert claimed.result(10).previous_worker == "test/1"
        assert step_of(stage, lease) == ("ready", "late/1", 2, 0)


class TestFinishAndSweep:
    def test_a_finish_not_yet_committed_under_a_lease_that_ran_out_is_ended(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        finished = first.begin(lambda own: files.finish_file(own.connection, lease, []), stop_after=COMMIT)
        wait_until(lambda: second.begin(sweep).result(10) == [lease.manifest_id], "the lease is cleared", seconds=10)
        first.go()
        assert is_disconnect(error_of(finished))
        assert step_of(stage, lease) == ("ready", None, 1, 0)
        assert stage.rows("SELECT state FROM steps WHERE kind = 'publish'") == [("waiting",)]

    def test_a_finish_waits_for_the_sweep_that_clears_its_lease_and_is_refused(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._CLEAR_EXPIRED)
        finished = second.begin(lambda own: files.finish_file(own.connection, lease, []))
        second_waits(stage, finished)
        first.go()
        assert swept.result(10) == [lease.manifest_id]
        assert isinstance(error_of(finished), LeaseLost)
        assert step_of(stage, lease) == ("ready", None, 1, 0)

    def test_a_step_that_ends_before_a_late_sweep_looks_again_stays_ended(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.expire(lease)
        swept = first.begin(sweep, stop_after=leases._EXPIRED)
        second.begin(lambda own: files.finish_file(own.connection, lease, [])).result(10)
        first.go()
        assert swept.result(10) == []
        assert step_of(stage, lease) == ("done", None, 1, 0)


def publish_lease(stage: Stage) -> Lease:
    manifest_id = stage.add_manifest()
    files.finish_plan(stage.connection, stage.claim_of(manifest_id, "test/1"), [])
    lease = stage.claim_of(manifest_id, "test/1")
    artifacts.record(
        stage.connection,
        lease,
        submission_id=1,
        type="summary",
        resource_type=None,
        part=0,
        path="summary",
        seconds=30,
    )
    return lease


def plan_lease(stage: Stage) -> Lease:
    return stage.claim_of(stage.add_manifest(), "test/1")


def write(stage: Stage, lease: Lease) -> object:
    return stage.write(lease, patient("a"), b"no JSON")


def note_validator(stage: Stage, lease: Lease) -> object:
    return files.note_validator(stage.connection, lease, '"v"')


def end_file(stage: Stage, lease: Lease) -> object:
    return files.finish_file(stage.connection, lease, [])


def end_plan(stage: Stage, lease: Lease) -> object:
    return files.finish_plan(stage.connection, lease, FILE)


def publish(stage: Stage, lease: Lease) -> object:
    return files.finish_manifest(stage.connection, lease, "completed")


OPERATIONS = [
    (Stage.ingest_lease, write),
    (Stage.ingest_lease, note_validator),
    (Stage.ingest_lease, end_file),
    (plan_lease, end_plan),
    (publish_lease, publish),
]
OPERATION_IDS = [operation.__name__ for _, operation in OPERATIONS]


class TestStopAndWork:
    @pytest.mark.parametrize(("give", "operation"), OPERATIONS, ids=OPERATION_IDS)
    def test_what_comes_to_its_commit_behind_a_stop_waits_and_leaves_nothing(
        self, stage: Stage, first: Actor, second: Actor, give: Any, operation: Any
    ) -> None:
        lease = give(stage)
        before = stage.dump()
        stopped = first.begin(lambda own: own.revoke(lease.manifest_id), stop_after=COMMIT)
        done = second.begin(lambda own: operation(own, lease))
        second_waits(stage, done)
        first.go()
        assert stopped.result(10) == [lease.manifest_id]
        assert isinstance(error_of(done), LeaseLost)
        after = stage.dump()
        assert {table for table in before if before[table] != after[table]} == {"manifests"}
        assert stage.rows("SELECT status FROM manifests") == [("stopped",)]

    @pytest.mark.parametrize(("give", "operation"), OPERATIONS, ids=OPERATION_IDS)
    def test_a_stop_behind_a_commit_waits_and_nothing_comes_after_it(
        self, stage: Stage, first: Actor, second: Actor, give: Any, operation: Any
    ) -> None:
        lease = give(stage)
        done = first.begin(lambda own: operation(own, lease), stop_after=COMMIT)
        stopped = second.begin(lambda own: own.revoke(lease.manifest_id))
        second_waits(stage, stopped)
        first.go()
        done.result(10)
        assert stopped.result(10) == ([] if operation is publish else [lease.manifest_id])
        status = "completed" if operation is publish else "stopped"
        assert stage.rows("SELECT status FROM manifests") == [(status,)]
        assert stage.rows("SELECT published FROM artifacts") == ([(True,)] if operation is publish else [])
        assert claim(stage) is None
        before = stage.dump()
        with pytest.raises(LeaseLost):
            operation(stage, at_its_cursor(stage, lease))
        assert stage.dump() == before

    def test_a_batch_that_holds_its_manifest_keeps_a_stop_waiting(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        batch = first.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._HOLD_MANIFEST)
        stopped = second.begin(lambda own: own.revoke(lease.manifest_id))
        second_waits(stage, stopped)
        first.go()
        assert batch.result(10).created == 1
        assert stopped.result(10) == [lease.manifest_id]
        assert stored(stage) == 1

    def test_a_batch_that_does_not_hold_its_manifest_yet_does_not_keep_a_stop_waiting(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        batch = first.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._ENTER)
        assert second.begin(lambda own: own.revoke(lease.manifest_id)).result(10) == [lease.manifest_id]
        first.go()
        assert isinstance(error_of(batch), LeaseLost)
        assert stored(stage) == 0

    def test_a_claim_behind_a_stop_waits_and_takes_the_next_manifest_s_step(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        manifest_id, next_one = stage.add_manifest(), stage.add_manifest()
        stopped = first.begin(lambda own: own.revoke(manifest_id), stop_after=COMMIT)
        claimed = second.begin(claim)
        second_waits(stage, claimed)
        first.go()
        assert stopped.result(10) == [manifest_id]
        assert claimed.result(10).manifest_id == next_one

    def test_a_stop_behind_a_claim_waits_and_the_claim_is_worth_nothing(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        manifest_id = stage.add_manifest()
        claimed = first.begin(claim, stop_after=leases._CLAIM)
        stopped = second.begin(lambda own: own.revoke(manifest_id))
        second_waits(stage, stopped)
        first.go()
        lease = claimed.result(10)
        assert stopped.result(10) == [manifest_id]
        assert stage.renew(lease).cancelled
        with pytest.raises(LeaseLost):
            files.finish_plan(stage.connection, lease, FILE)


def at_its_cursor(stage: Stage, lease: Lease) -> Lease:
    """The lease in the hands of a holder that knows its last commit."""
    [(at, lines)] = stage.rows("SELECT cursor_bytes, cursor_lines FROM steps WHERE id = :id", id=lease.step_id)
    return replace(lease, cursor_bytes=at, cursor_lines=lines)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["as listed", "the other way"])
def test_of_the_last_two_files_that_end_at_once_the_later_makes_the_publish_due(
    stage: Stage, first: Actor, second: Actor, order: tuple[int, int]
) -> None:
    one = stage.ingest_lease(files_listed=2)
    held = [one, stage.claim_of(one.manifest_id, "test/2")]
    ahead, behind = (held[index] for index in order)

    def publish_step() -> tuple[Any, ...]:
        return stage.rows("SELECT state, ready_at FROM steps WHERE kind = 'publish'")[0]

    ended = first.begin(lambda own: end_file(own, ahead), stop_after=COMMIT)
    last = second.begin(lambda own: end_file(own, behind), stop_after=None)
    second_waits(stage, last)
    waiting = publish_step()
    assert waiting[0] == "waiting"
    first.go()
    ended.result(10)
    last.result(10)
    due = publish_step()
    assert due[0] == "ready"
    with pytest.raises(LeaseLost):
        end_file(stage, ahead)
    assert publish_step() == due
    assert stage.claim().kind == "publish"
    assert claim(stage) is None


def test_of_two_files_that_end_one_after_the_other_only_the_last_makes_the_publish_due(
    stage: Stage, first: Actor, second: Actor
) -> None:
    one = stage.ingest_lease(files_listed=2)
    two = stage.claim_of(one.manifest_id, "test/2")
    last = first.begin(lambda own: end_file(own, two), stop_after=leases._ENTER)
    second.begin(lambda own: end_file(own, one)).result(10)
    assert stage.rows("SELECT state FROM steps WHERE kind = 'publish'") == [("waiting",)]
    first.go()
    last.result(10)
    assert stage.rows("SELECT state FROM steps WHERE kind = 'publish'") == [("ready",)]


def write_until_committed(stage: Stage, lease: Lease, *lines: bytes) -> bool:
    """What a hand does with a batch; whether it met somebody else's rows."""
    settings = stage.settings
    engine = create_engine(settings, application="test keeper", pooled=False)
    keeper = Keeper(engine, lease, settings, claimed_at=time.monotonic())
    work = steps.Work(
        lease, stage.connection, keeper, settings, ArtifactStore("file:///tmp"), lambda _: engine.connect()
    )
    [batch] = stage.reader(lease).batches(lines_of(*lines), lease.cursor_bytes, lease.cursor_lines + 1)
    try:
        return steps._write_until_committed(work, batch, Origins(lease), by_key=False)
    finally:
        if work.connection is not stage.connection:
            work.connection.close()


class TestBatchAndBatch:
    def test_a_batch_behind_another_one_of_the_same_ids_waits_and_is_decided_anew(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        ahead, behind = stage.ingest_lease("test/1"), stage.ingest_lease("test/2")
        lines = [patient("a", name="one"), patient("b", name="one")]
        one = first.begin(lambda own: own.write(ahead, *lines), stop_after=leases._FENCE)
        other = second.begin(lambda own: write_until_committed(own, behind, patient("b", name="two"), lines[0]))
        second_waits(stage, other)
        first.go()
        one.result(10)
        assert other.result(10) is True
        assert stage.rows("SELECT resource_id, seq, version, op FROM resource_versions ORDER BY 1, 2") == [
            ("a", 1, 1, resources.Op.CREATE),
            ("a", 2, 1, resources.Op.AFFIRM),
            ("b", 1, 1, resources.Op.CREATE),
            ("b", 2, 2, resources.Op.UPDATE),
        ]
        assert [step_of(stage, lease)[3] for lease in (ahead, behind)] == [2, 2]

    def test_a_batch_behind_another_one_that_dies_goes_on_as_if_it_had_never_been(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        ahead, behind = stage.ingest_lease("test/1"), stage.ingest_lease("test/2")
        one = first.begin(lambda own: own.write(ahead, patient("a")), stop_after=leases._FENCE)
        other = second.begin(lambda own: write_until_committed(own, behind, patient("a")))
        second_waits(stage, other)
        assert leases.evict(stage.connection, ahead) == 1
        assert other.result(10) is False
        first.go()
        assert is_disconnect(error_of(one))
        assert [step_of(stage, lease)[3] for lease in (ahead, behind)] == [0, 1]

    def test_batches_of_the_same_ids_in_opposite_order_deadlock_and_both_end(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        """Each is stopped in the middle by a row of a third, so that either has written what the other comes to."""
        left, right, middle = (stage.ingest_lease(f"test/{number}") for number in range(3))
        with Actor(stage.settings, "third") as third:
            gate = third.begin(lambda own: own.write(middle, patient("l"), patient("r")), stop_after=leases._FENCE)
            writes = [
                first.begin(lambda own: write_until_committed(own, left, patient("a"), patient("l"), patient("b"))),
                second.begin(lambda own: write_until_committed(own, right, patient("b"), patient("r"), patient("a"))),
            ]
            for name in ("first", "second"):
                wait_until(lambda name=name: stage.waits_for(name, "third"), "both are in the middle", seconds=10)
            leases.evict(stage.connection, middle)
            conflicts = [write.result(20) for write in writes]
            third.go()
            assert is_disconnect(error_of(gate))
        assert sorted(conflicts) == [False, True]
        lines = stage.rows("SELECT sum(line_count), sum(created + affirmed) FROM ingest_batches")
        assert lines == [(6, 6)]
        assert [step_of(stage, lease)[3] for lease in (left, right)] == [3, 3]
        by_id = stage.rows(
            "SELECT resource_id, array_agg(op ORDER BY seq) FROM resource_versions GROUP BY 1 ORDER BY 1"
        )
        twice = [resources.Op.CREATE, resources.Op.AFFIRM]
        assert by_id == [("a", twice), ("b", twice), ("l", twice[:1]), ("r", twice[:1])]


class TestHeartbeat:
    @pytest.mark.parametrize(
        ("give", "operation", "point"),
        [
            (Stage.ingest_lease, write, leases._HOLD_MANIFEST),
            (Stage.ingest_lease, end_file, leases._HOLD_MANIFEST_ALONE),
            (plan_lease, end_plan, leases._HOLD_MANIFEST_ALONE),
            (publish_lease, publish, leases._HOLD_MANIFEST_ALONE),
        ],
        ids=["write", "end_file", "end_plan", "publish"],
    )
    def test_a_heartbeat_does_not_wait_for_its_own_step_s_open_transaction(
        self, stage: Stage, first: Actor, second: Actor, give: Any, operation: Any, point: sa.TextClause
    ) -> None:
        lease = give(stage)
        done = first.begin(lambda own: operation(own, lease), stop_after=point)
        assert second.begin(lambda own: own.renew(lease)).result(10) == leases.Orders(cancelled=False, drain=False)
        first.go()
        done.result(10)

    def test_a_heartbeat_does_not_wait_for_a_stop_under_way(self, stage: Stage, first: Actor, second: Actor) -> None:
        lease = stage.ingest_lease()
        stopped = first.begin(lambda own: own.revoke(lease.manifest_id), stop_after=COMMIT)
        assert second.begin(lambda own: own.renew(lease)).result(10).cancelled is False
        first.go()
        stopped.result(10)
        assert stage.renew(lease).cancelled

    def test_a_heartbeat_that_meets_the_fence_waits_for_the_commit_and_renews(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        batch = first.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._FENCE)
        renewed = second.begin(lambda own: own.renew(lease))
        second_waits(stage, renewed)
        first.go()
        batch.result(10)
        assert renewed.result(10).cancelled is False


class TestEviction:
    def test_a_holder_between_fence_and_commit_is_ended_and_learns_that_its_lease_is_lost(
        self, stage: Stage, first: Actor
    ) -> None:
        """Its row is locked, so that no claim sees the step before the sweep has ended the session."""
        lease = stage.ingest_lease()
        stage.expire(lease)
        writing = first.begin(lambda own: write_until_committed(own, lease, patient("a")), stop_after=leases._FENCE)
        assert claim(stage) is None
        wait_until(lambda: sweep(stage) == [lease.manifest_id], "the lease is cleared", seconds=10)
        taken = stage.claim("next/1")
        assert (taken.step_id, taken.cursor_bytes) == (lease.step_id, 0)
        stage.write(taken, patient("a"))
        first.go()
        assert isinstance(error_of(writing), LeaseLost)
        assert stored(stage) == 1
        assert stage.rows("SELECT fencing_token FROM ingest_batches") == [(2,)]

    def test_a_holder_whose_own_session_was_ended_between_fence_and_commit_writes_the_batch_again(
        self, stage: Stage, first: Actor
    ) -> None:
        lease = stage.ingest_lease()
        writing = first.begin(lambda own: write_until_committed(own, lease, patient("a")), stop_after=leases._FENCE)
        assert leases.evict(stage.connection, lease) == 1
        first.go()
        assert writing.result(10) is False
        assert (step_of(stage, lease), stored(stage)) == (("ready", "test/1", 1, 1), 1)

    def test_claiming_ends_a_holder_that_has_written_and_does_not_come_to_its_fence(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        frozen = first.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._HOLD_MANIFEST)
        stage.expire(lease)
        taken = second.begin(claim).result(10)
        assert taken.previous_worker == "test/1"
        second.begin(lambda own: own.write(taken, patient("a"))).result(10)
        first.go()
        assert is_disconnect(error_of(frozen))
        assert (stored(stage), step_of(stage, lease)) == (1, ("ready", "late/1", 2, 1))

    def test_whoever_began_between_the_sweep_s_two_looks_does_not_keep_the_next_holder_waiting(
        self, stage: Stage, first: Actor, second: Actor
    ) -> None:
        lease = stage.ingest_lease()
        stage.write(lease, patient("a"))
        late = at_its_cursor(stage, lease)
        stage.expire(lease)
        swept = second.begin(sweep, stop_after=leases._EVICT_EXPIRED)
        frozen = first.begin(lambda own: own.write(late, patient("b")), stop_after=leases._HOLD_MANIFEST)
        second.go()
        assert swept.result(10) == [lease.manifest_id]
        taken = stage.claim("next/1")
        stage.execute("SET lock_timeout = '500ms'")
        stage.write(taken, patient("b"))
        first.go()
        assert is_disconnect(error_of(frozen))


def test_a_plan_that_another_has_finished_is_refused_as_a_lost_lease(stage: Stage) -> None:
    lease = plan_lease(stage)
    stage.expire(lease)
    files.finish_plan(stage.connection, stage.claim_of(lease.manifest_id, "next/1"), FILE)
    with pytest.raises(LeaseLost):
        files.finish_plan(stage.connection, lease, FILE)
