"""The client over the consumer's Celery broker, for services without HTTP access to it. Needs the extra `celery`."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import redis
from celery import Celery
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK
from kombu import Queue
from kombu.exceptions import OperationalError

from bulk_submit_client.errors import SubmissionStopped, SubmitError, Unreachable, WaitTimeout, refusal
from bulk_submit_client.http import Progress, Report
from bulk_submit_client.parameters import Headers, Submitter, header_pairs, kickoff_parameters

KICKOFF = "submit_tasks.kickoff"
REPORT_STATUS = "submit_tasks.report_status"
QUEUE = "kickoffs"
LONGEST_PAUSE_SECONDS = 1.0
BROKER_ERRORS = (OperationalError, redis.RedisError, OSError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the consumer made of a kickoff. `status` is what HTTP's would be, `outcome` the OperationOutcome."""

    accepted: bool
    status: int
    outcome: dict[str, Any]
    at: datetime


class CelerySubmitClient:
    """Submits over the broker at `broker_url` (Redis), as `submitter`, to the consumer's tenant `tenant`.

    `public_jwk` is the consumer's key of use `enc`, from its JWK Set: without it no header and no key can be sent.
    `app` is a Celery application on that broker to send with, if not one of the client's own. `timeout` is how many
    seconds an answer of the consumer is waited for.

    Every method raises `Unreachable` where the broker is not.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        submitter: Submitter,
        tenant: str = "default",
        public_jwk: dict[str, Any] | None = None,
        app: Celery | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._submitter = submitter
        self._tenant = tenant
        self._public_jwk = None if public_jwk is None else _encryption_key(public_jwk)
        self._app = app or _application(broker_url)
        self._redis = redis.Redis.from_url(broker_url, socket_connect_timeout=3, socket_timeout=10)
        self._timeout = timeout

    def submit(
        self,
        submission_id: str,
        manifest_url: str | None = None,
        *,
        fhir_base_url: str | None = None,
        status: str | None = "in-progress",
        output_format: str | None = None,
        headers: Headers = (),
        replaces: str | None = None,
        oauth_metadata_urls: Iterable[str] = (),
        file_encryption_key: Mapping[str, Any] | None = None,
        metadata: Iterable[tuple[str, str]] = (),
        import_directives: Iterable[tuple[str, str]] = (),
        request_id: str | None = None,
    ) -> str:
        """Send one $bulk-submit; returns its request id, under which the outcome will be found.

        It is one of letters, digits and `._~-`, at most 128. Pass that of an earlier request to repeat it. Raises
        `ValueError` where something confidential is to be sent and `public_jwk` is not set.
        """
        parameters = kickoff_parameters(
            self._submitter,
            submission_id,
            manifest_url,
            status=status,
            fhir_base_url=fhir_base_url,
            output_format=output_format,
            replaces=replaces,
            oauth_metadata_urls=oauth_metadata_urls,
            metadata=metadata,
            import_directives=import_directives,
        )
        message: dict[str, Any] = {"parameters": parameters}
        pairs = header_pairs(headers)
        if pairs or file_encryption_key is not None:
            message["secrets"] = self._encrypt(
                {"headers": pairs, "file_encryption_key": file_encryption_key, "manifest_url": manifest_url}
            )
        if request_id is None:
            request_id = str(uuid.uuid4())
        else:
            self._forget_refusal(request_id)
        self._send(KICKOFF, request_id, message)
        return request_id

    def complete(self, submission_id: str, *, request_id: str | None = None) -> str:
        """Say that no further manifests will follow; returns the request id."""
        return self.submit(submission_id, status="completed", request_id=request_id)

    def stop(self, submission_id: str, *, request_id: str | None = None) -> str:
        """Stop the submission; returns the request id."""
        return self.submit(submission_id, status="stopped", request_id=request_id)

    def outcome(self, request_id: str) -> Outcome | None:
        """What became of a request; None while it is not answered, and again a day after it was."""
        stored = self._read(lambda: self._redis.get(self._key("kickoff-request", request_id)))
        return None if stored is None else _outcome(stored)

    def outcomes(self, submission_id: str) -> dict[str, Outcome]:
        """What became of all requests for a submission, by request id, whoever sent them; kept as single ones are."""
        named = [self._submitter.system, self._submitter.value, submission_id]
        digest = hashlib.sha256(json.dumps(named, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
        stored = self._read(lambda: self._redis.hgetall(self._key("kickoff", digest)))
        return {request_id.decode(): _outcome(outcome) for request_id, outcome in stored.items()}

    def wait_accepted(self, request_id: str, timeout: float | None = None) -> Outcome:
        """Wait until a request is accepted; raises `SubmitError` with the OperationOutcome when it is refused.

        `timeout` is in seconds, the client's own if None. Raises `WaitTimeout` after it: send the request again, under
        the same request id.
        """
        outcome = _wait_for(
            lambda: self.outcome(request_id), self._timeout if timeout is None else timeout, f"request {request_id}"
        )
        if not outcome.accepted:
            raise refusal(SubmitError, outcome.status, outcome.outcome)
        return outcome

    def status(self, submission_id: str) -> Progress | Report:
        """Ask how far the submission is. Raises `SubmissionStopped`, `SubmitError`; `WaitTimeout` without an answer.

        The report's files are to be downloaded by HTTP.
        """
        return self._status(submission_id, self._timeout)

    def wait(
        self,
        submission_id: str,
        timeout: float | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Report:
        """Ask until the submission has ended; raises `SubmissionStopped`, `SubmitError`, `WaitTimeout`."""
        ends = None if timeout is None else time.monotonic() + timeout
        pause = 0.1
        while True:
            left = self._timeout if ends is None else ends - time.monotonic()
            longest = 10.0
            try:
                answer = self._status(submission_id, min(left, self._timeout))
            except (Unreachable, WaitTimeout):
                pass
            except SubmitError as error:
                if error.status != 429 and (error.status or 0) < 500:
                    raise
            else:
                if isinstance(answer, Report):
                    return answer
                if on_progress is not None:
                    on_progress(answer)
                longest = answer.retry_after
            pause = min(pause * 1.5, longest)
            if ends is not None and time.monotonic() + pause > ends:
                raise WaitTimeout(f"submission {submission_id} had not ended after {timeout:g} seconds")
            time.sleep(pause)

    def _status(self, submission_id: str, timeout: float) -> Progress | Report:
        request_id = str(uuid.uuid4())
        submitter = {"system": self._submitter.system, "value": self._submitter.value}
        self._send(REPORT_STATUS, request_id, {**submitter, "submission_id": submission_id})
        key = self._key("status", request_id)
        stored = _wait_for(lambda: self._read(lambda: self._redis.get(key)), timeout, "the request for status")
        answer = json.loads(stored)
        if answer["status"] == 200:
            return Report(answer["manifest"])
        if answer["status"] == 202:
            percent = re.search(r"(\d+(?:\.\d+)?)%", answer["progress"])
            return Progress(answer["progress"], float(percent[1]) if percent else None, float(answer["retry_after"]))
        kind = SubmissionStopped if answer["status"] == 410 else SubmitError
        raise refusal(kind, answer["status"], answer["outcome"])

    def _encrypt(self, secrets: dict[str, Any]) -> str:
        if self._public_jwk is None:
            raise ValueError("headers and keys are sent encrypted only: set public_jwk to the consumer's key")
        algorithm = "RSA-OAEP-256" if self._public_jwk["kty"] == "RSA" else "ECDH-ES"
        header = {"alg": algorithm, "enc": "A256GCM", "kid": self._public_jwk["kid"]}
        token = JWE(json.dumps(secrets).encode(), json.dumps(header))
        token.add_recipient(self._public_jwk)
        return str(token.serialize(compact=True))

    def _forget_refusal(self, request_id: str) -> None:
        """So that it is not taken for the answer to the request's repetition."""
        earlier = self.outcome(request_id)
        if earlier is not None and not earlier.accepted:
            self._read(lambda: self._redis.delete(self._key("kickoff-request", request_id)))

    def _send(self, task: str, request_id: str, arguments: dict[str, Any]) -> None:
        try:
            self._app.send_task(
                task,
                kwargs={"tenant": self._tenant, "request_id": request_id, **arguments},
                queue=Queue(QUEUE),
                serializer="json",
                ignore_result=True,
                retry=True,
                retry_policy={"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1.0},
                argsrepr="()",
                kwargsrepr=repr({"request_id": request_id}),
            )
        except BROKER_ERRORS as error:
            raise Unreachable(f"the broker was not reached ({type(error).__name__})") from error

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BROKER_ERRORS as error:
            raise Unreachable(f"the broker was not reached ({type(error).__name__})") from error

    def _key(self, kind: str, name: str) -> str:
        return f"bulk-submit:{kind}:{self._tenant}:{name}"


def _application(broker_url: str) -> Celery:
    app = Celery("bulk_submit_client", broker=broker_url, set_as_current=False)
    app.conf.broker_transport_options = {"socket_connect_timeout": 3, "socket_timeout": 10}
    return app


def _encryption_key(public_jwk: dict[str, Any]) -> JWK:
    if not public_jwk.get("kid") or public_jwk.get("use", "enc") != "enc":
        raise ValueError("public_jwk is not a key of use enc with a kid")
    return JWK(**public_jwk)


def _outcome(stored: bytes) -> Outcome:
    fields = json.loads(stored)
    at = datetime.fromisoformat(fields["at"])
    return Outcome(fields["accepted"], fields["status"], fields["outcome"], at)


def _wait_for(read: Callable[[], T | None], seconds: float, what: str) -> T:
    """What `read` gives once it gives something; raises `WaitTimeout`."""
    ends = time.monotonic() + seconds
    pause = 0.02
    while (found := read()) is None:
        if time.monotonic() + pause > ends:
            raise WaitTimeout(f"{what} was not answered within {seconds:g} seconds")
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
    return found
