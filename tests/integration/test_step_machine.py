"""From plan over files to publish: what makes a step due, what ends a manifest, in whatever order workers die."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from devstack.servers import free_port
from devstack.stack import wait_until
from schema import files, leases
from schema.files import PlannedFile, Problem
from schema.leases import Lease, LeaseLost
from settings import Settings
from tests.support.stage import Stage, patient
from workers.hands import Hand

GONE = Problem("error", "not-found", "the provider answered 404")


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Iterator[Stage]:
    settings = Settings(
        database_url=database_url,
        artifact_store_url=f"file://{tmp_path}/store",
        max_attempts=3,
        fetch_retries=0,
        retry_delay_seconds=60,
    )
    with Stage(settings) as stage:
        yield stage


def outputs(count: int) -> list[PlannedFile]:
    return [PlannedFile("output", f"http://provider.test/{number}.ndjson") for number in range(count)]


def planned(stage: Stage, listed: list[PlannedFile], problems: list[Problem] | None = None) -> int:
    """A manifest whose plan has ended."""
    manifest_id = stage.add_manifest()
    files.finish_plan(stage.connection, stage.claim_of(manifest_id, "test/1"), listed, problems=problems or [])
    return manifest_id


def states(stage: Stage, manifest_id: int) -> list[tuple[str, str]]:
    query = "SELECT kind, state FROM steps WHERE manifest_id = :id ORDER BY kind DESC, id"
    return [(kind, state) for kind, state in stage.rows(query, id=manifest_id)]


def test_a_new_manifest_has_a_plan_to_do_and_a_publish_that_waits(stage: Stage) -> None:
    assert states(stage, stage.add_manifest()) == [("publish", "waiting"), ("plan", "ready")]


@pytest.mark.parametrize("kinds", [[], ["deleted", "outcome"]], ids=["no files", "nothing to ingest"])
def test_a_plan_without_anything_to_ingest_is_published_next(stage: Stage, kinds: list[str]) -> None:
    manifest_id = planned(stage, [PlannedFile(kind, f"http://provider.test/{kind}") for kind in kinds])
    assert states(stage, manifest_id) == [("publish", "ready"), ("plan", "done")]
    assert stage.rows("SELECT kind FROM manifest_files ORDER BY position") == [(kind,) for kind in kinds]


def test_a_plan_that_failed_is_published_next_with_its_reason(stage: Stage) -> None:
    manifest_id = planned(stage, [], [GONE])
    assert states(stage, manifest_id) == [("publish", "ready"), ("plan", "failed")]
    with stage.connection.begin():
        assert files.manifest_view(stage.connection, stage.tenant_id, manifest_id).problems == [GONE]


def test_publishing_waits_for_every_file_failed_ones_included(stage: Stage) -> None:
    manifest_id = planned(stage, outputs(3))
    for ended, problems in enumerate([[], [GONE], [Problem("warning", "informational", "count differs")]]):
        assert ("publish", "waiting") in states(stage, manifest_id)
        lease = stage.claim_of(manifest_id, "test/1")
        assert (lease.kind, lease.file_id is None) == ("ingest", False)
        files.finish_file(stage.connection, lease, problems)
        assert Counter(state for kind, state in states(stage, manifest_id) if kind == "ingest")["ready"] == 2 - ended
    assert states(stage, manifest_id) == [
        ("publish", "ready"),
        ("plan", "done"),
        ("ingest", "done"),
        ("ingest", "failed"),
        ("ingest", "done"),
    ]


def test_of_files_that_end_at_once_one_makes_the_publish_due(stage: Stage) -> None:
    manifests = [planned(stage, outputs(4)) for _ in range(5)]
    held = [[stage.claim_of(manifest_id, f"test/{n}") for n in range(4)] for manifest_id in manifests]
    start = threading.Barrier(4)

    def end_all(number: int) -> None:
        with Stage(stage.settings) as own:
            for of_manifest in held:
                start.wait(10)
                files.finish_file(own.connection, of_manifest[number], [])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(end_all, range(4)))
    for manifest_id in manifests:
        assert dict(states(stage, manifest_id)) == {"publish": "ready", "plan": "done", "ingest": "done"}


def test_a_manifest_is_published_once(stage: Stage) -> None:
    manifest_id = planned(stage, [])
    stage.execute("UPDATE fetch_parameters SET sealed_secrets = 'secret'")
    lease = stage.claim_of(manifest_id, "test/1")
    finished_at = files.finish_manifest(stage.connection, lease, "completed")
    assert stage.rows("SELECT status, finished_at FROM manifests") == [("completed", finished_at)]
    assert stage.rows("SELECT sealed_secrets FROM fetch_parameters") == [(None,)]
    with pytest.raises(LeaseLost):
        files.finish_manifest(stage.connection, lease, "failed")
    assert leases.claim_next(stage.connection, "test/2", 30, manifest_id) is None
    assert stage.rows("SELECT status, finished_at FROM manifests") == [("completed", finished_at)]


class Schedule:
    """Workers that claim, write, finish, release, and go on with leases that they have lost. The model knows who has
    what; the database has to agree."""

    def __init__(self, stage: Stage, files_listed: int) -> None:
        self.stage = stage
        self.files_listed = files_listed
        self.manifest_id = stage.add_manifest()
        self.in_hand: dict[int, Lease] = {}
        self.holder: dict[int, Lease] = {}
        self.ended: Counter[int] = Counter()

    def claim(self, worker: int) -> bool:
        lease = leases.claim_next(self.stage.connection, f"node/{worker}", 30, 0)
        if lease is None:
            return False
        assert lease.step_id not in self.holder
        self.in_hand[worker] = self.holder[lease.step_id] = lease
        return True

    def expire(self, worker: int) -> None:
        """The worker's lease runs out; the worker does not notice."""
        lease = self.in_hand.get(worker)
        if lease is not None and self._holds(lease):
            self.stage.expire(lease)
            del self.holder[lease.step_id]

    def sweep(self, _: int) -> None:
        leases.expire(self.stage.connection, 100)

    def release(self, worker: int) -> None:
        lease = self.in_hand.pop(worker, None)
        if lease is None:
            return
        kept = leases.release(self.stage.connection, lease, delay=0, give_back=True, reason="test")
        assert kept or not self._holds(lease)
        if kept:
            self.holder.pop(lease.step_id, None)

    def write(self, worker: int) -> None:
        lease = self.in_hand.get(worker)
        if lease is not None and lease.kind == "ingest":
            line = patient(f"{lease.file_id}-{lease.cursor_lines}")
            try:
                progress = self.stage.write(lease, line)
            except LeaseLost:
                assert not self._holds(lease)
                del self.in_hand[worker]
            else:
                self._went_on(lease)
                self.in_hand[worker] = replace(lease, cursor_bytes=progress.end_byte, cursor_lines=progress.end_line)

    def finish(self, worker: int) -> None:
        lease = self.in_hand.pop(worker, None)
        if lease is None:
            return
        connection = self.stage.connection
        try:
            if lease.kind == "plan":
                files.finish_plan(connection, lease, outputs(self.files_listed))
            elif lease.kind == "ingest":
                files.finish_file(connection, lease, [])
            else:
                assert all(state == "done" for kind, state in states(self.stage, self.manifest_id) if kind != "publish")
                files.finish_manifest(connection, lease, "completed")
        except LeaseLost:
            assert not self._holds(lease)
        else:
            self._went_on(lease)
            del self.holder[lease.step_id]
            self.ended[lease.step_id] += 1

    def _holds(self, lease: Lease) -> bool:
        now = self.holder.get(lease.step_id)
        return now is not None and now.fencing_token == lease.fencing_token

    def _went_on(self, lease: Lease) -> None:
        """A commit went through: nobody may have claimed the step since, whether or not its lease had run out."""
        now = self.holder.setdefault(lease.step_id, lease)
        assert now.fencing_token == lease.fencing_token


