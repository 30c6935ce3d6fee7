"""The sweeps that beat schedules: what time has passed by is cleared, stopped or deleted.

Each is idempotent, and bounded in what a run does and in how long it takes; what is oldest goes first, and the next run
goes on where one ended or was killed. Of two runs of one sweep, the one that finds the other at work does nothing more.
A run that ends leaves its report in `sweeps`, which `/metrics` shows.

Objects of the artifact store are deleted before their rows, and while no transaction is open. One that the store does
not let go is tried again after everything else.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import sqlalchemy as sa
import structlog

from schema import fleet, leases, retention, sweeps
from schema.database import DATABASE_ERRORS, create_engine
from schema.retention import ManifestKey, StoredObject, SubmissionKey
from settings import Settings, settings
from submit_tasks.app import app
from submit_tasks.messages import BROKER_ERRORS, queue_length, ring
from workers.artifact_store import ArtifactStore, ArtifactStoreError

log = structlog.get_logger(__name__)

SECONDS_AT_ONCE = 15.0
"""After so long a run ends at the next border of a chunk: one small worker runs all of them."""

REFUSALS_AT_ONCE = 3
"""So many refusals of the artifact store in a row end a run: it is down."""

BATCHES_A_CHUNK = 16  # with an issue for each of their lines, in the worst case
MANIFESTS_A_CHUNK = 100
OBJECTS_A_CHUNK = 100
ROWS_A_CHUNK = 1000
LOG_ROWS_A_CHUNK = 10_000


class _AtWork(Exception):  # noqa: N818
    """Another run of the same sweep is at work."""


class _Enough(Exception):  # noqa: N818
    """The run reached its bound; the next one goes on."""


class Run:
    """One run of a sweep. `report` counts what it did; `limit` bounds the things it does."""

    def __init__(self, name: str, settings: Settings, engine: sa.Engine, limit: int) -> None:
        self.settings = settings
        self.limit = limit
        self.report: defaultdict[str, int] = defaultdict(int)
        self._lock = LOCKS[name]
        self._engine = engine
        self._connection = engine.connect()
        self._ends = time.monotonic() + SECONDS_AT_ONCE

    def close(self) -> None:
        """Let go of its connection."""
        self._connection.close()

    @contextmanager
    def alone(self) -> Iterator[sa.Connection]:
        """A transaction that no other run of this sweep has beside it."""
        with self._connection.begin():
            if not leases.only_one(self._connection, self._lock):
                raise _AtWork
            yield self._connection

    @contextmanager
    def guarded(self) -> Iterator[sa.Connection]:
        """A connection for what commits by itself, while no other run of this sweep goes on."""
        with self._engine.connect() as connection, self.alone():
            yield connection

    def check(self) -> None:
        """Between two chunks: raises if the run has had its time."""
        if time.monotonic() > self._ends:
            raise _Enough

    def repeat(self, what: str, chunk: Callable[[sa.Connection, int], int], limit: int) -> None:
        """Do it in transactions of `limit` rows until one finds fewer."""
        while True:
            with self.alone() as connection:
                done = chunk(connection, limit)
            self.report[what] += done
            if done < limit:
                return
            self.check()


def run(name: str, settings: Settings, limit: int | None = None) -> dict[str, int] | None:
    """Run a sweep now; returns its report, None where another run is at work. `limit` is in place of its own bound."""
    started_at = time.monotonic()
    engine = create_engine(settings, application=f"bulk-submit sweep {name}", pooled=False)
    try:
        work = Run(name, settings, engine, LIMITS[name] if limit is None else limit)
        try:
            work.report["more"] = 0
            try:
                SWEEPS[name](work)
            except _Enough:
                work.report["more"] = 1
            with work.alone() as connection:
                sweeps.record(connection, name, time.monotonic() - started_at, work.report)
        finally:
            work.close()
    except _AtWork:
        log.info("swept elsewhere", sweep=name)
        return None
    except Exception:
        with suppress(*DATABASE_ERRORS), engine.begin() as connection:
            sweeps.record_failure(connection, name)
        raise
    finally:
        engine.dispose()
    log.info("swept", sweep=name, **work.report)
    return dict(work.report)


def _leases(run: Run) -> None:
    with run.guarded() as connection:
        run.report["expired"] = len(leases.expire(connection, run.limit))
        run.report["slots"] = slots = max(fleet.slots(connection), 1)
        due = leases.due_manifests(connection, slots)
    run.report.update({"due": len(due), "called": 0})
    if due:
        try:
            called = due[: max(slots - queue_length(), 0)]
        except BROKER_ERRORS as error:
            log.warning("broker not reachable", error=type(error).__name__)
            return
        ring(called)
        run.report["called"] = len(called)


def _fleet(run: Run) -> None:
    with run.alone() as connection:
        struck = fleet.forget_silent(connection, run.settings.fleet_forget_seconds, run.limit)
    run.report["workers"] = len(struck)
    for node in struck:
        log.info("node struck out: not seen for long", node=node)


def _expired(run: Run) -> None:
    counted = ("submissions", "refusals", "objects", "tokens", "batches", "issues", "events")
    run.report.update(dict.fromkeys(counted, 0))
    run.repeat("tokens", retention.forget_expired_tokens, ROWS_A_CHUNK)
    with run.alone() as connection:
        expired = retention.expired_submissions(connection, run.settings.receipt_ttl_seconds, run.limit)
    store = ArtifactStore(run.settings.artifact_store_url)
    refusals = 0
    for submission in expired:
        try:
            _expire(run, store, submission)
            refusals = 0
        except ArtifactStoreError as error:
            log.warning("submission not expired yet", submission=submission.id, error=str(error))
            with run.alone() as connection:
                retention.note_kept_submission(connection, submission)
            run.report["refusals"] += 1
            refusals += 1
            if refusals == REFUSALS_AT_ONCE:
                raise _Enough from error
        run.check()
    if len(expired) == run.limit:
        raise _Enough


def _expire(run: Run, store: ArtifactStore, submission: SubmissionKey) -> None:
    """Delete what the submission was told. Raises `ArtifactStoreError`."""
    while True:
        with run.alone() as connection:
            objects = retention.objects_of(connection, submission, OBJECTS_A_CHUNK)
        if not objects:
            break
        store.delete(stored.path for stored in objects)
        with run.alone() as connection:
            run.report["objects"] += retention.forget_objects(connection, objects)
        run.check()
    with run.alone() as connection:
        run.report["tokens"] += retention.forget_tokens(connection, submission)
    while True:
        with run.alone() as connection:
            manifests = retention.uncleared_manifests(connection, submission, MANIFESTS_A_CHUNK)
        if not manifests:
            break
        for manifest in manifests:
            _clear(run, manifest)
            run.check()
    with run.alone() as connection:
        retention.mark_expired(connection, submission)
    run.report["submissions"] += 1


def _clear(run: Run, manifest: ManifestKey) -> None:
    """Delete what only the manifest's receipts were made of."""
    after = 0
    while True:
        with run.alone() as connection:
            cleared = retention.clear_batches(connection, manifest, after, BATCHES_A_CHUNK)
        run.report["batches"] += cleared.batches
        run.report["issues"] += cleared.issues
        if cleared.last is None:
            break
        after = cleared.last
        run.check()
    position = -1
    while True:
        with run.alone() as connection:
            files = retention.clear_files(connection, manifest, position, ROWS_A_CHUNK)
        if files.last is None:
            break
        position = files.last
        run.check()
    run.repeat("events", lambda connection, limit: retention.forget_events(connection, manifest, limit), ROWS_A_CHUNK)
    with run.alone() as connection:
        retention.clear_manifest(connection, manifest)


