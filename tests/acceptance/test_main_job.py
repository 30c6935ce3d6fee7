"""From the kickoff to the receipts: what a provider may send, and what it gets back."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import requests
from bulk_submit_client import SubmitError

from devstack.generator import bad_lines, expected_store, generate
from devstack.provider import Fault
from devstack.servers import free_port
from devstack.verify import differences
from tests.support.scene import Scene, line_of, patients

NAMED = os.environ.get("BULK_SUBMIT_SAMPLE_DATA")
SYNTHEA = Path(NAMED or Path(__file__).parents[3] / "shared" / "data" / "synthea-100")
ORGANIZED_BY = "http://hl7.org/fhir/uv/bulkdata/StructureDefinition/output-organized-by"


def test_two_patients_one_without_id(scene: Scene) -> None:
    named = {"resourceType": "Patient", "id": "ada"}
    nameless = {"resourceType": "Patient", "gender": "female"}
    receipts = scene.run(scene.manifest(scene.serve("p.ndjson", [named, nameless])))

    assert receipts.outputs == ["Patient"]
    assert len(list(receipts.lines("output"))) == 2
    assert scene.client.read("Patient", "ada")["id"] == "ada"
    [reference] = [entry["reference"] for entry in receipts.lines("ledger") if entry["line"] == 2]
    assigned = reference.removeprefix("Patient/")
    stored = scene.client.read("Patient", assigned)
    assert (stored["id"], stored["gender"]) == (assigned, "female")
    assert scene.versions() == 2


def test_unreachable_manifest(scene: Scene) -> None:
    receipts = scene.run(f"http://127.0.0.1:{free_port()}/manifest.json")

    assert receipts.outputs == []
    [text] = receipts.texts
    assert "manifest" in text
    assert scene.rows("SELECT status FROM manifests WHERE tenant_id = %(tenant)s") == [("failed",)]
    after = scene.run(scene.manifest(scene.serve("p.ndjson", patients(3))), "two")
    assert after.actions() == {"created": 3}


def test_malformed_line_is_reported_with_its_place(scene: Scene) -> None:
    good = line_of({"resourceType": "Patient", "id": "good"})
    receipts = scene.run(scene.manifest(scene.serve("p.ndjson", [good, b'{"resourceType": "Patient", "id"'])))

    assert scene.differences([good]) == []
    [issue] = receipts.errors
    assert "line 2 of p.ndjson" in issue["details"]["text"]
    assert issue["diagnostics"].endswith(f"line 2, byte offset {len(good) + 1}")
    assert receipts.actions() == {"created": 1, "failed": 1}
    assert scene.rows("SELECT status FROM manifests WHERE tenant_id = %(tenant)s") == [("completed",)]


def test_manifest_that_lists_nothing(scene: Scene) -> None:
    receipts = scene.run(scene.manifest())

    assert (receipts.outputs, receipts.texts) == ([], [])
    assert scene.rows("SELECT status FROM manifests WHERE tenant_id = %(tenant)s") == [("completed",)]


def test_submission_without_manifest_ends_empty_with_a_warning(scene: Scene) -> None:
    ended = scene.client.submit("none", status="completed")
    assert [issue["severity"] for issue in ended["issue"]] == ["information", "warning"]
    receipts = scene.run(None)

    assert (receipts.outputs, receipts.errors) == ([], [])


def test_linked_manifest_pages(scene: Scene) -> None:
    for number in (1, 2, 3):
        scene.serve(f"p{number}.ndjson", patients(10, f"page{number}"))
    scene.manifest("p3.ndjson", name="page3.json")
    scene.manifest("p2.ndjson", name="page2.json", link=[{"relation": "next", "url": "page3.json"}])
    receipts = scene.run(scene.manifest("p1.ndjson", link=[{"relation": "next", "url": "page2.json"}]))

    assert receipts.actions() == {"created": 30}
    assert [file["lines"] for file in receipts.reconciliation["files"]] == [10, 10, 10]


def test_file_without_a_declared_type(scene: Scene) -> None:
    lines = [{"resourceType": "Patient", "id": "a"}, {"resourceType": "Encounter", "id": "b"}]
    receipts = scene.run(scene.manifest({"url": scene.serve("mixed.ndjson", lines)}))

    assert sorted(receipts.outputs) == ["Encounter", "Patient"]
    assert scene.differences(lines) == []


def test_header_lines_of_files_organized_by_patient(scene: Scene) -> None:
    header = {"resourceType": "Parameters", "parameter": [{"name": "header", "part": []}]}
    lines = [{"resourceType": "Patient", "id": "a"}, {"resourceType": "Encounter", "id": "b"}]
    name = scene.serve("organized.ndjson", [header, *lines])
    receipts = scene.run(scene.manifest({"url": name}, outputOrganizedBy="Patient"))

    assert receipts.errors == []
    assert scene.differences(lines) == []
    assert receipts.actions()["created"] == 2


def test_one_file_of_three_is_absent(scene: Scene) -> None:
    first, third = patients(20, "first"), patients(30, "third")
    scene.serve("first.ndjson", first)
    scene.serve("third.ndjson", third)
    receipts = scene.run(scene.manifest("first.ndjson", "absent.ndjson", "third.ndjson"))

    assert scene.differences([*first, *third]) == []
    [text] = receipts.texts
    assert "absent.ndjson" in text
    assert "404" in text
    assert scene.rows("SELECT status FROM manifests WHERE tenant_id = %(tenant)s") == [("failed",)]


def test_every_kind_of_bad_line(scene: Scene) -> None:
    directory = scene.provider.directory
    bad = bad_lines(directory, "bad.ndjson", good=200, seed=7)
    receipts = scene.run(scene.manifest("bad.ndjson"))

    assert receipts.actions() == {"created": 200, "failed": len(bad)}
    failed = {entry["line"] for entry in receipts.lines("ledger") if entry["action"] == "failed"}
    assert failed == set(bad)
    assert len(receipts.errors) == len(bad)


def test_second_submission_of_the_same_changes_nothing(scene: Scene) -> None:
    lines = patients(1500)
    url = scene.manifest(scene.serve("p.ndjson", lines))
    assert scene.run(url, "one").actions() == {"created": 1500}
    again = scene.run(url, "two")

    assert sum(again.actions().values()) == 1500
    assert not {"created", "updated", "failed"} & set(again.actions())
    assert scene.versions() == 1500
    assert scene.differences(lines) == []


def test_changed_resources_become_new_versions(scene: Scene) -> None:
    old = patients(10)
    scene.run(scene.manifest(scene.serve("p.ndjson", old)), "one")
    new = [{**old[0], "gender": "female"}, *old[1:]]
    again = scene.run(scene.manifest(scene.serve("q.ndjson", new), name="second.json"), "two")

    assert again.actions()["updated"] == 1
    history = requests.get(f"{scene.base_url}/Patient/p-0/_history", timeout=10).json()
    assert [entry["resource"].get("gender") for entry in history["entry"]] == ["female", None]
    first = requests.get(f"{scene.base_url}/Patient/p-0/_history/1", timeout=10).json()
    assert "gender" not in first
    assert scene.differences(new) == []


def test_request_headers_reach_manifest_and_files(scene: Scene) -> None:
    scene.provider.add(Fault("*", require_header=("Authorization", "Bearer of-good-news")))
    url = scene.manifest(scene.serve("p.ndjson", patients(5)))
    receipts = scene.run(url, headers=[("Authorization", "Bearer of-good-news")])

    assert receipts.actions() == {"created": 5}
    assert {request.status for request in scene.provider.requests} == {200}


def test_progress_is_shown_while_files_are_read(scene: Scene) -> None:
    for number in range(4):
        scene.serve(f"p{number}.ndjson", patients(2000, f"f{number}"))
    last = scene.stall("p3.ndjson")
    scene.submit(scene.manifest(*(f"p{number}.ndjson" for number in range(4))))
    handle = scene.client.status("one")

    def text() -> str:
        answer = handle.poll()
        return getattr(answer, "text", "")

    scene.wait_for(lambda: "(3 of 4 files)" in text(), "three of four files are done")
    last.release.set()
    assert scene.wait().actions() == {"created": 8000}


def test_files_sent_with_gzip(scene: Scene) -> None:
    samples = generate(scene.provider.directory, 3000, seed=5, lines_per_file=500, gzip_every=2)
    receipts = scene.run(f"{scene.provider.url}/manifest.json")

    assert receipts.actions() == {"created": 3000}
    expected = expected_store(scene.provider.directory, [file.name for file in samples.files])
    assert list(differences(scene.stack.settings.database_url, expected, tenant=scene.tenant)) == []


def test_stopped_submission_takes_nothing_more(scene: Scene) -> None:
    scene.client.submit("one", status="stopped")
    with pytest.raises(SubmitError, match="stopped"):
        scene.submit(scene.manifest(scene.serve("p.ndjson", patients(1))))


@pytest.mark.skipif(not (NAMED or SYNTHEA.exists()), reason="BULK_SUBMIT_SAMPLE_DATA names no Synthea sample")
def test_synthea_sample_twice(scene: Scene) -> None:
    directory = scene.provider.directory
    names = _unpack(SYNTHEA, directory)
    shutil.copy(SYNTHEA / "manifest.json", directory)
    url = f"{scene.provider.url}/manifest.json"
    first = scene.run(url, "one")
    listed = json.loads((SYNTHEA / "manifest.json").read_text())["output"]
    lines = sum(entry["count"] for entry in listed)

    assert lines > 0
    assert first.actions() == {"created": lines}
    assert _store_differs(scene, names) == []
    versions = scene.versions()
    again = scene.run(url, "two")
    assert not {"created", "updated", "failed"} & set(again.actions())
    assert sum(again.actions().values()) == lines
    assert _store_differs(scene, names) == []
    assert versions == scene.versions() == lines


def _unpack(packed: Path, directory: Path) -> list[str]:
    names = []
    for path in sorted(packed.glob("*.ndjson.gz")):
        (directory / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        names.append(path.stem)
    return names


def _store_differs(scene: Scene, names: list[str]) -> list[str]:
    expected = expected_store(scene.provider.directory, names)
    return list(differences(scene.stack.settings.database_url, expected, tenant=scene.tenant))
