"""The client over HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from bulk_submit_client.errors import (
    IncompleteDownload,
    SubmissionStopped,
    SubmitError,
    Unreachable,
    WaitTimeout,
    refusal,
)
from bulk_submit_client.parameters import (
    Headers,
    Submitter,
    kickoff_parameters,
    parameters,
    secret_parameters,
    submitter_parameters,
)

FHIR_JSON = "application/fhir+json"
LONGEST_PAUSE_SECONDS = 60.0
EXTENSIONS = {"urn:bulk-submit:ledger": "ledger", "urn:bulk-submit:reconciliation": "reconciliation"}
KINDS = ("output", "outcome", "deleted", "ledger", "reconciliation")


@dataclass(frozen=True, slots=True)
class Progress:
    """An unfinished poll: what the consumer says, the percentage in it, and seconds until the next poll."""

    text: str
    percent: float | None
    retry_after: float


@dataclass(frozen=True, slots=True)
class Report:
    """A finished submission: its status manifest."""

    manifest: dict[str, Any]

    def files(self, kinds: Iterable[str] = KINDS) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind and entry (`url`, `type`, `count`, `manifestUrl` ...) of each file, kind by kind."""
        wanted = tuple(kinds)
        for kind in ("output", "outcome", "deleted"):
            if kind in wanted:
                yield from ((kind, item) for item in self.manifest.get(kind) or [])
        for extension in self.manifest.get("extension") or []:
            kind = EXTENSIONS.get(extension.get("url"), "")
            if kind in wanted:
                parts = extension.get("extension", [])
                item = {part["url"]: value for part in parts for key, value in part.items() if key.startswith("value")}
                yield kind, item


class StatusHandle:
    """One status request, with a poll URL of its own."""

    def __init__(self, client: SubmitClient, url: str) -> None:
        self._client = client
        self.url = url

    def poll(self) -> Progress | Report:
        """Ask once. Raises `SubmissionStopped`, `SubmitError`."""
        response = self._client.request("GET", self.url, accept="application/json")
        if response.status_code == 202:
            text = response.headers.get("X-Progress", "")
            percent = re.search(r"(\d+(?:\.\d+)?)%", text)
            return Progress(text, float(percent[1]) if percent else None, _retry_after(response, 5.0))
        if response.status_code == 200:
            return Report(_object(response))
        raise _refused(response, SubmissionStopped if response.status_code == 410 else SubmitError)

    def delete(self) -> None:
        """Say that nothing more is wanted under this URL."""
        self._client.expect(self._client.request("DELETE", self.url), 202)


