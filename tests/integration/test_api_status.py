"""$bulk-submit-status, the poll URL and the receipts behind it, over real HTTP before real receipts."""

from __future__ import annotations

import gzip
import json
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from devstack.provider import SampleProvider
from devstack.servers import EmbeddedPostgres, EmbeddedRedis
from tests.support.api import (
    SUBMITTER,
    Api,
    header,
    issues,
    manifest,
    parameters,
    serve,
    status,
    submission,
    submitter,
)
from tests.support.stage import patient

SEPARATE = "Respond-Async, handling=lenient,  separate-export-status"
OFFERS = {
    "gzip": True,
    "GZip;q=0.5, br": True,
    "deflate, gzip;q=1.0, *;q=0.5": True,
    "*": True,
    "x-gzip": True,
    "": False,
    "identity": False,
    "br, deflate": False,
    "gzip;q=0": False,
    "gzip;q=0.000, *;q=1": False,
    "gzip;q=nonsense": False,
    "gzip;q=nan": False,
    ";;,,=": False,
}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SampleProvider]:
    with SampleProvider(tmp_path_factory.mktemp("provider")) as provider:
        yield provider


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def api(
    postgres: EmbeddedPostgres, migrated_template: str, redis_server: EmbeddedRedis, directory: Path
) -> Iterator[Api]:
    database_url = postgres.create_database("api_status", template=migrated_template)
    limits = {"poll_interval_seconds": 7, "max_attempts": 1, "fetch_retries": 0}
    with Api(database_url, directory, broker_url=redis_server.url, **limits) as api:
        yield api


@pytest.fixture
def name() -> str:
    """A submission id not used before."""
    return f"s-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def ended(api: Api, provider: SampleProvider) -> str:
    """A finished submission: two good lines and one that is none."""
    url = serve(provider, "ended", a=[patient("one"), b"{}"], b=[patient("two")])
    api.finish("ended", url)
    return "ended"


def file_urls(document: dict[str, Any]) -> dict[str, str]:
    """The status manifest's files by kind; one of each."""
    found = {kind: item["url"] for kind in ("output", "outcome") for item in document[kind]}
    for extension in document["extension"]:
        found[extension["url"]] = extension["extension"][0]["valueUrl"]
    return found


def lines_of(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_status_request_is_given_an_absolute_poll_url(api: Api, ended: str) -> None:
    answer = api.post("$bulk-submit-status", parameters(submitter(), submission(ended)))
    [issue] = issues(answer, 202)
    assert (issue["severity"], issue["code"]) == ("information", "informational")
    token = answer.headers["Content-Location"].removeprefix(f"{api.base_url}/bulk-status/")
    assert re.fullmatch("[A-Za-z0-9_-]{43}", token)
    assert "Preference-Applied" not in answer.headers


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (parameters(submitter(), submission("unheard-of")), 404),
        (parameters(submitter("stranger"), submission("ended")), 403),
        (parameters(submitter()), 400),
        (parameters(submission("ended")), 400),
        (parameters(submitter(), submission("ended"), status("completed")), 400),
        (parameters(submitter(), submission("ended"), header("A", "b")), 400),
        (parameters(submitter(), submission("ended"), {"name": "_outputFormat", "valueString": "text/csv"}), 400),
    ],
)
def test_a_bad_status_request_is_refused(api: Api, ended: str, body: dict[str, Any], code: int) -> None:
    answer = api.post("$bulk-submit-status", body)
    [issue] = issues(answer, code)
    assert issue["severity"] == "error"
    assert ("expression" in issue) is (code != 404)
    assert "Content-Location" not in answer.headers


def test_another_submitters_submission_is_not_found(api: Api, ended: str) -> None:
    api.add_submitter("other")
    issues(api.post("$bulk-submit-status", parameters(submitter("other"), submission(ended))), 404)


@pytest.mark.parametrize("output_format", ["application/fhir+ndjson", "application/ndjson", "ndjson"])
def test_a_status_request_may_ask_for_ndjson_by_its_names(api: Api, ended: str, output_format: str) -> None:
    body = parameters(submitter(), submission(ended), {"name": "_outputFormat", "valueString": output_format})
    issues(api.post("$bulk-submit-status", body), 202)


