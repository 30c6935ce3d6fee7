"""Leases: who may work on a step, and what lets a commit through.

Terms
    step            a row of `steps`: one thing to do for one manifest (plan it, ingest one of its files, publish it)
    lease           a step's `worker_id`, `lease_expires_at` and `fencing_token`
    fencing token   raised by one on every claim and never reset: of two holders, the later has the larger token
    cursor          bytes and lines of the file that committed batches cover
    revoked         the step's manifest is no longer live (stopped, replaced, ended)

What is trusted
    Postgres alone: its clock, its row locks, its rows. A worker's clock only makes the worker stop itself early.

What is promised
    A transaction that ends with `fence` commits only if, at that instant, the manifest is live, the token is the newest
    one given out, and the cursor stands where the batch began. Everything it wrote comes with it or not at all.

What is not promised
    That at most one worker *works* on a step at a time. Two may; only one can commit.

Every fenced transaction is: `enter`, its writes, `hold_manifest`, then `fence` (or `finish`). `enter` takes an advisory
lock by which a successor finds and ends the session (`evict`); `fence` comes last, so that the row of the step is
locked for an instant only and a heartbeat never waits for a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from schema.database import is_conflict
from schema.tables import lease_events

CLAIM_LOCK_MILLISECONDS = 500


class LeaseLost(Exception):  # noqa: N818 - the field's term
    """The step is no longer this worker's: claimed by another, withdrawn, or ended. Stop, write nothing more."""


class WriteRefused(LeaseLost):
    """The same, found out by a write: the transaction rolls back, and nothing of it stays."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One claim of one step, as it was when it was claimed. `attempts` counts claims since the cursor last moved."""

    tenant_id: int
    step_id: int
    manifest_id: int
    file_id: int | None
    kind: str
    worker_id: str
    fencing_token: int
    attempts: int
    generation: int
    cursor_bytes: int
    cursor_lines: int
    previous_worker: str | None


@dataclass(frozen=True, slots=True)
class Orders:
    """What the heartbeat's reply asks of the holder."""

    cancelled: bool
    drain: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """What a batch adds to its step: the cursor's new place, and counts of lines by what became of them."""

    first_byte: int
    end_byte: int
    end_line: int
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    affirmed: int = 0
    failed: int = 0
    skipped: int = 0


# Tenants that have a due step and room under their cap, the one with the smallest share of its weight first.
# Plan: one probe of steps_leased_idx and one of steps_open_idx for each tenant.
_RANK_TENANTS = sa.text("""
SELECT t.id
FROM tenants t
CROSS JOIN LATERAL (
    SELECT count(*) AS leased FROM steps s
    WHERE s.tenant_id = t.id AND s.worker_id IS NOT NULL AND s.lease_expires_at > statement_timestamp()
) held
CROSS JOIN LATERAL (
    SELECT s.manifest_id FROM steps s
    JOIN manifests m ON m.tenant_id = s.tenant_id AND m.id = s.manifest_id AND m.status IN ('pending', 'processing')
    WHERE s.tenant_id = t.id AND s.state = 'ready' AND s.ready_at <= statement_timestamp()
      AND (s.worker_id IS NULL OR s.lease_expires_at <= statement_timestamp())
    ORDER BY s.manifest_id, s.id
    LIMIT 1
) due
WHERE held.leased < coalesce(t.max_leased_steps, 2147483647)
ORDER BY held.leased / t.weight, due.manifest_id = :hint DESC, due.manifest_id
""")

