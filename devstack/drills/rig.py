"""What drills run on: one stack with short leases, a provider that serves slowly, and a proxy before Postgres.

Its workers reach Postgres through the proxy, which passes everything on until a drill puts a trigger into it. A `Trial`
is one submission, of a tenant of its own, under one fault.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from bulk_submit_client import Report, StatusHandle, SubmitClient, SubmitError, Submitter

from devstack.generator import generate
from devstack.provider import Fault, SampleProvider
from devstack.proxy import PostgresProxy
from devstack.servers import OwnedDirectory
from devstack.stack import Child, Stack, wait_until
from schema import submissions
from schema.database import create_engine

SUBMITTER = Submitter("urn:bulk-submit:drill", "drill")
SUBMISSION = "drill"
MANIFEST = "manifest.json"
LEASE_SECONDS = 2.0
STALL_SECONDS = 5.0
SETTINGS = {
    "BULK_SUBMIT_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "BULK_SUBMIT_STALL_SECONDS": f"{STALL_SECONDS:g}",
    "BULK_SUBMIT_SLICE_SECONDS": "5",
    "BULK_SUBMIT_SWEEP_SECONDS": "1",
    "BULK_SUBMIT_RETRY_DELAY_SECONDS": "0.2",
    "BULK_SUBMIT_RETRY_DELAY_CAP_SECONDS": "1",
    "BULK_SUBMIT_FETCH_BACKOFF_SECONDS": "0.05",
    "BULK_SUBMIT_BATCH_LINES": "500",
    "BULK_SUBMIT_POLL_INTERVAL_SECONDS": "1",
}
POLL_SECONDS = 0.05
WAIT_SECONDS = 30.0
END_SECONDS = 90.0


@dataclass(frozen=True)
class Holder:
    """A step under lease: who works on it, and how far it is."""

    step_id: int
    file_id: int
    file: str
    worker_id: str
    token: int
    lines: int

    @property
    def node(self) -> str:
        """The name that the worker node was launched by."""
        return self.worker_id.partition("@")[0]

    @property
    def pid(self) -> int:
        """The process of the node's pool that works on it."""
        return int(self.worker_id.rpartition("/")[2].partition("-")[0])


class Rig:
    """Use as a context. `rate` is in bytes per second and response."""

    def __init__(
        self,
        *,
        resources: int = 20_000,
        lines_per_file: int = 2_000,
        workers: Sequence[str] = ("alpha", "beta"),
        rate: int = 4_000_000,
        settings: Mapping[str, str] = SETTINGS,
        proxied: bool = True,
    ) -> None:
        self.resources = resources
        self.workers = list(workers)
        self.rate = rate
        self._lines_per_file = lines_per_file
        self._settings = settings
        self._proxied = proxied

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as exits:
            self.directory = exits.enter_context(OwnedDirectory("drill"))
            served = self.directory / "served"
            served.mkdir()
            self.samples = generate(served, self.resources, lines_per_file=self._lines_per_file)
            self.provider = exits.enter_context(SampleProvider(served))
            self.stack = exits.enter_context(Stack(overrides=self._settings))
            self.proxy = exits.enter_context(PostgresProxy(self.stack.settings.database_url))
            api = self.stack.launch_api()
            self.stack.launch_sweeps()
            self.calm()
            api()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.clear()
        self._exits.close()

    @property
    def environment(self) -> dict[str, str]:
        """What workers see beside the stack's own environment."""
        return {"BULK_SUBMIT_DATABASE_URL": self.proxy.url} if self._proxied else {}

    def node(self, name: str) -> Child:
        """The worker node of that name."""
        return self.stack.child(name)

    def launch(self, name: str, *, module: Sequence[str] = ("cli",)) -> Callable[[], None]:
        """Start a worker node; the function returned waits until it is ready."""
        return self.stack.launch_worker(name, environment=self.environment, module=module)

    def calm(self) -> None:
        """No faults, and every worker up: those that have ended are started again."""
        self.proxy.clear()
        self.provider.clear()
        self.provider.add(Fault(bytes_per_second=self.rate))
        running = {child.name for child in self.stack.children if child.running}
        for wait in [self.launch(name) for name in self.workers if name not in running]:
            wait()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database holds; asked directly, not through the proxy."""
        with psycopg.connect(self.stack.settings.database_url) as connection:
            return connection.execute(query, values).fetchall()

    def named_rows(self, query: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The same, with named parameters."""
        with psycopg.connect(self.stack.settings.database_url) as connection:
            return connection.execute(query, values).fetchall()

    def trial(self, name: str, *, given: object = None) -> Trial:
        """Submit everything that is served, for a new tenant. `given`: see `Trial`."""
        return Trial(self, name, given)


