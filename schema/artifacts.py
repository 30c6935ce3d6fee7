"""Receipts as rows. A row is written before its object, and shown once its manifest has ended.

What receipts are made of is read page by page, each page in a transaction of its own: however long it takes to write
and to upload them, no transaction is open meanwhile, and no more than a page is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from schema.files import Problem
from schema.leases import Lease, enter, hold_manifest, renew
from schema.results import CommittedBatch, Issue
from schema.tables import artifacts, manifests


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published receipt. `byte_count` is before compression, `stored_bytes` after (gzip)."""

    id: int
    type: str
    resource_type: str | None
    part: int
    path: str
    line_count: int
    byte_count: int
    stored_bytes: int
    severity_counts: dict[str, int] | None
    manifest_id: int
    manifest_url: str | None


@dataclass(frozen=True, slots=True)
class ReportedFile:
    """A file of a manifest that ends. `state` is its step's, None where there was nothing to do for it."""

    tenant_id: int
    file_id: int
    position: int
    kind: str
    url: str
    declared_type: str | None
    declared_count: int | None
    declared_bytes: int | None
    problems: list[Problem]
    state: str | None
    generation: int


_FILES_A_PAGE = 500
_BATCHES_A_PAGE = 16

# Plan: manifest_files by (tenant_id, manifest_id, position), then one probe of steps_file_idx for each file.
_FILES = sa.text("""
SELECT f.tenant_id, f.id AS file_id, f.position, f.kind, f.url, f.declared_type, f.declared_count, f.declared_bytes,
       f.problems, s.state, coalesce(s.generation, 1) AS generation
FROM manifest_files f
LEFT JOIN steps s ON s.tenant_id = f.tenant_id AND s.file_id = f.id
WHERE f.tenant_id = :tenant_id AND f.manifest_id = :manifest_id AND f.position > :after
ORDER BY f.position
LIMIT :limit
""")

# Plan: the unique index (tenant_id, file_id, generation, first_byte), from where the last page ended.
_BATCHES = sa.text("""
SELECT id, file_id, first_byte, end_byte, first_line, line_count, digest, committed_at, results
FROM ingest_batches
WHERE tenant_id = :tenant_id AND file_id = :file_id AND generation = :generation AND first_byte > :after
ORDER BY first_byte
LIMIT :limit
""")

# Plan: a range of the primary key.
_ISSUES = sa.text("""
SELECT line, byte_offset, code, diagnostics, outcome, resource_type, resource_id
FROM entry_issues
WHERE tenant_id = :tenant_id AND file_id = :file_id AND generation = :generation
  AND line >= :first_line AND line < :end_line
ORDER BY line
""")


def files(connection: sa.Connection, tenant_id: int, manifest_id: int) -> Iterator[ReportedFile]:
    """The manifest's files in its order. Commits after each page."""
    after = -1
    while True:
        with connection.begin():
            page = connection.execute(
                _FILES,
                {"tenant_id": tenant_id, "manifest_id": manifest_id, "after": after, "limit": _FILES_A_PAGE},
            ).all()
        for row in page:
            problems = [Problem(**problem) for problem in row.problems]
            yield ReportedFile(**{**row._mapping, "problems": problems})
        if len(page) < _FILES_A_PAGE:
            return
        after = page[-1].position


def _place(file: ReportedFile) -> dict[str, int]:
    return {"tenant_id": file.tenant_id, "file_id": file.file_id, "generation": file.generation}


def batches(connection: sa.Connection, file: ReportedFile) -> Iterator[CommittedBatch]:
    """The file's committed batches in order. Commits after each page."""
    after = -1
    while True:
        with connection.begin():
            page = connection.execute(_BATCHES, {**_place(file), "after": after, "limit": _BATCHES_A_PAGE}).all()
        for row in page:
            yield CommittedBatch(**row._mapping)
        if len(page) < _BATCHES_A_PAGE:
            return
        after = page[-1].first_byte


def issues_of_batch(connection: sa.Connection, file: ReportedFile, batch: CommittedBatch) -> list[Issue]:
    """Why lines of the batch failed, in the order of the lines. Commits."""
    lines = {"first_line": batch.first_line, "end_line": batch.first_line + batch.line_count}
    with connection.begin():
        return [Issue(**row._mapping) for row in connection.execute(_ISSUES, {**_place(file), **lines})]


def record(
    connection: sa.Connection,
    lease: Lease,
    *,
    submission_id: int,
    type: str,
    resource_type: str | None,
    part: int,
    path: str,
    seconds: float,
) -> int:
    """Announce an object about to be written; returns the artifact's id. Commits. Raises `LeaseLost`."""
    with connection.begin():
        enter(connection, lease)
        artifact_id = connection.execute(
            artifacts.insert()
            .values(
                tenant_id=lease.tenant_id,
                submission_id=submission_id,
                manifest_id=lease.manifest_id,
                type=type,
                resource_type=resource_type,
                part=part,
                fencing_token=lease.fencing_token,
                path=path,
            )
            .returning(artifacts.c.id)
        ).scalar_one()
        hold_manifest(connection, lease)
        renew(connection, lease, seconds)
    return int(artifact_id)


def complete(
    connection: sa.Connection,
    lease: Lease,
    artifact_id: int,
    *,
    line_count: int,
    byte_count: int,
    stored_bytes: int,
    sha256: bytes,
    severity_counts: dict[str, int] | None,
    seconds: float,
) -> None:
    """Note what was written: counts, sizes, digest of the stored bytes. Commits. Raises `LeaseLost`."""
    with connection.begin():
        enter(connection, lease)
        connection.execute(
            artifacts.update()
            .where(artifacts.c.tenant_id == lease.tenant_id, artifacts.c.id == artifact_id)
            .values(
                line_count=line_count,
                byte_count=byte_count,
                stored_bytes=stored_bytes,
                sha256=sha256,
                severity_counts=severity_counts,
            )
        )
        hold_manifest(connection, lease)
        renew(connection, lease, seconds)


_COLUMNS = (
    artifacts.c.id,
    artifacts.c.type,
    artifacts.c.resource_type,
    artifacts.c.part,
    artifacts.c.path,
    artifacts.c.line_count,
    artifacts.c.byte_count,
    artifacts.c.stored_bytes,
    artifacts.c.severity_counts,
    artifacts.c.manifest_id,
    manifests.c.manifest_url,
)


def _published(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    same_manifest = sa.and_(manifests.c.tenant_id == artifacts.c.tenant_id, manifests.c.id == artifacts.c.manifest_id)
    return (
        sa.select(*_COLUMNS)
        .join(manifests, same_manifest)
        .where(artifacts.c.published, manifests.c.status.in_(("completed", "failed")), *conditions)
        .order_by(artifacts.c.manifest_id, artifacts.c.type, artifacts.c.resource_type, artifacts.c.part)
    )


def of_submission(connection: sa.Connection, tenant_id: int, submission_id: int) -> list[Artifact]:
    """The receipts of a submission's manifests that ended."""
    statement = _published(artifacts.c.tenant_id == tenant_id, artifacts.c.submission_id == submission_id)
    return [Artifact(**row._mapping) for row in connection.execute(statement)]


def get(connection: sa.Connection, tenant_id: int, submission_id: int, artifact_id: int) -> Artifact | None:
    """One receipt of that submission, or None."""
    row = connection.execute(
        _published(
            artifacts.c.tenant_id == tenant_id,
            artifacts.c.submission_id == submission_id,
            artifacts.c.id == artifact_id,
        )
    ).one_or_none()
    return None if row is None else Artifact(**row._mapping)