# The tenant's oldest due step. Both rows are locked, so that both are looked at again if somebody changed them
# meanwhile: a step of a manifest that was just stopped is not claimed. Nothing waits for a locked step.
# MATERIALIZED, because a plan that ran the LIMIT once per outer row would claim several. A second claim in a row
# without progress sets the time of the third in advance, in case this one dies without a word: it is due once the lease
# has run out and a delay has passed, which doubles.
_CLAIM = sa.text("""
WITH due AS MATERIALIZED (
    SELECT c.id, c.worker_id
    FROM steps c
    JOIN manifests m ON m.tenant_id = c.tenant_id AND m.id = c.manifest_id
    WHERE c.tenant_id = :tenant_id AND c.state = 'ready' AND c.ready_at <= statement_timestamp()
      AND (c.worker_id IS NULL OR c.lease_expires_at <= statement_timestamp())
      AND m.status IN ('pending', 'processing')
    ORDER BY c.manifest_id, c.id
    LIMIT 1
    FOR UPDATE OF c SKIP LOCKED
    FOR SHARE OF m
)
UPDATE steps s
SET worker_id = :worker_id,
    lease_expires_at = clock_timestamp() + make_interval(secs => :seconds),
    fencing_token = s.fencing_token + 1,
    attempts = s.attempts + 1,
    ready_at = CASE WHEN s.attempts = 0 THEN s.ready_at ELSE clock_timestamp()
        + make_interval(secs => :seconds + least(:retry_delay * 2 ^ least(s.attempts - 1, 60), :retry_delay_cap)) END
FROM due
WHERE s.tenant_id = :tenant_id AND s.id = due.id
RETURNING s.tenant_id, s.id AS step_id, s.manifest_id, s.file_id, s.kind, s.worker_id, s.fencing_token, s.attempts,
          s.generation, s.cursor_bytes, s.cursor_lines, due.worker_id AS previous_worker
""")

_MARK_PROCESSING = sa.text("""
UPDATE manifests SET status = 'processing', started_at = clock_timestamp()
WHERE tenant_id = :tenant_id AND id = :manifest_id AND status = 'pending'
""")

# One row when the lease is still held; its columns are the holder's orders. A drained fleet worker is asked to leave.
_RENEW = sa.text("""
UPDATE steps s
SET lease_expires_at = clock_timestamp() + make_interval(secs => :seconds)
FROM manifests m
LEFT JOIN fleet_workers w ON w.name = split_part(:worker_id, '/', 1)
WHERE s.tenant_id = :tenant_id AND s.id = :step_id
  AND s.worker_id = :worker_id AND s.fencing_token = :fencing_token AND s.state = 'ready'
  AND m.tenant_id = s.tenant_id AND m.id = s.manifest_id
RETURNING m.status NOT IN ('pending', 'processing') AS cancelled, coalesce(w.drain, false) AS drain
""")

_ENTER = sa.text("SELECT pg_advisory_xact_lock(:step_id)")

# The cast matters: the driver sends a small id as int2 or int4, and shifting those by 32 bits leaves them as they are.
_EVICT = sa.text("""
SELECT pid, pg_terminate_backend(pid) AS ended
FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND classid::bigint = (CAST(:step_id AS bigint) >> 32)
  AND objid::bigint = (CAST(:step_id AS bigint) & 4294967295)
  AND pid <> pg_backend_pid()
""")

# By whoever claimed the step: not if somebody else has claimed it since.
_EVICT_HELD = sa.text(f"""
{_EVICT.text}  AND EXISTS (
    SELECT 1 FROM steps
    WHERE tenant_id = :tenant_id AND id = :step_id
      AND fencing_token = :fencing_token AND worker_id = :worker_id AND state = 'ready'
  )
""")  # noqa: S608 - made of constants

# The same for every step of a submission.
_EVICT_SUBMISSION = sa.text("""
SELECT l.pid, pg_terminate_backend(l.pid) AS ended
FROM manifests m
JOIN steps s ON s.tenant_id = m.tenant_id AND s.manifest_id = m.id
JOIN pg_locks l ON l.locktype = 'advisory' AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.classid::bigint = (s.id >> 32) AND l.objid::bigint = (s.id & 4294967295)
WHERE m.tenant_id = :tenant_id AND m.submission_id = :submission_id AND l.pid <> pg_backend_pid()
""")

# The same for the sweep, which may come late: not if the step has a new holder meanwhile.
_EVICT_EXPIRED = sa.text(f"""
{_EVICT.text}  AND EXISTS (
    SELECT 1 FROM steps
    WHERE tenant_id = :tenant_id AND id = :step_id
      AND state = 'ready' AND worker_id IS NOT NULL AND lease_expires_at <= statement_timestamp()
  )
""")  # noqa: S608 - made of constants

_HOLD_MANIFEST = sa.text("""
SELECT 1 FROM manifests
WHERE tenant_id = :tenant_id AND id = :manifest_id AND status IN ('pending', 'processing')
FOR SHARE
""")

