"""The client over HTTP before a running API, and before servers that fail."""

from __future__ import annotations

import gzip
import json
import socketserver
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from bulk_submit_client import Progress, Report, SubmissionStopped, SubmitClient, SubmitError, Submitter, WaitTimeout
from bulk_submit_client.errors import IncompleteDownload, Unreachable

from devstack.provider import Fault, SampleProvider
from devstack.servers import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.support.api import SUBMITTER, SYSTEM, Api, serve
from tests.support.stage import patient
from workers.seals import unseal

MANIFEST = "http://127.0.0.1:9/manifest.json"
EHR = "http://ehr.test/fhir"
NORTH = Submitter(SYSTEM, SUBMITTER)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SampleProvider]:
    with SampleProvider(tmp_path_factory.mktemp("provider")) as provider:
        yield provider


@pytest.fixture(autouse=True)
def _without_faults(provider: SampleProvider) -> Iterator[None]:
    yield
    provider.clear()


@pytest.fixture(scope="module")
def api(
    postgres: EmbeddedPostgres,
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    database_url = postgres.create_database("api_client", template=migrated_template)
    directory = tmp_path_factory.mktemp("api")
    limits = {"poll_interval_seconds": 1, "max_attempts": 1, "fetch_retries": 0}
    with Api(database_url, directory, broker_url=redis_server.url, **limits) as api:
        yield api


@pytest.fixture
def client(api: Api) -> SubmitClient:
    return SubmitClient(f"{api.base_url}/", submitter=NORTH)


@pytest.fixture
def name() -> str:
    """A submission id not used before."""
    return f"s-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def report(api: Api, provider: SampleProvider) -> Report:
    """Of a submission of two good lines and one that is none."""
    api.finish("reported", serve(provider, "reported", a=[patient("one"), b"{}", patient("two")]))
    return SubmitClient(api.base_url, submitter=NORTH).wait("reported", timeout=10)


def texts(outcome: dict[str, Any] | None) -> list[str]:
    assert outcome is not None
    return [issue["details"]["text"] for issue in outcome["issue"]]


def listing(provider: SampleProvider, name: str, **item: Any) -> Report:
    """A report with one output file, which the provider serves."""
    return Report({"requiresAccessToken": False, "output": [{"url": f"{provider.url}/{name}", **item}]})


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that answers each request with these bytes and ends the connection; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.wfile.write(answer)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_submission_from_the_first_request_to_the_receipts(
    api: Api, provider: SampleProvider, client: SubmitClient, name: str, tmp_path: Path
) -> None:
    outcome = client.submit(name, serve(provider, name, a=[patient(name)]), fhir_base_url=EHR)
    assert texts(outcome) == ["The manifest is accepted."]
    assert "complete" in texts(client.complete(name))[0]
    seen: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress)
        api.work()

    report = client.wait(name, timeout=30, on_progress=on_progress)
    assert [(progress.percent, progress.retry_after) for progress in seen] == [(0.0, 1.0)]
    assert report.manifest["submissionId"] == name
    paths = client.download(report, tmp_path / "receipts")
    assert {path.name.split("-")[0] for path in paths} == {"output", "outcome", "ledger", "reconciliation"}
    assert sorted((tmp_path / "receipts").iterdir()) == sorted(paths)
    assert client.read("Patient", name)["meta"]["versionId"] == "1"