MOVES = ("claim", "claim", "claim", "write", "write", "write", "expire", "expire", "release", "sweep", "finish")


@hypothesis_settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    files_listed=st.integers(0, 3),
    moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 2)), min_size=60, max_size=90),
)
def test_every_file_ends_once_whatever_becomes_of_its_holders(
    stage: Stage, files_listed: int, moves: list[tuple[str, int]]
) -> None:
    schedule = Schedule(stage, files_listed)
    for move, worker in moves:
        getattr(schedule, move)(worker)
    for lease in list(schedule.holder.values()):
        stage.expire(lease)
    schedule.holder.clear()
    while schedule.claim(9):
        schedule.write(9)
        schedule.finish(9)
    manifest = {"id": schedule.manifest_id}
    assert stage.rows("SELECT status FROM manifests WHERE id = :id", **manifest) == [("completed",)]
    steps = stage.rows("SELECT id, kind, state, worker_id, cursor_lines FROM steps WHERE manifest_id = :id", **manifest)
    assert Counter(kind for _, kind, *_ in steps) == Counter(plan=1, ingest=files_listed, publish=1)
    assert {(state, worker) for _, _, state, worker, _ in steps} == {("done", None)}
    assert schedule.ended == Counter(step_id for step_id, *_ in steps)
    written = stage.rows(
        """SELECT f.id, coalesce(sum(b.line_count), 0), count(DISTINCT v.resource_id)
           FROM manifest_files f LEFT JOIN ingest_batches b ON b.file_id = f.id
           LEFT JOIN resource_versions v ON v.batch_id = b.id WHERE f.manifest_id = :id GROUP BY f.id""",
        **manifest,
    )
    lines = sum(lines for *_, lines in steps)
    assert sum(total for _, total, _ in written) == sum(stored for *_, stored in written) == lines


