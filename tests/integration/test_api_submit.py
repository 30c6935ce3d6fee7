"""POST $bulk-submit over real HTTP: what is accepted, what is refused and how, and what the database then holds."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from kombu.utils.json import loads as load_message
from redis import Redis

from devstack.servers import EmbeddedPostgres, EmbeddedRedis
from devstack.stack import wait_until
from schema.tables import metadata
from tests.support.api import (
    FHIR_JSON,
    SUBMITTER,
    Api,
    header,
    issues,
    manifest,
    parameters,
    status,
    submission,
    submitter,
)
from tests.unit.test_parameters import KEY, mutated, values
from workers.seals import unseal

URL = "http://files.test/manifest.json"
REQUIRED = [submitter(), status("completed")]


@pytest.fixture(scope="module")
def api(
    postgres: EmbeddedPostgres,
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    database_url = postgres.create_database("api_submit", template=migrated_template)
    with Api(database_url, tmp_path_factory.mktemp("api"), broker_url=redis_server.url) as api:
        yield api


@pytest.fixture(scope="module")
def bare(postgres: EmbeddedPostgres, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API without a broker and without a sealing key."""
    database_url = postgres.create_database("api_bare", template=migrated_template)
    with Api(database_url, tmp_path_factory.mktemp("bare"), sealing_keys="") as api:
        yield api


@pytest.fixture
def name() -> str:
    """A submission id not used before."""
    return f"s-{uuid.uuid4().hex[:12]}"


def texts(found: list[dict[str, Any]]) -> str:
    return "; ".join(issue["details"]["text"] for issue in found)


def all_text(api: Api) -> str:
    """Every row of every table, as text and, where a column is binary, as what its bytes say."""
    rows = [row for table in metadata.tables for (row,) in api.rows(f"SELECT t::text FROM {table} t")]
    return "\n".join(rows) + "".join(
        bytes(value).decode("latin-1")
        for table in metadata.tables.values()
        for column in table.columns
        if str(column.type) == "BYTEA"
        for (value,) in api.rows(f"SELECT {column.name} FROM {table.name} WHERE {column.name} IS NOT NULL")
    )


def test_a_manifest_is_accepted_with_all_it_says(api: Api, name: str) -> None:
    metadata_part = [
        {"name": "parameterUrl", "valueUri": "urn:mode"},
        {"name": "parameterValue", "valueString": "replace"},
    ]
    body = manifest(
        name,
        f"{URL}?sig=1",
        status("in-progress"),
        {"name": "outputFormat", "valueString": "application/fhir+ndjson;fhirVersion=4.0"},
        {"name": "oauthMetadataUrl", "valueUrl": "http://ehr.test/.well-known/smart-configuration"},
        {"name": "metadata", "part": metadata_part},
        {"name": "import", "part": metadata_part},
        header("X-Batch", "77"),
    )
    [issue] = issues(api.submit(body), 200)
    assert (issue["severity"], issue["code"]) == ("information", "informational")
    [(manifest_id, state)] = api.manifests(name)
    assert state == "pending"
    assert api.rows("SELECT manifest_url FROM manifests WHERE id = :id", id=manifest_id) == [(f"{URL}?sig=1",)]
    [row] = api.rows(
        """SELECT fhir_base_url, output_format, oauth_metadata_urls, metadata, import_directives, sealed_secrets
           FROM fetch_parameters WHERE manifest_id = :id""",
        id=manifest_id,
    )
    directives = [{"parameterUrl": "urn:mode", "parameterValue": "replace"}]
    assert row[:5] == (
        "http://ehr.test/fhir",
        "application/fhir+ndjson;fhirVersion=4.0",
        ["http://ehr.test/.well-known/smart-configuration"],
        directives,
        directives,
    )
    assert unseal(api.settings, row[5]).headers == [("X-Batch", "77")]
    steps = api.rows("SELECT kind, state FROM steps WHERE manifest_id = :id ORDER BY kind", id=manifest_id)
    assert steps == [("plan", "ready"), ("publish", "waiting")]
    query = "SELECT status, fhir_version, request_url FROM submissions WHERE submission_id = :name"
    assert api.rows(query, name=name) == [("in-progress", "4.0", f"{api.base_url}/$bulk-submit")]


def test_a_worker_is_called_for_the_manifest(api: Api, name: str, broker_url: str) -> None:
    issues(api.submit(manifest(name, URL)), 200)
    [(manifest_id, _)] = api.manifests(name)
    with Redis.from_url(broker_url) as redis:
        [message] = redis.lrange("manifests", 0, -1)
    headers = load_message(message)["headers"]
    assert (headers["task"], headers["argsrepr"]) == ("submit_tasks.process_manifest", f"[{manifest_id}]")