def test_an_unfinished_submission_says_how_far_it_is_and_when_to_ask_again(
    api: Api, provider: SampleProvider, name: str
) -> None:
    issues(api.submit(manifest(name, serve(provider, name, a=[patient("x")]))), 200)
    url = api.poll_url(name)
    answer = api.get(url)
    assert (answer.status_code, answer.content) == (202, b"")
    assert answer.headers["X-Progress"] == "0% (0 of 0 files)"
    assert answer.headers["Retry-After"] == "7"
    assert "X-Export-Status" not in answer.headers
    api.work()
    answer = api.get(url)
    assert answer.status_code == 202
    assert answer.headers["X-Progress"] == "99% (1 of 1 files)"
    issues(api.submit(parameters(submitter(), submission(name), status("completed"))), 200)
    assert api.get(url).status_code == 200


def test_a_completed_submission_is_unfinished_until_its_manifests_are(
    api: Api, provider: SampleProvider, name: str
) -> None:
    issues(api.submit(manifest(name, serve(provider, name, a=[patient("x")]), status("completed"))), 200)
    url = api.poll_url(name)
    assert api.get(url).status_code == 202
    api.work()
    assert api.get(url).status_code == 200


def test_a_finished_submission_gives_its_status_manifest(api: Api, provider: SampleProvider, ended: str) -> None:
    url = api.poll_url(ended)
    answer = api.get(url)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    expires = parsedate_to_datetime(answer.headers["Expires"])
    assert timedelta(days=6, hours=23) < expires - datetime.now(UTC) < timedelta(days=7, seconds=5)
    document = answer.json()
    assert document["submissionId"] == ended
    assert document["manifestType"].endswith("/StructureDefinition/BulkSubmitStatusManifest")
    assert document["requiresAccessToken"] is False
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document["transactionTime"])
    assert not {"error", "request", "outputOrganizedBy"} & document.keys()
    [output], [outcome] = document["output"], document["outcome"]
    manifest_url = f"{provider.url}/ended.json"
    assert (output["type"], output["count"], output["manifestUrl"]) == ("Patient", 2, manifest_url)
    assert outcome["manifestUrl"] == manifest_url
    assert {"code": "error", "count": 1} in outcome["countSeverity"]
    assert sum(entry["count"] for entry in outcome["countSeverity"]) == outcome["count"]
    assert all(file.startswith(f"{url}/files/") for file in file_urls(document).values())
    assert len(file_urls(document)) == 4
    again = api.get(api.poll_url(ended)).json()
    assert again["transactionTime"] == document["transactionTime"]


def test_a_manifest_that_cannot_be_fetched_is_told_in_an_outcome(api: Api, provider: SampleProvider, name: str) -> None:
    api.finish(name, f"{provider.url}/missing.json")
    document = api.get(api.poll_url(name)).json()
    assert document["output"] == []
    outcomes = lines_of(api.get(document["outcome"][0]["url"]).content)
    assert "404" in outcomes[0]["issue"][0]["details"]["text"]


def test_a_stopped_submission_is_gone(api: Api, provider: SampleProvider, name: str) -> None:
    issues(api.submit(manifest(name, serve(provider, name, a=[patient("x")]))), 200)
    url, separate = api.poll_url(name), api.poll_url(name, Prefer=SEPARATE)
    issues(api.submit(parameters(submitter(), submission(name), status("stopped"))), 200)
    [issue] = issues(api.get(url), 410)
    assert name in issue["details"]["text"]
    answer = api.get(separate)
    assert issues(answer, 200) == [issue]
    assert answer.headers["X-Export-Status"].startswith("410")


def test_the_job_may_have_a_status_apart_from_the_requests(api: Api, provider: SampleProvider, name: str) -> None:
    issues(api.submit(manifest(name, serve(provider, name, a=[patient("x")]), status("completed"))), 200)
    body = parameters(submitter(), submission(name))
    answer = api.post("$bulk-submit-status", body, Prefer=SEPARATE)
    assert answer.headers["Preference-Applied"] == "respond-async, separate-export-status"
    url = answer.headers["Content-Location"]
    answer = api.get(url)
    assert (answer.status_code, answer.headers["X-Export-Status"]) == (200, "202 Accepted")
    assert answer.headers["Retry-After"] == "7"
    api.work()
    answer = api.get(url)
    assert (answer.status_code, answer.headers["X-Export-Status"]) == (200, "200 OK")
    assert answer.json()["submissionId"] == name


