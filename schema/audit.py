"""Statements that look for rows which the product's guarantees do not allow. `workers/audit.py` runs them.

Each finds offenders: one text that names ids and numbers, never content. All of them read one snapshot, in which every
committed batch is whole: its versions, its row, its issues and its step's cursor came in one transaction. So work under
way offends nothing, and nothing here waits for it or makes it wait.

No statement is given its LIMIT where the planner could see it: with nothing to find, a plan that begins fast reads the
store in the order of its index, row by row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from schema.database import driver


class Check(NamedTuple):
    """What to count as looked at, and the statements that find offenders."""

    examined: sa.TextClause
    offenders: tuple[sa.TextClause, ...]


@dataclass(frozen=True, slots=True)
class AuditedBatch:
    """A row of `ingest_batches`. `results` is still packed, None once cleared."""

    tenant_id: int
    id: int
    manifest_id: int
    first_byte: int
    end_byte: int
    first_line: int
    line_count: int
    created: int
    updated: int
    unchanged: int
    affirmed: int
    failed: int
    skipped: int
    digest: bytes
    results: bytes | None = field(repr=False)


class StoredLine(NamedTuple):
    """A line whose resource stands in the store. `op` is that of the row it appended, 0 where it appended none."""

    line: int
    key: UUID
    seq: int
    version: int
    op: int
    resource_id: str


class PublishedArtifact(NamedTuple):
    """A receipt that is shown. `expired`: past its time to live, so that its object may be gone."""

    tenant_id: int
    id: int
    path: str
    stored_bytes: int
    sha256: bytes
    expired: bool


_ARTIFACTS_A_PAGE = 500
_BATCHES_A_FETCH = 16
_WORK_MEMORY = "64MB"


def _finds(statement: str) -> sa.TextClause:
    return sa.text(f"WITH found (offender) AS MATERIALIZED ({statement}) SELECT offender FROM found LIMIT :limit")  # noqa: S608 - made of constants


# lines: the batches of a file's current generation follow each other without gap or overlap, from byte 0 and line 1 to
# the cursor of its step.
# Plans: one pass over ingest_batches in the order of its unique index (tenant_id, file_id, generation, first_byte); one
# aggregate over it, hash joined with steps; hash joins of steps with batches and with files.
LINES = Check(
    sa.text("SELECT count(*) FROM manifest_files WHERE kind = 'output'"),
    (
        _finds("""
SELECT format('batch %s of file %s, generation %s: begins at byte %s and line %s, not at byte %s and line %s',
              id, file_id, generation, first_byte, first_line, due_byte, due_line)
FROM (
    SELECT id, file_id, generation, first_byte, end_byte, first_line, line_count,
           coalesce(lag(end_byte) OVER file, 0) AS due_byte,
           coalesce(lag(first_line + line_count) OVER file, 1) AS due_line
    FROM ingest_batches
    WINDOW file AS (PARTITION BY tenant_id, file_id, generation ORDER BY first_byte)
) batches
WHERE first_byte <> due_byte OR first_line <> due_line OR end_byte < first_byte OR line_count < 1
"""),
        _finds("""
SELECT format('step %s of file %s, %s: cursor at byte %s and line %s, its batches end at byte %s and line %s',
              s.id, s.file_id, s.state, s.cursor_bytes, s.cursor_lines,
              coalesce(b.end_byte, 0), coalesce(b.end_line, 0))
FROM steps s
LEFT JOIN (
    SELECT tenant_id, file_id, generation, max(end_byte) AS end_byte, sum(end_byte - first_byte) AS bytes,
           max(first_line + line_count - 1) AS end_line, sum(line_count) AS lines
    FROM ingest_batches
    GROUP BY tenant_id, file_id, generation
) b ON b.tenant_id = s.tenant_id AND b.file_id = s.file_id AND b.generation = s.generation
WHERE s.kind = 'ingest'
  AND (s.cursor_bytes, s.cursor_bytes, s.cursor_lines, s.cursor_lines)
   <> (coalesce(b.end_byte, 0), coalesce(b.bytes, 0), coalesce(b.end_line, 0), coalesce(b.lines, 0))
"""),
        _finds("""
SELECT format('batch %s of file %s: no step of manifest %s ingests generation %s',
              b.id, b.file_id, b.manifest_id, b.generation)
FROM ingest_batches b
LEFT JOIN steps s ON s.tenant_id = b.tenant_id AND s.file_id = b.file_id AND s.manifest_id = b.manifest_id
                 AND s.kind = 'ingest'
WHERE s.id IS NULL OR b.generation > s.generation
"""),
        _finds("""
