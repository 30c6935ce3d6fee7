"""Files from a provider that fails, through a real hand, into a real Postgres: every line once, every end told."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from devstack.provider import Fault, Request, SampleProvider
from devstack.servers import free_port
from devstack.stack import wait_until
from schema import resources
from settings import Settings
from tests.support.stage import Stage, patient
from workers.hands import Hand
from workers.seals import Secrets, seal

LINES = [patient(f"p{number}", name="N" * (number % 7)) for number in range(1000)]
DATA = b"\n".join(LINES) + b"\n"
BATCH = 100
HALF = len(DATA) // 2
WHOLE_BATCHES = DATA.count(b"\n", 0, HALF) // BATCH * BATCH
"""Lines of the batches that half of the file holds whole."""


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[SampleProvider]:
    directory = tmp_path / "served"
    directory.mkdir()
    with SampleProvider(directory) as provider:
        yield provider


@pytest.fixture
def stage(database_url: str, tmp_path: Path) -> Iterator[Stage]:
    settings = Settings(
        database_url=database_url,
        artifact_store_url=f"file://{tmp_path}/store",
        sealing_keys=SecretStr(Fernet.generate_key().decode()),
        batch_lines=BATCH,
        max_attempts=2,
        retry_delay_seconds=0.05,
        fetch_retries=1,
        fetch_backoff_seconds=0.01,
        connect_timeout_seconds=2,
        read_timeout_seconds=0.5,
    )
    with Stage(settings) as stage:
        yield stage


def serve(provider: SampleProvider, name: str = "1.ndjson", data: bytes = DATA) -> None:
    """Put the file in its place at once: who reads an older one goes on with that."""
    path = provider.directory / name
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def add_manifest(
    stage: Stage, provider: SampleProvider, output: Sequence[str | dict[str, Any]] = ("1.ndjson",), **more: Any
) -> int:
    items = [{"type": "Patient", "url": item} if isinstance(item, str) else item for item in output]
    serve(provider, "manifest.json", json.dumps({"output": items, **more}).encode())
    return stage.add_manifest(f"{provider.url}/manifest.json")


def status(stage: Stage, manifest_id: int) -> str:
    [(found,)] = stage.rows("SELECT status FROM manifests WHERE id = :id", id=manifest_id)
    return str(found)


def run(stage: Stage, manifest_id: int) -> str:
    """Let one hand work until the manifest has ended; how it ended."""
    hand = Hand(stage.settings, "test@here/1", lambda _: None)

    def ended() -> bool:
        hand.work(manifest_id)
        return status(stage, manifest_id) in ("completed", "failed")

    wait_until(ended, "the manifest ends", seconds=30)
    return status(stage, manifest_id)


def cursors(stage: Stage, manifest_id: int) -> list[tuple[str, int, int]]:
    """State, bytes and lines of each file, in the manifest's order."""
    query = """SELECT s.state, s.cursor_bytes, s.cursor_lines FROM steps s JOIN manifest_files f ON f.id = s.file_id
               WHERE s.manifest_id = :id ORDER BY f.position"""
    return [(state, size, lines) for state, size, lines in stage.rows(query, id=manifest_id)]


def file_problems(stage: Stage, manifest_id: int) -> list[list[tuple[str, str, str]]]:
    query = "SELECT problems FROM manifest_files WHERE manifest_id = :id ORDER BY position"
    return [[told(problem) for problem in problems] for (problems,) in stage.rows(query, id=manifest_id)]


def manifest_problems(stage: Stage, manifest_id: int) -> list[tuple[str, str, str]]:
    [(problems,)] = stage.rows("SELECT problems FROM manifests WHERE id = :id", id=manifest_id)
    return [told(problem) for problem in problems]


def told(problem: dict[str, str]) -> tuple[str, str, str]:
    return problem["severity"], problem["code"], problem["diagnostics"]


def issues(stage: Stage) -> list[tuple[int, int, str]]:
    return [
        (line, offset, code)
        for line, offset, code in stage.rows("SELECT line, byte_offset, code FROM entry_issues ORDER BY line")
    ]