def test_a_request_that_changes_nothing_calls_nobody(api: Api, name: str, broker_url: str) -> None:
    issues(api.submit(parameters(*REQUIRED, submission(name))), 200)
    issues(api.submit(manifest(name, URL)), 409)
    with Redis.from_url(broker_url) as redis:
        assert redis.llen("manifests") == 0


def test_without_a_broker_a_manifest_is_accepted_all_the_same(bare: Api, name: str) -> None:
    for _ in range(2):
        issues(bare.submit(manifest(name, URL)), 200)
    assert [state for _, state in bare.manifests(name)] == ["pending"]
    wait_until(lambda: "broker not reachable" in bare.log.read_text(), "the missing broker is noticed", seconds=5)


@pytest.mark.parametrize("code", ["in-progress", "completed"])
def test_the_same_request_again_has_the_same_meaning_and_leaves_one_manifest(api: Api, name: str, code: str) -> None:
    body = manifest(name, URL, status(code), header("X-Batch", "77"), KEY)
    for _ in range(3):
        found = issues(api.submit(body), 200)
        assert {issue["severity"] for issue in found} == {"information"}
    assert len(api.manifests(name)) == 1


def test_the_same_request_many_times_at_once_leaves_one_manifest(api: Api, name: str) -> None:
    body = manifest(name, URL, status("completed"))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.submit(body).status_code, range(16)))
    assert answers == [200] * 16
    assert len(api.manifests(name)) == 1


@pytest.mark.parametrize(
    "other",
    [
        header("X-Batch", "78"),
        {"name": "outputFormat", "valueString": "ndjson"},
        {"name": "oauthMetadataUrl", "valueUrl": "http://ehr.test/meta"},
        KEY,
    ],
    ids=lambda parameter: str(parameter["name"]),
)
def test_the_same_manifest_with_other_parameters_is_refused(api: Api, name: str, other: dict[str, Any]) -> None:
    issues(api.submit(manifest(name, URL)), 200)
    [issue] = issues(api.submit(manifest(name, URL, other)), 409)
    assert (issue["severity"], issue["code"]) == ("error", "duplicate")
    assert len(api.manifests(name)) == 1


def test_a_submission_takes_several_manifests_and_the_last_may_complete_it(api: Api, name: str) -> None:
    issues(api.submit(manifest(name, f"{URL}?1")), 200)
    issues(api.submit(manifest(name, f"{URL}?2", status("completed"))), 200)
    assert len(api.manifests(name)) == 2
    assert api.rows("SELECT status FROM submissions WHERE submission_id = :name", name=name) == [("completed",)]


@pytest.mark.parametrize("end", ["completed", "stopped"])
def test_an_ended_submission_takes_nothing_more_but_the_same_end_again(api: Api, name: str, end: str) -> None:
    issues(api.submit(manifest(name, URL)), 200)
    last = parameters(submitter(), submission(name), status(end))
    for _ in range(2):
        issues(api.submit(last), 200)
    other = {"completed": "stopped", "stopped": "completed"}[end]
    for body in (
        manifest(name, f"{URL}?2"),
        manifest(name, f"{URL}?2", status(end if end == "completed" else "in-progress")),
        parameters(submitter(), submission(name), status(other)),
        parameters(submitter(), submission(name), status("in-progress")),
    ):
        [issue] = issues(api.submit(body), 409)
        assert end in issue["details"]["text"]
    assert len(api.manifests(name)) == 1
    assert api.rows("SELECT status FROM submissions WHERE submission_id = :name", name=name) == [(end,)]


def test_a_manifest_sent_again_after_the_completion_is_answered_as_the_first(api: Api, name: str) -> None:
    body = manifest(name, URL)
    issues(api.submit(body), 200)
    issues(api.submit(parameters(submitter(), submission(name), status("completed"))), 200)
    [issue] = issues(api.submit(body), 200)
    assert "already" in issue["details"]["text"]
    assert len(api.manifests(name)) == 1


def test_an_end_without_any_manifest_is_taken_with_a_warning(api: Api, name: str) -> None:
    found = issues(api.submit(parameters(submitter(), submission(name), status("completed"))), 200)
    assert [issue["severity"] for issue in found] == ["information", "warning"]


def test_a_compressed_body_is_refused(api: Api, name: str) -> None:
    response = requests.post(
        f"{api.base_url}/$bulk-submit",
        data=b"\x1f\x8b",
        headers={"Content-Type": "application/fhir+json", "Content-Encoding": "gzip"},
        timeout=10,
    )
    [issue] = issues(response, 415)
    assert "Content-Encoding" in issue["details"]["text"]