def _idle(run: Run) -> None:
    seconds = run.settings.idle_submission_seconds
    with run.alone() as connection:
        idle = retention.idle_submissions(connection, seconds, run.limit)
    run.report["submissions"] = 0
    for submission in idle:
        with run.alone() as connection:
            run.report["submissions"] += retention.stop_if_idle(connection, submission, seconds)
        run.check()
    if len(idle) == run.limit:
        raise _Enough


def _orphans(run: Run) -> None:
    run.report.update({"objects": 0, "refusals": 0})
    with run.alone() as connection:
        orphans = retention.orphans(connection, run.settings.orphan_grace_seconds, run.limit)
    if not orphans:
        return
    store = ArtifactStore(run.settings.artifact_store_url)
    refusals = 0
    for orphan in orphans:
        deleted = _delete(store, orphan)
        with run.alone() as connection:
            if deleted:
                run.report["objects"] += retention.forget_objects(connection, [orphan])
            else:
                retention.note_kept_objects(connection, [orphan])
        run.report["refusals"] += not deleted
        refusals = 0 if deleted else refusals + 1
        if refusals == REFUSALS_AT_ONCE:
            raise _Enough
        run.check()
    if len(orphans) == run.limit:
        raise _Enough


def _delete(store: ArtifactStore, orphan: StoredObject) -> bool:
    try:
        store.delete([orphan.path])
    except ArtifactStoreError as error:
        log.warning("object not deleted yet", artifact=orphan.id, error=str(error))
        return False
    return True


def _logs(run: Run) -> None:
    run.report.update(dict.fromkeys(retention.LOGS, 0))
    seconds = run.settings.log_ttl_seconds
    for _ in range(run.limit):
        deleted = 0
        for name in retention.LOGS:
            with run.alone() as connection:
                gone = retention.forget_log(connection, name, seconds, LOG_ROWS_A_CHUNK)
            run.report[name] += gone
            deleted = max(deleted, gone)
        if deleted < LOG_ROWS_A_CHUNK:
            return
        run.check()
    raise _Enough


SWEEPS: dict[str, Callable[[Run], None]] = {
    "leases": _leases,
    "fleet": _fleet,
    "expired": _expired,
    "idle": _idle,
    "orphans": _orphans,
    "logs": _logs,
}
LIMITS = {"leases": 1000, "fleet": 1000, "expired": 100, "idle": 1000, "orphans": 1000, "logs": 100}
LOCKS = {name: 0x73776565 + number for number, name in enumerate(SWEEPS)}
"""Any fixed numbers: nobody else takes them."""


def sweep_leases() -> None:
    """Clear leases that ran out, and call for hands where steps are due and too few messages wait.

    Alone it would bring every manifest to its end.
    """
    run("leases", settings())


def sweep_fleet() -> None:
    """Strike out nodes that were not seen for long."""
    run("fleet", settings())


def sweep_expired() -> None:
    """Delete what submissions were told, once their time to live is over since they ended; and old poll tokens."""
    run("expired", settings())


def sweep_idle() -> None:
    """Stop submissions that were left open."""
    run("idle", settings())


def sweep_orphans() -> None:
    """Delete objects that were written and never published."""
    run("orphans", settings())


def sweep_logs() -> None:
    """Delete old lines of the logs."""
    run("logs", settings())


for _task in (sweep_leases, sweep_fleet, sweep_expired, sweep_idle, sweep_orphans, sweep_logs):
    app.task(name=f"submit_tasks.{_task.__name__}")(_task)
