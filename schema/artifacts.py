"""Receipts as rows. A row is written before its object, and shown once its manifest has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from schema.leases import Lease, enter, hold_manifest, renew
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
