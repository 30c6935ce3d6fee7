"""What time has passed by is deleted, stopped or struck out: oldest first, a bounded piece at a time, nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from devstack.stack import Child, wait_until
from schema import artifacts, files, leases, retention, submissions, sweeps
from schema.files import Problem
from schema.leases import Lease
from schema.submissions import Submission
from settings import Settings
from submit_tasks import sweeps as tasks
from tests.support.api import Api, issues, manifest, parameters, status, submission, submitter
from tests.support.stage import Stage, patient
from workers.artifact_store import ArtifactStore
from workers.audit import audit
from workers.receipts import publish
from workers.receipts.spool import remove_leftovers, spool

DAY = 86400
AGED = {"submissions": ("created_at", "updated_at", "completed_at"), "manifests": ("created_at", "finished_at")}


class Archive:
    """A stage whose submissions are ingested and published for real, and aged by decree."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        self.stage = stage
        self.settings = stage.settings
        self.directory = directory
        self.store = ArtifactStore(self.settings.artifact_store_url)

    def sweep(self, name: str, limit: int | None = None, **settings: float) -> dict[str, int]:
        """Run a sweep; returns what it reports, zeros left out."""
        report = tasks.run(name, self.settings.model_copy(update=settings), limit)
        assert report is not None
        return {what: count for what, count in report.items() if count}

    def ended(self, *, days: float = 0, status: str = "completed") -> int:
        """A submission of a file with a good and a bad line, published and ended; returns its manifest's id."""
        stage = self.stage
        lease = stage.ingest_lease()
        stage.write(lease, patient(f"p{lease.manifest_id}"), b"not json")
        files.note_validator(stage.connection, lease, '"etag"')
        files.finish_file(stage.connection, lease, [Problem("warning", "value", "a warning")])
        publication = stage.claim_of(lease.manifest_id, "test/1")
        publish(stage.connection, publication, self.settings, self.store, lambda: None)
        self.close(lease.manifest_id, status)
        self.age(lease.manifest_id, days)
        return lease.manifest_id

    def submission(self, manifest_id: int) -> Submission:
        query = """SELECT s.submission_id FROM submissions s JOIN manifests m ON m.submission_id = s.id
                   WHERE m.id = :id"""
        [[name]] = self.stage.rows(query, id=manifest_id)
        with self.stage.connection.begin():
            found = submissions.find_submission(
                self.stage.connection, self.stage.tenant_id, self.stage.submitter_id, name
            )
        assert found is not None
        return found

    def close(self, manifest_id: int, status: str) -> None:
        """Give out a poll token and end the submission."""
        held = self.submission(manifest_id)
        with self.stage.connection.begin():
            self.mint(held, b"%d" % manifest_id)
            submissions.set_status(self.stage.connection, held, status)

    def mint(self, held: Submission, token: bytes, seconds: float = 30 * DAY) -> None:
        submissions.mint_poll_token(
            self.stage.connection, held, token, seconds, owner_subject=None, separate_export_status=False
        )

    def age(self, manifest_id: int, days: float) -> None:
        """Let that many days go by for the submission and its manifest."""
        of_manifest = "id = (SELECT submission_id FROM manifests WHERE id = :id)"
        for table, columns in AGED.items():
            earlier = ", ".join(f"{column} = {column} - make_interval(secs => :seconds)" for column in columns)
            which = "id = :id" if table == "manifests" else of_manifest
            self.stage.execute(f"UPDATE {table} SET {earlier} WHERE {which}", id=manifest_id, seconds=days * DAY)

    def paths(self, manifest_id: int) -> list[Path]:
        """Where the manifest's objects are."""
        rows = self.stage.rows("SELECT path FROM artifacts WHERE manifest_id = :id ORDER BY id", id=manifest_id)
        return [self.directory / "artifacts" / path for (path,) in rows]

    def objects(self, manifest_id: int) -> list[Path]:
        """The objects that the manifest has in the store, whatever rows say."""
        return [path for path in self.directory.glob(f"artifacts/*/*/{manifest_id}/*") if path.is_file()]

    def kept(self, manifest_id: int) -> dict[str, list[str]]:
        """Everything that goes with its time, as rows."""
        of_manifest = {
            "artifacts": "manifest_id = :id",
            "fetch_parameters": "manifest_id = :id",
            "lease_events": "manifest_id = :id",
            "poll_tokens": "submission_id = (SELECT submission_id FROM manifests WHERE id = :id)",
            "entry_issues": "file_id IN (SELECT id FROM manifest_files WHERE manifest_id = :id)",
            "ingest_batches": "manifest_id = :id AND results IS NOT NULL",
            "manifest_files": "manifest_id = :id AND (problems <> '[]' OR validator IS NOT NULL OR url LIKE '%?%')",
        }
        rows = {
            table: [row for (row,) in self.stage.rows(f"SELECT t::text FROM {table} t WHERE {where}", id=manifest_id)]
            for table, where in of_manifest.items()
        }
        return {table: sorted(found) for table, found in rows.items() if found}

    def expired(self) -> list[int]:
        """The manifests whose submissions are marked, in that order."""
        query = """SELECT m.id FROM manifests m JOIN submissions s ON s.id = m.submission_id
                   WHERE s.expired_at IS NOT NULL ORDER BY s.expired_at"""
        return [manifest_id for (manifest_id,) in self.stage.rows(query)]

    def record(self, lease: Lease, name: str, *, minutes: float) -> Path:
        """An object that the lease has written and not published, so many minutes ago."""
        path = f"{lease.tenant_id}/1/{lease.manifest_id}/{name}.{lease.fencing_token}"
        artifact_id = artifacts.record(
            self.stage.connection,
            lease,
            submission_id=1,
            type="output",
            resource_type="Patient",
            part=0,
            path=path,
            seconds=30,
        )
        source = self.directory / "source"
        source.write_bytes(b"content")
        self.store.write(path, source, lambda: None)
        self.stage.execute(
            "UPDATE artifacts SET created_at = created_at - make_interval(mins => :minutes) WHERE id = :id",
            minutes=minutes,
            id=artifact_id,
        )
        return self.directory / "artifacts" / path

    def publishing(self) -> Lease:
        """A lease on the publish step of a manifest without files."""
        manifest_id = self.stage.add_manifest()
        files.finish_plan(self.stage.connection, self.stage.claim_of(manifest_id, "test/1"), [])
        return self.stage.claim_of(manifest_id, "test/1")


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "spool").mkdir()
    values = {"artifact_store_url": f"file://{tmp_path}/artifacts", "spool_directory": str(tmp_path / "spool")}
    with Stage(Settings(database_url=database_url, **values)) as stage:
        yield stage