def test_stopping_ends_the_session_of_a_worker_frozen_before_its_commit(api: Api, name: str) -> None:
    issues(api.submit(manifest(name, URL)), 200)
    with psycopg.connect(api.settings.database_url) as frozen:
        [[step]] = frozen.execute(
            "SELECT s.id FROM steps s JOIN manifests m ON m.id = s.manifest_id"
            " JOIN submissions u ON u.id = m.submission_id AND u.submission_id = %s WHERE s.kind = 'plan'",
            [name],
        ).fetchall()
        frozen.execute("SELECT pg_advisory_xact_lock(%s::bigint)", [step])
        frozen.execute("SELECT 1 FROM manifests FOR SHARE")
        issues(api.submit(parameters(submitter(), submission(name), status("stopped"))), 200)
        with pytest.raises(psycopg.OperationalError):
            frozen.execute("SELECT 1")
    assert [state for _, state in api.manifests(name)] == ["stopped"]


def test_a_database_that_is_away_is_told_as_a_moment_s_trouble(
    postgres: EmbeddedPostgres, migrated_template: str, tmp_path: Path
) -> None:
    database_url = postgres.create_database("api_away", template=migrated_template)
    with Api(database_url, tmp_path) as api, psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("ALTER DATABASE api_away ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'api_away'")
        for answer in (
            api.submit(manifest("away", URL)),
            api.post("$bulk-submit-status", parameters(submitter(), submission("away"))),
            api.get("Patient/1"),
        ):
            [issue] = issues(answer, 503)
            assert (issue["code"], answer.headers["Retry-After"]) == ("transient", "5")
        assert "Traceback" not in api.log.read_text()
        connection.execute("ALTER DATABASE api_away ALLOW_CONNECTIONS true")
        issues(api.submit(manifest("away", URL)), 200)


def test_stopping_forgets_the_secrets(api: Api, name: str) -> None:
    issues(api.submit(manifest(name, URL, header("Authorization", "Bearer of-news"))), 200)
    sealed = "SELECT count(sealed_secrets) FROM fetch_parameters p JOIN manifests m ON m.id = p.manifest_id"
    sealed += " JOIN submissions u ON u.id = m.submission_id WHERE u.submission_id = :name"
    assert api.rows(sealed, name=name) == [(1,)]
    issues(api.submit(parameters(submitter(), submission(name), status("stopped"))), 200)
    assert api.rows(sealed, name=name) == [(0,)]


def test_stopping_ends_the_manifests(api: Api, name: str) -> None:
    issues(api.submit(manifest(name, URL)), 200)
    issues(api.submit(parameters(submitter(), submission(name), status("stopped"))), 200)
    assert [state for _, state in api.manifests(name)] == ["stopped"]


def test_another_fhir_version_in_the_same_submission_is_refused(api: Api, name: str) -> None:
    def of_version(url: str, version: str) -> dict[str, Any]:
        value = f"application/fhir+ndjson;fhirVersion={version}"
        return manifest(name, url, {"name": "outputFormat", "valueString": value})

    issues(api.submit(of_version(URL, "4.0")), 200)
    issues(api.submit(of_version(f"{URL}?2", "5.0")), 422)
    assert len(api.manifests(name)) == 1


def test_submissions_are_each_submitters_own(api: Api, name: str) -> None:
    api.add_submitter("south")
    for value in (SUBMITTER, "south"):
        body = manifest(name, URL)
        body["parameter"][0] = submitter(value)
        issues(api.submit(body), 200)
    assert len(api.manifests(name)) == 2


def test_an_unknown_submitter_is_refused(api: Api, name: str) -> None:
    body = manifest(name, URL)
    body["parameter"][0] = submitter("stranger")
    [issue] = issues(api.submit(body), 403)
    assert issue["code"] == "forbidden"
    assert api.manifests(name) == []


@pytest.mark.parametrize("tenant", ["nowhere", "%00", "default%00", "%ff", "%ed%a0%80", "%F0%9F%98%80", "a" * 5000])
@pytest.mark.parametrize("operation", ["$bulk-submit", "$bulk-submit-status"])
def test_an_unknown_tenant_is_not_found(api: Api, name: str, tenant: str, operation: str) -> None:
    body = parameters(submitter(), submission(name), *([status("completed")] if operation == "$bulk-submit" else []))
    target = f"/{tenant}/fhir/{operation}"
    [issue] = issues(api.raw("POST", target, json.dumps(body).encode(), Content_Type=FHIR_JSON), 404)
    assert issue["code"] == "not-found"


