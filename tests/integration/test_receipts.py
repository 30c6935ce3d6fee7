"""Receipts of manifests in a real Postgres and a real directory: every line of every artifact, and whose they are."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schema import artifacts, files, leases, results
from schema.fhir_types import TYPE_NUMBERS
from schema.files import PlannedFile, Problem
from schema.leases import LeaseLost, Progress
from schema.results import Action, Issue, LineResults
from settings import Settings
from tests.support.stage import Stage
from workers.artifact_store import ArtifactStore, ArtifactStoreError
from workers.receipts import publish
from workers.receipts.render import fhir_instant

PATIENTS = "http://provider.test/out/patients.ndjson"
MANIFEST = "http://provider.test/manifest.json"
SUBSETTED = {"system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue", "code": "SUBSETTED"}
LINE_BYTES = 100

Line = tuple[Action, str, str, int] | tuple[Action]
"""What became of a line; for a stored one its type, id and version."""


def created(resource_id: str, resource_type: str = "Patient") -> Line:
    return (Action.CREATED, resource_type, resource_id, 1)


class Press:
    """A stage whose manifests are ingested by decree and published for real."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        self.stage = stage
        self.connection = stage.connection
        self.store = ArtifactStore(f"file://{directory}/store")
        self.spool = directory / "spool"
        self.spool.mkdir()
        self.settings = stage.settings.model_copy(update={"spool_directory": str(self.spool)})
        self.alive: Callable[[], None] = lambda: None

    def plan(
        self, listed: Sequence[PlannedFile], *, notes: Sequence[str] = (), problems: Sequence[Problem] = ()
    ) -> int:
        """A manifest that lists these files."""
        manifest_id = self.stage.add_manifest(f"{MANIFEST}?sig=secret")
        lease = self.stage.claim_of(manifest_id, "test/1")
        files.finish_plan(self.connection, lease, listed, notes=notes, problems=problems)
        return manifest_id

    def ingest(
        self,
        manifest_id: int,
        *batches: Sequence[Line],
        issues: Sequence[Issue] = (),
        problems: Sequence[Problem] = (),
    ) -> None:
        """The next file of the manifest: its batches, each line 100 bytes long, and its end."""
        lease = self.stage.claim_of(manifest_id, "test/1")
        assert lease.kind == "ingest"
        line = 1
        for lines in batches:
            packed = LineResults(bytearray(entry[0] for entry in lines), [LINE_BYTES] * len(lines))
            for entry in lines:
                if len(entry) == 4:
                    packed.types.append(TYPE_NUMBERS[entry[1]])
                    packed.ids.append(entry[2])
                    packed.versions.append(entry[3])
                    packed.seqs.append(entry[3])
            end = line + len(lines)
            progress = Progress((line - 1) * LINE_BYTES, (end - 1) * LINE_BYTES, end - 1)
            with self.connection.begin():
                leases.enter(self.connection, lease)
                results.record_batch(
                    self.connection,
                    lease,
                    results.next_batch_id(self.connection),
                    progress,
                    first_line=line,
                    line_count=len(lines),
                    digest=b"digest of batch from %d" % line,
                    results=packed,
                    issues=[issue for issue in issues if line <= issue.line < end],
                )
                leases.hold_manifest(self.connection, lease)
                leases.fence(self.connection, lease, progress, seconds=30)
            line = end
        files.finish_file(self.connection, lease, problems)

    def publish(self, manifest_id: int, **settings: Any) -> str:
        """Claim the publish step and do it."""
        return self.publish_under(self.stage.claim_of(manifest_id, "test/1"), **settings)

    def publish_under(self, lease: leases.Lease, **settings: Any) -> str:
        assert lease.kind == "publish"
        return publish(
            self.connection, lease, self.settings.model_copy(update=settings), self.store, lambda: self.alive()
        )

    def listed(self, manifest_id: int) -> list[artifacts.Artifact]:
        """What a status manifest would list of this manifest."""
        with self.connection.begin():
            view = files.manifest_view(self.connection, self.stage.tenant_id, manifest_id)
            found = artifacts.of_submission(self.connection, self.stage.tenant_id, view.submission_id)
        return [artifact for artifact in found if artifact.manifest_id == manifest_id]

    def lines(self, artifact: artifacts.Artifact) -> list[str]:
        """The artifact's lines, its row checked against its object."""
        stored = b"".join(self.store.read(artifact.path))
        plain = gzip.decompress(stored)
        lines = plain.decode().split("\n")
        assert lines.pop() == ""
        [(digest,)] = self.stage.rows("SELECT sha256 FROM artifacts WHERE id = :id", id=artifact.id)
        assert digest == hashlib.sha256(stored).digest()
        assert (artifact.line_count, artifact.byte_count, artifact.stored_bytes) == (
            len(lines),
            len(plain),
            len(stored),
        )
        return lines

    def read(self, manifest_id: int, type: str, resource_type: str | None = None) -> list[Any]:
        """The documents of one receipt, its parts in order."""
        parts = [part for part in self.listed(manifest_id) if (part.type, part.resource_type) == (type, resource_type)]
        assert [part.part for part in parts] == list(range(len(parts)))
        return [json.loads(line) for part in parts for line in self.lines(part)]

    def commit_times(self, manifest_id: int) -> list[str]:
        """When the manifest's batches were committed, as instants."""
        query = "SELECT committed_at FROM ingest_batches WHERE manifest_id = :id ORDER BY file_id, first_byte"
        return [fhir_instant(time) for (time,) in self.stage.rows(query, id=manifest_id)]

    def status(self, manifest_id: int) -> str:
        [(status,)] = self.stage.rows("SELECT status FROM manifests WHERE id = :id", id=manifest_id)
        return str(status)