class Poller(threading.Thread):
    """Polls a submission's status over HTTP all the time, and remembers how long each answer took, in seconds."""

    def __init__(self, handle: StatusHandle) -> None:
        super().__init__(name="poller", daemon=True)
        self.latencies: list[float] = []
        self.refusals = 0
        self.report: Report | None = None
        self._handle = handle
        self._left = threading.Event()

    def run(self) -> None:
        while self.report is None and not self._left.wait(POLL_SECONDS):
            started = time.monotonic()
            try:
                answer = self._handle.poll()
            except SubmitError:
                self.refusals += 1
            else:
                if isinstance(answer, Report):
                    self.report = answer
            self.latencies.append(time.monotonic() - started)

    def stop(self) -> None:
        """Poll no more."""
        self._left.set()
        self.join()

    def percentile(self, share: float) -> float:
        """The latency, in seconds, that this share of the polls stayed within."""
        ordered = sorted(self.latencies) or [0.0]
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


@dataclass(frozen=True)
class Strike:
    """When a fault struck (wall clock), and what to wait for: work of that step going on, or any step's."""

    at: float
    holder: Holder | None
    by_claim: bool


class Trial:
    """One submission under load and one fault: finds whom to strike, and keeps notes.

    `given` is what was prepared for the drill before the submission.
    """

    def __init__(self, rig: Rig, name: str, given: object = None) -> None:
        self.rig = rig
        self.name = name
        self.given = given
        self.tenant = f"{name}-{uuid.uuid4().hex[:8]}"
        self.deeds: list[str] = []
        self.faults: list[str] = []
        self.strike: Strike | None = None
        self._logs = {log: log.stat().st_size for log in {child.log for child in rig.stack.children}}
        engine = create_engine(rig.stack.settings, application="bulk-submit drill", pooled=False)
        with engine.begin() as connection:
            self.tenant_id = submissions.add_tenant(connection, self.tenant)
            submissions.add_submitter(connection, self.tenant_id, SUBMITTER.system, SUBMITTER.value, ignore_meta=False)
        engine.dispose()
        base_url = f"{rig.stack.settings.public_url}/{self.tenant}/fhir"
        self.client = SubmitClient(base_url, submitter=SUBMITTER)
        self.began = time.monotonic()
        self.client.submit(
            SUBMISSION,
            f"{rig.provider.url}/{MANIFEST}",
            fhir_base_url="http://ehr.example.org/fhir",
            status="completed",
        )
        self.poller = Poller(SubmitClient(base_url, submitter=SUBMITTER).status(SUBMISSION))
        self.poller.start()

    def did(self, text: str) -> None:
        """Note what was done."""
        self.deeds.append(text)

    def expect(self, holds: object, text: str) -> None:
        """Note a fault unless it holds."""
        if not holds:
            self.faults.append(text)

    def struck(self, holder: Holder | None = None, *, at: float | None = None, by_claim: bool = False) -> None:
        """Note that the fault struck, now or then (wall clock). `by_claim`: only the step's next claim ends it."""
        self.strike = Strike(time.time() if at is None else at, holder, by_claim)

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = WAIT_SECONDS) -> None:
        """Wait for a condition to hold."""
        wait_until(condition, what, seconds=seconds)

    def wait_for_end(self) -> Report:
        """Wait until the status says that the submission has ended."""
        self.wait(lambda: self.poller.report, "the submission ends", seconds=END_SECONDS)
        assert self.poller.report is not None
        return self.poller.report

    def holder(self, *, worker_id: str | None = None, file: str = "") -> Holder:
        """An ingest step that is not past the middle of its file; or this worker's; or this file's."""
        found: list[Holder] = []
        query = """
            SELECT s.id, s.file_id, f.url, s.worker_id, s.fencing_token, s.cursor_lines FROM steps s
            JOIN manifest_files f ON f.tenant_id = s.tenant_id AND f.id = s.file_id
            WHERE s.tenant_id = %s AND s.kind = 'ingest' AND s.state = 'ready' AND s.lease_expires_at > now()
              AND (s.worker_id = %s OR (%s <> '' AND f.url LIKE %s)
                   OR (%s AND s.cursor_lines BETWEEN 1 AND f.declared_count / 2))
            ORDER BY s.cursor_lines DESC LIMIT 1
        """
        anybody = worker_id is None and not file

        def find() -> list[Holder]:
            for row in self.rig.rows(query, self.tenant_id, worker_id, file, f"%/{file}", anybody):
                found.append(Holder(row[0], row[1], row[2].rpartition("/")[2], *row[3:]))
            return found

        self.wait(find, "a worker in the middle of a file")
        return found[0]

    def committed_lines(self) -> int:
        """Lines that committed batches cover."""
        query = "SELECT coalesce(sum(cursor_lines), 0)::bigint FROM steps WHERE tenant_id = %s"
        [[lines]] = self.rig.rows(query, self.tenant_id)
        return int(lines)

    def wait_for_load(self, share: float = 0.2) -> None:
        """Wait until that share of all lines is committed."""
        least = int(self.rig.resources * share)
        self.wait(lambda: self.committed_lines() >= least, f"{least} lines committed")

    def claimed_again(self, holder: Holder) -> bool:
        """Whether the step was claimed after the holder's claim."""
        query = "SELECT 1 FROM steps WHERE tenant_id = %s AND id = %s AND fencing_token > %s"
        return bool(self.rig.rows(query, self.tenant_id, holder.step_id, holder.token))

    def logged(self, text: str, name: str | None = None) -> bool:
        """Whether the node of that name, or any process, logged the text since the trial began."""
        return any(text in line for line in self.log_lines(name))

    def swept(self, name: str) -> bool:
        """Whether that process has made a sweep of leases since the trial began."""
        return any("sweep_leases[" in line and "succeeded" in line for line in self.log_lines(name))

    def log_lines(self, name: str | None = None) -> list[str]:
        """What was logged since the trial began."""
        logs = {child.log for child in self.rig.stack.children if name in (None, child.name)}
        lines: list[str] = []
        for log in sorted(logs):
            with log.open("rb") as file:
                file.seek(self._logs.get(log, 0))
                lines += file.read().decode(errors="replace").splitlines()
        return lines

    def everything(self) -> list[tuple[Any, ...]]:
        """What a worker could change of this tenant, row by row; the timeline of leases aside."""
        found: list[tuple[Any, ...]] = []
        for table in ("manifests", "manifest_files", "steps", "ingest_batches", "entry_issues", "artifacts"):
            query = f"SELECT '{table}', md5(t::text) FROM {table} t WHERE tenant_id = %s ORDER BY 2"  # noqa: S608
            found += self.rig.rows(query, self.tenant_id)
        query = "SELECT key, seq, version, op, batch_id, md5(body) FROM resource_versions WHERE key BETWEEN %s AND %s"
        return found + self.rig.rows(query + " ORDER BY key, seq", *self.keys())

    def keys(self) -> tuple[uuid.UUID, uuid.UUID]:
        """The lowest and the highest key of this tenant's resources."""
        prefix = self.tenant_id.to_bytes(4, "big")
        return uuid.UUID(bytes=prefix + bytes(12)), uuid.UUID(bytes=prefix + b"\xff" * 12)


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
