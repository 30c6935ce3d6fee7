"""The API as a process of its own, on a free port of the loopback, before a database that a test may look into."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import requests
import sqlalchemy as sa
from cryptography.fernet import Fernet

from devstack.provider import SampleProvider
from devstack.servers import free_port
from devstack.stack import Child, wait_until
from schema import submissions
from schema.database import create_engine
from settings import Settings
from workers.hands import Hand

FHIR_JSON = "application/fhir+json"
SYSTEM = "urn:test"
SUBMITTER = "north"
EVENT_STATUS = "http://hl7.org/fhir/event-status"
SEVERITIES = {"fatal", "error", "warning", "information"}
INTERNALS = ("Traceback", "psycopg", "sqlalchemy", "SELECT ", "INSERT ", ".py", "site-packages")


def submitter(value: str = SUBMITTER) -> dict[str, Any]:
    """The parameter that names the submitter."""
    return {"name": "submitter", "valueIdentifier": {"system": SYSTEM, "value": value}}


def submission(submission_id: str) -> dict[str, Any]:
    """The parameter that names the submission."""
    return {"name": "submissionId", "valueString": submission_id}


def status(code: str) -> dict[str, Any]:
    """The parameter that says how the submission stands."""
    return {"name": "submissionStatus", "valueCoding": {"system": EVENT_STATUS, "code": code}}


def header(name: str, value: str) -> dict[str, Any]:
    """The parameter of one request header."""
    part = [{"name": "headerName", "valueString": name}, {"name": "headerValue", "valueString": value}]
    return {"name": "fileRequestHeader", "part": part}


def parameters(*items: Any) -> dict[str, Any]:
    """The resource of these parameters."""
    return {"resourceType": "Parameters", "parameter": list(items)}


def manifest(submission_id: str, url: str, *more: Any) -> dict[str, Any]:
    """A $bulk-submit of one manifest, in progress unless `more` says otherwise."""
    return parameters(
        submitter(),
        submission(submission_id),
        {"name": "manifestUrl", "valueUrl": url},
        {"name": "fhirBaseUrl", "valueUrl": "http://ehr.test/fhir"},
        *more,
    )


def issues(response: requests.Response, code: int | None = None) -> list[dict[str, Any]]:
    """The issues of an answer that is an OperationOutcome and tells no internals."""
    assert code is None or response.status_code == code, f"{response.status_code} {response.text}"
    assert response.headers["Content-Type"] == FHIR_JSON
    outcome = response.json()
    assert outcome["resourceType"] == "OperationOutcome"
    assert outcome["issue"]
    for issue in outcome["issue"]:
        assert issue["severity"] in SEVERITIES
        assert issue["code"]
        assert issue["details"]["text"].strip()
    assert not [word for word in INTERNALS if word in response.text], response.text
    found: list[dict[str, Any]] = outcome["issue"]
    return found


class Api:
    """`bulk-submit api` before that database, with one submitter of the default tenant. Ends with the context.

    Without `broker_url`, nothing listens where the broker should be. `overrides` are settings by their names.
    """

    def __init__(
        self, database_url: str, directory: Path, *, broker_url: str | None = None, **overrides: object
    ) -> None:
        port = free_port()
        self.log = directory / "api.log"
        self.public_url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.public_url}/default/fhir"
        self._port = port
        values = {
            "database_url": database_url,
            "broker_url": broker_url or f"redis://127.0.0.1:{free_port()}/0",
            "artifact_store_url": f"file://{directory}/artifacts",
            "public_url": self.public_url,
            "sealing_keys": Fernet.generate_key().decode(),
            **{name: str(value) for name, value in overrides.items()},
        }
        self.settings = Settings(**values)  # type: ignore[arg-type]
        self._environment = {f"BULK_SUBMIT_{name.upper()}": value for name, value in values.items()}

    def __enter__(self) -> Self:
        self._engine = create_engine(self.settings, application="test api", pooled=False)
        self.add_submitter(SUBMITTER)
        self.session = requests.Session()
        command = [sys.executable, "-m", "cli", "api", "--port", str(self._port)]
        self._child = Child("api", command, self.log, self._environment)
        try:
            wait_until(self._answers, "the API answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()
        self.session.close()
        self._engine.dispose()

    def _answers(self) -> bool:
        assert self._child.running, self._child.tail()
        try:
            return self.session.get(f"{self.public_url}/healthz", timeout=5).ok
        except requests.ConnectionError:
            return False

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process ever held."""
        memory = Path(f"/proc/{self._child.process.pid}/status").read_text()
        [line] = [line for line in memory.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    def add_submitter(self, value: str, *, tenant: str = "default") -> None:
        """Register a submitter."""
        with self._engine.begin() as connection:
            tenant_id = submissions.add_tenant(connection, tenant)
            submissions.add_submitter(connection, tenant_id, SYSTEM, value, ignore_meta=False)

    def post(self, operation: str, body: Any, **headers: str) -> requests.Response:
        """POST a JSON value, or bytes as they are, to an operation of the default tenant."""
        sent = {"Content-Type": FHIR_JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        return self.session.post(f"{self.base_url}/{operation}", headers=sent, timeout=30, **data)

    def submit(self, body: Any, **headers: str) -> requests.Response:
        """POST to $bulk-submit."""
        return self.post("$bulk-submit", body, **headers)

    def get(self, path: str, **headers: str) -> requests.Response:
        """GET a path below the FHIR base, or a whole URL, without asking for a content coding."""
        url = path if path.startswith("http") else f"{self.base_url}/{path}"
        sent = {"Accept-Encoding": "identity", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.session.get(url, headers=sent, timeout=30)

    def raw(self, method: str, target: str, body: bytes | None = None, **headers: str) -> requests.Response:
        """A request whose target goes out as it stands, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body or b"")), **headers}.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            response = requests.Response()
            response.status_code = answer.status
            response.headers.update(answer.getheaders())
            response._content = answer.read()
            return response
        finally:
            connection.close()

    def poll_url(self, submission_id: str, **headers: str) -> str:
        """Ask for a poll URL."""
        body = parameters(submitter(), submission(submission_id))
        answer = self.post("$bulk-submit-status", body, **headers)
        issues(answer, 202)
        return answer.headers["Content-Location"]

    def finish(self, submission_id: str, url: str) -> None:
        """Submit the manifest, complete the submission, and do the work."""
        issues(self.submit(manifest(submission_id, url, status("completed"))), 200)
        self.work()

    def work(self) -> None:
        """Do everything that is due, as a worker would."""
        Hand(self.settings, "test/1", lambda _: None).work(0)

    def execute(self, statement: str, **values: Any) -> None:
        """Run a statement."""
        with self._engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def rows(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._engine.begin() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query), values)]

    def manifests(self, submission_id: str) -> list[tuple[int, str]]:
        """Ids and states of the manifests of a submission."""
        query = """SELECT m.id, m.status FROM manifests m JOIN submissions s
                   ON s.tenant_id = m.tenant_id AND s.id = m.submission_id
                   WHERE s.submission_id = :name ORDER BY m.id"""
        return [(int(number), str(state)) for number, state in self.rows(query, name=submission_id)]


def serve(provider: SampleProvider, name: str, **files: Iterable[bytes]) -> str:
    """Put files of Patients before the provider, and the manifest that lists them; returns the manifest's URL."""
    for file, lines in files.items():
        (provider.directory / f"{name}-{file}.ndjson").write_bytes(b"".join(line + b"\n" for line in lines))
    document = {
        "transactionTime": "2026-01-01T00:00:00Z",
        "requiresAccessToken": False,
        "output": [{"type": "Patient", "url": f"{name}-{file}.ndjson"} for file in files],
        "error": [],
    }
    (provider.directory / f"{name}.json").write_text(json.dumps(document))
    return f"{provider.url}/{name}.json"