BODIES = {
    "empty": (b"", 400),
    "blank": (b" \n", 400),
    "cut": (json.dumps(manifest("s", URL)).encode()[:-1], 400),
    "two values": (b"{}{}", 400),
    "no JSON": (b"resourceType=Parameters", 400),
    "XML": (b"<Parameters/>", 400),
    "NaN": (b"NaN", 400),
    "not UTF-8": (b'{"resourceType":"Parameters\xff"}', 400),
    "UTF-16": ('{"resourceType":"Parameters"}'.encode("utf-16"), 400),
    "half a surrogate pair": (rb'{"resourceType":"\ud800"}', 400),
    "array": (b"[]", 400),
    "text": (b'"Parameters"', 400),
    "number": (b"12", 400),
    "number without end": (b"9" * 5000, 400),
    "number too large": (b"1e999", 400),
    "null": (b"null", 400),
    "deep": (b"[" * 100_000, 400),
    "deep and whole": (b"[" * 100_000 + b"]" * 100_000, 400),
    "another resource": (b'{"resourceType":"Bundle"}', 400),
    "many faults": (b'{"resourceType":"Parameters","parameter":[' + b"0," * 400_000 + b"0]}", 400),
    "one byte too long": (b" " * (4 * 1024 * 1024 + 1), 413),
    "far too long": (b" " * (9 * 1024 * 1024), 413),
}


