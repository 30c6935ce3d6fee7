"""What is kept for a time only: which rows are past it, and their deletion, a chunk at a time.

Nothing here commits: each function is a part of a transaction that its caller opens, and short. Whoever deletes objects
reads their paths, ends the transaction, deletes them, and only then deletes their rows: a row without an object can be
found again, an object without a row cannot. Everything may be done again, and goes on where it was left.

What the store's history rests on stays: submissions, manifests, files, steps, and the batches without their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from schema import submissions as front
from schema.submissions import Submission
from schema.tables import artifacts, fetch_parameters, manifests, poll_tokens
from schema.tables import submissions as submissions_table


class SubmissionKey(NamedTuple):
    """A submission."""

    tenant_id: int
    id: int


class ManifestKey(NamedTuple):
    """A manifest."""

    tenant_id: int
    id: int


class StoredObject(NamedTuple):
    """An artifact's row, and its object's path in the artifact store."""

    tenant_id: int
    id: int
    path: str


# Plan: submissions_ended_idx up to the cutoff, which is what is left to do; one probe of manifests for each; a sort.
# What the artifact store refused comes after what was not tried since, so that it keeps nothing else waiting.
_EXPIRED = sa.text("""
SELECT s.tenant_id, s.id
FROM submissions s
WHERE s.expired_at IS NULL AND s.completed_at <= statement_timestamp() - make_interval(secs => :seconds)
  AND s.status IN ('completed', 'stopped')
  AND NOT EXISTS (
    SELECT 1 FROM manifests m
    WHERE m.tenant_id = s.tenant_id AND m.submission_id = s.id
      AND (m.status IN ('pending', 'processing')
           OR m.finished_at > statement_timestamp() - make_interval(secs => :seconds))
  )
ORDER BY coalesce(s.expiry_failed_at, s.completed_at), s.tenant_id, s.id
LIMIT :limit
""")

# Plan: submissions_open_idx up to the cutoff; one probe of manifests for each.
_IDLE = """
SELECT s.tenant_id, s.id, s.submitter_id, s.submission_id, s.status, s.fhir_version, s.transaction_time
FROM submissions s
WHERE s.status = 'in-progress' AND s.updated_at <= statement_timestamp() - make_interval(secs => :seconds)
  AND NOT EXISTS (
    SELECT 1 FROM manifests m
    WHERE m.tenant_id = s.tenant_id AND m.submission_id = s.id
      AND (m.status IN ('pending', 'processing')
           OR greatest(m.created_at, m.finished_at) > statement_timestamp() - make_interval(secs => :seconds))
  )
"""
_OLDEST_IDLE = sa.text(f"{_IDLE}ORDER BY s.updated_at LIMIT :limit")
_STILL_IDLE = sa.text(f"{_IDLE}AND s.tenant_id = :tenant_id AND s.id = :id")
_HOLD = sa.text("SELECT 1 FROM submissions WHERE tenant_id = :tenant_id AND id = :id FOR UPDATE SKIP LOCKED")

# The pieces of a manifest, each walked by an index: batches and files from where the last chunk ended.
_CLEAR_BATCHES = sa.text("""
WITH chunk AS MATERIALIZED (
    SELECT id, file_id, generation, first_line, line_count FROM ingest_batches
    WHERE tenant_id = :tenant_id AND manifest_id = :id AND id > :after AND results IS NOT NULL
    ORDER BY id
    LIMIT :limit
), cleared AS (
    UPDATE ingest_batches b SET results = NULL FROM chunk c WHERE b.tenant_id = :tenant_id AND b.id = c.id
), deleted AS (
    DELETE FROM entry_issues i USING chunk c
    WHERE i.tenant_id = :tenant_id AND i.file_id = c.file_id AND i.generation = c.generation
      AND i.line >= c.first_line AND i.line < c.first_line + c.line_count
    RETURNING 1
)
SELECT count(*) AS batches, max(id) AS last, (SELECT count(*) FROM deleted) AS issues FROM chunk
""")

_CLEAR_FILES = sa.text("""
WITH chunk AS MATERIALIZED (
    SELECT id, position FROM manifest_files
    WHERE tenant_id = :tenant_id AND manifest_id = :id AND position > :after
      AND (problems <> '[]' OR validator IS NOT NULL OR strpos(url, '?') > 0)
    ORDER BY position
    LIMIT :limit
), cleared AS (
    UPDATE manifest_files f SET problems = '[]', validator = NULL, url = split_part(f.url, '?', 1)
    FROM chunk c
    WHERE f.tenant_id = :tenant_id AND f.id = c.id
)
SELECT count(*) AS files, max(position) AS last FROM chunk
""")

_DELETE_EVENTS = sa.text("""
DELETE FROM lease_events WHERE (tenant_id, id) IN (
    SELECT tenant_id, id FROM lease_events WHERE tenant_id = :tenant_id AND manifest_id = :id LIMIT :limit
)
""")

_DELETE_TOKENS = sa.text("""
DELETE FROM poll_tokens WHERE (tenant_id, token_hash) IN (
    SELECT tenant_id, token_hash FROM poll_tokens WHERE expires_at <= statement_timestamp()
    ORDER BY expires_at
    LIMIT :limit
)
""")

# An unpublished artifact that no commit can publish any more: its manifest has ended, or its lease was followed by
# another. Either is so for ever. Plan: artifacts_unpublished_idx up to the cutoff; a probe of manifests and steps each.
_ORPHANS = sa.text("""
SELECT a.tenant_id, a.id, a.path
FROM artifacts a
JOIN manifests m ON m.tenant_id = a.tenant_id AND m.id = a.manifest_id
LEFT JOIN steps s ON s.tenant_id = a.tenant_id AND s.manifest_id = a.manifest_id AND s.kind = 'publish'
WHERE NOT a.published AND a.created_at <= statement_timestamp() - make_interval(secs => :seconds)
  AND (m.status NOT IN ('pending', 'processing') OR a.fencing_token < s.fencing_token)
