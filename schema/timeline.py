"""The lease timeline of a manifest: who held which step, when, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    """A line of the timeline.

    `event` is claimed, released, lost (the holder noticed), refused (a write of a lost lease was turned away), expired
    (the sweep noticed), finished or failed. `position` is the file's place in the manifest, None where the step is not
    about a file.
    """

    at: datetime
    step_id: int
    kind: str
    position: int | None
    event: str
    worker_id: str | None
    fencing_token: int
    reason: str | None


# Plan: lease_events_manifest_idx, one probe of steps and of manifest_files for each event.
_TIMELINE = sa.text("""
SELECT e.at, e.step_id, s.kind, f.position, e.event, e.worker_id, e.fencing_token, e.reason
FROM lease_events e
JOIN steps s ON s.tenant_id = e.tenant_id AND s.id = e.step_id
LEFT JOIN manifest_files f ON f.tenant_id = s.tenant_id AND f.id = s.file_id
WHERE e.tenant_id = :tenant_id AND e.manifest_id = :manifest_id
ORDER BY e.id
""")

# Plan: a scan of manifests, for people; ids are unique over all tenants.
_NAMED = sa.text("""
SELECT tenant_id, id FROM manifests
WHERE id = CAST(:id AS bigint) OR manifest_url = :name
ORDER BY id DESC
LIMIT 1
""")


def find_manifest(connection: sa.Connection, name: str) -> tuple[int, int] | None:
    """Tenant id and id of the manifest of that id, or the newest of that URL."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else None
    row = connection.execute(_NAMED, {"id": number, "name": name}).one_or_none()
    return None if row is None else (int(row.tenant_id), int(row.id))


def of_manifest(connection: sa.Connection, tenant_id: int, manifest_id: int) -> list[LeaseEvent]:
    """What happened to the leases of the manifest's steps, in the order in which they were written."""
    rows = connection.execute(_TIMELINE, {"tenant_id": tenant_id, "manifest_id": manifest_id})
    return [LeaseEvent(**row._mapping) for row in rows]
