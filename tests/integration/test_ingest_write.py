"""Batches written to a real Postgres: what is created, updated, affirmed, and what the fence refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from schema import leases, resources
from schema.database import DATABASE_ERRORS, is_conflict
from schema.leases import Lease, LeaseLost
from settings import Settings
from tests.support.stage import Stage, lines_of, patient
from workers.ingest.write import Origins, write_batch


def write(stage: Stage, lease: Lease, *lines: bytes, by_key: bool = False) -> leases.Progress:
    """All the lines as one batch, committed under the lease."""
    [batch] = stage.reader(lease).batches(lines_of(*lines), lease.cursor_bytes, lease.cursor_lines + 1)
    return write_batch(stage.connection, lease, batch, Origins(lease), by_key=by_key, lease_seconds=30)


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=database_url)) as stage:
        yield stage


def test_a_new_resource_is_created_with_the_bytes_received(stage: Stage) -> None:
    line = b'{"id": "a", "resourceType": "Patient", "multipleBirthInteger": 1.10}'
    progress = write(stage, stage.ingest_lease(), line)
    assert (progress.created, progress.end_byte, progress.end_line) == (1, len(line) + 1, 1)
    stored = resources.read(stage.connection, stage.tenant_id, "Patient", "a")
    assert stored is not None
    assert (stored.body, stored.version, stored.op) == (line.decode(), 1, resources.Op.CREATE)


def test_other_content_is_a_new_version_and_the_old_one_stays_readable(stage: Stage) -> None:
    write(stage, stage.ingest_lease(), patient("a", name="old"))
    progress = write(stage, stage.ingest_lease(), patient("a", name="new"))
    assert progress.updated == 1
    newest = resources.read(stage.connection, stage.tenant_id, "Patient", "a")
    first = resources.read(stage.connection, stage.tenant_id, "Patient", "a", version=1)
    assert newest is not None
    assert first is not None
    assert (newest.version, newest.body) == (2, patient("a", name="new").decode())
    assert first.body == patient("a", name="old").decode()


def test_identical_bytes_from_another_manifest_are_affirmed_without_a_version_or_a_body(stage: Stage) -> None:
    write(stage, stage.ingest_lease(), patient("a"))
    progress = write(stage, stage.ingest_lease(), patient("a"))
    assert (progress.affirmed, progress.created, progress.updated) == (1, 0, 0)
    rows = stage.rows("SELECT seq, version, op, body IS NULL AS bodiless FROM resource_versions ORDER BY seq")
    assert rows == [(1, 1, resources.Op.CREATE, False), (2, 1, resources.Op.AFFIRM, True)]
    stored = resources.read(stage.connection, stage.tenant_id, "Patient", "a")
    assert stored is not None
    assert stored.body == patient("a").decode()


def test_identical_bytes_within_one_manifest_write_nothing(stage: Stage) -> None:
    progress = write(stage, stage.ingest_lease(), patient("a"), patient("a"))
    assert (progress.created, progress.unchanged) == (1, 1)
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(1,)]


def test_an_id_that_comes_three_times_in_a_batch_gets_consecutive_versions(stage: Stage) -> None:
    contents = [patient("a", name=name) for name in ("one", "two", "three")]
    progress = write(stage, stage.ingest_lease(), *contents)
    assert (progress.created, progress.updated) == (1, 2)
    history = resources.history(stage.connection, stage.tenant_id, "Patient", "a")
    assert [(version.version, version.body) for version in history] == [
        (3, contents[2].decode()),
        (2, contents[1].decode()),
        (1, contents[0].decode()),
    ]


def test_a_line_without_id_is_another_resource_in_every_manifest(stage: Stage) -> None:
    line = b'{"resourceType":"Patient"}'
    write(stage, stage.ingest_lease(), line)
    write(stage, stage.ingest_lease(), line)
    assert stage.rows("SELECT count(DISTINCT resource_id), count(*) FROM resource_versions") == [(2, 2)]


def test_a_deleted_resource_is_created_again_as_a_new_version(stage: Stage) -> None:
    write(stage, stage.ingest_lease(), patient("a"))
    with stage.connection.begin():
        stage.connection.execute(
            sa.text("""INSERT INTO resource_versions (key, seq, version, batch_id, line, op, resource_id)
                       SELECT key, 2, 2, batch_id, 1, 3, resource_id FROM resource_versions""")
        )
    progress = write(stage, stage.ingest_lease(), patient("a"))
    assert progress.created == 1
    stored = resources.read(stage.connection, stage.tenant_id, "Patient", "a")
    assert stored is not None
    assert (stored.version, stored.op) == (3, resources.Op.CREATE)


def test_tenants_do_not_see_each_other(stage: Stage) -> None:
    write(stage, stage.ingest_lease(), patient("a"))
    other = stage.other_tenant()
    assert resources.read(stage.connection, other, "Patient", "a") is None


def test_a_holder_whose_lease_was_taken_commits_nothing(stage: Stage) -> None:
    old = stage.ingest_lease()
    stage.expire(old)
    new = stage.claim("another/1")
    assert new.step_id == old.step_id
    assert new.fencing_token == old.fencing_token + 1
    with pytest.raises(LeaseLost):
        write(stage, old, patient("a"))
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(0,)]
    assert stage.rows("SELECT count(*) FROM ingest_batches") == [(0,)]


def test_the_token_alone_refuses_when_worker_state_and_cursor_are_equal(stage: Stage) -> None:
    old = stage.ingest_lease()
    stage.execute("UPDATE steps SET fencing_token = fencing_token + 1 WHERE id = :id", id=old.step_id)
    with pytest.raises(LeaseLost):
        write(stage, old, patient("a"))
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(0,)]


def test_the_cursor_alone_refuses_the_same_batch_a_second_time(stage: Stage) -> None:
    lease = stage.ingest_lease()
    progress = write(stage, lease, patient("a"))
    with pytest.raises(LeaseLost), stage.connection.begin():
        leases.fence(stage.connection, lease, progress, 30)
    with pytest.raises(LeaseLost):
        write(stage, lease, patient("a"))
    assert stage.rows("SELECT cursor_lines, created FROM steps WHERE id = :id", id=lease.step_id) == [(1, 1)]


def test_nothing_is_committed_for_a_manifest_that_was_stopped(stage: Stage) -> None:
    lease = stage.ingest_lease()
    stage.execute("UPDATE manifests SET status = 'stopped' WHERE id = :id", id=lease.manifest_id)
    with pytest.raises(LeaseLost):
        write(stage, lease, patient("a"))
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(0,)]


def test_two_writers_of_the_same_ids_in_opposite_order_both_commit(stage: Stage, database_url: str) -> None:
    ids = [f"p{number}" for number in range(300)]
    start = threading.Barrier(2)
    failures: list[BaseException] = []

    def writer(own: Stage, lease: Lease, order: list[str]) -> None:
        lines = [patient(resource_id, name=lease.worker_id) for resource_id in order]
        start.wait(10)
        by_key = False
        while True:
            try:
                write(own, lease, *lines, by_key=by_key)
            except DATABASE_ERRORS as error:
                if not is_conflict(error):
                    failures.append(error)
                    return
                by_key = True
            else:
                return

    settings = Settings(database_url=database_url)
    with Stage(settings) as left, Stage(settings) as right:
        threads = [
            threading.Thread(target=writer, args=(left, left.ingest_lease("left/1"), ids)),
            threading.Thread(target=writer, args=(right, right.ingest_lease("right/1"), ids[::-1])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert stage.rows("SELECT count(*), max(version), count(DISTINCT key) FROM resource_versions") == [(600, 2, 300)]