def test_everything_a_request_may_say_arrives(api: Api, client: SubmitClient, name: str) -> None:
    key = {"value": "the-key", "coding": {"system": "urn:keys", "code": "jwe"}}
    client.submit(
        name,
        MANIFEST,
        fhir_base_url=EHR,
        output_format="application/fhir+ndjson;fhirVersion=4.0",
        headers=[("X-Batch", "1"), ("X-Batch", "2")],
        oauth_metadata_urls=["http://ehr.test/meta"],
        file_encryption_key=key,
        metadata=[("urn:a", "1"), ("urn:b", "2")],
        import_directives=[("urn:mode", "replace")],
    )
    [(manifest_id, _)] = api.manifests(name)
    [(*plain, sealed)] = api.rows(
        """SELECT fhir_base_url, output_format, oauth_metadata_urls, metadata, import_directives, sealed_secrets
           FROM fetch_parameters WHERE manifest_id = :id""",
        id=manifest_id,
    )
    assert plain == [
        EHR,
        "application/fhir+ndjson;fhirVersion=4.0",
        ["http://ehr.test/meta"],
        [
            {"parameterUrl": "urn:a", "parameterValue": "1"},
            {"parameterUrl": "urn:b", "parameterValue": "2"},
        ],
        [{"parameterUrl": "urn:mode", "parameterValue": "replace"}],
    ]
    secrets = unseal(api.settings, sealed)
    assert (secrets.headers, secrets.file_encryption_key) == ([("X-Batch", "1"), ("X-Batch", "2")], key)


def test_the_same_submit_again_is_no_second_manifest(api: Api, client: SubmitClient, name: str) -> None:
    for _ in range(2):
        client.submit(name, MANIFEST, fhir_base_url=EHR, headers={"X-Batch": "1"})
    assert len(api.manifests(name)) == 1
    with pytest.raises(SubmitError, match="with other parameters") as raised:
        client.submit(name, MANIFEST, fhir_base_url=EHR, headers={"X-Batch": "2"})
    assert raised.value.status == 409


def test_a_refusal_carries_the_outcome_and_tells_every_fault(client: SubmitClient, name: str) -> None:
    with pytest.raises(SubmitError) as raised:
        client.submit(name, "ftp://files.test/m", output_format="text/csv", status="finished")
    error = raised.value
    assert error.status == 400
    told = texts(error.outcome)
    assert len(told) == 4
    assert all(text in str(error) for text in told)
    assert "neither http nor https" in str(error)


def test_a_stranger_is_refused(api: Api, name: str) -> None:
    stranger = SubmitClient(api.base_url, submitter=Submitter(SYSTEM, "stranger"))
    for request in (lambda: stranger.complete(name), lambda: stranger.status(name), lambda: stranger.wait(name)):
        with pytest.raises(SubmitError, match="not registered") as raised:
            request()
        assert raised.value.status == 403


def test_an_unknown_submission_or_resource_is_told(client: SubmitClient, name: str) -> None:
    with pytest.raises(SubmitError, match="no such submission") as raised:
        client.status(name)
    assert raised.value.status == 404
    with pytest.raises(SubmitError, match="Patient/nobody is not known"):
        client.read("Patient", "nobody")


def test_a_stopped_submission_ends_the_wait(client: SubmitClient, name: str) -> None:
    client.submit(name, MANIFEST, fhir_base_url=EHR)
    assert "stopped" in texts(client.stop(name))[0]
    for ask in (client.status(name).poll, lambda: client.wait(name)):
        with pytest.raises(SubmissionStopped, match=f"{name} was stopped") as raised:
            ask()
        assert raised.value.status == 410


def test_waiting_has_an_end(client: SubmitClient, name: str) -> None:
    client.submit(name, MANIFEST, fhir_base_url=EHR)
    seen: list[Progress] = []
    with pytest.raises(WaitTimeout, match=name):
        client.wait(name, timeout=0.5, on_progress=seen.append)
    assert len(seen) == 1
    assert isinstance(client.status(name).poll(), Progress)


def test_a_deleted_status_request_cannot_be_polled(client: SubmitClient, report: Report) -> None:
    handle, other = client.status("reported"), client.status("reported")
    handle.delete()
    for ask in (handle.poll, handle.delete):
        with pytest.raises(SubmitError) as raised:
            ask()
        assert raised.value.status == 404
    assert isinstance(other.poll(), Report)


