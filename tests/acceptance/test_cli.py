"""The `bulk-submit` command, as a submitter and an operator use it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import requests

from devstack.servers import free_port
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
    assert "1 line failed" in watched.stdout
    assert "line 41 of p.ndjson" in watched.stdout

    status = bulk_submit(scene, "status", "cli")
    assert status.returncode == 0
    assert "40" in status.stdout
    assert "1 line failed" in status.stdout

    ledger = bulk_submit(scene, "ledger", "cli")
    entries = [json.loads(line) for line in ledger.stdout.splitlines()]
    assert [entry["line"] for entry in entries] == list(range(1, 42))
    assert [entry["line"] for entry in entries if entry["action"] == "failed"] == [41]


@pytest.mark.parametrize("command", ["watch", "status"])
def test_a_manifest_that_failed_is_told_with_its_errors(scene: Scene, command: str) -> None:
    bad = [b"not json"] * 20
    url = scene.manifest(scene.serve("p.ndjson", [*patients(3), *bad]), "absent.ndjson")
    scene.run(url)

    told = bulk_submit(scene, command, "one")
    assert (told.returncode, told.stderr) == (1, "")
    assert f"failed: {url}" in told.stdout
    assert "20 lines failed" in told.stdout
    [missing] = [line for line in told.stdout.splitlines() if "absent.ndjson" in line]
    assert "404" in missing


def test_a_manifest_that_cannot_be_fetched_is_told_as_failed(scene: Scene) -> None:
    url = f"http://127.0.0.1:{free_port()}/manifest.json"
    scene.run(url)

    told = bulk_submit(scene, "status", "one")
    assert told.returncode == 1
    assert f"failed: {url}" in told.stdout


def test_what_comes_from_outside_is_printed_as_it_is(scene: Scene) -> None:
    url = f"{scene.manifest(scene.serve('p.ndjson', patients(1)))}?since=[/x]&of=[bold]{'a' * 300}"

    submitted = bulk_submit(scene, "submit", url, "--id", "[/x]", "--fhir-base-url", "http://ehr.test/fhir")
    assert (submitted.returncode, submitted.stdout) == (0, f"accepted {url}\n")
    watched = bulk_submit(scene, "watch", "[/x]")
    assert (watched.returncode, watched.stderr) == (0, "")
    unknown = bulk_submit(scene, "submit", "[/y]", "--id", "other", "--fhir-base-url", "http://ehr.test/fhir")
    assert unknown.returncode == 1
    assert "Traceback" not in unknown.stderr


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


@pytest.mark.parametrize("command", [("migrate",), ("submitter", "add")])
def test_a_database_that_is_not_there_is_told_in_a_line(scene: Scene, command: tuple[str, ...]) -> None:
    nowhere = f"postgresql://postgres@127.0.0.1:{free_port()}/none"
    refused = bulk_submit(scene, *command, BULK_SUBMIT_DATABASE_URL=nowhere)
    assert (refused.returncode, refused.stderr) == (1, "")
    [line] = refused.stdout.splitlines()
    assert "connection" in line


def test_up_takes_another_port_where_one_is_taken_and_says_how_to_reach_it() -> None:
    flower_port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "cli", "up", "--workers", "1"]
        command += ["--port", str(port), "--flower-port", str(flower_port)]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert up.stdout is not None
        with up, up.stdout:
            try:
                lines = []
                while "Interrupt" not in (line := up.stdout.readline()):
                    assert line
                    lines.append(line.strip())
                exports = dict(line.removeprefix("export ").split("=", 1) for line in lines if "export " in line)
                assert requests.get(f"http://127.0.0.1:{flower_port}/healthcheck", timeout=5).ok
                assert requests.get(f"{exports['BULK_SUBMIT_BASE']}/metadata", timeout=5).ok
                added = subprocess.run(
                    [sys.executable, "-m", "cli", "submitter", "add"], env={**os.environ, **exports}, check=False
                )
            finally:
                up.send_signal(signal.SIGINT)
    assert lines[0].startswith(f"Port {port} is taken: the API will listen on ")
    assert (up.returncode, added.returncode) == (0, 0)