@pytest.fixture
def press(database_url: str, tmp_path: Path) -> Iterator[Press]:
    with Stage(Settings(database_url=database_url)) as stage:
        yield Press(stage, tmp_path)


def texts(outcomes: list[Any]) -> list[tuple[str, str, str]]:
    """Severity, code and text of each outcome's one issue."""
    found = []
    for outcome in outcomes:
        [issue] = outcome["issue"]
        found.append((issue["severity"], issue["code"], issue["details"]["text"]))
    return found


def test_output_holds_each_version_written_and_nothing_else(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", f"{PATIENTS}?sig=secret", "Patient")])
    press.ingest(
        manifest_id,
        [created("a"), (Action.UNCHANGED, "Patient", "b", 4), (Action.FAILED,), (Action.BLANK,)],
        [(Action.AFFIRMED, "Patient", "c", 2), (Action.HEADER,), (Action.UPDATED, "Patient", "d", 7)],
        issues=[Issue(3, 200, "structure", "not JSON")],
    )
    assert press.publish(manifest_id) == "completed"
    first, second = press.commit_times(manifest_id)
    assert press.read(manifest_id, "output", "Patient") == [
        {
            "resourceType": "Patient",
            "id": "a",
            "meta": {"versionId": "1", "lastUpdated": first, "source": f"{PATIENTS}#1", "tag": [SUBSETTED]},
        },
        {
            "resourceType": "Patient",
            "id": "d",
            "meta": {"versionId": "7", "lastUpdated": second, "source": f"{PATIENTS}#7", "tag": [SUBSETTED]},
        },
    ]


def test_the_ledger_has_every_line_of_every_file_in_order(press: Press) -> None:
    other = "http://provider.test/out/others.ndjson"
    manifest_id = press.plan([PlannedFile("output", f"{PATIENTS}?sig=secret"), PlannedFile("output", other)])
    press.ingest(
        manifest_id,
        [created("a"), (Action.UPDATED, "Patient", "b", 3)],
        [(Action.UNCHANGED, "Patient", "c", 2), (Action.AFFIRMED, "Patient", "d", 5)],
        [(Action.FAILED,), (Action.FAILED,), (Action.BLANK,), (Action.HEADER,)],
        issues=[
            Issue(5, 400, "structure", "not JSON"),
            Issue(6, 500, "value", "bad code", resource_type="Patient", resource_id="e"),
        ],
    )
    press.ingest(manifest_id, [created("f", "Device")])
    press.publish(manifest_id)

    def entry(line: int, action: str, reference: str | None = None, version: str | None = None, **more: str) -> Any:
        known = {"reference": reference, "version": version}
        place = {"file": PATIENTS, "line": line, "offset": (line - 1) * LINE_BYTES, "action": action}
        return place | {name: value for name, value in known.items() if value is not None} | more

    assert press.read(manifest_id, "ledger") == [
        entry(1, "created", "Patient/a", "1"),
        entry(2, "updated", "Patient/b", "3"),
        entry(3, "unchanged", "Patient/c", "2"),
        entry(4, "affirmed", "Patient/d", "5"),
        entry(5, "failed", cause="not JSON"),
        entry(6, "failed", "Patient/e", cause="bad code"),
        entry(7, "blank"),
        entry(8, "header"),
        entry(1, "created", "Device/f", "1") | {"file": other},
    ]


def test_a_failed_line_is_an_outcome_that_names_its_place_and_its_resource(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", f"{PATIENTS}?sig=secret")])
    press.ingest(
        manifest_id,
        [created("a"), (Action.FAILED,)],
        [(Action.FAILED,)],
        issues=[
            Issue(2, 100, "structure", "not JSON"),
            Issue(3, 200, "value", "bad code", resource_type="Patient", resource_id="e"),
        ],
    )
    assert press.publish(manifest_id) == "completed"
    first, second, third = press.read(manifest_id, "outcome")
    assert first == {
        "resourceType": "OperationOutcome",
        "issue": [
            {
                "severity": "error",
                "code": "structure",
                "details": {"text": "line 2 of patients.ndjson: not JSON"},
                "diagnostics": f"{PATIENTS}, line 2, byte offset 100",
            }
        ],
    }
    assert second["extension"] == [
        {
            "url": "http://hl7.org/fhir/StructureDefinition/operationoutcome-sourceResource",
            "valueReference": {"reference": "http://ehr.test/Patient/e"},
        }
    ]
    assert third["issue"][0]["diagnostics"] == PATIENTS
    assert texts([third]) == [
        (
            "information",
            "informational",
            "patients.ndjson: 3 lines read, 1 stored (1 created, 0 updated, 0 unchanged, 0 affirmed), "
            "2 failed, 0 skipped",
        )
    ]
    [part] = [artifact for artifact in press.listed(manifest_id) if artifact.type == "outcome"]
    assert part.severity_counts == {"error": 2, "information": 1}


def test_notes_problems_and_wrong_counts_are_told(press: Press) -> None:
    manifest_id = press.plan(
        [
            PlannedFile("output", PATIENTS, "Patient", declared_count=3),
            PlannedFile("output", "http://provider.test/out/exact.ndjson", declared_count=1),
            PlannedFile("outcome", "http://provider.test/out/theirs.ndjson", declared_count=9),
        ],
        notes=["manifest.request is missing"],
    )
    press.ingest(manifest_id, [created("a"), (Action.BLANK,)], problems=[Problem("warning", "value", "odd type")])
    press.ingest(manifest_id, [created("b"), (Action.HEADER,)])
    assert press.publish(manifest_id) == "completed"
    told = texts(press.read(manifest_id, "outcome"))
    summaries = [text for severity, _, text in told if severity == "information"]
    assert [entry for entry in told if entry[0] != "information"] == [
        ("warning", "value", "odd type"),
        ("warning", "value", "patients.ndjson: 1 resources read, 3 declared"),
    ]
    assert summaries[0] == "manifest.request is missing"
    assert [text.partition(":")[0] for text in summaries[1:]] == ["patients.ndjson", "exact.ndjson", "theirs.ndjson"]
    assert summaries[-1] == "theirs.ndjson: listed under outcome; it was not read"


def test_a_file_that_failed_fails_the_manifest_and_what_was_stored_is_reported(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS), PlannedFile("output", "http://provider.test/b")])
    press.ingest(manifest_id, [created("a")])
    press.ingest(manifest_id, problems=[Problem("error", "not-found", "the server answered 404")])
    assert press.publish(manifest_id) == "failed"
    assert press.status(manifest_id) == "failed"
    assert [entry["id"] for entry in press.read(manifest_id, "output", "Patient")] == ["a"]
    outcomes = press.read(manifest_id, "outcome")
    assert ("error", "not-found", "the server answered 404") in texts(outcomes)
    assert {outcome["issue"][0]["diagnostics"] for outcome in outcomes} == {PATIENTS, "http://provider.test/b"}


