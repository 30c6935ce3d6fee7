"""A database on which a test puts manifests, claims their steps and writes their lines, without processes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import sqlalchemy as sa

from devstack.stack import wait_until
from schema import files, leases, submissions
from schema.database import create_engine
from schema.files import PlannedFile
from schema.leases import Lease, Progress
from schema.tables import metadata
from settings import Settings
from workers.fetch.ndjson import Block
from workers.ingest.lines import LineReader, LineRules
from workers.ingest.write import Origins, write_batch

_numbers = itertools.count(1)


def patient(resource_id: str, *, name: str = "Ada") -> bytes:
    """A Patient as a line, without its line end."""
    return f'{{"resourceType":"Patient","id":"{resource_id}","name":[{{"family":"{name}"}}]}}'.encode()


def lines_of(*lines: bytes) -> Iterator[Block]:
    """The lines as the one block of a file."""
    yield Block(b"".join(line + b"\n" for line in lines), 0, 1)


class Stage:
    """One connection to a migrated database, with a submitter of the default tenant."""

    def __init__(self, settings: Settings, *, submitter: str = "north", application: str = "test stage") -> None:
        self.settings = settings
        self._submitter = submitter
        self._engine = create_engine(settings, application=application, pooled=False)

    def __enter__(self) -> Self:
        self.connection = self._engine.connect()
        with self.connection.begin():
            tenant_id = submissions.find_tenant(self.connection, "default")
            assert tenant_id is not None
            self.tenant_id = tenant_id
            self.submitter_id = submissions.add_submitter(
                self.connection, tenant_id, "urn:test", self._submitter, ignore_meta=False
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._engine.dispose()

    def add_manifest(self, url: str | None = None, *, tenant_id: int | None = None) -> int:
        """A manifest, pending, in a submission of its own."""
        number = next(_numbers)
        with self.connection.begin():
            submission = submissions.hold_submission(
                self.connection,
                self.tenant_id if tenant_id is None else tenant_id,
                self.submitter_id,
                f"{self._submitter}-{number}",
                owner_subject=None,
                request_url=None,
            )
            return submissions.add_manifest(
                self.connection,
                submission,
                manifest_url=url or f"http://provider.test/{self._submitter}/{number}/manifest.json",
                replaces_url=None,
                kickoff_digest=b"digest",
                parameters=submissions.FetchParameters("http://ehr.test", None, [], [], [], None),
            )

    def claim(self, worker: str = "test/1", *, hint: int = 0, seconds: float = 30) -> Lease:
        """The next step; fails the test if there is none."""
        lease = leases.claim_next(self.connection, worker, seconds, hint)
        assert lease is not None
        return lease

    def ingest_lease(self, worker: str = "test/1", *, files_listed: int = 1) -> Lease:
        """A lease on the first file of a manifest just planned."""
        manifest_id = self.add_manifest()
        plan = self.claim_of(manifest_id, worker)
        listed = [PlannedFile("output", f"http://provider.test/{manifest_id}/{n}.ndjson") for n in range(files_listed)]
        files.finish_plan(self.connection, plan, listed)
        return self.claim_of(manifest_id, worker)

    def claim_of(self, manifest_id: int, worker: str) -> Lease:
        """A lease on a step of that manifest, whatever else is due."""
        others = "manifest_id <> :id AND state = 'ready' AND worker_id IS NULL"
        self.execute(f"UPDATE steps SET ready_at = 'infinity' WHERE {others}", id=manifest_id)
        lease = self.claim(worker)
        self.execute(f"UPDATE steps SET ready_at = clock_timestamp() WHERE {others}", id=manifest_id)
        assert lease.manifest_id == manifest_id
        return lease

    def expire(self, lease: Lease) -> None:
        """Let the lease run out, and the delay after it, as far as the database is concerned."""
        over = "lease_expires_at = clock_timestamp(), ready_at = clock_timestamp()"
        self.execute(f"UPDATE steps SET {over} WHERE id = :id", id=lease.step_id)

    def reader(self, lease: Lease, **rules: Any) -> LineReader:
        """A reader of the lease's file, any type accepted."""
        defaults: dict[str, Any] = {
            "position": 0,
            "declared_type": None,
            "organized_by": None,
            "ignore_meta": False,
            "batch_lines": self.settings.batch_lines,
            "batch_bytes": self.settings.batch_bytes,
            "max_line_bytes": self.settings.max_line_bytes,
        }
        return LineReader(LineRules(tenant_id=lease.tenant_id, manifest_id=lease.manifest_id, **{**defaults, **rules}))

    def write(self, lease: Lease, *lines: bytes) -> Progress:
        """The lines as the next batch of the lease's file, committed under the lease."""
        [batch] = self.reader(lease).batches(lines_of(*lines), lease.cursor_bytes, lease.cursor_lines + 1)
        return write_batch(self.connection, lease, batch, Origins(lease), by_key=False, lease_seconds=30)

    def renew(self, lease: Lease) -> leases.Orders:
        """A heartbeat."""
        with self.connection.begin():
            return leases.renew(self.connection, lease, 30)

    def revoke(self, manifest_id: int, status: str = "stopped") -> list[int]:
        """End the manifest's submission's live manifests, in one transaction."""
        with self.connection.begin():
            row = self.connection.execute(
                sa.text("""SELECT s.submitter_id, s.submission_id FROM submissions s
                           JOIN manifests m ON m.tenant_id = s.tenant_id AND m.submission_id = s.id
                           WHERE m.id = :id"""),
                {"id": manifest_id},
            ).one()
            submission = submissions.find_submission(self.connection, self.tenant_id, *row)
            assert submission is not None
            return submissions.revoke(self.connection, submission, status)

    def dump(self) -> dict[str, list[str]]:
        """Every row of every table."""
        tables = " UNION ALL ".join(f"SELECT '{table}', row::text FROM {table} row" for table in metadata.tables)
        found: dict[str, list[str]] = {table: [] for table in metadata.tables}
        for table, row in self.rows(f"{tables} ORDER BY 1, 2"):
            found[table].append(row)
        return found

    def clear(self) -> None:
        """Forget everything but tenants and submitters. For tests that share a database; numbers go on."""
        kept = ("tenants", "submitters", "resource_types")
        with self.connection.begin():
            for table in reversed(metadata.sorted_tables):
                if table.name not in kept:
                    self.connection.execute(table.delete())

    def waits_for_lock(self, application: str) -> bool:
        """Whether a session of that application name waits for a lock that another one holds."""
        query = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name LIKE :name AND wait_event_type = 'Lock'"""
        return bool(self.rows(query, name=application))

    def waits_for(self, waiter: str, holder: str) -> bool:
        """Whether the session of the one application name waits for a lock of the other's."""
        query = """SELECT 1 FROM pg_stat_activity w JOIN pg_stat_activity h ON h.pid = ANY(pg_blocking_pids(w.pid))
                   WHERE w.datname = current_database() AND w.wait_event_type = 'Lock'
                     AND w.application_name = :waiter AND h.application_name = :holder"""
        return bool(self.rows(query, waiter=waiter, holder=holder))

    def other_tenant(self) -> int:
        """The id of a second tenant."""
        with self.connection.begin():
            return submissions.add_tenant(self.connection, "other")

    def execute(self, statement: str, **parameters: Any) -> None:
        """Run a statement and commit."""
        with self.connection.begin():
            self.connection.execute(sa.text(statement), parameters)

    def rows(self, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self.connection.begin():
            return [tuple(row) for row in self.connection.execute(sa.text(query), parameters)]


COMMIT = sa.text("COMMIT")
"""For `Actor.begin`: the point just before the first COMMIT."""


class Actor:
    """A session with a thread of its own, which stops inside its transaction where a test wants it to."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self.stage = Stage(settings, application=name)
        self._pool = ThreadPoolExecutor(1)
        self._stop_at: sa.TextClause | None = None
        self._stopped = threading.Event()
        self._go = threading.Event()

    def __enter__(self) -> Self:
        self.stage.__enter__()
        sa.event.listen(self.stage.connection, "after_cursor_execute", self._after)
        sa.event.listen(self.stage.connection, "commit", self._before_commit)
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._pool.shutdown()
        self.stage.__exit__()

    def begin(self, operation: Callable[[Stage], Any], *, stop_after: sa.TextClause | None = None) -> Future[Any]:
        """Do it in the thread; with `stop_after`, return once that statement of it has been executed."""
        self._go.clear()
        self._stopped.clear()
        self._stop_at = stop_after
        future = self._pool.submit(operation, self.stage)
        if stop_after is not None:
            wait_until(lambda: self._stopped.is_set() or future.done(), f"{self.name} is where it is to stop")
            assert self._stopped.is_set(), f"{self.name} never came there"
        return future

    def go(self) -> None:
        """Go on from where it stopped."""
        self._go.set()

    def _after(self, *arguments: Any) -> None:
        if arguments[4].invoked_statement is self._stop_at:
            self._wait()

    def _before_commit(self, _: sa.Connection) -> None:
        if self._stop_at is COMMIT:
            self._wait()

    def _wait(self) -> None:
        self._stop_at = None
        self._stopped.set()
        assert self._go.wait(30), f"{self.name} was left where it stopped"
