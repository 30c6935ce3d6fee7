"""Kickoff and status over the broker alone: real messages, a real worker, answers in Redis."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import requests
from bulk_submit_client import Progress, Report, SubmissionStopped, SubmitClient, SubmitError, Submitter, WaitTimeout
from bulk_submit_client.celery import CelerySubmitClient, Outcome
from bulk_submit_client.parameters import EVENT_STATUS, parameters, submitter_parameters
from celery import Celery
from jwcrypto.jwk import JWK

from devstack.provider import Fault, SampleProvider
from devstack.stack import Stack, wait_until
from submit_tasks.broker_requests import KEPT_SECONDS, answer_kickoff
from workers.seals import Secrets, unseal

NORTH = Submitter("urn:test", "north")
SECRET = "Bearer eyJ-very-secret"
BASE = "http://ehr.test/fhir"


class Fleet:
    """A stack with one worker and the API, and a provider that serves a guarded manifest of one file."""

    def __init__(self, stack: Stack, provider: SampleProvider) -> None:
        self.stack = stack
        self.provider = provider
        self.http = SubmitClient(stack.base_url, submitter=NORTH)
        self.keys = requests.get(f"{stack.base_url}/.well-known/jwks.json", timeout=10).json()["keys"]
        self.redis = redis.Redis.from_url(stack.redis.url)
        self.client = self.sender()

    def sender(self, submitter: Submitter = NORTH, public_jwk: dict[str, Any] | None = None) -> CelerySubmitClient:
        return CelerySubmitClient(self.stack.redis.url, submitter=submitter, public_jwk=public_jwk or self.keys[0])

    def url(self) -> str:
        """A manifest's URL, never the same."""
        return f"{self.provider.url}/manifest.json?n={uuid.uuid4()}"

    def send(self, body: Any, secrets: Any = None) -> Outcome:
        """The outcome of a message as another implementation might send it."""
        request_id = str(uuid.uuid4())
        message = {"tenant": "default", "request_id": request_id, "parameters": body}
        with Celery(broker=self.stack.redis.url, set_as_current=False) as app:
            extra = {} if secrets is None else {"secrets": secrets}
            app.send_task("submit_tasks.kickoff", kwargs={**message, **extra}, queue="kickoffs")
        wait_until(lambda: self.client.outcome(request_id), "an outcome", seconds=20)
        outcome = self.client.outcome(request_id)
        assert outcome is not None
        return outcome

    def settle(self) -> None:
        """Wait until what was sent so far is done: the worker has one slot."""
        with pytest.raises(SubmitError):
            self.client.status("never submitted")

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.stack.settings.database_url) as connection:
            return connection.execute(query, parameters).fetchall()

    def manifests(self, submission_id: str) -> list[tuple[Any, ...]]:
        """URL and sealed secrets of each manifest of a submission."""
        return self.rows(
            "SELECT m.manifest_url, f.sealed_secrets FROM submissions s"
            " JOIN manifests m ON (m.tenant_id, m.submission_id) = (s.tenant_id, s.id)"
            " JOIN fetch_parameters f ON (f.tenant_id, f.manifest_id) = (m.tenant_id, m.id) WHERE s.submission_id = %s",
            submission_id,
        )

    def secret_seen(self) -> bool:
        """Whether it stands in the worker's log, or anywhere in Redis."""
        read = {b"string": self.redis.get, b"hash": self.redis.hgetall}
        stored = [read[kind](key) for key in self.redis.keys("*") if (kind := self.redis.type(key)) in read]
        return SECRET in repr(stored) or SECRET in self.stack.child("worker1").log.read_text()