ORDER BY coalesce(a.removal_failed_at, a.created_at), a.tenant_id, a.id
LIMIT :limit
""")

# Plan: the index on `at`, from its beginning.
_DELETE_LOG = {
    log: sa.text(f"""
DELETE FROM {log} WHERE (tenant_id, id) IN (
    SELECT tenant_id, id FROM {log} WHERE at <= statement_timestamp() - make_interval(secs => :seconds)
    ORDER BY at
    LIMIT :limit
)
""")  # noqa: S608 - made of constants
    for log in ("lease_events", "egress_log")
}
LOGS = tuple(_DELETE_LOG)
"""Tables that only grow, and that nothing rests on."""


def expired_submissions(connection: sa.Connection, seconds: float, limit: int) -> list[SubmissionKey]:
    """Submissions that ended, with all their manifests, at least `seconds` ago; those to be done first come first."""
    rows = connection.execute(_EXPIRED, {"seconds": seconds, "limit": limit})
    return [SubmissionKey(*row) for row in rows]


def _of(submission: SubmissionKey, table: sa.Table) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant_id == submission.tenant_id, table.c.submission_id == submission.id)


def objects_of(connection: sa.Connection, submission: SubmissionKey, limit: int) -> list[StoredObject]:
    """Up to `limit` of the submission's artifacts, published or not."""
    rows = connection.execute(
        sa.select(artifacts.c.tenant_id, artifacts.c.id, artifacts.c.path)
        .where(_of(submission, artifacts))
        .order_by(artifacts.c.id)
        .limit(limit)
    )
    return [StoredObject(*row) for row in rows]


def _rows_of(objects: Sequence[StoredObject]) -> sa.ColumnElement[bool]:
    return sa.tuple_(artifacts.c.tenant_id, artifacts.c.id).in_([(row.tenant_id, row.id) for row in objects])


def forget_objects(connection: sa.Connection, objects: Sequence[StoredObject]) -> int:
    """Delete the rows of objects that were deleted; returns how many there still were."""
    return connection.execute(artifacts.delete().where(_rows_of(objects))).rowcount


def note_kept_objects(connection: sa.Connection, objects: Sequence[StoredObject]) -> None:
    """The artifact store did not delete them: others come first now."""
    connection.execute(artifacts.update().where(_rows_of(objects)).values(removal_failed_at=sa.func.clock_timestamp()))


def note_kept_submission(connection: sa.Connection, submission: SubmissionKey) -> None:
    """The artifact store did not delete its objects: others come first now."""
    connection.execute(
        submissions_table.update()
        .where(submissions_table.c.tenant_id == submission.tenant_id, submissions_table.c.id == submission.id)
        .values(expiry_failed_at=sa.func.clock_timestamp())
    )


def forget_tokens(connection: sa.Connection, submission: SubmissionKey) -> int:
    """Delete the submission's poll tokens; returns how many."""
    return connection.execute(poll_tokens.delete().where(_of(submission, poll_tokens))).rowcount