@pytest.fixture
def archive(stage: Stage, tmp_path: Path) -> Archive:
    return Archive(stage, tmp_path)


@pytest.fixture
def other(stage: Stage) -> Iterator[Stage]:
    """A second connection to the same database."""
    with Stage(stage.settings) as other:
        yield other


def refuse(path: Path) -> None:
    """Let the store refuse to delete this object."""
    path.unlink()
    (path / "in-the-way").mkdir(parents=True)


def relent(path: Path) -> None:
    """Let it delete it again."""
    (path / "in-the-way").rmdir()
    path.rmdir()
    path.write_bytes(b"")


def test_what_a_submission_was_told_goes_with_its_time_and_a_younger_ones_stays(archive: Archive) -> None:
    stage = archive.stage
    old, young = archive.ended(days=7.1), archive.ended(days=6.9)
    stage.execute("UPDATE manifest_files SET url = url || '?sig=secret'")
    stage.execute("UPDATE fetch_parameters SET sealed_secrets = 'sealed'")
    kept, everything = archive.kept(young), set(archive.kept(old))
    assert everything == set(kept)
    assert len(everything) == 7
    versions = stage.rows("SELECT t::text FROM resource_versions t ORDER BY 1")
    written = archive.objects(young)
    report = archive.sweep("expired")
    assert archive.kept(old) == {}
    assert archive.objects(old) == []
    assert archive.kept(young) == kept
    assert archive.objects(young) == written
    assert archive.expired() == [old]
    assert stage.rows("SELECT t::text FROM resource_versions t ORDER BY 1") == versions
    assert stage.rows("SELECT count(*) FROM ingest_batches") == [(2,)]
    assert [result.offenders for result in audit(stage.settings) if result.offenders] == []
    assert {what: report[what] for what in ("submissions", "objects", "tokens", "batches", "issues")} == {
        "submissions": 1,
        "objects": len(written),
        "tokens": 1,
        "batches": 1,
        "issues": 1,
    }
    before = stage.dump()
    assert archive.sweep("expired") == {}
    assert {**stage.dump(), "sweeps": []} == {**before, "sweeps": []}