_HOLD_MANIFEST_ALONE = sa.text("""
SELECT 1 FROM manifests
WHERE tenant_id = :tenant_id AND id = :manifest_id AND status IN ('pending', 'processing')
FOR NO KEY UPDATE
""")

# The fence. Zero rows: somebody else holds the step, it has ended, or this batch is not the next one.
_FENCE = sa.text("""
UPDATE steps
SET cursor_bytes = :end_byte, cursor_lines = :end_line, attempts = 0, ready_at = clock_timestamp(),
    lease_expires_at = clock_timestamp() + make_interval(secs => :seconds),
    created = created + :created, updated = updated + :updated, unchanged = unchanged + :unchanged,
    affirmed = affirmed + :affirmed, failed = failed + :failed, skipped = skipped + :skipped
WHERE tenant_id = :tenant_id AND id = :step_id
  AND fencing_token = :fencing_token AND worker_id = :worker_id AND state = 'ready'
  AND generation = :generation AND cursor_bytes = :first_byte
""")

_FINISH = sa.text("""
UPDATE steps SET state = :state, worker_id = NULL, lease_expires_at = NULL
WHERE tenant_id = :tenant_id AND id = :step_id
  AND fencing_token = :fencing_token AND worker_id = :worker_id AND state = 'ready'
""")

_RELEASE = sa.text("""
UPDATE steps
SET worker_id = NULL, lease_expires_at = NULL, attempts = greatest(attempts - :give_back, 0),
    ready_at = clock_timestamp() + make_interval(secs => :delay)
WHERE tenant_id = :tenant_id AND id = :step_id
  AND fencing_token = :fencing_token AND worker_id = :worker_id AND state = 'ready'
""")

# FOR UPDATE waits for a COMMIT still under way; a plain read would not.
_HOLD_STEP = sa.text("""
SELECT cursor_bytes FROM steps
WHERE tenant_id = :tenant_id AND id = :step_id
  AND fencing_token = :fencing_token AND worker_id = :worker_id AND state = 'ready'
FOR UPDATE
""")

# Leases that ran out, whether or not their rows are locked: what to evict before anything else.
_EXPIRED = sa.text("""
SELECT tenant_id, id FROM steps
WHERE state = 'ready' AND worker_id IS NOT NULL AND lease_expires_at <= statement_timestamp()
ORDER BY lease_expires_at
LIMIT :limit
""")

_CLEAR_EXPIRED = sa.text("""
UPDATE steps s
SET worker_id = NULL, lease_expires_at = NULL
FROM (
    SELECT tenant_id, id, worker_id FROM steps
    WHERE tenant_id = :tenant_id AND id = :step_id
      AND state = 'ready' AND worker_id IS NOT NULL AND lease_expires_at <= statement_timestamp()
    FOR UPDATE SKIP LOCKED
) expired
WHERE s.tenant_id = expired.tenant_id AND s.id = expired.id
RETURNING s.manifest_id, s.fencing_token, expired.worker_id
""")

_DUE_MANIFESTS = sa.text("""
SELECT s.manifest_id
FROM steps s
JOIN manifests m ON m.tenant_id = s.tenant_id AND m.id = s.manifest_id AND m.status IN ('pending', 'processing')
WHERE s.state = 'ready' AND s.ready_at <= statement_timestamp()
  AND (s.worker_id IS NULL OR s.lease_expires_at <= statement_timestamp())
ORDER BY s.ready_at
LIMIT :limit
""")

_OTHERS_WAIT = sa.text("""
SELECT EXISTS (
    SELECT 1 FROM steps s
    JOIN manifests m ON m.tenant_id = s.tenant_id AND m.id = s.manifest_id AND m.status IN ('pending', 'processing')
    JOIN tenants t ON t.id = s.tenant_id
    WHERE s.tenant_id <> :tenant_id AND s.state = 'ready' AND s.ready_at <= statement_timestamp()
      AND (s.worker_id IS NULL OR s.lease_expires_at <= statement_timestamp())
      AND (t.max_leased_steps IS NULL OR t.max_leased_steps > (
          SELECT count(*) FROM steps h
          WHERE h.tenant_id = t.id AND h.worker_id IS NOT NULL AND h.lease_expires_at > statement_timestamp()))
)
""")