SELECT format('file %s of manifest %s: %s steps ingest it', f.id, f.manifest_id, count(s.id))
FROM manifest_files f
LEFT JOIN steps s ON s.tenant_id = f.tenant_id AND s.file_id = f.id AND s.kind = 'ingest'
WHERE f.kind = 'output'
GROUP BY f.tenant_id, f.id, f.manifest_id
HAVING count(s.id) <> 1
"""),
    ),
)

# counters: what polls and receipts are told is the sum of what was committed; every line of a batch is counted once,
# and every failed one has its issue. Issues may go with the packed results.
# Plans: an aggregate over ingest_batches, hash joined with steps; a scan; an aggregate over entry_issues, hash full
# joined with ingest_batches.
COUNTERS = Check(
    sa.text("SELECT (SELECT count(*) FROM steps) + (SELECT count(*) FROM ingest_batches)"),
    (
        _finds("""
SELECT format('step %s: its counts are not the sums over its %s batches', s.id, coalesce(b.batches, 0))
FROM steps s
LEFT JOIN (
    SELECT tenant_id, file_id, generation, count(*) AS batches, sum(created) AS created, sum(updated) AS updated,
           sum(unchanged) AS unchanged, sum(affirmed) AS affirmed, sum(failed) AS failed, sum(skipped) AS skipped
    FROM ingest_batches
    GROUP BY tenant_id, file_id, generation
) b ON b.tenant_id = s.tenant_id AND b.file_id = s.file_id AND b.generation = s.generation AND s.kind = 'ingest'
WHERE (s.created, s.updated, s.unchanged, s.affirmed, s.failed, s.skipped)
   <> (coalesce(b.created, 0), coalesce(b.updated, 0), coalesce(b.unchanged, 0),
       coalesce(b.affirmed, 0), coalesce(b.failed, 0), coalesce(b.skipped, 0))
"""),
        _finds("""
SELECT format('batch %s: %s lines, %s counted', id, line_count,
              created + updated + unchanged + affirmed + failed + skipped)
FROM ingest_batches
WHERE line_count <> created + updated + unchanged + affirmed + failed + skipped
"""),
        _finds("""
SELECT format('batch %s: %s failed lines, %s issues', coalesce(b.id, i.batch_id), coalesce(b.failed, 0),
              coalesce(i.issues, 0))
FROM ingest_batches b
FULL JOIN (
    SELECT tenant_id, batch_id, file_id, generation, count(*) AS issues, min(line) AS first, max(line) AS last
    FROM entry_issues
    GROUP BY tenant_id, batch_id, file_id, generation
) i ON i.tenant_id = b.tenant_id AND i.batch_id = b.id AND i.file_id = b.file_id AND i.generation = b.generation
WHERE (coalesce(b.failed, 0) <> coalesce(i.issues, 0) AND NOT (b.results IS NULL AND i.issues IS NULL))
   OR i.first < b.first_line OR i.last >= b.first_line + b.line_count
"""),
    ),
)

# tokens: no batch of a file was committed under an older fencing token than one before it, nor under a token that was
# never given out.
# Plan: one pass over ingest_batches in the order of its unique index, hash joined with steps.
TOKENS = Check(
    sa.text("SELECT count(*) FROM ingest_batches"),
    (
        _finds("""
SELECT format('batch %s of file %s: token %s, after %s; its step was given %s',
              b.id, b.file_id, b.fencing_token, b.earlier, s.fencing_token)
FROM (
    SELECT tenant_id, id, file_id, fencing_token, coalesce(lag(fencing_token) OVER file, 1) AS earlier
    FROM ingest_batches
    WINDOW file AS (PARTITION BY tenant_id, file_id ORDER BY generation, first_byte)
) b
LEFT JOIN steps s ON s.tenant_id = b.tenant_id AND s.file_id = b.file_id AND s.kind = 'ingest'
WHERE b.fencing_token < b.earlier OR b.fencing_token > s.fencing_token
"""),
    ),
)

# versions: a resource's rows count 1, 2, 3 …; each raises the version by one, save an affirm (5), which keeps it; the
# first is a create (1), and a create comes later only after a delete (3), which nothing but a create or a restore (4)
# may follow; all are of one id, and each names a batch of its own tenant.
# Plans: the rows without their bodies, sorted by key and seq; a hash anti join with ingest_batches.
VERSIONS = Check(
    sa.text("SELECT count(*) FROM resource_versions"),
    (
        _finds("""
SELECT format('key %s, seq %s: version %s, op %s, after seq %s, version %s, op %s',
              key, seq, version, op, coalesce(seq_before::text, 'none'), version_before, op_before)