def assert_every_line_once(stage: Stage, manifest_id: int, lines: Sequence[bytes] = LINES) -> None:
    """The store holds these Patients, one version each, and the batches cover the file without gap or overlap."""
    assert stage.rows("SELECT count(*), max(version) FROM resource_versions") == [(len(lines), 1)]
    for line in (lines[0], lines[len(lines) // 2], lines[-1]):
        with stage.connection.begin():
            stored = resources.read(stage.connection, stage.tenant_id, "Patient", json.loads(line)["id"])
        assert stored is not None
        assert stored.body == line.decode()
    totals = (
        "SELECT created, updated + unchanged + affirmed + failed FROM steps WHERE manifest_id = :id AND file_id > 0"
    )
    assert stage.rows(totals, id=manifest_id) == [(len(lines), 0)]
    query = """SELECT first_byte, end_byte, first_line, line_count FROM ingest_batches
               WHERE manifest_id = :id ORDER BY first_byte"""
    at_byte, at_line = 0, 1
    for first_byte, end_byte, first_line, line_count in stage.rows(query, id=manifest_id):
        assert (first_byte, first_line) == (at_byte, at_line)
        at_byte, at_line = end_byte, first_line + line_count
    assert at_line == len(lines) + 1


def asked(provider: SampleProvider, name: str = "1.ndjson") -> list[Request]:
    return [request for request in provider.requests if request.path == f"/{name}"]


def committed_by_the_first(stage: Stage) -> int:
    """The byte up to which the first lease of the file committed."""
    [(end,)] = stage.rows("SELECT max(end_byte) FROM ingest_batches WHERE fencing_token = 1")
    return int(end)


def run_with_change(stage: Stage, provider: SampleProvider, manifest_id: int, change: Callable[[], object]) -> None:
    """Run the manifest to its end; its file stands still half-way, and then the change happens."""
    fault = provider.add(Fault("1.ndjson", stall_after=HALF, times=1))

    def wait_and_change() -> None:
        wait_until(lambda: asked(provider), "the file is asked for", seconds=20)
        change()

    changer = threading.Thread(target=wait_and_change)
    changer.start()
    run(stage, manifest_id)
    changer.join(20)
    assert fault.applied == 1


def test_a_file_is_ingested_and_its_manifest_completed(stage: Stage, provider: SampleProvider) -> None:
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert cursors(stage, manifest_id) == [("done", len(DATA), 1000)]
    assert_every_line_once(stage, manifest_id)
    assert len(asked(provider)) == 1


def test_after_a_cut_the_file_goes_on_from_the_cursor_and_nothing_before_it_is_read(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider)
    provider.add(Fault("1.ndjson", cut_after=HALF, times=1))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    cursor = committed_by_the_first(stage)
    assert cursor == sum(len(line) + 1 for line in LINES[:WHOLE_BATCHES])
    first, second = asked(provider)
    assert "Range" not in first.headers
    assert (second.headers["Range"], second.status) == (f"bytes={cursor}-", 206)
    assert second.headers["If-Range"].startswith('"')


@pytest.mark.parametrize(
    "fault",
    [Fault("1.ndjson", truncate_to=HALF, times=1), Fault("1.ndjson", stall_after=HALF, times=1)],
    ids=["ends short", "stands still"],
)
def test_a_body_that_breaks_off_in_another_way_goes_on_as_well(
    stage: Stage, provider: SampleProvider, fault: Fault
) -> None:
    serve(provider)
    provider.add(fault)
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    assert [request.status for request in asked(provider)] == [200, 206]


def test_a_provider_that_breaks_off_again_and_again_is_outlasted_as_long_as_lines_come(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider)
    provider.add(Fault("1.ndjson", cut_after=len(DATA) // 8, times=6))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    assert len(asked(provider)) == 7


def test_a_provider_that_never_gets_further_fails_the_file_and_what_was_read_stands(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    run_with_change(stage, provider, manifest_id, lambda: provider.add(Fault("1.ndjson", cut_after=10)))
    assert status(stage, manifest_id) == "failed"
    reason = f"{provider.url}/1.ndjson: the connection broke after 10 bytes"
    assert file_problems(stage, manifest_id) == [[("error", "incomplete", reason)]]
    [(state, _, lines)] = cursors(stage, manifest_id)
    assert (state, lines) == ("failed", WHOLE_BATCHES)
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(WHOLE_BATCHES,)]


@pytest.mark.parametrize("last_is_open", [False, True])
def test_a_server_without_ranges_is_read_again_and_what_is_committed_passed_over(
    stage: Stage, provider: SampleProvider, last_is_open: bool
) -> None:
    serve(provider, data=DATA[:-1] if last_is_open else DATA)
    provider.add(Fault("1.ndjson", no_range=True))
    provider.add(Fault("1.ndjson", cut_after=HALF, times=2))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    assert [request.status for request in asked(provider)] == [200, 200, 200]


def test_a_gzip_body_is_read_again_and_what_is_committed_passed_over(stage: Stage, provider: SampleProvider) -> None:
    packed = gzip.compress(DATA, 1)
    serve(provider)
    serve(provider, "1.ndjson.gz", packed)
    provider.add(Fault("1.ndjson", cut_after=len(packed) // 2, times=1))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    assert committed_by_the_first(stage) > 0
    assert all("Range" not in request.headers for request in asked(provider))


def test_a_gzip_file_is_never_asked_for_by_a_range_of_its_lines(stage: Stage, provider: SampleProvider) -> None:
    packed = gzip.compress(DATA, 1)
    serve(provider, "1.gz", packed)
    provider.add(Fault("1.gz", cut_after=len(packed) // 2, times=1))
    manifest_id = add_manifest(stage, provider, ["1.gz"])
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    assert all("Range" not in request.headers for request in asked(provider, "1.gz"))


def test_a_validator_that_changes_without_the_content_costs_a_second_reading_and_no_more(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider)
    provider.add(Fault("1.ndjson", change_etag=True))
    provider.add(Fault("1.ndjson", cut_after=HALF, times=1))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)
    _, second = asked(provider)
    assert (second.headers["Range"], second.status) == (f"bytes={committed_by_the_first(stage)}-", 200)


def test_a_file_that_changed_where_it_was_read_fails_and_what_was_read_stands(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    run_with_change(stage, provider, manifest_id, lambda: serve(provider, data=DATA.replace(b'p10"', b'q10"')))
    assert status(stage, manifest_id) == "failed"
    assert file_problems(stage, manifest_id) == [
        [("error", "conflict", "the file changed while it was being read; what was read of it stands")]
    ]
    [(state, _, lines)] = cursors(stage, manifest_id)
    assert state == "failed"
    assert stage.rows("SELECT count(*) FROM resource_versions") == [(lines,)]
    assert lines == WHOLE_BATCHES


def test_a_file_that_became_shorter_than_what_was_read_fails(stage: Stage, provider: SampleProvider) -> None:
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    run_with_change(stage, provider, manifest_id, lambda: serve(provider, data=b"\n".join(LINES[:50])))
    assert status(stage, manifest_id) == "failed"
    [[(_, code, _)]] = file_problems(stage, manifest_id)
    assert code == "conflict"


def test_a_file_that_only_grew_is_read_to_its_new_end(stage: Stage, provider: SampleProvider) -> None:
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    more = [*LINES, patient("late")]
    run_with_change(stage, provider, manifest_id, lambda: serve(provider, data=b"\n".join(more) + b"\n"))
    assert status(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id, more)


def test_of_three_files_one_that_is_missing_fails_the_manifest_and_two_are_stored(
    stage: Stage, provider: SampleProvider
) -> None:
    serve(provider, "1.ndjson", patient("a") + b"\n")
    serve(provider, "3.ndjson", patient("c") + b"\n")
    manifest_id = add_manifest(stage, provider, ["1.ndjson", "2.ndjson?sig=s3cr3t", "3.ndjson"])
    assert run(stage, manifest_id) == "failed"
    assert [state for state, _, _ in cursors(stage, manifest_id)] == ["done", "failed", "done"]
    missing = ("error", "not-found", f"{provider.url}/2.ndjson answered 404")
    assert file_problems(stage, manifest_id) == [[], [missing], []]
    assert manifest_problems(stage, manifest_id) == []
    assert len(asked(provider, "2.ndjson?sig=s3cr3t")) == 1
    query = "SELECT resource_id FROM resource_versions ORDER BY 1"
    assert stage.rows(query) == [("a",), ("c",)]


def test_a_manifest_out_of_reach_fails_with_one_problem(stage: Stage) -> None:
    url = f"http://127.0.0.1:{free_port()}/manifest.json"
    manifest_id = stage.add_manifest(f"{url}?sig=s3cr3t")
    assert run(stage, manifest_id) == "failed"
    assert manifest_problems(stage, manifest_id) == [("error", "transient", f"{url} could not be reached")]
    assert cursors(stage, manifest_id) == []


def test_a_manifest_that_is_none_fails_at_once_with_one_problem(stage: Stage, provider: SampleProvider) -> None:
    serve(provider, "manifest.json", b'{"output":[{"url":"http://[broken"}]}')
    manifest_id = stage.add_manifest(f"{provider.url}/manifest.json")
    assert run(stage, manifest_id) == "failed"
    reason = f"{provider.url}/manifest.json: output[0].url cannot be parsed"
    assert manifest_problems(stage, manifest_id) == [("error", "structure", reason)]
    assert len(provider.requests) == 1


@pytest.mark.parametrize("document", [{}, {"output": []}])
def test_a_manifest_that_lists_nothing_is_completed(
    stage: Stage, provider: SampleProvider, document: dict[str, Any]
) -> None:
    serve(provider, "manifest.json", json.dumps(document).encode())
    manifest_id = stage.add_manifest(f"{provider.url}/manifest.json")
    assert run(stage, manifest_id) == "completed"
    assert manifest_problems(stage, manifest_id) == []


def test_an_empty_file_is_done(stage: Stage, provider: SampleProvider) -> None:
    serve(provider, data=b"")
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    assert cursors(stage, manifest_id) == [("done", 0, 0)]


def test_bad_lines_are_told_by_line_and_offset_and_the_rest_is_stored(stage: Stage, provider: SampleProvider) -> None:
    lines = [patient("a"), b"{", b"", patient("b") + b"\r", b'{"resourceType":"Group","id":"g"}', patient("c")]
    serve(provider, data=b"\n".join(lines))
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "completed"
    offsets = [sum(len(line) + 1 for line in lines[:count]) for count in range(len(lines))]
    assert issues(stage) == [(2, offsets[1], "structure"), (5, offsets[4], "invalid")]
    query = "SELECT created, failed, skipped FROM steps WHERE manifest_id = :id AND file_id > 0"
    assert stage.rows(query, id=manifest_id) == [(3, 2, 1)]


def test_linked_pages_and_files_of_any_type_are_ingested(stage: Stage, provider: SampleProvider) -> None:
    serve(provider, "1.ndjson", patient("a") + b"\n" + b'{"resourceType":"Group","id":"g"}\n')
    serve(provider, "2.ndjson", b'{"resourceType":"Parameters"}\n' + patient("b") + b"\n")
    second = {"outputOrganizedBy": "Patient", "output": [{"url": "2.ndjson"}]}
    serve(provider, "page2.json", json.dumps(second).encode())
    manifest_id = add_manifest(stage, provider, [{"url": "1.ndjson"}], link=[{"relation": "next", "url": "page2.json"}])
    assert run(stage, manifest_id) == "completed"
    assert stage.rows("SELECT resource_id FROM resource_versions ORDER BY 1") == [("a",), ("b",), ("g",)]
    assert issues(stage) == []


def test_headers_that_were_sealed_go_with_the_manifest_and_its_files(stage: Stage, provider: SampleProvider) -> None:
    provider.add(Fault(require_header=("X-Key", "s3cr3t")))
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    stage.execute(
        "UPDATE fetch_parameters SET sealed_secrets = :sealed WHERE manifest_id = :id",
        id=manifest_id,
        sealed=seal(stage.settings, Secrets([("X-Key", "s3cr3t")])),
    )
    assert run(stage, manifest_id) == "completed"
    assert_every_line_once(stage, manifest_id)


def test_a_file_that_asks_for_a_login_fails_with_what_is_missing(stage: Stage, provider: SampleProvider) -> None:
    provider.add(Fault("1.ndjson", require_header=("Authorization", "Bearer abc")))
    serve(provider)
    manifest_id = add_manifest(stage, provider)
    assert run(stage, manifest_id) == "failed"
    assert file_problems(stage, manifest_id) == [[("error", "login", f"{provider.url}/1.ndjson answered 401")]]
    assert len(asked(provider)) == 1