def _name(lease: Lease) -> dict[str, Any]:
    return {
        "tenant_id": lease.tenant_id,
        "step_id": lease.step_id,
        "manifest_id": lease.manifest_id,
        "fencing_token": lease.fencing_token,
        "worker_id": lease.worker_id,
    }


def record_event(connection: sa.Connection, lease: Lease, event: str, reason: str | None = None) -> None:
    """Write a line of the lease's timeline, in the caller's transaction."""
    connection.execute(lease_events.insert().values(**_name(lease), event=event, reason=reason))


def claim_next(
    connection: sa.Connection,
    worker_id: str,
    seconds: float,
    hint: int,
    *,
    retry_delay: float = 0.0,
    retry_delay_cap: float = 0.0,
) -> Lease | None:
    """Claim the fairest step that is due, or None when nothing is. Commits.

    Tenants go by their share of leased steps over their weight; `hint` (a manifest id) breaks ties among them. Within a
    tenant the oldest manifest goes first. The sessions of a holder whose lease ran out are ended. A step whose holders
    die one after the other, without progress, is due again after `retry_delay` seconds, doubled each time, at most
    `retry_delay_cap`.
    """
    claim = {
        "worker_id": worker_id,
        "seconds": seconds,
        "retry_delay": retry_delay,
        "retry_delay_cap": retry_delay_cap,
    }
    with connection.begin():
        tenants = connection.execute(_RANK_TENANTS, {"hint": hint}).scalars().all()
    for tenant_id in tenants:
        with connection.begin():
            row = _claim(connection, {**claim, "tenant_id": tenant_id})
            if row is None:
                continue
            lease = Lease(**row._mapping)
            if lease.kind == "plan":
                connection.execute(_MARK_PROCESSING, {"tenant_id": tenant_id, "manifest_id": lease.manifest_id})
            after = lease.previous_worker and f"the lease of {lease.previous_worker} ran out"
            record_event(connection, lease, "claimed", after)
        if lease.fencing_token > 1:
            evict(connection, lease)
        return lease
    return None


def _claim(connection: sa.Connection, claim: dict[str, Any]) -> sa.Row[Any] | None:
    """The tenant's claimed step; None also where somebody holds its manifest for longer than a commit takes."""
    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{CLAIM_LOCK_MILLISECONDS}ms'"))
    try:
        with connection.begin_nested():
            row = connection.execute(_CLAIM, claim).one_or_none()
    except sa.exc.OperationalError as error:
        if not is_conflict(error):
            raise
        return None
    connection.execute(sa.text("SET LOCAL lock_timeout TO DEFAULT"))
    return row


def renew(connection: sa.Connection, lease: Lease, seconds: float) -> Orders:
    """Renew the lease for `seconds` from now, by the database's clock; raises `LeaseLost` if it is not held any more.

    On its own it is the heartbeat; as the last statement of a transaction without a cursor it is that one's fence.
    """
    row = connection.execute(_RENEW, {**_name(lease), "seconds": seconds}).one_or_none()
    if row is None:
        raise LeaseLost("the lease was not renewed: it is another's, or the step has ended")
    return Orders(cancelled=row.cancelled, drain=row.drain)


def enter(connection: sa.Connection, lease: Lease) -> None:
    """Begin a fenced transaction: from here a successor can find this session and end it."""
    connection.execute(_ENTER, {"step_id": lease.step_id})


def evict(connection: sa.Connection, lease: Lease) -> int:
    """End every other session that is inside a fenced transaction of the lease's step. Returns how many. Commits.

    Whose lease is lost ends nobody's session: it would be the new holder's.
    """
    with connection.begin():
        return len(connection.execute(_EVICT_HELD, _name(lease)).all())


def evict_submission(connection: sa.Connection, tenant_id: int, submission_id: int) -> int:
    """End every session that is inside a fenced transaction of the submission's steps, in the caller's transaction."""
    submission = {"tenant_id": tenant_id, "submission_id": submission_id}
    return len(connection.execute(_EVICT_SUBMISSION, submission).all())