FROM (
    SELECT key, seq, version, op, resource_id, lag(seq) OVER history AS seq_before,
           lag(version) OVER history AS version_before, lag(op) OVER history AS op_before,
           lag(resource_id) OVER history AS id_before
    FROM resource_versions
    WINDOW history AS (PARTITION BY key ORDER BY seq)
) v
WHERE CASE WHEN seq_before IS NULL THEN seq <> 1 OR version <> 1 OR op <> 1
      ELSE seq <> seq_before + 1 OR version <> version_before + (op <> 5)::int
        OR (op = 1 AND op_before <> 3) OR (op IN (2, 3, 5) AND op_before = 3) OR resource_id <> id_before
      END
"""),
        _finds("""
SELECT format('key %s, seq %s: there is no batch %s of its tenant', v.key, v.seq, v.batch_id)
FROM (SELECT key, seq, batch_id, ('x' || left(key::text, 8))::bit(32)::bigint AS tenant_id FROM resource_versions) v
WHERE NOT EXISTS (SELECT 1 FROM ingest_batches b WHERE b.tenant_id = v.tenant_id AND b.id = v.batch_id)
"""),
    ),
)

# written: a batch appended as many rows as it says, of the kinds it says, for lines of its own.
# Plan: one scan of the rows without their bodies, a hash aggregate of one entry a batch, hash joined with
# ingest_batches.
WRITTEN = Check(
    sa.text("SELECT count(*) FROM ingest_batches"),
    (
        _finds("""
SELECT format('batch %s: %s created, %s updated, %s affirmed; the store has %s, %s, %s of it, of lines %s to %s',
              b.id, b.created, b.updated, b.affirmed, coalesce(v.created, 0), coalesce(v.updated, 0),
              coalesce(v.affirmed, 0), v.first, v.last)
FROM ingest_batches b
LEFT JOIN (
    SELECT ('x' || left(key::text, 8))::bit(32)::bigint AS tenant_id, batch_id, min(line) AS first, max(line) AS last,
           count(*) FILTER (WHERE op = 1) AS created, count(*) FILTER (WHERE op = 2) AS updated,
           count(*) FILTER (WHERE op = 5) AS affirmed
    FROM resource_versions
    GROUP BY 1, 2
) v ON v.tenant_id = b.tenant_id AND v.batch_id = b.id
WHERE (b.created, b.updated, b.affirmed)
   <> (coalesce(v.created, 0), coalesce(v.updated, 0), coalesce(v.affirmed, 0))
   OR v.first < b.first_line OR v.last >= b.first_line + b.line_count
"""),
    ),
)

# endings: a manifest that is not over has a step that is due, one that is over has none and says since when; receipts
# wait for the files, and for nothing else. A manifest that was stopped or replaced keeps the steps it had: nobody can
# claim them, and who holds one is told to let go.
# Plans: one aggregate over steps, hash joined with manifests; scans of steps and submissions.
ENDINGS = Check(
    sa.text("SELECT (SELECT count(*) FROM manifests) + (SELECT count(*) FROM submissions)"),
    (
        _finds("""
SELECT format('manifest %s is %s, %s: %s steps due, %s open or leased, %s plan and %s publish; publish waits: %s',
              m.id, m.status, CASE WHEN m.finished_at IS NULL THEN 'not finished' ELSE 'finished' END,
              coalesce(s.due, 0), coalesce(s.open, 0), coalesce(s.plans, 0), coalesce(s.publishes, 0),
              coalesce(s.waits, false))
FROM manifests m
LEFT JOIN (
    SELECT tenant_id, manifest_id,
           count(*) FILTER (WHERE state = 'ready') AS due,
           count(*) FILTER (WHERE state IN ('waiting', 'ready') OR worker_id IS NOT NULL) AS open,
           count(*) FILTER (WHERE kind = 'plan') AS plans,
           count(*) FILTER (WHERE kind = 'publish') AS publishes,
           bool_or(kind = 'publish' AND state = 'waiting') AS waits,
           bool_or(kind <> 'publish' AND state <> 'done' AND state <> 'failed') AS files_open
    FROM steps
    GROUP BY tenant_id, manifest_id
) s ON s.tenant_id = m.tenant_id AND s.manifest_id = m.id
WHERE (m.status IN ('pending', 'processing')) <> (m.finished_at IS NULL)
   OR (m.status IN ('pending', 'processing') AND coalesce(s.due, 0) = 0)
   OR (m.status IN ('completed', 'failed') AND coalesce(s.open, 0) > 0)
   OR coalesce(s.plans, 0) <> 1 OR coalesce(s.publishes, 0) <> 1 OR s.waits <> s.files_open