def test_a_step_over_its_attempts_fails_with_a_reason_and_the_manifest_ends(stage: Stage) -> None:
    plan_over = stage.add_manifest()
    file_over = planned(stage, outputs(1))
    stage.execute("UPDATE steps SET attempts = 3 WHERE state = 'ready'")
    rung: list[int] = []
    Hand(stage.settings, "node/1", rung.extend).work(0)
    reason = Problem("error", "exception", "given up after 3 attempts that failed on our side")
    with stage.connection.begin():
        assert files.manifest_view(stage.connection, stage.tenant_id, plan_over).problems == [reason]
    assert stage.rows("SELECT problems[0] ->> 'diagnostics' FROM manifest_files") == [(reason.diagnostics,)]
    assert stage.rows("SELECT id, status FROM manifests ORDER BY id") == [(plan_over, "failed"), (file_over, "failed")]
    assert stage.rows("SELECT count(*) FROM steps WHERE worker_id IS NOT NULL OR state = 'ready'") == [(0,)]


def test_a_provider_that_is_down_puts_the_step_off_until_its_attempts_are_used(stage: Stage) -> None:
    manifest_id = stage.add_manifest(f"http://127.0.0.1:{free_port()}/manifest.json")
    hand = Hand(stage.settings, "node/1", lambda _: None)
    for attempt in (1, 2):
        hand.work(manifest_id)
        query = """SELECT attempts, extract(epoch FROM ready_at - clock_timestamp())::float FROM steps
                   WHERE kind = 'plan' AND state = 'ready' AND worker_id IS NULL"""
        [(attempts, delay)] = stage.rows(query)
        assert attempts == attempt
        assert 40 * attempt < delay <= 72 * attempt
        stage.execute("UPDATE steps SET ready_at = clock_timestamp()")
    hand.work(manifest_id)
    assert stage.rows("SELECT status FROM manifests") == [("failed",)]


def test_a_claim_that_meets_the_late_commit_of_a_former_holder_is_made_again(stage: Stage) -> None:
    manifest_id = stage.add_manifest()
    stage.execute("UPDATE manifests SET manifest_url = NULL")
    lease = stage.claim()
    stage.expire(lease)
    hand = Hand(stage.settings, "node/1", lambda _: None)

    def blocked() -> bool:
        with Stage(stage.settings, submitter="observer") as observer:
            return observer.waits_for_lock("%hand node/1")

    with ThreadPoolExecutor(1) as pool:
        with contextlib.suppress(sa.exc.OperationalError), stage.connection.begin():
            leases.hold_manifest(stage.connection, lease, alone=True)
            working = pool.submit(hand.work, manifest_id)
            wait_until(blocked, "the claim has locked the step and waits for the manifest", seconds=10)
            leases.finish(stage.connection, lease, "failed")
        working.result(20)
    assert states(stage, manifest_id)[1][1] in ("done", "failed")
