"""Each condition of the fence alone, and proof that it is needed: with the condition taken out, its scenario fails."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa

from devstack.servers import EmbeddedPostgres
from devstack.stack import wait_until
from schema import files, leases
from schema.database import DATABASE_ERRORS
from schema.leases import Lease, LeaseLost
from settings import Settings
from tests.support.stage import COMMIT, Actor, Stage, patient


@pytest.fixture(scope="module")
def shared_database(postgres: EmbeddedPostgres, migrated_template: str) -> str:
    return postgres.create_database(f"fence_{uuid.uuid4().hex[:12]}", template=migrated_template)


@pytest.fixture
def stage(shared_database: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=shared_database)) as stage:
        stage.clear()
        yield stage


def is_refused(stage: Stage, operation: Callable[[], object]) -> None:
    """It raises `LeaseLost` and changes nothing."""
    before = stage.dump()
    try:
        operation()
    except LeaseLost:
        refused = True
    else:
        refused = False
    assert refused, "it went through"
    assert stage.dump() == before


def waits(stage: Stage, future: Future[Any], waiter: str, holder: str) -> bool:
    """Whether it has to wait for the other; known once it does, or has ended."""
    wait_until(lambda: future.done() or stage.waits_for(waiter, holder), f"{waiter} waits or ends", seconds=10)
    return not future.done()


ALONE = {
    "nothing": ("SELECT 1", False),
    "the token": ("UPDATE steps SET fencing_token = fencing_token + 1 WHERE id = :id", True),
    "the worker": ("UPDATE steps SET worker_id = 'test/10' WHERE id = :id", True),
    "the state": ("UPDATE steps SET state = 'done' WHERE id = :id", True),
    "the generation": ("UPDATE steps SET generation = generation + 1 WHERE id = :id", True),
    "the cursor, behind": ("UPDATE steps SET cursor_bytes = cursor_bytes - 1 WHERE id = :id", True),
    "the cursor, ahead": ("UPDATE steps SET cursor_bytes = cursor_bytes + 1 WHERE id = :id", True),
    "the manifest, stopped": ("UPDATE manifests SET status = 'stopped'", True),
    "the manifest, replaced": ("UPDATE manifests SET status = 'replaced'", True),
    "the manifest, completed": ("UPDATE manifests SET status = 'completed'", True),
    "the manifest, failed": ("UPDATE manifests SET status = 'failed'", True),
    "the manifest, still pending": ("UPDATE manifests SET status = 'pending'", False),
    "the time, run out": ("UPDATE steps SET lease_expires_at = '-infinity', attempts = 9 WHERE id = :id", False),
}


@pytest.mark.parametrize("differs", ALONE)
def test_a_batch_is_refused_by_one_thing_that_differs_all_else_being_equal(stage: Stage, differs: str) -> None:
    """The cursor stands behind a first batch, and the next one begins there, or a byte before or after it."""
    change, refused = ALONE[differs]
    lease = stage.ingest_lease()
    done = stage.write(lease, patient("a"))
    at = replace(lease, cursor_bytes=done.end_byte, cursor_lines=1)
    stage.connection.execute(sa.text(change), {"id": lease.step_id})
    stage.connection.commit()
    if refused:
        is_refused(stage, lambda: stage.write(at, patient("b")))
    else:
        assert stage.write(at, patient("b")).created == 1


def zombie(stage: Stage) -> tuple[Lease, Lease]:
    """A lease that was lost and the one that followed it: the same worker, the same cursor, a newer token."""
    lost = stage.ingest_lease()
    stage.expire(lost)
    held = stage.claim_of(lost.manifest_id, lost.worker_id)
    assert replace(held, fencing_token=1, attempts=1, previous_worker=None) == lost
    return lost, held


def a_zombie_writes(stage: Stage) -> None:
    lost, held = zombie(stage)
    is_refused(stage, lambda: stage.write(lost, patient("stale")))
    assert stage.write(held, patient("fresh")).created == 1


def a_zombie_renews(stage: Stage) -> None:
    lost, _ = zombie(stage)
    is_refused(stage, lambda: stage.renew(lost))


def a_zombie_finishes(stage: Stage) -> None:
    lost, _ = zombie(stage)
    is_refused(stage, lambda: files.finish_file(stage.connection, lost, []))


def a_zombie_releases(stage: Stage) -> None:
    lost, _ = zombie(stage)
    before = stage.dump()
    assert not leases.release(stage.connection, lost, delay=0, give_back=True, reason="late")
    assert stage.dump() == before


def a_zombie_notes_its_validator(stage: Stage) -> None:
    lost, _ = zombie(stage)
    is_refused(stage, lambda: files.note_validator(stage.connection, lost, '"stale"'))


def a_batch_overlaps(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.write(lease, patient("a"), patient("b"))
    inside = replace(lease, cursor_bytes=len(patient("a")) + 1, cursor_lines=1)
    is_refused(stage, lambda: stage.write(inside, patient("b")))


def another_worker_has_the_token(stage: Stage) -> None:
    lease = stage.ingest_lease()
    is_refused(stage, lambda: stage.write(replace(lease, worker_id="test/2"), patient("a")))


def a_step_that_ended_is_written(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.execute("UPDATE steps SET state = 'done' WHERE id = :id", id=lease.step_id)
    is_refused(stage, lambda: stage.write(lease, patient("a")))


def another_generation_is_written(stage: Stage) -> None:
    lease = stage.ingest_lease()
    is_refused(stage, lambda: stage.write(replace(lease, generation=2), patient("a")))


def a_stopped_manifest_is_written(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.revoke(lease.manifest_id)
    is_refused(stage, lambda: stage.write(lease, patient("a")))


def a_stop_meets_a_batch(stage: Stage) -> None:
    """Once a manifest is stopped, nothing more is committed."""
    lease = stage.ingest_lease()
    with Actor(stage.settings, "writer") as writer, Actor(stage.settings, "stopper") as stopper:
        batch = writer.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._FENCE)
        stopped = stopper.begin(lambda own: own.revoke(lease.manifest_id))
        waited = waits(stage, stopped, "stopper", "writer")
        writer.go()
        batch.result(10)
        stopped.result(10)
    assert waited, "the batch came after the stop"


def claim(stage: Stage) -> Lease | None:
    return leases.claim_next(stage.connection, "test/1", 30, 0)


def two_claim_at_once(stage: Stage) -> None:
    """The second is told at once that there is nothing, and waits for nobody."""
    stage.add_manifest()
    with Actor(stage.settings, "one") as one, Actor(stage.settings, "two") as two:
        first = one.begin(claim, stop_after=leases._CLAIM)
        second = two.begin(claim)
        waited = waits(stage, second, "two", "one")
        one.go()
        first.result(10)
        second.result(10)
    assert not waited, "the second waited for the first"


def two_claim_one_step(stage: Stage) -> None:
    """One of them gets it, whoever waits for whom."""
    leases.release(stage.connection, stage.ingest_lease(), delay=0, give_back=True, reason="test")
    with Actor(stage.settings, "one") as one, Actor(stage.settings, "two") as two:
        first = one.begin(claim, stop_after=leases._CLAIM)
        second = two.begin(claim)
        waits(stage, second, "two", "one")
        one.go()
        claimed = [first.result(10), second.result(10)]
    assert [lease is not None for lease in claimed] == [True, False]


def a_claim_comes_second(stage: Stage) -> None:
    """It saw that the tenant has something due; meanwhile another has claimed it."""
    stage.add_manifest()
    with Actor(stage.settings, "second") as second:
        late = second.begin(claim, stop_after=leases._RANK_TENANTS)
        stage.claim()
        second.go()
        assert late.result(10) is None


def a_holder_freezes(stage: Stage) -> None:
    """In the middle of its batch, with rows of keys that its successor needs."""
    lost = stage.ingest_lease()
    with Actor(stage.settings, "frozen") as frozen:
        batch = frozen.begin(lambda own: own.write(lost, patient("a")), stop_after=leases._HOLD_MANIFEST)
        stage.expire(lost)
        held = stage.claim_of(lost.manifest_id, "test/2")
        stage.execute("SET lock_timeout = '500ms'")
        try:
            written = stage.write(held, patient("a")).created
        except DATABASE_ERRORS:
            written = 0
        frozen.go()
        assert written == 1, "the successor waits for the frozen holder"
        assert isinstance(batch.exception(10), DATABASE_ERRORS)


def a_sweep_comes_late(stage: Stage, *, by_what: sa.TextClause, again: bool) -> None:
    """It saw a lease that had run out; meanwhile the holder has renewed it."""
    lease = stage.ingest_lease()
    stage.expire(lease)
    with Actor(stage.settings, "sweep") as sweep, Actor(stage.settings, "holder") as holder:
        swept = sweep.begin(lambda own: leases.expire(own.connection, 10), stop_after=by_what)
        stage.renew(lease)
        batch = holder.begin(lambda own: own.write(lease, patient("a")), stop_after=leases._ENTER if again else None)
        if not again:
            batch.result(10)
        sweep.go()
        cleared = swept.result(10)
        holder.go()
        assert batch.exception(10) is None, "a holder that renewed its lease was ended"
    assert cleared == []
    assert stage.rows("SELECT worker_id FROM steps WHERE id = :id", id=lease.step_id) == [("test/1",)]


def a_sweep_comes_late_to_evict(stage: Stage) -> None:
    a_sweep_comes_late(stage, by_what=leases._EXPIRED, again=True)


def a_sweep_comes_late_to_clear(stage: Stage) -> None:
    a_sweep_comes_late(stage, by_what=leases._EVICT_EXPIRED, again=False)


def two_last_files_end(stage: Stage) -> None:
    """One sees that the other has ended, and publishing is due."""
    one = stage.ingest_lease(files_listed=2)
    two = stage.claim_of(one.manifest_id, "test/2")
    with Actor(stage.settings, "one") as first, Actor(stage.settings, "two") as second:
        ended = first.begin(lambda own: files.finish_file(own.connection, one, []), stop_after=COMMIT)
        last = second.begin(lambda own: files.finish_file(own.connection, two, []))
        waits(stage, last, "two", "one")
        first.go()
        ended.result(10)
        last.result(10)
    assert stage.rows("SELECT state FROM steps WHERE kind = 'publish'") == [("ready",)]


def one_of_two_files_ends(stage: Stage) -> None:
    """Publishing is not due while a file is still being read."""
    files.finish_file(stage.connection, stage.ingest_lease(files_listed=2), [])
    assert stage.rows("SELECT state FROM steps WHERE kind = 'publish'") == [("waiting",)]


TOKEN = "fencing_token = :fencing_token AND "
HELD = "s.worker_id = :worker_id AND s.fencing_token = :fencing_token"
LIVE = "AND status IN ('pending', 'processing')"
LEASE_OVER = "AND (c.worker_id IS NULL OR c.lease_expires_at <= statement_timestamp())"
RAN_OUT = "AND worker_id IS NOT NULL AND lease_expires_at <= statement_timestamp()"


@dataclass(frozen=True)
class Mutation:
    """A statement with a piece of it replaced, and the scenario that must notice."""

    scenario: Callable[[Stage], None]
    statement: str
    piece: str
    replacement: str = ""
    module: ModuleType = leases

    def mutated(self) -> sa.TextClause:
        text = getattr(self.module, self.statement).text
        assert self.piece in text
        return sa.text(text.replace(self.piece, self.replacement))


MUTATIONS = {
    "fence without the token": Mutation(a_zombie_writes, "_FENCE", TOKEN),
    "fence without the cursor": Mutation(a_batch_overlaps, "_FENCE", " AND cursor_bytes = :first_byte"),
    "fence without the worker": Mutation(another_worker_has_the_token, "_FENCE", "worker_id = :worker_id AND "),
    "fence without the state": Mutation(a_step_that_ended_is_written, "_FENCE", " AND state = 'ready'"),
    "fence without the generation": Mutation(another_generation_is_written, "_FENCE", "generation = :generation AND "),
    "manifest held whatever its status": Mutation(a_stopped_manifest_is_written, "_HOLD_MANIFEST", LIVE),
    "manifest looked at and not held": Mutation(a_stop_meets_a_batch, "_HOLD_MANIFEST", "FOR SHARE"),
    "manifest not held alone": Mutation(two_last_files_end, "_HOLD_MANIFEST_ALONE", "FOR NO KEY UPDATE", "FOR SHARE"),
    "renewal without the token": Mutation(a_zombie_renews, "_RENEW", HELD, "s.worker_id = :worker_id"),
    "finish without the token": Mutation(a_zombie_finishes, "_FINISH", TOKEN),
    "release without the token": Mutation(a_zombie_releases, "_RELEASE", TOKEN),
    "step held without the token": Mutation(a_zombie_notes_its_validator, "_HOLD_STEP", TOKEN),
    "claim that waits": Mutation(two_claim_at_once, "_CLAIM", "SKIP LOCKED"),
    "claim without a lock": Mutation(two_claim_one_step, "_CLAIM", "FOR UPDATE OF c SKIP LOCKED"),
    "claim whatever is held": Mutation(a_claim_comes_second, "_CLAIM", LEASE_OVER),
    "claim without eviction": Mutation(a_holder_freezes, "_EVICT_HELD", "WHERE", "WHERE false AND"),
    "sweep that does not look again before it evicts": Mutation(a_sweep_comes_late_to_evict, "_EVICT_EXPIRED", RAN_OUT),
    "sweep that does not look again before it clears": Mutation(a_sweep_comes_late_to_clear, "_CLEAR_EXPIRED", RAN_OUT),
    "publish due whatever is left": Mutation(
        one_of_two_files_ends, "_READY_PUBLISH", "AND o.state = 'ready'", "AND false", files
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_scenario_holds_and_fails_without_the_condition_it_is_about(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, mutation: Mutation
) -> None:
    mutation.scenario(stage)
    stage.clear()
    monkeypatch.setattr(mutation.module, mutation.statement, mutation.mutated())
    with pytest.raises(AssertionError):
        mutation.scenario(stage)