def uncleared_manifests(connection: sa.Connection, submission: SubmissionKey, limit: int) -> list[ManifestKey]:
    """Up to `limit` of the submission's manifests that `clear_manifest` has not seen yet."""
    parameters_of_it = sa.and_(
        fetch_parameters.c.tenant_id == manifests.c.tenant_id, fetch_parameters.c.manifest_id == manifests.c.id
    )
    statement = (
        sa.select(manifests.c.tenant_id, manifests.c.id)
        .join(fetch_parameters, parameters_of_it)
        .where(_of(submission, manifests))
        .order_by(manifests.c.id)
        .limit(limit)
    )
    return [ManifestKey(*row) for row in connection.execute(statement)]


class ClearedBatches(NamedTuple):
    """How many batches lost their results, the last one's id, and how many issues went with them."""

    batches: int
    last: int | None
    issues: int


def clear_batches(connection: sa.Connection, manifest: ManifestKey, after: int, limit: int) -> ClearedBatches:
    """Take from the next `limit` batches whose ids are over `after` their packed results, with their lines' issues."""
    parameters = {**manifest._asdict(), "after": after, "limit": limit}
    return ClearedBatches(*connection.execute(_CLEAR_BATCHES, parameters).one())


class ClearedFiles(NamedTuple):
    """How many files were cleared, and the last one's position."""

    files: int
    last: int | None


def clear_files(connection: sa.Connection, manifest: ManifestKey, after: int, limit: int) -> ClearedFiles:
    """Take from the next `limit` files at positions over `after` their problems and the queries of their URLs."""
    return ClearedFiles(*connection.execute(_CLEAR_FILES, {**manifest._asdict(), "after": after, "limit": limit}).one())


def forget_events(connection: sa.Connection, manifest: ManifestKey, limit: int) -> int:
    """Delete up to `limit` lines of the timeline of the manifest's leases; returns how many."""
    return connection.execute(_DELETE_EVENTS, {**manifest._asdict(), "limit": limit}).rowcount


def clear_manifest(connection: sa.Connection, manifest: ManifestKey) -> None:
    """Delete how the manifest was to be fetched, sealed secrets and all, and what it was told in general.

    To be done last: it is how a manifest that is done with is known.
    """
    connection.execute(
        fetch_parameters.delete().where(
            fetch_parameters.c.tenant_id == manifest.tenant_id, fetch_parameters.c.manifest_id == manifest.id
        )
    )
    connection.execute(
        manifests.update()
        .where(manifests.c.tenant_id == manifest.tenant_id, manifests.c.id == manifest.id)
        .values(problems=[], notes=[])
    )


def mark_expired(connection: sa.Connection, submission: SubmissionKey) -> None:
    """Nothing of it is left to tell: from now on nobody finds it, and its id stays taken."""
    forget_tokens(connection, submission)
    connection.execute(
        submissions_table.update()
        .where(submissions_table.c.tenant_id == submission.tenant_id, submissions_table.c.id == submission.id)
        .values(expired_at=sa.func.clock_timestamp())
    )


def forget_expired_tokens(connection: sa.Connection, limit: int) -> int:
    """Delete up to `limit` poll tokens past their own time, the oldest first; returns how many."""
    return connection.execute(_DELETE_TOKENS, {"limit": limit}).rowcount


def idle_submissions(connection: sa.Connection, seconds: float, limit: int) -> list[Submission]:
    """Submissions left open, without a live manifest, with which nothing happened for `seconds`; oldest first."""
    rows = connection.execute(_OLDEST_IDLE, {"seconds": seconds, "limit": limit})
    return [Submission(**row._mapping) for row in rows]


def stop_if_idle(connection: sa.Connection, submission: Submission, seconds: float) -> bool:
    """Stop the submission as its submitter would; not if somebody holds it or something happened meanwhile."""
    place = {"tenant_id": submission.tenant_id, "id": submission.id}
    if connection.execute(_HOLD, place).one_or_none() is None:
        return False
    if connection.execute(_STILL_IDLE, {**place, "seconds": seconds}).one_or_none() is None:
        return False
    front.set_status(connection, submission, "stopped")
    front.revoke(connection, submission, "stopped")
    return True


def orphans(connection: sa.Connection, seconds: float, limit: int) -> list[StoredObject]:
    """Artifacts of lost leases and of manifests that ended without them, recorded at least `seconds` ago."""
    rows = connection.execute(_ORPHANS, {"seconds": seconds, "limit": limit})
    return [StoredObject(*row) for row in rows]


def forget_log(connection: sa.Connection, log: str, seconds: float, limit: int) -> int:
    """Delete up to `limit` lines of one of `LOGS` written at least `seconds` ago, oldest first; returns how many."""
    return connection.execute(_DELETE_LOG[log], {"seconds": seconds, "limit": limit}).rowcount