def hold_manifest(connection: sa.Connection, lease: Lease, *, alone: bool = False) -> None:
    """Keep the manifest as it is until this transaction ends; raises `WriteRefused` unless it is live.

    `alone` also keeps other commits of the same manifest out: the one who finishes sees what the others finished.
    """
    statement = _HOLD_MANIFEST_ALONE if alone else _HOLD_MANIFEST
    if connection.execute(statement, _name(lease)).one_or_none() is None:
        raise WriteRefused("the manifest is not live any more")


def hold_step(connection: sa.Connection, lease: Lease) -> int:
    """Keep the step under this lease until the transaction ends; returns its cursor in bytes. Raises `WriteRefused`.

    The fence of a transaction that moves no cursor and renews nothing.
    """
    row = connection.execute(_HOLD_STEP, _name(lease)).one_or_none()
    if row is None:
        raise WriteRefused("the lease is another's, or the step has ended")
    return int(row.cursor_bytes)


def fence(connection: sa.Connection, lease: Lease, progress: Progress, seconds: float) -> None:
    """The last statement of a batch: move the cursor and the counts, renew the lease; raises `WriteRefused`."""
    values = {name: getattr(progress, name) for name in Progress.__slots__}
    parameters = {**_name(lease), **values, "generation": lease.generation, "seconds": seconds}
    if connection.execute(_FENCE, parameters).rowcount != 1:
        raise WriteRefused("the lease is another's, or the cursor stands elsewhere")


def finish(connection: sa.Connection, lease: Lease, state: str, reason: str | None = None) -> None:
    """End the step as `done` or `failed` and give up its lease; raises `WriteRefused`."""
    if connection.execute(_FINISH, {**_name(lease), "state": state}).rowcount != 1:
        raise WriteRefused("the lease is another's, or the step has ended")
    record_event(connection, lease, "finished" if state == "done" else "failed", reason)


def release(connection: sa.Connection, lease: Lease, *, delay: float, give_back: bool, reason: str) -> bool:
    """Hand the lease back: the step is due again after `delay` seconds. Commits. Whether it was still held.

    `give_back` returns the attempt: leaving was no fault of the step.
    """
    with connection.begin():
        held = connection.execute(_RELEASE, {**_name(lease), "delay": delay, "give_back": int(give_back)}).rowcount == 1
        if held:
            record_event(connection, lease, "released", reason)
    return held


def cursor_after_lost_commit(connection: sa.Connection, lease: Lease) -> int:
    """Where the cursor stands once no commit of this lease can be under way any more. Raises `LeaseLost`.

    To be called on a new connection: the old session is ended first, then the row is read under its lock.
    """
    evict(connection, lease)
    with connection.begin():
        return hold_step(connection, lease)


def expire(connection: sa.Connection, limit: int) -> list[int]:
    """Clear up to `limit` leases that ran out, oldest first, and end their sessions. Commits.

    Returns the manifests' ids.
    """
    with connection.begin():
        expired = connection.execute(_EXPIRED, {"limit": limit}).all()
    cleared = []
    for tenant_id, step_id in expired:
        step = {"tenant_id": tenant_id, "step_id": step_id}
        with connection.begin():
            connection.execute(_EVICT_EXPIRED, step)
        with connection.begin():
            row = connection.execute(_CLEAR_EXPIRED, step).one_or_none()
            if row is None:
                continue
            connection.execute(
                lease_events.insert().values(
                    **step,
                    manifest_id=row.manifest_id,
                    fencing_token=row.fencing_token,
                    worker_id=row.worker_id,
                    event="expired",
                )
            )
            cleared.append(int(row.manifest_id))
    return cleared


def due_manifests(connection: sa.Connection, limit: int) -> list[int]:
    """Manifest ids of up to `limit` steps that are due and held by nobody, one id for each step. Commits."""
    with connection.begin():
        return list(connection.execute(_DUE_MANIFESTS, {"limit": limit}).scalars())


def others_wait(connection: sa.Connection, lease: Lease) -> bool:
    """Whether another tenant has a step that is due, and room under its cap. Commits."""
    with connection.begin():
        return bool(connection.execute(_OTHERS_WAIT, {"tenant_id": lease.tenant_id}).scalar_one())


def only_one(connection: sa.Connection, lock: int) -> bool:
    """Whether this transaction is the only one that holds `lock`, until it ends. Does not wait."""
    return bool(connection.execute(sa.text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": -lock}).scalar_one())