class SubmitClient:
    """Submits to the consumer at `base_url` (its FHIR base), as `submitter`.

    `token` is a bearer token, or a function that gives one for each request. `timeout` is in seconds, for connecting
    and for silence while reading.
    """

    def __init__(
        self,
        base_url: str,
        *,
        submitter: Submitter,
        token: str | Callable[[], str] | None = None,
        session: requests.Session | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._submitter = submitter
        self._token = token
        self._session = session or requests.Session()
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
    ) -> dict[str, Any]:
        """Send one $bulk-submit; returns the OperationOutcome. Sending the same again is answered as the first."""
        body = kickoff_parameters(
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
        body["parameter"] += secret_parameters(headers, file_encryption_key)
        return _object(self.expect(self.request("POST", f"{self._base_url}/$bulk-submit", body=body), 200))

    def complete(self, submission_id: str) -> dict[str, Any]:
        """Say that no further manifests will follow."""
        return self.submit(submission_id, status="completed")

    def stop(self, submission_id: str) -> dict[str, Any]:
        """Stop the submission."""
        return self.submit(submission_id, status="stopped")

    def status(self, submission_id: str) -> StatusHandle:
        """Ask for a poll URL."""
        body = parameters(submitter_parameters(self._submitter, submission_id))
        response = self.request(
            "POST", f"{self._base_url}/$bulk-submit-status", body=body, headers={"Prefer": "respond-async"}
        )
        url = self.expect(response, 202).headers.get("Content-Location")
        if url is None:
            raise SubmitError("the consumer gave no poll URL", status=response.status_code)
        return StatusHandle(self, url)

    def wait(
        self,
        submission_id: str,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Report:
        """Poll until the submission has ended; raises `SubmissionStopped`, `SubmitError`, `WaitTimeout`."""
        ends = None if timeout is None else time.monotonic() + timeout
        handle = self.status(submission_id)
        backoff = 0.5
        while True:
            try:
                answer = handle.poll()
            except SubmitError as error:
                passes = isinstance(error, Unreachable) or error.status == 429 or (error.status or 0) >= 500
                if not passes:
                    raise
                pause = backoff = min(backoff * 2, LONGEST_PAUSE_SECONDS)
            else:
                if isinstance(answer, Report):
                    return answer
                if on_progress is not None:
                    on_progress(answer)
                pause, backoff = answer.retry_after, 0.5
            if ends is not None and time.monotonic() + pause > ends:
                raise WaitTimeout(f"submission {submission_id} had not ended after {timeout:g} seconds")
            time.sleep(pause)

    def download(self, report: Report, directory: Path, *, kinds: Sequence[str] = KINDS) -> list[Path]:
        """Stream the report's files of these kinds into `directory`; returns their paths.

        A file appears once it is whole. Raises `IncompleteDownload` where it breaks off, or has not as many lines as
        the report says.
        """
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, (kind, item) in enumerate(report.files(kinds)):
            resource_type = re.sub(r"[^A-Za-z]", "", str(item.get("type", "")))
            name = "-".join(filter(None, (kind, resource_type, f"{number:05}")))
            path = directory / f"{name}.{'json' if kind == 'reconciliation' else 'ndjson'}"
            draft = path.with_suffix(".part")
            try:
                lines = self._save(report, item["url"], draft)
                if "count" in item and int(item["count"]) != lines:
                    raise IncompleteDownload(f"{path.name} has {lines} lines, not {item['count']}")
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            paths.append(path)
        return paths

    def _save(self, report: Report, url: str, draft: Path) -> int:
        lines = 0
        with self._open(report, url) as response, draft.open("wb") as file, _whole():
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)
                lines += chunk.count(b"\n")
        return lines

    def outcomes(self, report: Report) -> Iterator[dict[str, Any]]:
        """The report's OperationOutcomes, streamed. Raises `IncompleteDownload` where a file breaks off."""
        for _, item in report.files(("outcome",)):
            with self._open(report, item["url"]) as response, _whole():
                for line in response.iter_lines():
                    yield json.loads(line)

    def read(self, resource_type: str, resource_id: str) -> dict[str, Any]:
        """A stored resource."""
        return _object(self.expect(self.request("GET", f"{self._base_url}/{resource_type}/{resource_id}"), 200))

    def request(
        self,
        method: str,
        url: str,
        *,
        body: dict[str, Any] | None = None,
        accept: str = FHIR_JSON,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        authorized: bool = True,
    ) -> requests.Response:
        """One request, `authorized` with the client's token if it has one. Raises `Unreachable`."""
        sent = {"Accept": accept, **(headers or {})}
        token = self._token() if callable(self._token) else self._token
        if token is not None and authorized:
            sent["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            sent["Content-Type"] = FHIR_JSON
            data = json.dumps(body)
        try:
            return self._session.request(method, url, data=data, headers=sent, timeout=self._timeout, stream=stream)
        except requests.RequestException as error:
            raise Unreachable(f"the consumer was not reached: {type(error).__name__}") from error

    def expect(self, response: requests.Response, status: int) -> requests.Response:
        """The response, if it has that status; raises `SubmitError` with what it says otherwise."""
        if response.status_code != status:
            raise _refused(response, SubmitError)
        return response

    def _open(self, report: Report, url: str) -> requests.Response:
        response = self.request(
            "GET",
            url,
            accept="application/fhir+ndjson",
            headers={"Accept-Encoding": "gzip"},
            stream=True,
            authorized=report.manifest.get("requiresAccessToken") is not False,
        )
        return self.expect(response, 200)


@contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except (requests.RequestException, json.JSONDecodeError) as error:
        raise IncompleteDownload(f"a file broke off: {type(error).__name__}") from error


def _object(response: requests.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise SubmitError("the consumer's answer is not a JSON object", status=response.status_code)
    return body


def _retry_after(response: requests.Response, default: float) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), LONGEST_PAUSE_SECONDS) if value.isdecimal() else default


def _refused(response: requests.Response, kind: type[SubmitError]) -> SubmitError:
    try:
        outcome = response.json()
    except (ValueError, requests.RequestException):
        outcome = None
    return refusal(kind, response.status_code, outcome)
