"""One provider and one submitter before a running fleet: what a scenario serves, sends and finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from bulk_submit_client import Report, SubmitClient, Submitter

from devstack.provider import Fault, SampleProvider
from devstack.stack import Stack, wait_until
from devstack.verify import differences
from schema import submissions
from schema.database import create_engine

SUBMITTER = Submitter("urn:acceptance", "north")
Line = dict[str, Any] | bytes


def patients(count: int, prefix: str = "p") -> list[dict[str, Any]]:
    """Patients that differ, about 300 bytes each."""
    return [
        {
            "resourceType": "Patient",
            "id": f"{prefix}-{number}",
            "name": [{"family": f"Family {number}", "given": ["Ada", "Zoë"]}],
            "telecom": [{"system": "phone", "value": f"+41 {number:09}"}],
            "address": [{"line": [f"{number} Long Street"], "city": "Basel", "country": "CH"}],
        }
        for number in range(count)
    ]


def line_of(line: Line) -> bytes:
    """The line as it is served, without its end."""
    return line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()


class Scene:
    """A tenant of its own on a stack that others use too. Use within the provider's context."""

    def __init__(self, stack: Stack, provider: SampleProvider, tenant: str, scratch: Path) -> None:
        self.stack = stack
        self.provider = provider
        self.tenant = tenant
        self._scratch = scratch
        self._reports = 0
        engine = create_engine(stack.settings, application="test scene", pooled=False)
        with engine.begin() as connection:
            tenant_id = submissions.add_tenant(connection, tenant)
            submissions.add_submitter(connection, tenant_id, SUBMITTER.system, SUBMITTER.value, ignore_meta=False)
        engine.dispose()
        self.base_url = f"{stack.settings.public_url}/{tenant}/fhir"
        self.client = SubmitClient(self.base_url, submitter=SUBMITTER)

    def serve(self, name: str, lines: Iterable[Line]) -> str:
        """Put a file before the provider; returns its name."""
        path = self.provider.directory / name
        path.write_bytes(b"".join(line_of(line) + b"\n" for line in lines))
        return name

    def manifest(self, *entries: str | dict[str, Any], name: str = "manifest.json", **more: Any) -> str:
        """Put a manifest before the provider that lists these files (of Patients, unless said); returns its URL."""
        output = [{"type": "Patient", "url": entry} if isinstance(entry, str) else entry for entry in entries]
        document = {
            "transactionTime": "2026-01-01T00:00:00Z",
            "request": f"{self.provider.url}/fhir/$export",
            "requiresAccessToken": False,
            "output": output,
            "error": [],
            **more,
        }
        (self.provider.directory / name).write_text(json.dumps(document))
        return f"{self.provider.url}/{name}"

    def submit(self, manifest_url: str | None, submission_id: str = "one", **more: Any) -> None:
        """Send the manifest, the only one of its submission."""
        self.client.submit(
            submission_id, manifest_url, fhir_base_url="http://ehr.test/fhir", status="completed", **more
        )

    def wait(self, submission_id: str = "one", *, seconds: float = 60) -> Receipts:
        """Poll until it has ended, and download everything."""
        report = self.client.wait(submission_id, timeout=seconds)
        self._reports += 1
        return Receipts(report, self.client, self._scratch / f"receipts-{self._reports}")

    def run(self, manifest_url: str | None, submission_id: str = "one", **more: Any) -> Receipts:
        """Send the manifest and wait for its receipts."""
        self.submit(manifest_url, submission_id, **more)
        return self.wait(submission_id)

    def stall(self, name: str, share: float = 0.5) -> Fault:
        """Let the provider fall silent once, after that share of the file, until the fault's `release` is set."""
        size = (self.provider.directory / name).stat().st_size
        return self.provider.add(Fault(name, times=1, stall_after=int(size * share)))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database holds; `%(tenant)s` stands for the tenant's number."""
        with psycopg.connect(self.stack.settings.database_url) as connection:
            [[tenant_id]] = connection.execute("SELECT id FROM tenants WHERE name = %s", (self.tenant,)).fetchall()
            return connection.execute(
                query, {"tenant": tenant_id, **{f"v{n}": v for n, v in enumerate(values)}}
            ).fetchall()

    def committed_lines(self) -> int:
        """How many lines are committed."""
        query = "SELECT coalesce(sum(cursor_lines), 0) FROM steps WHERE tenant_id = %(tenant)s AND kind = 'ingest'"
        [[lines]] = self.rows(query)
        return int(lines)

    def wait_for_lines(self, at_least: int = 1) -> None:
        """Wait until so many lines are committed."""
        wait_until(lambda: self.committed_lines() >= at_least, f"{at_least} lines committed", seconds=30)

    def holder(self) -> str:
        """The node that holds a lease of an ingest step: the name it was launched by."""
        held: list[str] = []

        def find() -> list[str]:
            query = (
                "SELECT worker_id FROM steps WHERE tenant_id = %(tenant)s AND kind = 'ingest' AND worker_id IS NOT NULL"
            )
            held[:] = [str(worker).split("@")[0] for (worker,) in self.rows(query)]
            return held

        wait_until(find, "a worker holds an ingest lease", seconds=30)
        return held[0]

    def differences(self, lines: Iterable[Line]) -> list[str]:
        """What the store holds otherwise than these lines, each of which has an id of its own."""
        return list(differences(self.stack.settings.database_url, _expected(lines), tenant=self.tenant))

    def versions(self) -> int:
        """How many versions the store holds, of all resources."""
        query = "SELECT count(*) FROM resource_history WHERE tenant = %(v0)s AND op <> 'affirm'"
        [[count]] = self.rows(query, self.tenant)
        return int(count)

    def wait_for(self, condition: Callable[[], object], what: str, *, seconds: float = 30) -> None:
        """Wait for a condition to hold."""
        wait_until(condition, what, seconds=seconds)