def test_an_expired_submission_is_found_no_more_and_keeps_its_id(database_url: str, tmp_path: Path) -> None:
    with Api(database_url, tmp_path) as api:
        issues(api.submit(parameters(submitter(), submission("one"), status("completed"))), 200)
        url = api.poll_url("one")
        assert api.get(url).status_code == 200
        api.execute("UPDATE submissions SET completed_at = completed_at - interval '8 days'")
        tokens = api.rows("SELECT t::text FROM poll_tokens t")
        report = tasks.run("expired", api.settings)
        assert report is not None
        assert (report["submissions"], report["tokens"], len(tokens)) == (1, 1, 1)
        issues(api.get(url), 404)
        issues(api.post("$bulk-submit-status", parameters(submitter(), submission("one"))), 404)
        issues(api.submit(manifest("one", "http://provider.test/m.json")), 409)


def test_a_token_given_out_while_its_submission_expired_leads_nowhere(archive: Archive) -> None:
    held = archive.submission(archive.ended(days=8))
    archive.sweep("expired")
    with archive.stage.connection.begin():
        archive.mint(held, b"late")
        assert submissions.resolve_poll_token(archive.stage.connection, held.tenant_id, b"late") is None


@pytest.mark.parametrize("status", ["completed", "stopped"])
def test_time_runs_from_the_end_of_the_last_manifest(archive: Archive, status: str) -> None:
    late = archive.ended(days=30, status=status)
    archive.stage.execute("UPDATE manifests SET finished_at = clock_timestamp() - interval '6 days'")
    assert archive.sweep("expired") == {}
    archive.age(late, 2)
    archive.sweep("expired")
    assert archive.expired() == [late]


def test_a_submission_with_a_live_manifest_is_not_over(archive: Archive) -> None:
    live = archive.stage.ingest_lease().manifest_id
    archive.close(live, "completed")
    archive.age(live, 30)
    assert archive.sweep("expired") == {}
    assert archive.kept(live)


def test_five_are_done_in_three_runs_of_two_the_oldest_first(archive: Archive) -> None:
    ages = {archive.ended(days=days): days for days in (9, 12, 8, 11, 10)}
    oldest_first = sorted(ages, key=ages.__getitem__, reverse=True)
    for done, more in ((2, 1), (4, 1), (5, 0)):
        assert archive.sweep("expired", limit=2).get("more", 0) == more
        assert archive.expired() == oldest_first[:done]
    assert not [path for path in archive.directory.glob("artifacts/**/*") if path.is_file()]


def test_a_run_that_was_killed_between_objects_and_rows_is_taken_up(archive: Archive) -> None:
    old = archive.ended(days=8)
    for path in archive.paths(old)[:-1]:
        path.unlink()
    assert archive.sweep("expired")["submissions"] == 1
    assert (archive.kept(old), archive.objects(old), archive.expired()) == ({}, [], [old])