"""),
        _finds("""
SELECT format('step %s is %s: a lease without a holder, a holder without a lease, or both on a step that ended',
              id, state)
FROM steps
WHERE (worker_id IS NULL) <> (lease_expires_at IS NULL) OR (worker_id IS NOT NULL AND state <> 'ready')
"""),
        _finds("""
SELECT format('submission %s is %s: it ended at %s and has %s manifests that did not', s.id, s.status,
              coalesce(s.completed_at::text, 'no time'), count(m.id))
FROM submissions s
LEFT JOIN manifests m ON m.tenant_id = s.tenant_id AND m.submission_id = s.id AND m.status IN ('pending', 'processing')
GROUP BY s.tenant_id, s.id
HAVING s.status NOT IN ('in-progress', 'completed', 'stopped')
    OR (s.status = 'in-progress') <> (s.completed_at IS NULL)
    OR (s.status = 'stopped' AND count(m.id) > 0)
"""),
    ),
)

# receipts: those shown are those of the lease that ended the manifest, complete, and they have a line for every line
# that was committed. Receipts go once their time to live is over, so a manifest older than that may lack some.
# Plans: artifacts hash joined with manifests and steps; aggregates over artifacts and ingest_batches, hash joined.
RECEIPTS = Check(
    sa.text("SELECT count(*) FROM artifacts WHERE published"),
    (
        _finds("""
SELECT format('artifact %s of manifest %s, %s: token %s of %s, %s', a.id, m.id, m.status, a.fencing_token,
              s.fencing_token, CASE WHEN a.published THEN 'published' ELSE 'not published' END)
FROM artifacts a
JOIN manifests m ON m.tenant_id = a.tenant_id AND m.id = a.manifest_id
JOIN steps s ON s.tenant_id = a.tenant_id AND s.manifest_id = a.manifest_id AND s.kind = 'publish'
WHERE (m.status IN ('completed', 'failed') AND a.published <> (a.fencing_token = s.fencing_token))
   OR (m.status IN ('pending', 'processing') AND a.published)
   OR (a.published AND (a.line_count IS NULL OR a.stored_bytes IS NULL OR a.sha256 IS NULL))
"""),
        _finds("""
SELECT format('manifest %s: %s lines committed, %s in the ledger; %s versions written, %s in the output; %s summaries',
              m.id, coalesce(b.lines, 0), coalesce(a.ledger, 0), coalesce(b.written, 0), coalesce(a.output, 0),
              coalesce(a.summaries, 0))
FROM manifests m
LEFT JOIN (
    SELECT tenant_id, manifest_id, sum(line_count) FILTER (WHERE type = 'ledger') AS ledger,
           sum(line_count) FILTER (WHERE type = 'output') AS output,
           count(*) FILTER (WHERE type = 'summary') AS summaries
    FROM artifacts
    WHERE published
    GROUP BY tenant_id, manifest_id
) a ON a.tenant_id = m.tenant_id AND a.manifest_id = m.id
LEFT JOIN (
    SELECT b.tenant_id, b.manifest_id, sum(b.line_count) AS lines, sum(b.created + b.updated) AS written
    FROM ingest_batches b
    JOIN steps s ON s.tenant_id = b.tenant_id AND s.file_id = b.file_id AND s.generation = b.generation
                AND s.kind = 'ingest'
    GROUP BY b.tenant_id, b.manifest_id
) b ON b.tenant_id = m.tenant_id AND b.manifest_id = m.id
WHERE m.status IN ('completed', 'failed') AND m.created_at > clock_timestamp() - make_interval(secs => :ttl)
  AND (coalesce(a.ledger, 0), coalesce(a.output, 0), coalesce(a.summaries, 0))
   <> (coalesce(b.lines, 0), coalesce(b.written, 0), 1)
"""),
    ),
)

# Plan: a scan, batch by batch through a cursor of the server.
_BATCHES = sa.text("""
SELECT tenant_id, id, manifest_id, first_byte, end_byte, first_line, line_count, created, updated, unchanged, affirmed,
       failed, skipped, digest, results
FROM ingest_batches
""")

# What a batch's packed results say of its lines, and is not so. A line that appended no row names one of its manifest.
# Plan: a probe of the primary key for each line; LIMIT 1 keeps the planner from reading the whole store for a batch.
_WRONG_LINES = """
SELECT format('batch %%s, line %%s: not in the store as key %%s, seq %%s, version %%s, op %%s',
              %(batch_id)s::bigint, l.line, l.key, l.seq, l.version, l.op)
