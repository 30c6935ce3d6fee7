"""The audit of a real store: clean as the fleet leaves it, and each check finds what one statement breaks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from devstack.provider import SampleProvider
from devstack.servers import EmbeddedPostgres, free_port
from devstack.stack import wait_until
from schema import submissions
from schema.results import Action, LineResults, pack, unpack
from settings import Settings
from tests.support.api import serve
from tests.support.stage import Stage, patient
from workers.audit import MORE, OFFENDERS_NAMED, CheckResult, audit
from workers.hands import Hand

CHECKS = ["lines", "entries", "counters", "tokens", "versions", "written", "endings", "receipts"]
FIRST_FILE = "(SELECT min(file_id) FROM ingest_batches)"
MIDDLE_BATCH = f"(SELECT id FROM ingest_batches WHERE file_id = {FIRST_FILE} ORDER BY first_byte OFFSET 1 LIMIT 1)"
LAST_BATCH = f"(SELECT max(id) FROM ingest_batches WHERE file_id = {FIRST_FILE})"
COMPLETED = "(SELECT min(id) FROM manifests WHERE status = 'completed')"
CLEARED = "UPDATE ingest_batches SET results = NULL"

BAD = [b"not json", b"", b'{"resourceType":"Patient","id":"not an id"}']
FIRST = [*(patient(f"p{number}") for number in range(30)), *BAD, patient("p0"), patient("p1", name="again")]
SECOND = [*(patient(f"p{number}") for number in range(5, 15)), *(patient(f"p{n}", name="new") for n in range(20, 30))]


class Store:
    """A copy of the store that the fleet left: a database and a directory of receipts."""

    def __init__(self, stage: Stage, receipts: Path) -> None:
        self.stage = stage
        self.settings = stage.settings
        self.receipts = receipts
        self.execute = stage.execute

    def audit(self, *, quick: bool = False) -> dict[str, CheckResult]:
        return {result.name: result for result in audit(self.settings, quick=quick)}

    def offenders(self) -> dict[str, list[str]]:
        """What offends, by check."""
        return {name: result.offenders for name, result in self.audit().items() if result.offenders}

    def receipt(self, type: str) -> tuple[int, Path]:
        """Id and object of a receipt of the first manifest that was completed."""
        query = f"SELECT id, path FROM artifacts WHERE manifest_id = {COMPLETED} AND type = :type"
        [(artifact_id, path)] = self.stage.rows(query, type=type)
        return artifact_id, self.receipts / path

    def repack(self, change: Callable[[LineResults], None]) -> int:
        """Change the packed results of a batch with failed and stored lines; returns the batch's id."""
        query = "SELECT id, results FROM ingest_batches WHERE failed > 0 AND updated > 0"
        [(batch_id, results), *_] = self.stage.rows(query)
        lines = unpack(results)
        change(lines)
        self.execute("UPDATE ingest_batches SET results = :results WHERE id = :id", results=pack(lines), id=batch_id)
        return int(batch_id)


def _settings(database_url: str, receipts: Path) -> Settings:
    return Settings(database_url=database_url, artifact_store_url=f"file://{receipts}", batch_lines=10)


def _stop(stage: Stage, manifest_id: int) -> None:
    query = """SELECT s.submission_id FROM submissions s
               JOIN manifests m ON m.tenant_id = s.tenant_id AND m.submission_id = s.id WHERE m.id = :id"""
    [(name,)] = stage.rows(query, id=manifest_id)
    with stage.connection.begin():
        submission = submissions.hold_submission(
            stage.connection, stage.tenant_id, stage.submitter_id, name, owner_subject=None, request_url=None
        )
        submissions.set_status(stage.connection, submission, "stopped")
        submissions.revoke(stage.connection, submission, "stopped")