class Receipts:
    """A finished submission's status manifest and files."""

    def __init__(self, report: Report, client: SubmitClient, directory: Path) -> None:
        self.manifest = report.manifest
        self.outputs = [item["type"] for item in report.manifest.get("output", [])]
        self._paths = client.download(report, directory)

    def lines(self, kind: str) -> Iterator[dict[str, Any]]:
        """The lines of the files of a kind."""
        for path in self._paths:
            if path.name.startswith(kind):
                with path.open() as lines:
                    yield from map(json.loads, lines)

    @property
    def reconciliation(self) -> dict[str, Any]:
        """The reconciliation document, of a submission with one manifest."""
        [path] = [path for path in self._paths if path.name.startswith("reconciliation")]
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Every issue of severity error or fatal."""
        issues = (issue for outcome in self.lines("outcome") for issue in outcome["issue"])
        return [issue for issue in issues if issue["severity"] in ("error", "fatal")]

    @property
    def texts(self) -> list[str]:
        """What the errors say."""
        return [issue["details"]["text"] for issue in self.errors]

    def actions(self) -> Counter[str]:
        """The ledger's actions, counted. Fails where a line stands in it twice."""
        actions: Counter[str] = Counter()
        places: Counter[tuple[str, int]] = Counter()
        for entry in self.lines("ledger"):
            actions[entry["action"]] += 1
            places[entry["file"], entry["line"]] += 1
        assert not [place for place, count in places.items() if count > 1]
        return actions


def bulk_submit(scene: Scene, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as the scene's submitter and operator."""
    variables = {
        **os.environ,
        **scene.stack.environment,
        "BULK_SUBMIT_BASE": scene.base_url,
        "BULK_SUBMIT_SYSTEM": SUBMITTER.system,
        "BULK_SUBMIT_VALUE": SUBMITTER.value,
        "COLUMNS": "200",
        **environment,
    }
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=90, check=False)


def _expected(lines: Iterable[Line]) -> Iterator[tuple[str, str, bytes]]:
    for line in lines:
        body = line_of(line)
        resource = json.loads(body)
        yield resource["resourceType"], resource["id"], body
