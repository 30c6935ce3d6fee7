"""Manifests and their files as steps see them: what planning writes, what ingest and publish read, how each one ends.

    plan ──files──▶ ingest × n ──the last one──▶ publish ──▶ manifest completed or failed
      └─ nothing to ingest, or not to be had ──────▲

Whoever ends a step also makes the next one ready, in the same transaction and with the manifest's row locked, so that
of two files that end at once one sees the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import sqlalchemy as sa

from schema.leases import Lease, WriteRefused, enter, finish, hold_manifest, hold_step
from schema.tables import artifacts, fetch_parameters, manifest_files, manifests, steps


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that went wrong with a whole file or manifest. `diagnostics` is written for the submitter."""

    severity: str
    code: str
    diagnostics: str


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that the manifest lists, in the manifest's order. `kind`: output, deleted or outcome."""

    kind: str
    url: str
    declared_type: str | None = None
    organized_by: str | None = None
    declared_count: int | None = None
    declared_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ManifestView:
    """What a worker needs to know of a manifest."""

    tenant_id: int
    manifest_id: int
    submission_id: int
    manifest_url: str | None
    fhir_base_url: str | None
    output_format: str | None
    sealed_secrets: bytes | None
    ignore_meta: bool
    problems: list[Problem]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class FileView:
    """What a worker needs to know of the file it ingests."""

    position: int
    url: str
    declared_type: str | None
    organized_by: str | None
    validator: str | None
    problems: list[Problem]


_MANIFEST_VIEW = sa.text("""
SELECT m.tenant_id, m.id AS manifest_id, m.submission_id, m.manifest_url, p.fhir_base_url, p.output_format,
       p.sealed_secrets, r.ignore_meta, m.problems, m.notes
FROM manifests m
JOIN fetch_parameters p ON p.tenant_id = m.tenant_id AND p.manifest_id = m.id
JOIN submissions s ON s.tenant_id = m.tenant_id AND s.id = m.submission_id
JOIN submitters r ON r.tenant_id = s.tenant_id AND r.id = s.submitter_id
WHERE m.tenant_id = :tenant_id AND m.id = :manifest_id
""")

_FILE_VIEW = sa.text("""
SELECT position, url, declared_type, organized_by, validator, problems
FROM manifest_files
WHERE tenant_id = :tenant_id AND id = :file_id
""")

_READY_PUBLISH = sa.text("""
UPDATE steps SET state = 'ready', ready_at = clock_timestamp()
WHERE tenant_id = :tenant_id AND manifest_id = :manifest_id AND kind = 'publish' AND state = 'waiting'
  AND NOT EXISTS (
    SELECT 1 FROM steps o
    WHERE o.tenant_id = :tenant_id AND o.manifest_id = :manifest_id AND o.kind = 'ingest' AND o.state = 'ready'
  )
""")


def _problems(value: list[dict[str, str]]) -> list[Problem]:
    return [Problem(**problem) for problem in value]


def manifest_view(connection: sa.Connection, tenant_id: int, manifest_id: int) -> ManifestView:
    """The manifest with its fetch parameters; raises `sqlalchemy.exc.NoResultFound` if there is none."""
    row = connection.execute(_MANIFEST_VIEW, {"tenant_id": tenant_id, "manifest_id": manifest_id}).one()
    return ManifestView(**{**row._mapping, "problems": _problems(row.problems)})


def file_view(connection: sa.Connection, lease: Lease) -> FileView:
    """The file of an ingest step."""
    row = connection.execute(_FILE_VIEW, {"tenant_id": lease.tenant_id, "file_id": lease.file_id}).one()
    return FileView(**{**row._mapping, "problems": _problems(row.problems)})


def _publish_if_nothing_is_left(connection: sa.Connection, lease: Lease) -> None:
    connection.execute(_READY_PUBLISH, {"tenant_id": lease.tenant_id, "manifest_id": lease.manifest_id})