FROM unnest(%(lines)b::bigint[], %(keys)b::uuid[], %(seqs)b::bigint[], %(versions)b::bigint[], %(ops)b::smallint[],
            %(ids)b::text[]) AS l (line, key, seq, version, op, resource_id)
LEFT JOIN LATERAL (
    SELECT r.version, r.op, r.batch_id, r.line, r.resource_id
    FROM resource_versions r
    WHERE r.key = l.key AND r.seq = l.seq
    LIMIT 1
) v ON true
WHERE v.version IS DISTINCT FROM l.version OR v.resource_id <> l.resource_id
   OR CASE WHEN l.op = 0
      THEN NOT EXISTS (
        SELECT 1 FROM ingest_batches b
        WHERE b.tenant_id = %(tenant_id)s AND b.id = v.batch_id AND b.manifest_id = %(manifest_id)s
      )
      ELSE v.op <> l.op OR v.batch_id <> %(batch_id)s OR v.line <> l.line
      END
"""

# Plan: the primary key, from where the last page ended.
_PUBLISHED = sa.text("""
SELECT a.tenant_id, a.id, a.path, a.stored_bytes, a.sha256,
       m.created_at <= clock_timestamp() - make_interval(secs => :ttl) AS expired
FROM artifacts a
JOIN manifests m ON m.tenant_id = a.tenant_id AND m.id = a.manifest_id AND m.status IN ('completed', 'failed')
WHERE a.published AND a.stored_bytes IS NOT NULL AND a.sha256 IS NOT NULL
  AND (a.tenant_id, a.id) > (:tenant_id, :id)
ORDER BY a.tenant_id, a.id
LIMIT :limit
""")

_STILL_THERE = sa.text("SELECT EXISTS (SELECT 1 FROM artifacts WHERE tenant_id = :tenant_id AND id = :id)")


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that can only read, and sees everything as it was at its first statement."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection.begin():
            connection.execute(sa.text(f"SET LOCAL work_mem = '{_WORK_MEMORY}'"))
            yield connection


def examined(connection: sa.Connection, check: Check) -> int:
    """How many things the check looks at."""
    return int(connection.execute(check.examined).scalar_one())


def offenders(connection: sa.Connection, check: Check, limit: int, *, ttl_seconds: float) -> list[str]:
    """Up to `limit` things that should not be. `ttl_seconds`: how long receipts are kept."""
    found: list[str] = []
    for statement in check.offenders:
        parameters = {"limit": limit - len(found), "ttl": ttl_seconds}
        names = statement.compile().params
        found += connection.execute(statement, {name: parameters[name] for name in names}).scalars()
    return found


def batches(connection: sa.Connection) -> Generator[AuditedBatch, None, None]:
    """Every committed batch, a few in memory at a time."""
    with connection.execute(_BATCHES.execution_options(yield_per=_BATCHES_A_FETCH)) as rows:
        for row in rows:
            yield AuditedBatch(**row._mapping)


def wrong_lines(connection: sa.Connection, batch: AuditedBatch, lines: Sequence[StoredLine]) -> list[str]:
    """Which of the batch's lines are not in the store as its results have it."""
    if not lines:
        return []
    parameters: dict[str, Any] = {
        "tenant_id": batch.tenant_id,
        "manifest_id": batch.manifest_id,
        "batch_id": batch.id,
        **dict(
            zip(("lines", "keys", "seqs", "versions", "ops", "ids"), map(list, zip(*lines, strict=True)), strict=True)
        ),
    }
    with driver(connection).cursor() as cursor:
        return [offender for (offender,) in cursor.execute(_WRONG_LINES, parameters)]


def published_artifacts(connection: sa.Connection, *, ttl_seconds: float) -> Iterator[PublishedArtifact]:
    """Every receipt that is shown. Commits after each page: no transaction is open while objects are read."""
    after = {"tenant_id": 0, "id": 0}
    while True:
        with connection.begin():
            page = connection.execute(_PUBLISHED, {**after, "ttl": ttl_seconds, "limit": _ARTIFACTS_A_PAGE}).all()
        for row in page:
            yield PublishedArtifact(*row)
        if len(page) < _ARTIFACTS_A_PAGE:
            return
        after = {"tenant_id": page[-1].tenant_id, "id": page[-1].id}


def still_there(connection: sa.Connection, artifact: PublishedArtifact) -> bool:
    """Whether the receipt's row is there now. Commits."""
    with connection.begin():
        return bool(connection.execute(_STILL_THERE, {"tenant_id": artifact.tenant_id, "id": artifact.id}).scalar_one())