@pytest.mark.parametrize(("body", "code"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("operation", ["$bulk-submit", "$bulk-submit-status"])
def test_a_body_that_is_no_parameters_is_refused(api: Api, operation: str, body: bytes, code: int) -> None:
    answer = api.post(operation, body)
    found = issues(answer, code)
    assert {issue["severity"] for issue in found} == {"error"}
    assert len(answer.content) < 50_000


def test_a_body_just_within_the_limit_is_read(api: Api, name: str) -> None:
    body = json.dumps(manifest(name, URL)).encode()
    issues(api.submit(body + b" " * (4 * 1024 * 1024 - len(body))), 200)


def test_a_body_may_come_in_chunks(api: Api, name: str) -> None:
    body = json.dumps(manifest(name, URL)).encode()
    chunks = (body[start : start + 7] for start in range(0, len(body), 7))
    url = f"{api.base_url}/$bulk-submit"
    issues(api.session.post(url, data=chunks, headers={"Content-Type": FHIR_JSON}, timeout=30), 200)
    assert len(api.manifests(name)) == 1


def test_a_body_that_breaks_off_is_nobodys_error(api: Api) -> None:
    for sent in (b"", b'{"resourceType"'):
        with socket.create_connection(("127.0.0.1", int(api.public_url.rsplit(":", 1)[1]))) as connection:
            head = f"POST /default/fhir/$bulk-submit HTTP/1.1\r\nHost: x\r\nContent-Type: {FHIR_JSON}\r\n"
            connection.sendall(head.encode() + b"Content-Length: 100\r\n\r\n" + sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert "level=error" not in api.log.read_text()


@pytest.mark.parametrize(
    "media_type", ["application/fhir+json; charset=UTF-8", "application/json", "Application/JSON+FHIR"]
)
def test_json_goes_by_several_names(api: Api, name: str, media_type: str) -> None:
    issues(api.submit(manifest(name, URL), Content_Type=media_type), 200)


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/fhir+xml", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused(api: Api, name: str, media_type: str) -> None:
    [issue] = issues(api.submit(manifest(name, URL), Content_Type=media_type), 415)
    assert "application/fhir+json" in issue["details"]["text"]
    assert api.manifests(name) == []


def test_every_fault_is_told_with_its_place_and_nothing_is_written(api: Api, name: str) -> None:
    body = parameters(
        submitter("x\0"),
        submission(name),
        {"name": "manifestUrl", "valueUrl": "ftp://u:p@files.test/m"},
        {"name": "outputFormat", "valueString": "text/csv"},
        header("Connection", "close"),
        {"name": "colour", "valueString": "red"},
    )
    found = issues(api.submit(body), 400)
    assert [issue["expression"] for issue in found] == [
        *([f"Parameters.parameter[{index}]"] for index in (0, 2)),
        ["Parameters.parameter[3]"],
        ["Parameters.parameter[4]"],
        ["Parameters.parameter[5].name"],
        ["Parameters.parameter"],
    ]
    assert "fhirBaseUrl" in texts(found)
    assert api.rows("SELECT 1 FROM submissions WHERE submission_id = :name", name=name) == []


@pytest.mark.parametrize(
    "url", ["manifest.json", "//files.test/m", "ftp://files.test/m", "http://u:p@files.test/m", "http://", "http://a b"]
)
def test_a_manifest_url_that_may_not_be_fetched_is_refused(api: Api, name: str, url: str) -> None:
    [issue] = issues(api.submit(manifest(name, url)), 400)
    assert issue["expression"] == ["Parameters.parameter[2]"]


def test_urls_of_any_accepted_length_can_be_kept(api: Api, name: str) -> None:
    url = "http://files.test/" + "".join(uuid.uuid4().hex for _ in range(70))
    issues(api.submit(manifest(name, url[:2048])), 200)
    issues(api.submit(manifest(name, url[:2049])), 400)


def test_a_refused_kickoff_leaves_nothing(bare: Api, name: str) -> None:
    for secret in (header("Authorization", "Bearer x"), KEY):
        [issue] = issues(bare.submit(manifest(name, URL, secret)), 422)
        assert issue["severity"] == "error"
    assert bare.rows("SELECT 1 FROM submissions WHERE submission_id = :name", name=name) == []


def test_replacing_a_manifest_is_refused_so_far(api: Api, name: str) -> None:
    issues(api.submit(manifest(name, URL, {"name": "replacesManifestUrl", "valueUrl": f"{URL}?0"})), 422)


def test_secrets_are_sealed_in_the_database_and_never_logged(api: Api, name: str) -> None:
    value, key = f"Bearer {uuid.uuid4().hex}", f"key-{uuid.uuid4().hex}"
    secret_key = {"name": "fileEncryptionKey", "part": [{"name": "value", "valueString": key}]}
    body = manifest(name, URL, header("Authorization", value), secret_key)
    issues(api.submit(body), 200)
    issues(api.submit({**body, "parameter": [*body["parameter"], header("A\n", value), {"name": key}]}), 400)
    issues(api.submit(json.dumps(body).encode()[:-1]), 400)
    stored, logged = all_text(api), api.log.read_text()
    assert name in stored
    for secret in (value, value.removeprefix("Bearer "), key):
        assert secret not in stored
        assert secret not in logged
    [(sealed,)] = api.rows(
        """SELECT sealed_secrets FROM fetch_parameters p JOIN manifests m ON m.id = p.manifest_id
           JOIN submissions s ON s.id = m.submission_id WHERE s.submission_id = :name""",
        name=name,
    )
    opened = unseal(api.settings, sealed)
    assert (opened.headers, opened.file_encryption_key) == ([("Authorization", value)], {"value": key, "coding": None})


def test_methods_other_than_post_are_refused(api: Api) -> None:
    for operation in ("$bulk-submit", "$bulk-submit-status"):
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
            answer = api.raw(method, f"/default/fhir/{operation}")
            [issue] = issues(answer, 405)
            assert (issue["code"], answer.headers["Allow"]) == ("not-supported", "POST")
        answer = api.raw("HEAD", f"/default/fhir/{operation}")
        assert (answer.status_code, answer.content) == (405, b"")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "//",
        "*",
        "/default",
        "/default/fhir",
        "/default/fhir/",
        "/default/fhir/%",
        "/default/fhir/$bulk-submit/",
        "/default/fhir/%24bulk-submit%00",
        "/default/fhir/../../etc/passwd",
        "/default/fhir/%2e%2e/%2e%2e/etc/passwd",
        "/default/fhir/$export",
        "/default/fhir/" + "x" * 20_000,
        "/default/%2ffhir/metadata",
        "/docs",
        "/openapi.json",
        "http://elsewhere.test/default/fhir/$bulk-submit",
    ],
    ids=lambda target: target[:40],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_an_unknown_path_is_not_found(api: Api, method: str, target: str) -> None:
    answer = api.raw(method, target, b"{}" if method == "POST" else None)
    if method == "HEAD":
        assert (answer.status_code, answer.content) == (404, b"")
    else:
        assert issues(answer, 404)[0]["code"] == "not-found"


def test_any_json_value_and_any_mutation_of_a_request_is_answered_in_order(api: Api) -> None:
    answered = []

    @given(mutated() | values)
    @hypothesis_settings(max_examples=60, deadline=None, database=None)
    def send(body: Any) -> None:
        try:
            data = json.dumps(body).encode()
        except ValueError:
            return
        for operation in ("$bulk-submit", "$bulk-submit-status"):
            answer = api.post(operation, data)
            assert answer.status_code < 500
            answered.append(len(issues(answer)))

    send()
    assert len(answered) > 60


def test_nothing_here_was_an_error_of_ours(api: Api, bare: Api) -> None:
    for one in (api, bare):
        assert "Traceback" not in one.log.read_text()
        assert one.get("metadata").status_code == 200