def test_a_failed_step_without_a_reason_is_an_error_all_the_same(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a")])
    press.stage.execute("UPDATE steps SET state = 'failed' WHERE kind = 'ingest' AND manifest_id = :id", id=manifest_id)
    assert press.publish(manifest_id) == "failed"
    assert ("error", "incomplete", "the file was not read to its end") in texts(press.read(manifest_id, "outcome"))


def test_a_manifest_that_could_not_be_fetched_fails_with_its_cause(press: Press) -> None:
    manifest_id = press.plan([], problems=[Problem("error", "not-found", "the manifest could not be fetched: 404")])
    assert press.publish(manifest_id) == "failed"
    [outcome] = press.read(manifest_id, "outcome")
    assert texts([outcome]) == [("error", "not-found", "the manifest could not be fetched: 404")]
    assert outcome["issue"][0]["diagnostics"] == MANIFEST


def test_a_manifest_with_nothing_to_say_has_a_summary_alone(press: Press) -> None:
    manifest_id = press.plan([])
    press.stage.execute("UPDATE manifests SET manifest_url = NULL WHERE id = :id", id=manifest_id)
    assert press.publish(manifest_id) == "completed"
    assert [artifact.type for artifact in press.listed(manifest_id)] == ["summary"]
    [summary] = press.read(manifest_id, "summary")
    assert (summary["manifestUrl"], summary["files"], summary["status"]) == (None, [], "completed")
    assert summary["total"]["lines"] == 0


def test_the_summary_reconciles_each_file_and_the_whole_with_what_was_declared(press: Press) -> None:
    manifest_id = press.plan(
        [
            PlannedFile("output", f"{PATIENTS}?sig=secret", "Patient", declared_count=5, declared_bytes=650),
            PlannedFile("output", "http://provider.test/b", declared_count=1),
            PlannedFile("output", "http://provider.test/c"),
        ],
        notes=["a note"],
    )
    press.ingest(
        manifest_id,
        [created("a"), (Action.UPDATED, "Patient", "b", 2), (Action.UNCHANGED, "Patient", "c", 2), (Action.BLANK,)],
        [(Action.AFFIRMED, "Patient", "d", 5), (Action.FAILED,), (Action.HEADER,)],
        issues=[Issue(6, 500, "structure", "not JSON")],
    )
    problem = Problem("error", "not-found", "the server answered 404")
    press.ingest(manifest_id, problems=[problem])
    press.ingest(manifest_id, [created("e")])
    press.publish(manifest_id)
    [summary] = press.read(manifest_id, "summary")
    first, second, third = summary["files"]

    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()

    batches = [b"digest of batch from 1", b"digest of batch from 5"]
    assert first == {
        "file": PATIENTS,
        "position": 0,
        "kind": "output",
        "type": "Patient",
        "status": "done",
        "declaredCount": 5,
        "declaredBytes": 650,
        "lines": 7,
        "bytes": 700,
        "created": 1,
        "updated": 1,
        "unchanged": 1,
        "affirmed": 1,
        "stored": 4,
        "failed": 1,
        "skipped": 2,
        "countDifference": 0,
        "byteDifference": 50,
        "digest": digest(*batches),
        "problems": [],
    }
    assert (second["status"], second["countDifference"], second["byteDifference"]) == ("failed", -1, None)
    assert second["problems"] == [
        {"severity": "error", "code": "not-found", "diagnostics": "the server answered 404"},
    ]
    assert (third["declaredCount"], third["countDifference"]) == (None, None)
    total = summary["total"]
    assert (total["lines"], total["bytes"], total["created"], total["stored"], total["failed"]) == (8, 800, 2, 5, 1)
    assert (total["declaredCount"], total["countDifference"], total["byteDifference"]) == (6, -1, 50)
    assert total["digest"] == digest(*(bytes.fromhex(file["digest"]) for file in summary["files"]))
    assert (summary["manifestUrl"], summary["status"], summary["notes"]) == (MANIFEST, "failed", ["a note"])


def test_each_resource_type_of_a_mixed_file_has_parts_of_its_own(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a"), created("b", "Device"), created("c")], [created("d", "Device")])
    press.publish(manifest_id)
    assert [entry["id"] for entry in press.read(manifest_id, "output", "Patient")] == ["a", "c"]
    assert [entry["id"] for entry in press.read(manifest_id, "output", "Device")] == ["b", "d"]


def test_parts_roll_at_the_limit_and_no_line_is_lost_or_doubled(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    numbers = [f"p{number}" for number in range(40)]
    press.ingest(manifest_id, *([created(number)] for number in numbers[:20]), [created(n) for n in numbers[20:]])
    press.publish(manifest_id, receipt_part_lines=7)
    assert [entry["id"] for entry in press.read(manifest_id, "output", "Patient")] == numbers
    assert [entry["line"] for entry in press.read(manifest_id, "ledger")] == list(range(1, 41))
    counts = [artifact.line_count for artifact in press.listed(manifest_id) if artifact.type == "ledger"]
    assert counts == [7, 7, 7, 7, 7, 5]


def test_every_file_is_told_of_however_many_there_are(press: Press) -> None:
    urls = [f"http://provider.test/{number}" for number in range(1001)]
    manifest_id = press.plan([PlannedFile("outcome", url) for url in urls])
    press.publish(manifest_id)
    [summary] = press.read(manifest_id, "summary")
    assert [file["file"] for file in summary["files"]] == urls
    assert len(press.read(manifest_id, "outcome")) == 1001


def test_only_the_generation_that_stands_is_reported(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a"), (Action.FAILED,)], issues=[Issue(2, 100, "structure", "not JSON")])
    press.stage.execute("UPDATE steps SET generation = 2 WHERE kind = 'ingest' AND manifest_id = :id", id=manifest_id)
    press.publish(manifest_id)
    assert [artifact.type for artifact in press.listed(manifest_id)] == ["outcome", "summary"]


def test_paths_hold_numbers_and_type_names_only(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a")])
    lease = press.stage.claim_of(manifest_id, "test/1")
    press.publish_under(lease)
    [(submission_id,)] = press.stage.rows("SELECT submission_id FROM manifests WHERE id = :id", id=manifest_id)
    place = f"{lease.tenant_id}/{submission_id}/{manifest_id}"
    assert {artifact.path for artifact in press.listed(manifest_id)} == {
        f"{place}/{name}-0.{lease.fencing_token}.ndjson.gz"
        for name in ("ledger", "outcome", "output-Patient", "summary")
    }


def test_no_transaction_is_open_while_receipts_are_written(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, *([created(f"p{number}")] for number in range(20)))
    seen = []
    press.alive = lambda: seen.append(press.connection.in_transaction())
    press.publish(manifest_id, receipt_part_lines=5)
    assert len(seen) > 20
    assert not any(seen)


def lost_at(press: Press, call: int, lease: leases.Lease, won: list[leases.Lease]) -> Callable[[], None]:
    """An `alive` at whose n-th call the lease has run out and another worker has the step. It notices nothing."""
    calls = iter(range(call))

    def alive() -> None:
        if next(calls, None) is None and not won:
            press.stage.expire(lease)
            won.append(press.stage.claim_of(lease.manifest_id, "test/2"))

    return alive


@pytest.mark.parametrize("call", [0, 3, 7, 10, 13], ids="lost at call {}".format)
def test_a_lost_lease_publishes_nothing_and_its_successor_lists_its_own_receipts_alone(press: Press, call: int) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, *([created(f"p{number}")] for number in range(6)))
    lease = press.stage.claim_of(manifest_id, "test/1")
    won: list[leases.Lease] = []
    press.alive = lost_at(press, call, lease, won)
    with pytest.raises(LeaseLost):
        press.publish_under(lease, receipt_part_lines=2)
    assert press.listed(manifest_id) == []
    assert press.status(manifest_id) == "processing"
    assert list(press.spool.iterdir()) == []

    [successor] = won
    assert press.publish_under(successor, receipt_part_lines=2) == "completed"
    listed = press.listed(manifest_id)
    assert all(artifact.path.endswith(f".{successor.fencing_token}.ndjson.gz") for artifact in listed)
    assert [entry["line"] for entry in press.read(manifest_id, "ledger")] == list(range(1, 7))
    assert [entry["id"] for entry in press.read(manifest_id, "output", "Patient")] == [f"p{n}" for n in range(6)]

    objects = {f"{path.parent.name}/{path.name}" for path in press.spool.parent.glob("store/*/*/*/*")}
    rows = {"/".join(path.split("/")[-2:]) for (path,) in press.stage.rows("SELECT path FROM artifacts")}
    assert objects <= rows


def test_a_stopped_manifest_is_not_published(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a")])
    lease = press.stage.claim_of(manifest_id, "test/1")
    press.stage.execute("UPDATE manifests SET status = 'stopped' WHERE id = :id", id=manifest_id)
    with pytest.raises(LeaseLost):
        press.publish_under(lease)
    assert press.status(manifest_id) == "stopped"
    assert press.listed(manifest_id) == []


def test_trouble_with_the_store_leaves_the_manifest_to_the_next_attempt(press: Press) -> None:
    manifest_id = press.plan([PlannedFile("output", PATIENTS)])
    press.ingest(manifest_id, [created("a")])
    lease = press.stage.claim_of(manifest_id, "test/1")
    [(submission_id,)] = press.stage.rows("SELECT submission_id FROM manifests WHERE id = :id", id=manifest_id)
    in_the_way = press.spool.parent / "in-the-way"
    in_the_way.write_bytes(b"x")
    path = f"{lease.tenant_id}/{submission_id}/{manifest_id}/ledger-0.{lease.fencing_token}.ndjson.gz"
    press.store.write(path, in_the_way, press.alive)
    with pytest.raises(ArtifactStoreError):
        press.publish_under(lease)
    assert press.listed(manifest_id) == []
    leases.release(press.connection, lease, delay=0, give_back=False, reason="store")
    assert press.publish(manifest_id) == "completed"
    assert len(press.read(manifest_id, "ledger")) == 1


def test_memory_does_not_grow_with_lines(press: Press) -> None:
    batch = [created(hashlib.sha256(b"%d" % number).hexdigest()) for number in range(500)]

    def peak(batches: int) -> int:
        manifest_id = press.plan([PlannedFile("output", PATIENTS)])
        press.ingest(manifest_id, *([batch] * batches))
        lease = press.stage.claim_of(manifest_id, "test/1")
        tracemalloc.start()
        try:
            press.publish_under(lease, receipt_part_lines=20_000)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(160) < 1.5 * peak(16)


def test_a_stale_lease_cannot_end_a_manifest(press: Press) -> None:
    manifest_id = press.plan([])
    lease = press.stage.claim_of(manifest_id, "test/1")
    with pytest.raises(LeaseLost):
        press.publish_under(replace(lease, fencing_token=lease.fencing_token - 1))
    assert press.status(manifest_id) == "processing"