@pytest.fixture(scope="module")
def left_by_the_fleet(
    postgres: EmbeddedPostgres, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A database to copy, and a directory: two manifests completed, one failed, one stopped in the middle of a file."""
    name = f"audited_{uuid4().hex[:12]}"
    receipts = tmp_path_factory.mktemp("receipts")
    served = tmp_path_factory.mktemp("served")
    settings = _settings(postgres.create_database(name, template=migrated_template), receipts)
    with Stage(settings) as stage, SampleProvider(served) as provider:
        broken = serve(provider, "broken", a=[patient("q1")], b=[patient("q2")])
        (served / "broken-b.ndjson").unlink()
        urls = [serve(provider, "first", a=FIRST, b=[patient("r1")], c=[]), serve(provider, "second", a=SECOND), broken]
        for url in urls:
            stage.add_manifest(url)
            Hand(settings, "test/1", lambda _: None).work(0)
        stopped = stage.ingest_lease()
        stage.write(stopped, patient("s1"))
        _stop(stage, stopped.manifest_id)
        statuses = [status for (status,) in stage.rows("SELECT status FROM manifests ORDER BY id")]
        assert statuses == ["completed", "completed", "failed", "stopped"]
    return name, receipts


@pytest.fixture
def store(postgres: EmbeddedPostgres, left_by_the_fleet: tuple[str, Path], tmp_path: Path) -> Iterator[Store]:
    template, receipts = left_by_the_fleet
    copied = Path(shutil.copytree(receipts, tmp_path / "receipts"))
    database_url = postgres.create_database(f"test_{uuid4().hex[:12]}", template=template)
    with Stage(_settings(database_url, copied)) as stage:
        yield Store(stage, copied)


def test_the_store_is_clean_as_the_fleet_leaves_it_and_after_the_audit_it_is_the_same(store: Store) -> None:
    before = store.stage.dump()
    results = store.audit()
    assert list(results) == CHECKS
    assert not [result for result in results.values() if result.offenders]
    [(batches, versions)] = store.stage.rows(
        "SELECT (SELECT count(*) FROM ingest_batches), (SELECT count(*) FROM resource_versions)"
    )
    assert (results["entries"].examined, results["versions"].examined) == (batches, versions)
    assert all(result.examined and result.proves and not result.skipped for result in results.values())
    assert store.stage.dump() == before


def test_an_empty_store_is_clean(database_url: str, tmp_path: Path) -> None:
    results = list(audit(_settings(database_url, tmp_path)))
    assert [(result.name, result.examined, result.offenders) for result in results] == [
        (name, 0, []) for name in CHECKS
    ]


def test_quick_leaves_out_what_reads_every_row_of_the_store(store: Store) -> None:
    assert [name for name in CHECKS if name not in store.audit(quick=True)] == ["versions", "written"]


BROKEN = {
    "a batch is gone": (
        [f"DELETE FROM ingest_batches WHERE id = {MIDDLE_BATCH}"],
        {
            "lines": "not at byte",
            "counters": "not the sums over its 3 batches",
            "versions": "there is no batch",
            "receipts": "in the ledger",
        },
    ),
    "a cursor is moved": (
        [f"UPDATE steps SET cursor_lines = cursor_lines - 1 WHERE file_id = {FIRST_FILE}"],
        {"lines": "cursor at byte"},
    ),
    "a batch overlaps another": (
        [f"UPDATE ingest_batches SET end_byte = end_byte + 1 WHERE id = {MIDDLE_BATCH}"],
        {"lines": "not at byte", "entries": "bytes, results of"},
    ),
    "a file has no step": (
        ["DELETE FROM steps WHERE kind = 'ingest' AND cursor_bytes = 0"],
        {"lines": "0 steps ingest it"},
    ),
    "a batch is of a generation to come": (
        [
            f"""UPDATE ingest_batches
                SET generation = 2, first_byte = 0, end_byte = end_byte - first_byte, first_line = 1
                WHERE id = {LAST_BATCH}"""
        ],
        {
            "lines": "ingests generation 2",
            "counters": "not the sums",
            "written": "of it, of lines 3",
            "receipts": "in the ledger",
        },
    ),
    "a digest is cut": (
        [f"UPDATE ingest_batches SET digest = substr(digest, 1, 31) WHERE id = {MIDDLE_BATCH}"],
        {"entries": "a digest of 31 bytes"},
    ),
    "results are no results": (
        [rf"UPDATE ingest_batches SET results = '\x28b5' WHERE id = {MIDDLE_BATCH}"],
        {"entries": "cannot be read"},
    ),
    "a step counts too much": (
        [f"UPDATE steps SET created = created + 1 WHERE file_id = {FIRST_FILE}"],
        {"counters": "not the sums"},
    ),
    "a step without a file counts something": (
        ["UPDATE steps SET failed = 1 WHERE kind = 'plan'"],
        {"counters": "not the sums"},
    ),
    "a batch counts a line twice": (
        [
            f"UPDATE ingest_batches SET unchanged = unchanged + 1 WHERE id = {MIDDLE_BATCH}",
            f"UPDATE steps SET unchanged = unchanged + 1 WHERE file_id = {FIRST_FILE}",
        ],
        {"counters": "10 lines, 11 counted"},
    ),
    "an issue is gone": (
        ["DELETE FROM entry_issues WHERE line = (SELECT min(line) FROM entry_issues)"],
        {"counters": "failed lines"},
    ),
    "an issue is of another batch's line": (
        ["UPDATE entry_issues SET line = 1 WHERE line = (SELECT min(line) FROM entry_issues)"],
        {"counters": "failed lines"},
    ),
    "an issue is of no batch": (
        ["UPDATE entry_issues SET batch_id = 1000000 WHERE line = (SELECT min(line) FROM entry_issues)"],
        {"counters": "batch 1000000: 0 failed lines, 1 issues"},
    ),
    "a batch came under an older token": (
        [
            f"UPDATE steps SET fencing_token = 3 WHERE file_id = {FIRST_FILE}",
            f"UPDATE ingest_batches SET fencing_token = 2 WHERE id = {MIDDLE_BATCH}",
        ],
        {"tokens": "token 1, after 2"},
    ),
    "a batch came under a token never given out": (
        [f"UPDATE ingest_batches SET fencing_token = 2 WHERE id = {LAST_BATCH}"],
        {"tokens": "token 2, after 1; its step was given 1"},
    ),
    "a seq is missing": (
        [CLEARED, "UPDATE resource_versions SET seq = 3 WHERE seq = 2 AND op = 5"],
        {"versions": "seq 3: version 1, op 5, after seq 1"},
    ),
    "a version is raised by two": (
        [CLEARED, "UPDATE resource_versions SET version = 3 WHERE version = 2 AND op = 2"],
        {"versions": "version 3, op 2, after seq 1, version 1"},
    ),
    "an affirm raises the version": (
        [CLEARED, "UPDATE resource_versions SET version = version + 1 WHERE op = 5"],
        {"versions": "version 2, op 5"},
    ),
    "a resource is created twice": (
        ["UPDATE resource_versions SET op = 1 WHERE op = 2"],
        {"versions": "op 1, after seq 1, version 1, op 1", "written": "updated"},
    ),
    "a deleted resource is updated": (
        [
            "UPDATE resource_versions SET op = 3 WHERE seq = 2 AND op = 2 AND resource_id = 'p1'",
            """INSERT INTO resource_versions (key, seq, version, batch_id, line, op, resource_id)
               SELECT key, 3, 3, batch_id, line, 2, resource_id FROM resource_versions
               WHERE resource_id = 'p1' AND seq = 2""",
        ],
        {"versions": "seq 3: version 3, op 2, after seq 2, version 2, op 3", "written": "line 35"},
    ),
    "two ids share a key": (
        [CLEARED, "UPDATE resource_versions SET resource_id = 'other' WHERE op = 5 AND resource_id = 'p5'"],
        {"versions": "seq 2"},
    ),
    "a row is of no batch": (
        ["UPDATE resource_versions SET batch_id = 1000000 WHERE resource_id = 'p3'"],
        {"versions": "there is no batch 1000000", "written": "line 4"},
    ),
    "a row is gone": (
        ["DELETE FROM resource_versions WHERE op = 5 AND resource_id = 'p5'"],
        {"written": "affirmed; the store has"},
    ),
    "a row is of a line outside its batch": (
        [CLEARED, "UPDATE resource_versions SET line = 99 WHERE op = 1 AND resource_id = 'p3'"],
        {"written": "of lines 1 to 99"},
    ),
    "two rows have changed their lines": (
        ["UPDATE resource_versions SET line = 7 - line WHERE op = 1 AND resource_id IN ('p2', 'p3')"],
        {"written": "line 3: not in the store"},
    ),
    "an unchanged line rests on another manifest": (
        [
            f"UPDATE ingest_batches SET manifest_id = manifest_id + 1 WHERE id = {LAST_BATCH}",
            "DELETE FROM artifacts",
            "UPDATE manifests SET created_at = '2000-01-01'",
        ],
        {"written": "op 0", "lines": "no step of manifest"},
    ),
    "a file of a manifest that ended is open again": (
        [f"UPDATE steps SET state = 'ready' WHERE file_id = {FIRST_FILE}"],
        {"endings": "is completed, finished: 1 steps due"},
    ),
    "receipts of a manifest that ended are to come": (
        [f"UPDATE steps SET state = 'waiting' WHERE kind = 'publish' AND manifest_id = {COMPLETED}"],
        {"endings": "publish waits: t"},
    ),
    "a step that ended is leased": (
        ["UPDATE steps SET worker_id = 'x', lease_expires_at = now() WHERE kind = 'plan' AND state = 'done'"],
        {"endings": "both on a step that ended"},
    ),
    "a manifest ended at no time": (
        [f"UPDATE manifests SET finished_at = NULL WHERE id = {COMPLETED}"],
        {"endings": "not finished"},
    ),
    "a live manifest has nothing due": (
        [f"UPDATE manifests SET status = 'processing', finished_at = NULL WHERE id = {COMPLETED}"],
        {"endings": "0 steps due", "receipts": "processing: token"},
    ),
    "a stopped submission has a live manifest": (
        ["UPDATE manifests SET status = 'processing', finished_at = NULL WHERE status = 'stopped'"],
        {"endings": "1 manifests that did not"},
    ),
    "a submission ended at no time": (
        ["UPDATE submissions SET completed_at = NULL WHERE status = 'stopped'"],
        {"endings": "ended at no time"},
    ),
    "a receipt has no digest": (
        [f"UPDATE artifacts SET sha256 = NULL WHERE type = 'ledger' AND manifest_id = {COMPLETED}"],
        {"receipts": "token 1 of 1, published"},
    ),
    "a receipt of the ledger is not shown": (
        [f"UPDATE artifacts SET published = false WHERE type = 'ledger' AND manifest_id = {COMPLETED}"],
        {"receipts": "0 in the ledger"},
    ),
    "a receipt of an older token is shown": (
        [f"UPDATE artifacts SET fencing_token = 0 WHERE type = 'outcome' AND manifest_id = {COMPLETED}"],
        {"receipts": "token 0 of 1, published"},
    ),
    "output lacks a line": (
        ["UPDATE artifacts SET line_count = line_count - 1 WHERE type = 'output'"],
        {"receipts": "in the output"},
    ),
    "there is no summary": (["DELETE FROM artifacts WHERE type = 'summary'"], {"receipts": "0 summaries"}),
}


@pytest.mark.parametrize(("statements", "expected"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_found_and_named(store: Store, statements: list[str], expected: dict[str, str]) -> None:
    for statement in statements:
        store.execute(statement)
    found = store.offenders()
    assert sorted(found) == sorted(expected), found
    for check, text in expected.items():
        assert any(text in offender for offender in found[check]), found


def test_results_that_lack_a_line_are_named(store: Store) -> None:
    def drop_a_line(lines: LineResults) -> None:
        place = lines.actions.index(Action.FAILED)
        del lines.actions[place], lines.lengths[place]

    batch_id = store.repack(drop_a_line)
    found = store.offenders()
    assert sorted(found) == ["counters", "entries"]
    assert any(f"batch {batch_id}: " in text and "actions" in text for text in found["entries"])


def test_results_that_lack_an_id_are_named(store: Store) -> None:
    def drop_an_id(lines: LineResults) -> None:
        lines.ids.pop()

    batch_id = store.repack(drop_an_id)
    [offender] = store.offenders()["entries"]
    assert f"batch {batch_id}: " in offender


def test_results_that_tell_another_fate_than_was_counted_are_named(store: Store) -> None:
    def fail_to_blank(lines: LineResults) -> None:
        lines.actions[lines.actions.index(Action.FAILED)] = Action.BLANK

    batch_id = store.repack(fail_to_blank)
    assert store.offenders() == {"counters": [f"batch {batch_id}: its counts are not those of its results"]}


def test_results_that_name_a_version_that_there_is_not_are_named(store: Store) -> None:
    def raise_a_version(lines: LineResults) -> None:
        lines.versions[0] += 1

    batch_id = store.repack(raise_a_version)
    [offender] = store.offenders().pop("written")
    assert offender.startswith(f"batch {batch_id}, line ")


def test_a_receipt_whose_object_is_missing_is_named(store: Store) -> None:
    artifact_id, path = store.receipt("ledger")
    path.unlink()
    assert store.offenders() == {"receipts": [f"artifact {artifact_id}: its object is missing"]}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_receipt_whose_object_was_changed_is_named(store: Store, change: Callable[[bytes], bytes]) -> None:
    artifact_id, path = store.receipt("ledger")
    path.write_bytes(change(path.read_bytes()))
    [offender] = store.offenders().pop("receipts")
    assert offender.startswith(f"artifact {artifact_id}: its object ")


def test_results_that_were_cleared_are_skipped(store: Store) -> None:
    store.execute(CLEARED)
    results = store.audit()
    assert not [result for result in results.values() if result.offenders]
    skipped = results["entries"].skipped
    assert skipped == results["entries"].examined > 0


def test_receipts_past_their_time_are_not_missed(store: Store) -> None:
    store.execute("UPDATE manifests SET created_at = created_at - interval '8 days'")
    store.execute("DELETE FROM artifacts WHERE type = 'summary'")
    _, path = store.receipt("ledger")
    path.unlink()
    assert store.offenders() == {}


def test_offenders_are_many_and_a_few_are_named(store: Store) -> None:
    store.execute("UPDATE resource_versions SET version = version + 1")
    found = store.offenders()
    assert len(found["versions"]) == OFFENDERS_NAMED + 1
    assert [names[-1] for names in found.values()] == [MORE] * len(found)


def test_work_under_way_is_no_offender(store: Store) -> None:
    with Stage(store.settings, submitter="south") as worker:
        waiting = worker.ingest_lease("test/2")
        worker.write(waiting, patient("u1"), b"not json")
        [(end_byte,)] = worker.rows("SELECT cursor_bytes FROM steps WHERE id = :id", id=waiting.step_id)
        ahead = replace(waiting, cursor_bytes=end_byte, cursor_lines=2)
        open_batch = threading.Thread(target=worker.write, args=(ahead, patient("u2"), b"not json"))
        with store.stage.connection.begin():
            manifest = sa.text("SELECT 1 FROM manifests WHERE id = :id FOR UPDATE")
            store.stage.connection.execute(manifest, {"id": waiting.manifest_id})
            open_batch.start()
            with Stage(store.settings) as other:
                wait_until(lambda: other.waits_for_lock("test stage"), "the batch waits before its fence")
            during = store.offenders()
        open_batch.join(30)
        assert during == {}
        query = "SELECT cursor_lines, failed FROM steps WHERE id = :id"
        assert worker.rows(query, id=waiting.step_id) == [(4, 2)]
    assert store.offenders() == {}


def _command(store: Store, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "BULK_SUBMIT_DATABASE_URL": store.settings.database_url,
        "BULK_SUBMIT_ARTIFACT_STORE_URL": store.settings.artifact_store_url,
        "COLUMNS": "150",
        **environment,
    }
    command = [sys.executable, "-m", "cli", "audit", *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_exits_with_0_when_clean_and_with_1_and_their_names_when_something_offends(store: Store) -> None:
    clean = _command(store, "--quick")
    assert (clean.returncode, clean.stderr) == (0, "")
    assert re.findall(r"^│ (\w+)", clean.stdout, re.MULTILINE) == [*CHECKS[:4], *CHECKS[6:]]

    store.execute("UPDATE resource_versions SET version = version + 1 WHERE resource_id = 'p3'")
    [(key,)] = store.stage.rows("SELECT DISTINCT key FROM resource_versions WHERE resource_id = 'p3'")
    offended = _command(store)
    assert (offended.returncode, offended.stderr) == (1, "")
    assert f"versions: key {key}, seq 1: version 2" in offended.stdout
    assert "Ada" not in offended.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"BULK_SUBMIT_DATABASE_URL": f"postgresql://postgres:secret@127.0.0.1:{free_port()}/postgres"},
        {"BULK_SUBMIT_ARTIFACT_STORE_URL": "file:///dev/null/secret"},
    ],
    ids=["no database", "no artifact store"],
)
def test_the_command_exits_with_2_when_it_could_not_run(store: Store, environment: dict[str, str]) -> None:
    failed = _command(store, **environment)
    assert (failed.returncode, failed.stderr) == (2, "")
    assert "could not run" in failed.stdout
    assert "secret" not in failed.stdout