def test_a_run_out_of_time_ends_at_a_chunk_and_the_next_goes_on(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [archive.ended(days=8), archive.ended(days=9)]
    monkeypatch.setattr(tasks, "SECONDS_AT_ONCE", 0)
    runs = 0
    while archive.sweep("expired").get("more"):
        runs += 1
        assert runs < 20
    assert runs > 4
    assert archive.expired() == old[::-1]
    assert [archive.kept(manifest_id) for manifest_id in old] == [{}, {}]


def test_rows_stay_until_the_store_lets_their_objects_go_and_others_come_first(archive: Archive) -> None:
    refused, next_one = archive.ended(days=9), archive.ended(days=8)
    path = archive.paths(refused)[0]
    refuse(path)
    kept = archive.kept(refused)
    assert archive.sweep("expired", limit=1) == {"refusals": 1, "more": 1}
    assert archive.kept(refused) == kept
    archive.sweep("expired", limit=1)
    assert archive.expired() == [next_one]
    relent(path)
    archive.sweep("expired", limit=1)
    assert archive.expired() == [next_one, refused]
    assert (archive.kept(refused), archive.objects(refused)) == ({}, [])


def test_a_store_that_is_down_ends_the_run(archive: Archive) -> None:
    for days in (8, 9, 10, 11):
        for path in archive.paths(archive.ended(days=days)):
            refuse(path)
    assert archive.sweep("expired") == {"refusals": 3, "more": 1}
    assert archive.expired() == []


def test_poll_tokens_past_their_own_time_go_and_others_stay(archive: Archive) -> None:
    held = archive.submission(archive.stage.add_manifest())
    with archive.stage.connection.begin():
        archive.mint(held, b"past", seconds=-1)
        archive.mint(held, b"present", seconds=60)
    assert archive.sweep("expired") == {"tokens": 1}
    assert archive.stage.rows("SELECT token_hash FROM poll_tokens") == [(b"present",)]


def test_objects_of_a_lost_lease_go_and_those_of_its_successor_stay(archive: Archive) -> None:
    lost = archive.publishing()
    of_the_lost = archive.record(lost, "output", minutes=61)
    archive.stage.expire(lost)
    assert archive.sweep("orphans") == {}
    live = archive.stage.claim_of(lost.manifest_id, "test/2")
    of_the_live = archive.record(live, "output", minutes=61)
    assert archive.sweep("orphans") == {"objects": 1}
    assert (of_the_lost.exists(), of_the_live.exists()) == (False, True)
    assert archive.paths(live.manifest_id) == [of_the_live]


def test_objects_of_a_manifest_that_was_stopped_go(archive: Archive) -> None:
    lease = archive.publishing()
    archive.record(lease, "output", minutes=61)
    archive.stage.execute("UPDATE manifests SET status = 'stopped', finished_at = clock_timestamp()")
    assert archive.sweep("orphans") == {"objects": 1}
    assert (archive.objects(lease.manifest_id), archive.paths(lease.manifest_id)) == ([], [])


def test_published_receipts_are_no_orphans(archive: Archive) -> None:
    ended = archive.ended()
    archive.stage.execute("UPDATE artifacts SET created_at = created_at - interval '2 days'")
    assert archive.sweep("orphans") == {}
    assert len(archive.objects(ended)) == len(archive.paths(ended)) > 1


def test_an_orphan_is_left_to_its_writer_for_a_while(archive: Archive) -> None:
    lease = archive.publishing()
    young = archive.record(lease, "young", minutes=59)
    archive.stage.execute("UPDATE manifests SET status = 'stopped', finished_at = clock_timestamp()")
    assert archive.sweep("orphans") == {}
    assert young.exists()
    assert archive.sweep("orphans", orphan_grace_seconds=58 * 60) == {"objects": 1}
    assert not young.exists()


def test_an_orphan_that_the_store_does_not_let_go_keeps_none_waiting(archive: Archive) -> None:
    lease = archive.publishing()
    oldest, *others = [archive.record(lease, f"a{age}", minutes=age) for age in (90, 80, 70)]
    archive.stage.execute("UPDATE manifests SET status = 'stopped', finished_at = clock_timestamp()")
    refuse(oldest)
    assert archive.sweep("orphans", limit=1) == {"refusals": 1, "more": 1}
    assert archive.sweep("orphans", limit=1) == {"objects": 1, "more": 1}
    assert [path.exists() for path in others] == [False, True]
    archive.sweep("orphans", limit=1)
    relent(oldest)
    assert archive.sweep("orphans", limit=2) == {"objects": 1}
    assert archive.paths(lease.manifest_id) == []


def test_a_submission_left_open_is_stopped_and_then_expires(archive: Archive) -> None:
    idle, fresh, live = archive.ended(days=31), archive.ended(days=29), archive.stage.add_manifest()
    archive.age(live, 31)
    archive.stage.execute("UPDATE submissions SET status = 'in-progress', completed_at = NULL")
    assert archive.sweep("idle") == {"submissions": 1}
    states = {manifest_id: archive.submission(manifest_id).status for manifest_id in (idle, fresh, live)}
    assert states == {idle: "stopped", fresh: "in-progress", live: "in-progress"}
    assert archive.sweep("expired") == {}
    archive.stage.execute("UPDATE submissions SET completed_at = completed_at - interval '8 days'")
    archive.sweep("expired")
    assert archive.expired() == [idle]


def test_a_manifest_that_came_or_ended_lately_keeps_a_submission_open(archive: Archive) -> None:
    ended, came = archive.ended(days=60), archive.ended(days=60)
    archive.stage.execute("UPDATE submissions SET status = 'in-progress', completed_at = NULL")
    archive.stage.execute("UPDATE manifests SET finished_at = clock_timestamp() WHERE id = :id", id=ended)
    archive.stage.execute("UPDATE manifests SET created_at = clock_timestamp() WHERE id = :id", id=came)
    assert archive.sweep("idle") == {}


def test_a_submission_that_its_submitter_is_about_to_use_is_not_stopped(archive: Archive, other: Stage) -> None:
    idle = archive.ended(days=31)
    archive.stage.execute("UPDATE submissions SET status = 'in-progress', completed_at = NULL")
    held = archive.submission(idle)
    with other.connection.begin():
        submissions.hold_submission(
            other.connection,
            held.tenant_id,
            held.submitter_id,
            held.submission_id,
            owner_subject=None,
            request_url=None,
        )
        assert archive.sweep("idle") == {}
    assert archive.sweep("idle") == {"submissions": 1}


def test_a_submission_used_since_it_was_found_idle_is_not_stopped(archive: Archive) -> None:
    connection, manifest_id = archive.stage.connection, archive.ended(days=31)
    archive.stage.execute("UPDATE submissions SET status = 'in-progress', completed_at = NULL")
    with connection.begin():
        [idle] = retention.idle_submissions(connection, 30 * DAY, 10)
    archive.stage.execute("UPDATE manifests SET finished_at = clock_timestamp() WHERE id = :id", id=manifest_id)
    with connection.begin():
        assert not retention.stop_if_idle(connection, idle, 30 * DAY)
    assert archive.submission(manifest_id).status == "in-progress"


def test_old_lines_of_the_logs_go_a_bounded_number_at_a_time(archive: Archive) -> None:
    stage, rows = archive.stage, tasks.LOG_ROWS_A_CHUNK + 1
    stage.execute(
        """INSERT INTO egress_log (tenant_id, manifest_id, method, url, verdict, at)
           SELECT 1, 1, 'GET', n::text, 'allowed', clock_timestamp() - interval '30 days' - n * interval '1 second'
           FROM generate_series(1, :rows) n""",
        rows=rows,
    )
    for age in ("31 days", "29 days"):
        stage.execute(
            f"""INSERT INTO lease_events (tenant_id, manifest_id, step_id, event, fencing_token, reason, at)
                VALUES (1, 1, 1, 'claimed', 1, '{age}', clock_timestamp() - interval '{age}')"""
        )
    assert archive.sweep("logs", limit=1) == {"lease_events": 1, "egress_log": rows - 1, "more": 1}
    assert stage.rows("SELECT url FROM egress_log") == [("1",)]
    assert archive.sweep("logs") == {"egress_log": 1}
    assert stage.rows("SELECT reason FROM lease_events") == [("29 days",)]


def test_nodes_not_seen_for_long_are_struck_out(archive: Archive) -> None:
    for name, age in (("gone", "2 days"), ("silent", "23 hours"), ("up", "0")):
        archive.stage.execute(
            f"""INSERT INTO fleet_workers (name, pid, slots, last_seen_at)
                VALUES ('{name}', 1, 1, clock_timestamp() - interval '{age}')"""
        )
    assert archive.sweep("fleet") == {"workers": 1}
    assert archive.stage.rows("SELECT name FROM fleet_workers ORDER BY name") == [("silent",), ("up",)]


@pytest.mark.parametrize("name", list(tasks.SWEEPS))
def test_of_two_runs_of_a_sweep_one_does_nothing(archive: Archive, other: Stage, name: str) -> None:
    archive.ended(days=8)
    with other.connection.begin():
        assert leases.only_one(other.connection, tasks.LOCKS[name])
        before = archive.stage.dump()
        assert tasks.run(name, archive.settings) is None
        assert archive.stage.dump() == before


def test_a_run_leaves_its_report_and_a_failed_one_is_counted(archive: Archive) -> None:
    def recorded() -> sweeps.SweepRecord:
        with archive.stage.connection.begin():
            [record] = sweeps.records(archive.stage.connection)
        return record

    archive.ended(days=8)
    archive.stage.execute("ALTER TABLE poll_tokens RENAME TO hidden")
    for failures in (1, 2):
        with pytest.raises(sa.exc.ProgrammingError):
            archive.sweep("expired")
        assert recorded() == sweeps.SweepRecord("expired", None, None, {}, failures)
    archive.stage.execute("ALTER TABLE hidden RENAME TO poll_tokens")
    report = archive.sweep("expired")
    record = recorded()
    assert (record.name, record.failures) == ("expired", 0)
    assert {what: count for what, count in record.report.items() if count} == report
    assert record.age_seconds is not None
    assert 0 <= record.age_seconds < 60
    archive.stage.execute("ALTER TABLE poll_tokens RENAME TO hidden")
    with pytest.raises(sa.exc.ProgrammingError):
        archive.sweep("expired")
    again = recorded()
    assert (again.failures, again.report) == (1, record.report)
    assert again.age_seconds is not None
    assert again.age_seconds > record.age_seconds


SPOOL_UNTIL_KILLED = """
import sys
from pathlib import Path
from settings import Settings
from workers.receipts.spool import spool

with spool(Settings(spool_directory=sys.argv[1])) as directory:
    (Path(directory) / "part").touch()
    print(directory, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def spooling(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a directory in the spool, and that."""
    command = [sys.executable, "-c", SPOOL_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_process_left_in_the_spool_is_removed_and_nothing_else(
    spooling: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, directory = spooling
    settings = Settings(spool_directory=str(tmp_path))
    elsewhere = tmp_path / f"receipts-elsewhere-{process.pid}-x"
    elsewhere.mkdir()
    assert directory.parent == tmp_path
    assert remove_leftovers(settings) == []
    process.kill()
    process.wait()
    assert remove_leftovers(settings) == [directory]
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_a_worker_node_that_starts_clears_the_spool(
    spooling: tuple[subprocess.Popen[str], Path], tmp_path: Path, database_url: str, broker_url: str
) -> None:
    process, directory = spooling
    process.kill()
    process.wait()
    environment = {
        "BULK_SUBMIT_DATABASE_URL": database_url,
        "BULK_SUBMIT_BROKER_URL": broker_url,
        "BULK_SUBMIT_SPOOL_DIRECTORY": str(tmp_path),
    }
    assert directory.exists()
    command = [sys.executable, "-m", "cli", "worker", "--name", "test", "--slots", "1", "--queues", "sweeps"]
    worker = Child("worker", command, tmp_path / "worker.log", environment)
    try:
        wait_until(lambda: not directory.exists() or not worker.running, "the spool is clear", seconds=30)
        assert not directory.exists(), worker.tail()
    finally:
        worker.kill()


def test_a_directory_of_the_spool_is_gone_with_its_context(tmp_path: Path) -> None:
    with spool(Settings(spool_directory=str(tmp_path))) as directory:
        assert list(tmp_path.iterdir()) == [Path(directory)]
    assert list(tmp_path.iterdir()) == []