class Flaky(requests.Session):
    """A session whose polls fail once each way before they succeed."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Any] = [requests.ConnectionError(), requests.ReadTimeout(), 429, 503]

    def request(self, method: str | bytes, url: str | bytes, **more: Any) -> requests.Response:  # type: ignore[override]
        if method == "GET" and self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            response = requests.Response()
            response.status_code = failure
            return response
        return super().request(method, url, **more)


def test_waiting_outlives_what_passes(api: Api, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("bulk_submit_client.http.time.sleep", pauses.append)
    session = Flaky()
    found = SubmitClient(api.base_url, submitter=NORTH, session=session).wait("reported")
    assert found.manifest["submissionId"] == "reported"
    assert (session.failures, pauses) == ([], [1.0, 2.0, 4.0, 8.0])


def test_nobody_listens(name: str) -> None:
    client = SubmitClient(f"http://127.0.0.1:{free_port()}/fhir", submitter=NORTH, token="secret-token")
    requests_made = (
        lambda: client.submit(name, "http://files.test/secret-path", fhir_base_url=EHR),
        lambda: client.complete(name),
        lambda: client.status(name),
        lambda: client.wait(name),
        lambda: client.read("Patient", "x"),
        lambda: client.download(Report({"output": [{"url": f"http://127.0.0.1:{free_port()}/secret"}]}), Path("/tmp")),
    )
    for request in requests_made:
        with pytest.raises(Unreachable) as raised:
            request()
        assert (raised.value.status, raised.value.outcome) == (None, None)
        assert "secret" not in str(raised.value)


def test_a_connection_that_breaks_is_unreachable(name: str) -> None:
    for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"):
        with answering(answer) as url, pytest.raises(Unreachable):
            SubmitClient(url, submitter=NORTH).complete(name)


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\n<html", 502, "the consumer answered 502"),
        (b"HTTP/1.1 500 E\r\nContent-Length: 2\r\n\r\n[]", 500, "the consumer answered 500"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "not a JSON object"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 200, "not a JSON object"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, "the consumer answered 204"),
    ],
)
def test_an_answer_that_is_not_the_protocol_is_told(name: str, answer: bytes, status: int, text: str) -> None:
    with answering(answer) as url, pytest.raises(SubmitError, match=text) as raised:
        SubmitClient(url, submitter=NORTH).complete(name)
    assert (raised.value.status, raised.value.outcome) == (status, None)


def test_a_status_answer_without_a_poll_url_is_told(name: str) -> None:
    with (
        answering(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n") as url,
        pytest.raises(SubmitError, match="no poll URL"),
    ):
        SubmitClient(url, submitter=NORTH).status(name)


@pytest.mark.parametrize(
    ("fields", "pause"),
    [
        ("Retry-After: 3\r\n", 3.0),
        ("Retry-After: 1795564800\r\n", 60.0),
        ("Retry-After: Tue, 24 Nov 2026 09:00:00 GMT\r\n", 5.0),
        ("Retry-After: \xb2\r\n", 5.0),
        ("", 5.0),
    ],
)
def test_a_pause_that_makes_no_sense_is_not_believed(name: str, fields: str, pause: float) -> None:
    poll = f"HTTP/1.1 202 Accepted\r\nContent-Location: URL\r\nX-Progress: about 41.5% done\r\n{fields}"
    with answering(poll.encode("latin-1") + b"Content-Length: 0\r\nConnection: close\r\n\r\n") as url:
        handle = SubmitClient(url, submitter=NORTH).status(name)
        handle.url = url
        progress = handle.poll()
    assert progress == Progress("about 41.5% done", 41.5, pause)


def test_downloads_are_what_the_api_serves(api: Api, client: SubmitClient, report: Report, tmp_path: Path) -> None:
    paths = client.download(report, tmp_path)
    listed = list(report.files())
    assert [kind for kind, _ in listed] == ["output", "outcome", "ledger", "reconciliation"]
    for path, (kind, item) in zip(paths, listed, strict=True):
        assert path.name.startswith(kind)
        assert path.read_bytes() == api.get(item["url"]).content
    assert paths[0].name == "output-Patient-00000.ndjson"
    assert paths[-1].suffix == ".json"
    [only] = client.download(report, tmp_path / "some", kinds=["ledger"])
    assert [json.loads(line)["action"] for line in only.open()] == ["created", "failed", "created"]


def test_outcomes_are_read_without_a_file(client: SubmitClient, report: Report) -> None:
    outcomes = list(client.outcomes(report))
    assert len(outcomes) == report.manifest["outcome"][0]["count"]
    assert {outcome["resourceType"] for outcome in outcomes} == {"OperationOutcome"}
    assert any("resourceType is missing" in texts(outcome)[0] for outcome in outcomes)


def test_a_packed_file_is_unpacked(provider: SampleProvider, client: SubmitClient, tmp_path: Path) -> None:
    (provider.directory / "packed").write_bytes(b"")
    (provider.directory / "packed.gz").write_bytes(gzip.compress(b"{}\n" * 1000))
    [path] = client.download(listing(provider, "packed", count=1000), tmp_path)
    assert path.read_bytes() == b"{}\n" * 1000


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (Fault("cut", cut_after=100_000), 200_000),
        (Fault("cut", truncate_to=100_000), 200_000),
        (Fault("cut", truncate_to=100_000), None),
        (Fault("cut", cut_after=0), None),
        (Fault("elsewhere"), 199_999),
        (Fault("elsewhere"), 200_001),
    ],
    ids=["reset", "ended", "ended, uncounted", "reset at once", "too many lines", "too few lines"],
)
def test_a_file_that_is_not_whole_is_not_kept(
    provider: SampleProvider, client: SubmitClient, tmp_path: Path, fault: Fault, count: int | None
) -> None:
    (provider.directory / "cut").write_bytes(b"{}\n" * 200_000)
    provider.add(fault)
    report = listing(provider, "cut", **({} if count is None else {"count": count}))
    with pytest.raises(IncompleteDownload):
        client.download(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    provider.clear()
    if fault.applied:
        [path] = client.download(report, tmp_path)
        assert path.stat().st_size == 600_000


def test_a_packed_file_that_is_damaged_is_not_kept(
    provider: SampleProvider, client: SubmitClient, tmp_path: Path
) -> None:
    whole = gzip.compress(b"".join(b'{"n":%d}\n' % number for number in range(10_000)))
    (provider.directory / "damaged").write_bytes(b"")
    for damaged in (whole[:2000], whole[:2000] + b"\xff" * 2000, b"no gzip"):
        (provider.directory / "damaged.gz").write_bytes(damaged)
        with pytest.raises(IncompleteDownload):
            client.download(listing(provider, "damaged", count=10_000), tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_outcomes_that_break_off_are_told(provider: SampleProvider, client: SubmitClient) -> None:
    (provider.directory / "outcomes").write_bytes(b'{"resourceType":"OperationOutcome"}\n' * 10_000)
    report = Report({"outcome": [{"url": f"{provider.url}/outcomes"}]})
    for fault in (Fault("outcomes", truncate_to=300_000), Fault("outcomes", cut_after=300_000)):
        provider.add(fault)
        with pytest.raises(IncompleteDownload):
            list(client.outcomes(report))
        provider.clear()
    assert len(list(client.outcomes(report))) == 10_000


def test_a_file_that_is_gone_is_told_with_its_status(
    api: Api, client: SubmitClient, report: Report, tmp_path: Path
) -> None:
    handle = client.status("reported")
    answer = handle.poll()
    assert isinstance(answer, Report)
    handle.delete()
    with pytest.raises(SubmitError, match="no such status request") as raised:
        client.download(answer, tmp_path)
    assert raised.value.status == 404
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", ["t", lambda: "t"], ids=["a token", "a function"])
def test_a_token_goes_with_requests_and_not_with_files_that_need_none(
    provider: SampleProvider, tmp_path: Path, token: Any
) -> None:
    (provider.directory / "Patient").mkdir(exist_ok=True)
    (provider.directory / "Patient" / "x").write_bytes(b"{}\n")
    client = SubmitClient(provider.url, submitter=NORTH, token=token)
    sent = []
    for requires in (None, True, False):
        manifest = {"output": [{"url": f"{provider.url}/Patient/x", "count": 1}]}
        client.download(
            Report(manifest if requires is None else {**manifest, "requiresAccessToken": requires}), tmp_path
        )
        sent.append("Authorization" in provider.requests[-1].headers)
    client.read("Patient", "x")
    sent.append("Authorization" in provider.requests[-1].headers)
    assert sent == [True, True, False, True]
