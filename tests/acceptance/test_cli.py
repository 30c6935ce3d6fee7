"""The `bulk-submit` command, as a submitter and an operator use it."""

from __future__ import annotations

import json

from devstack.stack import Stack
from tests.support.scene import Scene, bulk_submit, patients


def test_submit_watch_status_ledger(scene: Scene) -> None:
    url = scene.manifest(scene.serve("p.ndjson", [*patients(40), b"not json"]))

    submitted = bulk_submit(scene, "submit", url, "--id", "cli", "--fhir-base-url", "http://ehr.test/fhir")
    assert (submitted.returncode, submitted.stderr) == (0, "")
    assert "accepted" in submitted.stdout

    watched = bulk_submit(scene, "watch", "cli")
    assert watched.returncode == 0
    assert "Patient" in watched.stdout

    status = bulk_submit(scene, "status", "cli")
    assert status.returncode == 0
    assert "40" in status.stdout

    ledger = bulk_submit(scene, "ledger", "cli")
    entries = [json.loads(line) for line in ledger.stdout.splitlines()]
    assert [entry["line"] for entry in entries] == list(range(1, 42))
    assert [entry["line"] for entry in entries if entry["action"] == "failed"] == [41]


def test_refusals_are_told_in_words(scene: Scene) -> None:
    refused = bulk_submit(
        scene, "submit", "ftp://provider.test/m.json", "--id", "cli", "--fhir-base-url", "http://e.test"
    )
    assert refused.returncode != 0
    assert "manifestUrl" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr

    unknown = bulk_submit(scene, "status", "never-heard-of")
    assert unknown.returncode != 0
    assert "Traceback" not in unknown.stderr


def test_unreachable_consumer_is_told_in_words(scene: Scene) -> None:
    status = bulk_submit(scene, "status", "cli", "--base", "http://127.0.0.1:9/default/fhir")
    assert status.returncode != 0
    assert "Traceback" not in status.stderr


def test_submitters_are_let_in_by_command(scene: Scene) -> None:
    added = bulk_submit(scene, "submitter", "add", "--system", "urn:new", "--value", "one", "--tenant", scene.tenant)
    assert (added.returncode, added.stderr) == (0, "")
    submitted = bulk_submit(
        scene,
        *("submit", scene.manifest(scene.serve("p.ndjson", patients(1))), "--id", "new"),
        *("--fhir-base-url", "http://ehr.test/fhir", "--system", "urn:new", "--value", "one"),
    )
    assert submitted.returncode == 0


def test_migrate_may_be_repeated(scene: Scene, stack: Stack) -> None:
    assert bulk_submit(scene, "migrate").returncode == 0
    assert scene.run(scene.manifest(scene.serve("p.ndjson", patients(1)))).actions() == {"created": 1}


def test_a_setting_that_does_not_fit_is_named(scene: Scene) -> None:
    refused = bulk_submit(scene, "status", "one", BULK_SUBMIT_LEASE_SECONDS="soon")
    assert refused.returncode == 2
    assert "BULK_SUBMIT_LEASE_SECONDS" in refused.stderr
    assert "Traceback" not in refused.stderr