@pytest.mark.parametrize("prefer", ["respond-async", "return=minimal;foo", "separate-export-statuses", ",,;"])
def test_other_preferences_change_nothing(api: Api, ended: str, prefer: str) -> None:
    answer = api.get(api.poll_url(ended, Prefer=prefer))
    assert answer.status_code == 200
    assert "X-Export-Status" not in answer.headers


def test_each_status_request_lives_and_ends_on_its_own(api: Api, ended: str) -> None:
    first, second, third = (api.poll_url(ended) for _ in range(3))
    assert len({first, second, third}) == 3
    file = api.get(first).json()["output"][0]["url"]
    issues(api.session.delete(first, timeout=30), 202)
    for answer in (api.get(first), api.session.delete(first, timeout=30), api.get(file)):
        assert issues(answer, 404)[0]["code"] == "not-found"
    for url in (second, third):
        document = api.get(url).json()
        assert api.get(document["output"][0]["url"]).status_code == 200
    assert api.manifests(ended)[0][1] == "completed"


def test_an_expired_status_request_is_not_found(api: Api, ended: str) -> None:
    url = api.poll_url(ended)
    file = api.get(url).json()["output"][0]["url"]
    api.execute("UPDATE poll_tokens SET expires_at = clock_timestamp() WHERE expires_at > clock_timestamp()")
    issues(api.get(url), 404)
    issues(api.get(file), 404)


@pytest.mark.parametrize("token", ["x", "a" * 43, "%00", "%ff", "..", "'", "%2e%2e", "a" * 20_000], ids=lambda t: t[:9])
def test_an_unknown_status_request_is_not_found(api: Api, token: str) -> None:
    for method in ("GET", "DELETE"):
        assert issues(api.raw(method, f"/default/fhir/bulk-status/{token}"), 404)[0]["code"] == "not-found"
    issues(api.raw("GET", f"/default/fhir/bulk-status/{token}/files/1"), 404)


def test_a_status_request_is_unknown_to_another_tenant(api: Api, ended: str) -> None:
    api.add_submitter(SUBMITTER, tenant="second")
    url = api.poll_url(ended)
    issues(api.get(url.replace("/default/", "/second/")), 404)
    issues(api.get(url.replace("/default/", "/nowhere/")), 404)
    assert api.get(url).status_code == 200


def test_of_a_token_only_a_hash_is_kept_and_nothing_logged(api: Api, ended: str) -> None:
    url = api.poll_url(ended)
    token = url.rsplit("/", 1)[1]
    api.get(url)
    [(row,)] = api.rows("SELECT t::text FROM poll_tokens t WHERE token_hash = sha256(:token)", token=token.encode())
    assert token not in row
    assert token.encode().hex() not in row
    assert token not in api.log.read_text()


def test_methods_other_than_those_of_a_poll_url_are_refused(api: Api, ended: str) -> None:
    url = api.poll_url(ended)
    target = url.removeprefix(api.public_url)
    file = api.get(url).json()["output"][0]["url"].removeprefix(api.public_url)
    for method, path in (("POST", target), ("PUT", target), ("POST", file), ("DELETE", file)):
        assert issues(api.raw(method, path, b"{}"), 405)[0]["code"] == "not-supported"


@pytest.mark.parametrize(("offer", "packed"), OFFERS.items(), ids=repr)
def test_a_file_is_packed_only_for_who_offers_to_take_it_so(api: Api, ended: str, offer: str, packed: bool) -> None:
    [item] = api.get(api.poll_url(ended)).json()["output"]
    plain = api.raw("GET", item["url"].removeprefix(api.public_url))
    answer = api.raw("GET", item["url"].removeprefix(api.public_url), Accept_Encoding=offer)
    assert (plain.status_code, answer.status_code) == (200, 200)
    assert "Content-Encoding" not in plain.headers
    assert answer.headers.get("Content-Encoding") == ("gzip" if packed else None)
    assert "Accept-Encoding" in answer.headers["Vary"]
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    content = gzip.decompress(answer.content) if packed else answer.content
    assert content == plain.content
    assert (len(content), content.count(b"\n")) == (item["fileSize"], item["count"])


