"""A pair of hands: claims what is due, does it under a lease, and hands back what it cannot finish.

    claim ──▶ plan │ ingest │ publish ──▶ ended, in a fenced transaction
      ▲              │
      │              ├─ lease lost ─────────▶ stop, write nothing more
      │              ├─ provider's fault ───▶ released with a delay; over the cap, ended as failed with its cause
      │              ├─ our own fault ──────▶ released with a delay
      └──────────────┴─ this node leaves ───▶ released at once, attempt given back, another hand called

Knows nothing of Celery: `ring` sends messages, and any of them may be lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa
import structlog

from schema import files, fleet, leases
from schema.database import DATABASE_ERRORS, create_engine, is_conflict, is_disconnect
from schema.files import Problem
from schema.leases import Lease, LeaseLost, WriteRefused
from settings import Settings
from workers import steps
from workers.artifact_store import ArtifactStore
from workers.draining import drain_ordered
from workers.fetch.errors import FetchError
from workers.ingest.resume import FileChanged
from workers.keeper import Keeper
from workers.steps import HandBack, Work

log = structlog.get_logger(__name__)

RUNNERS: dict[str, Callable[[Work], None]] = {"plan": steps.plan, "ingest": steps.ingest, "publish": steps.publish}


class Hand:
    """One of a worker's slots. `ring` asks for a hand for each of the manifest ids it is given."""

    def __init__(self, settings: Settings, worker_id: str, ring: Callable[[Sequence[int]], None]) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._ring = ring
        self._engine = create_engine(settings, application=f"bulk-submit hand {worker_id}", pooled=False)
        self._keeper_engine = create_engine(
            settings,
            application=f"bulk-submit keeper {worker_id}",
            pooled=False,
            answer_within=settings.lease_seconds / 3,
        )
        self._store = ArtifactStore(settings.artifact_store_url)
        self._connection: sa.Connection | None = None

    def work(self, hint: int) -> None:
        """Do what is due, `hint`'s manifest among equals, until nothing is, the slice is used or the node leaves."""
        slice_ends = time.monotonic() + self._settings.slice_seconds
        try:
            while not drain_ordered():
                connection = self._connected()
                claimed_at = time.monotonic()
                try:
                    lease = self._claim(connection, hint)
                except DATABASE_ERRORS as error:
                    if not is_conflict(error):
                        raise
                    continue
                if lease is None:
                    return
                with structlog.contextvars.bound_contextvars(
                    manifest=lease.manifest_id, step=lease.step_id, kind=lease.kind, token=lease.fencing_token
                ):
                    if not self._do(lease, connection, claimed_at):
                        return
                if time.monotonic() > slice_ends:
                    self._ring([lease.manifest_id])
                    return
        except DATABASE_ERRORS as error:
            if not is_disconnect(error):
                raise
            log.warning("database not reachable; the sweep will call again", error=type(error).__name__)
        finally:
            self._disconnect()

    def _claim(self, connection: sa.Connection, hint: int) -> Lease | None:
        settings = self._settings
        return leases.claim_next(
            connection,
            self._worker_id,
            settings.lease_seconds,
            hint,
            retry_delay=settings.retry_delay_seconds,
            retry_delay_cap=settings.retry_delay_cap_seconds,
        )

    def _connected(self) -> sa.Connection:
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self._connection = self._engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect_again(self, alive: Callable[[], None]) -> sa.Connection:
        """A new connection, however long the database takes to come back; `alive` ends it when the lease is gone."""
        while True:
            alive()
            try:
                self._connection = self._engine.connect()
            except DATABASE_ERRORS:
                time.sleep(0.2)
            else:
                return self._connection

    def _do(self, lease: Lease, connection: sa.Connection, claimed_at: float) -> bool:
        """Work on one step; whether to go on with another."""
        with Keeper(self._keeper_engine, lease, self._settings, claimed_at=claimed_at) as keeper:
            work = Work(lease, connection, keeper, self._settings, self._store, self._connect_again)
            try:
                if lease.attempts > self._settings.max_attempts and lease.kind != "publish":
                    self._fail(
                        work, "exception", f"given up after {lease.attempts - 1} attempts that failed on our side"
                    )
                else:
                    RUNNERS[lease.kind](work)
            except LeaseLost as loss:
                self._note_loss(work, loss)
            except HandBack as leaving:
                self._release(work, delay=0, give_back=True, reason=str(leaving))
                self._ring([lease.manifest_id])
                return False
            except FetchError as error:
                self._fetch_failed(work, error)
            except FileChanged:
                self._fail(work, "conflict", "the file changed while it was being read; what was read of it stands")
            except Exception as error:
                log.exception("step put off")
                try:
                    if is_disconnect(error):
                        work.connection.invalidate()
                        work.connection = self._connect_again(keeper.alive)
                    self._put_off(work, reason=type(error).__name__)
                except LeaseLost as loss:
                    self._note_loss(work, loss)
        if work.hands_wanted > 1:
            hands = min(work.hands_wanted, fleet.slots(work.connection))
            if hands > 1:
                self._ring([lease.manifest_id] * (hands - 1))
        return True

    def _note_loss(self, work: Work, loss: LeaseLost) -> None:
        """Leave a line in the lease's timeline, if the database can be reached; nothing depends on it."""
        event = "refused" if isinstance(loss, WriteRefused) else "lost"
        log.warning("lease lost", event_kind=event, reason=str(loss))
        try:
            with self._engine.begin() as connection:
                leases.record_event(connection, work.lease, event, str(loss) or None)
        except DATABASE_ERRORS as error:
            log.warning("loss not noted", error=type(error).__name__)

    def _fetch_failed(self, work: Work, error: FetchError) -> None:
        attempts = 1 if work.progressed else work.lease.attempts
        log.warning("fetch failed", code=error.code, status=error.http_status, attempt=attempts)
        if error.retryable and attempts < self._settings.max_attempts:
            self._put_off(work, reason=error.code)
        else:
            self._fail(work, error.code, error.reason)

    def _put_off(self, work: Work, *, reason: str) -> None:
        attempts = 0 if work.progressed else work.lease.attempts
        longest = self._settings.retry_delay_cap_seconds
        delay = min(self._settings.retry_delay_seconds * 2 ** min(attempts - 1, 60), longest) if attempts else 0.0
        self._release(work, delay=delay * random.uniform(0.8, 1.2), give_back=False, reason=reason)  # noqa: S311

    def _release(self, work: Work, *, delay: float, give_back: bool, reason: str) -> None:
        if not leases.release(work.connection, work.lease, delay=delay, give_back=give_back, reason=reason):
            log.warning("lease was lost before it was released")

    def _fail(self, work: Work, code: str, diagnostics: str) -> None:
        """End the step for good: the manifest's or the file's problem is `diagnostics`; the rest goes on."""
        problem = Problem("error", code, diagnostics)
        try:
            if work.lease.kind == "plan":
                files.finish_plan(work.connection, work.lease, [], problems=[problem])
            else:
                with work.connection.begin():
                    earlier = files.file_view(work.connection, work.lease).problems
                files.finish_file(work.connection, work.lease, [*earlier, problem])
        except LeaseLost as loss:
            self._note_loss(work, loss)