def body(submission_id: str, *more: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a kickoff."""
    return parameters([*submitter_parameters(NORTH, submission_id), *more])


def manifest(url: str) -> list[dict[str, Any]]:
    return [{"name": "manifestUrl", "valueUrl": url}, {"name": "fhirBaseUrl", "valueUrl": BASE}]


def issues(outcome: Outcome) -> list[tuple[str, str]]:
    assert outcome.outcome["resourceType"] == "OperationOutcome"
    return [(issue["severity"], issue["code"]) for issue in outcome.outcome["issue"]]


def texts(outcome: Outcome) -> str:
    return " ".join(issue["details"]["text"] for issue in outcome.outcome["issue"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory: Path = tmp_path_factory.mktemp("provider")
    overrides = {"BULK_SUBMIT_POLL_INTERVAL_SECONDS": "1", "BULK_SUBMIT_RETRY_DELAY_SECONDS": "0.2"}
    with SampleProvider(directory) as provider, Stack(overrides=overrides) as stack:
        (directory / "patients.ndjson").write_text('{"resourceType":"Patient","id":"ada"}\n')
        served = {
            "transactionTime": "2026-01-01T00:00:00Z",
            "request": f"{BASE}/$export",
            "requiresAccessToken": True,
            "output": [{"type": "Patient", "url": f"{provider.url}/patients.ndjson", "count": 1}],
            "error": [],
        }
        (directory / "manifest.json").write_text(json.dumps(served))
        provider.add(Fault(require_header=("Authorization", SECRET)))
        ready = [stack.launch_api(), stack.launch_worker("worker1")]
        stack.register_submitter(NORTH.system, NORTH.value)
        for wait in ready:
            wait()
        yield Fleet(stack, provider)


def test_a_kickoff_is_accepted_once_however_often_its_message_comes(fleet: Fleet) -> None:
    url = fleet.url()
    request_id = fleet.client.submit("twice", url, fhir_base_url=BASE)
    first = fleet.client.wait_accepted(request_id)
    assert (first.status, texts(first)) == (200, "The manifest is accepted.")
    fleet.client.submit("twice", url, fhir_base_url=BASE, request_id=request_id)
    fleet.settle()
    second = fleet.client.wait_accepted(request_id)
    assert second.at > first.at
    assert "accepted already" in texts(second)
    assert [stored for stored, _ in fleet.manifests("twice")] == [url]


def test_a_message_that_comes_again_after_the_end_does_not_undo_its_acceptance(fleet: Fleet) -> None:
    url = fleet.url()
    request_id = fleet.client.submit("late", url, fhir_base_url=BASE)
    first = fleet.client.wait_accepted(request_id)
    fleet.client.wait_accepted(fleet.client.stop("late"))
    fleet.client.submit("late", url, fhir_base_url=BASE, request_id=request_id)
    fleet.settle()
    assert fleet.client.outcome(request_id) == first
    with pytest.raises(SubmitError) as refused:
        fleet.client.wait_accepted(fleet.client.submit("late", fleet.url(), fhir_base_url=BASE))
    assert refused.value.status == 409


def test_the_whole_way_with_a_secret_header_to_receipts(fleet: Fleet, tmp_path: Path) -> None:
    request_id = fleet.client.submit("whole", fleet.url(), fhir_base_url=BASE, headers={"Authorization": SECRET})
    fleet.client.wait_accepted(request_id)
    assert "file" in getattr(fleet.client.status("whole"), "text", "")
    fleet.client.wait_accepted(fleet.client.complete("whole"))
    report = fleet.client.wait("whole", 60)
    by_http = fleet.http.wait("whole", timeout=10)

    def without_tokens(found: Report) -> Any:
        token = found.manifest["output"][0]["url"].split("/")[-3]
        return json.loads(json.dumps(found.manifest).replace(token, "token"))

    assert without_tokens(report) == without_tokens(by_http)
    [output] = fleet.http.download(report, tmp_path, kinds=("output",))
    assert json.loads(output.read_text())["id"] == "ada"
    assert not fleet.secret_seen()


def test_secrets_are_stored_sealed_and_are_those_that_were_sent(fleet: Fleet) -> None:
    key = {"value": "c2VjcmV0", "coding": {"code": "jwe"}}
    headers = [("Authorization", SECRET), ("X-Key", "b")]
    request_id = fleet.client.submit(
        "sealed", fleet.url(), fhir_base_url=BASE, headers=headers, file_encryption_key=key
    )
    fleet.client.wait_accepted(request_id)
    [(_, sealed)] = fleet.manifests("sealed")
    assert SECRET.encode() not in sealed
    assert unseal(fleet.stack.settings, sealed) == Secrets(headers, key)
    assert not fleet.secret_seen()


def test_a_message_shows_nothing_that_was_sent_in_confidence(broker_url: str, fleet: Fleet) -> None:
    unserved = CelerySubmitClient(broker_url, submitter=NORTH, public_jwk=fleet.keys[0])
    url = f"{fleet.url()}&sig=signed"
    request_id = unserved.submit("waiting", url, fhir_base_url=BASE, headers={"Authorization": SECRET})
    [message] = redis.Redis.from_url(broker_url).lrange("kickoffs", 0, -1)
    sent = json.loads(message)
    body = base64.b64decode(sent["body"]).decode()
    assert url in body
    assert (sent["headers"]["argsrepr"], sent["headers"]["kwargsrepr"]) == ("()", repr({"request_id": request_id}))
    assert SECRET not in body + json.dumps(sent["headers"])


def header_parameter(name: str) -> dict[str, Any]:
    part = [{"name": "headerName", "valueString": "Authorization"}, {"name": "headerValue", "valueString": SECRET}]
    return {"name": name, "part": part}


@pytest.mark.parametrize(
    "secret",
    [
        header_parameter("fileRequestHeader"),
        header_parameter("fileRequestHeaders"),
        {"name": "fileEncryptionKey", "part": [{"name": "value", "valueString": SECRET}]},
    ],
    ids=lambda secret: str(secret["name"]),
)
def test_a_secret_in_the_clear_is_refused_and_not_repeated(fleet: Fleet, secret: dict[str, Any]) -> None:
    refused = fleet.send(body("clear", *manifest(fleet.url()), secret))
    assert (refused.accepted, refused.status, issues(refused)) == (False, 400, [("error", "security")])
    assert refused.outcome["issue"][0]["expression"] == ["Parameters.parameter[4]"]
    assert fleet.manifests("clear") == []
    assert not fleet.secret_seen()


def another_key(**names: str) -> dict[str, Any]:
    key: dict[str, Any] = JWK.generate(kty="EC", crv="P-256", use="enc", **names).export_public(as_dict=True)
    return key


@pytest.mark.parametrize("kid", ["stack-enc", "unknown"])
def test_secrets_encrypted_to_another_key_are_refused_without_internals(fleet: Fleet, kid: str) -> None:
    sender = fleet.sender(public_jwk=another_key(kid=kid))
    request_id = sender.submit("other-key", fleet.url(), fhir_base_url=BASE, headers={"Authorization": SECRET})
    with pytest.raises(SubmitError, match="encrypt") as refused:
        sender.wait_accepted(request_id)
    assert refused.value.status == 400
    assert "Invalid" not in str(refused.value.outcome)
    assert fleet.manifests("other-key") == []


@pytest.mark.parametrize("garbage", ["", "a.b.c.d.e", "e30.e30.e30.e30.e30", {"headers": []}, [], 5])
def test_secrets_that_are_no_jwe_are_refused(fleet: Fleet, garbage: Any) -> None:
    refused = fleet.send(body("garbage", *manifest(fleet.url())), garbage)
    assert (refused.status, issues(refused)) == (400, [("error", "security")])
    assert fleet.manifests("garbage") == []


def test_secrets_lifted_from_a_message_are_of_no_use_with_another_manifest(fleet: Fleet) -> None:
    token = fleet.client._encrypt({"headers": [["Authorization", SECRET]], "manifest_url": fleet.url()})
    refused = fleet.send(body("lifted", *manifest(fleet.url())), token)
    assert (refused.status, issues(refused)) == (400, [("error", "security")])
    assert fleet.manifests("lifted") == []


@pytest.mark.parametrize("broken", [None, [], "x", {"resourceType": "Patient"}, {"resourceType": "Parameters"}])
def test_broken_parameters_are_answered_under_the_request_id(fleet: Fleet, broken: Any) -> None:
    refused = fleet.send(broken)
    assert (refused.accepted, refused.status) == (False, 400)
    assert set(issues(refused)) <= {("error", "invalid"), ("error", "required")}


def test_outcomes_are_found_by_submission_refused_ones_too(fleet: Fleet) -> None:
    name = 'näme: \t"quoted" \\ \x7f 😀'
    accepted = fleet.client.submit(name)
    fleet.client.wait_accepted(accepted)
    status = {"name": "submissionStatus", "valueCoding": {"system": EVENT_STATUS, "code": "wrong"}}
    fleet.send(body(name, status))
    found = fleet.client.outcomes(name)
    assert found.pop(accepted) == fleet.client.outcome(accepted)
    [refused] = found.values()
    assert (refused.status, issues(refused)) == (400, [("error", "code-invalid")])


def test_outcomes_are_kept_for_a_day(fleet: Fleet) -> None:
    fleet.client.wait_accepted(fleet.client.submit("kept"))
    fleet.client.status("kept")
    keys: Sequence[bytes] = fleet.redis.keys("bulk-submit:*")
    assert {key.split(b":")[1] for key in keys} == {b"kickoff", b"kickoff-request", b"status"}
    assert all(0 < fleet.redis.ttl(key) <= KEPT_SECONDS for key in keys)


@pytest.mark.parametrize(
    ("submitter", "tenant", "status"),
    [(Submitter("urn:test", "stranger"), "default", 403), (NORTH, "nowhere", 404), (NORTH, "no: where", 404)],
)
def test_whoever_is_not_registered_is_refused(fleet: Fleet, submitter: Submitter, tenant: str, status: int) -> None:
    sender = CelerySubmitClient(fleet.stack.redis.url, submitter=submitter, tenant=tenant)
    request_id = sender.submit("theirs", fleet.url(), fhir_base_url=BASE)
    with pytest.raises(SubmitError) as refused:
        sender.wait_accepted(request_id)
    assert refused.value.status == status
    assert list(sender.outcomes("theirs")) == [request_id]
    with pytest.raises(SubmitError) as unknown:
        sender.status("theirs")
    assert unknown.value.status == status


def test_the_status_of_an_unknown_submission_is_not_found(fleet: Fleet) -> None:
    with pytest.raises(SubmitError, match="no such submission") as error:
        fleet.client.status("never submitted")
    assert error.value.status == 404


def test_a_submission_without_manifests_ends_in_an_empty_report(fleet: Fleet) -> None:
    fleet.client.wait_accepted(fleet.client.complete("empty"))
    assert fleet.client.wait("empty", 20).manifest["output"] == []


def test_waiting_for_a_submission_that_does_not_end_tells_its_progress_and_ends_in_time(fleet: Fleet) -> None:
    fleet.client.wait_accepted(fleet.client.submit("open"))
    seen: list[Progress] = []
    with pytest.raises(WaitTimeout):
        fleet.client.wait("open", 0.5, on_progress=seen.append)
    assert seen
    assert set(seen) == {Progress("0% (0 of 0 files)", 0.0, 1.0)}


def test_the_status_of_a_stopped_submission_says_so(fleet: Fleet) -> None:
    fleet.client.wait_accepted(fleet.client.stop("stopped"))
    with pytest.raises(SubmissionStopped):
        fleet.client.wait("stopped", 20)


def test_without_a_database_a_request_is_refused_and_may_be_sent_again(fleet: Fleet) -> None:
    url, request_id = fleet.url(), "sent-again"
    away = fleet.stack.settings.model_copy(update={"database_url": "postgresql://postgres@127.0.0.1:1/x"})
    answer_kickoff(away, "default", request_id, body("again", *manifest(url)), None)
    with pytest.raises(SubmitError, match="send the same again") as refused:
        fleet.client.wait_accepted(request_id)
    assert refused.value.status == 503
    fleet.client.submit("again", url, fhir_base_url=BASE, request_id=request_id)
    assert fleet.client.wait_accepted(request_id).accepted
    assert [stored for stored, _ in fleet.manifests("again")] == [url]


def test_an_error_of_ours_is_answered_without_internals(fleet: Fleet) -> None:
    broken = fleet.stack.settings.model_copy(update={"private_jwks": type(fleet.stack.settings.private_jwks)("{")})
    token = fleet.client._encrypt({"headers": [["Authorization", SECRET]]})
    answer_kickoff(broken, "default", "failed", body("failed", *manifest(fleet.url())), token)
    outcome = fleet.client.outcome("failed")
    assert outcome is not None
    assert (outcome.status, issues(outcome)) == (500, [("error", "exception")])
    assert "JWK" not in str(outcome.outcome)


@pytest.mark.parametrize(("tenant", "request_id"), [("default", "a:b"), ("default", ""), ("\0", "a"), ("default", 5)])
def test_a_request_whose_answer_has_no_name_leaves_nothing(fleet: Fleet, tenant: Any, request_id: Any) -> None:
    before = set(fleet.redis.keys("bulk-submit:*"))
    answer_kickoff(fleet.stack.settings, tenant, request_id, body("nameless"), None)
    assert set(fleet.redis.keys("bulk-submit:*")) == before


def test_the_published_keys_have_no_private_member(fleet: Fleet) -> None:
    assert [set(key) for key in fleet.keys] == [{"kty", "crv", "x", "y", "kid", "use"}]