def test_every_file_has_its_media_type_and_says_what_became_of_the_lines(api: Api, ended: str) -> None:
    urls = file_urls(api.get(api.poll_url(ended)).json())
    answers = {kind: api.get(url) for kind, url in urls.items()}
    assert {kind: answer.headers["Content-Type"] for kind, answer in answers.items()} == {
        "output": "application/fhir+ndjson",
        "outcome": "application/fhir+ndjson",
        "urn:bulk-submit:ledger": "application/x-ndjson",
        "urn:bulk-submit:reconciliation": "application/json",
    }
    assert [entry["id"] for entry in lines_of(answers["output"].content)] == ["one", "two"]
    assert {entry["resourceType"] for entry in lines_of(answers["outcome"].content)} == {"OperationOutcome"}
    ledger = lines_of(answers["urn:bulk-submit:ledger"].content)
    assert [entry["action"] for entry in ledger] == ["created", "failed", "created"]
    assert answers["urn:bulk-submit:reconciliation"].json()["total"]["failed"] == 1


def test_head_says_of_a_file_what_get_would(api: Api, ended: str) -> None:
    [item] = api.get(api.poll_url(ended)).json()["output"]
    for coding in ("identity", "gzip"):
        got = api.raw("GET", item["url"].removeprefix(api.public_url), Accept_Encoding=coding)
        head = api.raw("HEAD", item["url"].removeprefix(api.public_url), Accept_Encoding=coding)
        assert (head.status_code, head.content) == (200, b"")
        for field in ("Content-Length", "Content-Type", "Content-Encoding", "Vary"):
            assert head.headers.get(field) == got.headers.get(field)


@pytest.mark.parametrize("number", ["0", "-1", "999999", "9" * 30, "9" * 5000, "abc", "1.5", "%00", ""], ids=str)
def test_an_unknown_file_is_not_found(api: Api, ended: str, number: str) -> None:
    target = f"{api.poll_url(ended)}/files/{number}".removeprefix(api.public_url)
    assert issues(api.raw("GET", target), 404)[0]["code"] == "not-found"
    assert api.raw("HEAD", target).status_code == 404


def test_a_file_of_another_submission_is_not_found(api: Api, provider: SampleProvider, ended: str, name: str) -> None:
    api.finish(name, serve(provider, name, a=[patient("other")]))
    url, other = api.poll_url(ended), api.poll_url(name)
    for file in file_urls(api.get(other).json()).values():
        issues(api.get(file.replace(other, url)), 404)
        assert api.get(file).status_code == 200


def test_a_file_whose_object_is_gone_is_not_found(
    api: Api, provider: SampleProvider, directory: Path, name: str
) -> None:
    api.finish(name, serve(provider, name, a=[patient("gone")]))
    [item] = api.get(api.poll_url(name)).json()["output"]
    [(path,)] = api.rows("SELECT path FROM artifacts WHERE id = :id", id=int(item["url"].rsplit("/", 1)[1]))
    (directory / "artifacts" / path).unlink()
    for coding in ("identity", "gzip"):
        issues(api.get(item["url"], Accept_Encoding=coding), 404)


def test_a_large_file_is_streamed(api: Api, provider: SampleProvider, directory: Path, name: str) -> None:
    api.finish(name, serve(provider, name, a=[patient("large")]))
    [item] = api.get(api.poll_url(name)).json()["output"]
    artifact = int(item["url"].rsplit("/", 1)[1])
    [(path,)] = api.rows("SELECT path FROM artifacts WHERE id = :id", id=artifact)
    block = patient("large") * 10_000
    packed = gzip.compress(block, 1) * 200
    (directory / "artifacts" / path).write_bytes(packed)
    query = "UPDATE artifacts SET byte_count = :plain, stored_bytes = :packed WHERE id = :id"
    api.execute(query, plain=len(block) * 200, packed=len(packed), id=artifact)
    before = api.peak_bytes
    with api.session.get(item["url"], headers={"Accept-Encoding": "identity"}, stream=True, timeout=60) as answer:
        received = sum(len(chunk) for chunk in answer.iter_content(1 << 20))
    assert received == len(block) * 200 > 100_000_000
    assert api.peak_bytes - before < 40_000_000


def test_nothing_here_was_an_error_of_ours(api: Api) -> None:
    assert "Traceback" not in api.log.read_text()