def _manifest(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(manifests.c.tenant_id == lease.tenant_id, manifests.c.id == lease.manifest_id)


def finish_plan(
    connection: sa.Connection,
    lease: Lease,
    files: Sequence[PlannedFile],
    *,
    notes: Sequence[str] = (),
    problems: Sequence[Problem] = (),
) -> None:
    """End planning: the files' rows and steps, or why there are none. Commits. Raises `LeaseLost`."""
    with connection.begin():
        enter(connection, lease)
        hold_manifest(connection, lease, alone=True)
        place = {"tenant_id": lease.tenant_id, "manifest_id": lease.manifest_id}
        if files:
            listed = [{**place, "position": position, **asdict(file)} for position, file in enumerate(files)]
            insert = manifest_files.insert().returning(manifest_files.c.id, sort_by_parameter_order=True)
            try:
                ids = connection.execute(insert, listed).scalars()
            except sa.exc.IntegrityError as error:
                raise WriteRefused("another has planned this manifest") from error
            to_ingest = [
                {**place, "file_id": file_id, "kind": "ingest", "state": "ready"}
                for file_id, file in zip(ids, files, strict=True)
                if file.kind == "output"
            ]
            if to_ingest:
                connection.execute(steps.insert(), to_ingest)
        connection.execute(
            manifests.update()
            .where(_manifest(lease))
            .values(notes=list(notes), problems=[asdict(problem) for problem in problems])
        )
        finish(connection, lease, "failed" if problems else "done", problems[0].diagnostics if problems else None)
        _publish_if_nothing_is_left(connection, lease)


def note_validator(connection: sa.Connection, lease: Lease, validator: str | None) -> None:
    """Remember which body is being read, before its first batch. Commits. Raises `LeaseLost`."""
    with connection.begin():
        enter(connection, lease)
        connection.execute(
            manifest_files.update()
            .where(manifest_files.c.tenant_id == lease.tenant_id, manifest_files.c.id == lease.file_id)
            .values(validator=validator)
        )
        hold_manifest(connection, lease)
        hold_step(connection, lease)


def finish_file(connection: sa.Connection, lease: Lease, problems: Sequence[Problem]) -> None:
    """End a file: `failed` if one of the problems is an error. Commits. Raises `LeaseLost`."""
    errors = [problem for problem in problems if problem.severity == "error"]
    with connection.begin():
        enter(connection, lease)
        hold_manifest(connection, lease, alone=True)
        if problems:
            connection.execute(
                manifest_files.update()
                .where(manifest_files.c.tenant_id == lease.tenant_id, manifest_files.c.id == lease.file_id)
                .values(problems=[asdict(problem) for problem in problems])
            )
        finish(connection, lease, "failed" if errors else "done", errors[0].diagnostics if errors else None)
        _publish_if_nothing_is_left(connection, lease)


def finish_manifest(connection: sa.Connection, lease: Lease, status: str) -> datetime:
    """Publish the artifacts that this lease wrote, with the manifest's terminal status. Commits. Raises `LeaseLost`.

    What was sealed for fetching is not needed any more, and goes.
    """
    with connection.begin():
        enter(connection, lease)
        hold_manifest(connection, lease, alone=True)
        connection.execute(
            artifacts.update()
            .where(
                artifacts.c.tenant_id == lease.tenant_id,
                artifacts.c.manifest_id == lease.manifest_id,
                artifacts.c.fencing_token == lease.fencing_token,
            )
            .values(published=True)
        )
        connection.execute(
            fetch_parameters.update()
            .where(
                fetch_parameters.c.tenant_id == lease.tenant_id,
                fetch_parameters.c.manifest_id == lease.manifest_id,
            )
            .values(sealed_secrets=None)
        )
        finished_at = connection.execute(
            manifests.update()
            .where(_manifest(lease))
            .values(status=status, finished_at=sa.func.clock_timestamp())
            .returning(manifests.c.finished_at)
        ).scalar_one()
        finish(connection, lease, "done", status)
    assert isinstance(finished_at, datetime)
    return finished_at
