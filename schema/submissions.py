"""Tenants, submitters, submissions, their manifests, and the poll tokens under which providers ask for them.

These are the front door's operations: not fenced, one short transaction each, which the caller opens. Whoever changes a
submission or adds to it holds its row (`hold_submission`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from schema.database import is_conflict
from schema.leases import evict_submission
from schema.tables import (
    LIVE_MANIFEST_STATUSES,
    fetch_parameters,
    manifests,
    poll_tokens,
    steps,
    submissions,
    submitters,
    tenants,
)

REVOKE_LOCK_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Submission:
    """A submission. `id` is ours, `submission_id` the submitter's."""

    tenant_id: int
    id: int
    submitter_id: int
    submission_id: str
    status: str
    fhir_version: str | None
    transaction_time: datetime | None


@dataclass(frozen=True, slots=True)
class FetchParameters:
    """What a manifest's kickoff said about fetching it. `sealed_secrets`: see `workers/seals.py`."""

    fhir_base_url: str | None
    output_format: str | None
    oauth_metadata_urls: Sequence[str]
    metadata: Sequence[dict[str, str]]
    import_directives: Sequence[dict[str, str]]
    sealed_secrets: bytes | None


@dataclass(frozen=True, slots=True)
class ManifestProgress:
    """How far a manifest is. `fraction` is between 0 and 1, over its files."""

    status: str
    files: int
    files_ended: int
    fraction: float


@dataclass(frozen=True, slots=True)
class PollToken:
    """What a poll token stands for, and until when. `separate_export_status`: the Prefer of its status request."""

    submission: Submission
    separate_export_status: bool
    expires_at: datetime


_SUBMISSION_COLUMNS = (
    submissions.c.tenant_id,
    submissions.c.id,
    submissions.c.submitter_id,
    submissions.c.submission_id,
    submissions.c.status,
    submissions.c.fhir_version,
    submissions.c.transaction_time,
)

# One row a manifest, from the counts its steps carry: the cost grows with files, never with lines.
_PROGRESS = sa.text("""
SELECT m.status,
       count(*) FILTER (WHERE s.kind = 'ingest') AS files,
       count(*) FILTER (WHERE s.kind = 'ingest' AND s.state IN ('done', 'failed')) AS files_ended,
       coalesce(avg(CASE WHEN s.state IN ('done', 'failed') THEN 1
                    ELSE least(coalesce(s.cursor_bytes / nullif(f.declared_bytes, 0)::float8, 0), 1) END)
                FILTER (WHERE s.kind = 'ingest'), 0)::float8 AS fraction
FROM manifests m
JOIN steps s ON s.tenant_id = m.tenant_id AND s.manifest_id = m.id
LEFT JOIN manifest_files f ON f.tenant_id = s.tenant_id AND f.id = s.file_id
WHERE m.tenant_id = :tenant_id AND m.submission_id = :submission_id
GROUP BY m.id, m.status
ORDER BY m.id
""")


def find_tenant(connection: sa.Connection, name: str) -> int | None:
    """The tenant's id, or None."""
    return connection.execute(sa.select(tenants.c.id).where(tenants.c.name == name)).scalar_one_or_none()


def add_tenant(connection: sa.Connection, name: str) -> int:
    """The tenant's id, made if there is none of that name."""
    connection.execute(insert(tenants).values(name=name).on_conflict_do_nothing())
    return int(connection.execute(sa.select(tenants.c.id).where(tenants.c.name == name)).scalar_one())


def find_submitter(connection: sa.Connection, tenant_id: int, system: str, value: str) -> int | None:
    """The submitter's id, or None."""
    return connection.execute(
        sa.select(submitters.c.id).where(
            submitters.c.tenant_id == tenant_id, submitters.c.system == system, submitters.c.value == value
        )
    ).scalar_one_or_none()


def add_submitter(connection: sa.Connection, tenant_id: int, system: str, value: str, *, ignore_meta: bool) -> int:
    """Register a submitter, or change its settings."""
    return int(
        connection.execute(
            insert(submitters)
            .values(tenant_id=tenant_id, system=system, value=value, ignore_meta=ignore_meta)
            .on_conflict_do_update(index_elements=["tenant_id", "system", "value"], set_={"ignore_meta": ignore_meta})
            .returning(submitters.c.id)
        ).scalar_one()
    )


def find_submission(
    connection: sa.Connection, tenant_id: int, submitter_id: int, submission_id: str
) -> Submission | None:
    """The submission that its submitter calls `submission_id`; None also once it has expired."""
    row = connection.execute(
        sa.select(*_SUBMISSION_COLUMNS).where(
            submissions.c.tenant_id == tenant_id,
            submissions.c.submitter_id == submitter_id,
            submissions.c.submission_id == submission_id,
            submissions.c.expired_at.is_(None),
        )
    ).one_or_none()
    return None if row is None else Submission(**row._mapping)


def hold_submission(
    connection: sa.Connection,
    tenant_id: int,
    submitter_id: int,
    submission_id: str,
    *,
    owner_subject: str | None,
    request_url: str | None,
) -> Submission:
    """The submission, made if it is new, its row locked until the transaction ends."""
    connection.execute(
        insert(submissions)
        .values(
            tenant_id=tenant_id,
            submitter_id=submitter_id,
            submission_id=submission_id,
            owner_subject=owner_subject,
            request_url=request_url,
        )
        .on_conflict_do_nothing()
    )
    row = connection.execute(
        sa.select(*_SUBMISSION_COLUMNS)
        .where(
            submissions.c.tenant_id == tenant_id,
            submissions.c.submitter_id == submitter_id,
            submissions.c.submission_id == submission_id,
        )
        .with_for_update()
    ).one()
    return Submission(**row._mapping)


def _submission(submission: Submission) -> sa.ColumnElement[bool]:
    return sa.and_(submissions.c.tenant_id == submission.tenant_id, submissions.c.id == submission.id)


def set_status(connection: sa.Connection, submission: Submission, status: str) -> None:
    """Change the submission's status; `completed` and `stopped` are final and are stamped."""
    now = sa.func.clock_timestamp()
    ended = {} if status == "in-progress" else {"completed_at": now}
    connection.execute(
        submissions.update().where(_submission(submission)).values(status=status, updated_at=now, **ended)
    )


def set_fhir_version(connection: sa.Connection, submission: Submission, fhir_version: str) -> None:
    """Fix the FHIR version that all manifests of the submission use."""
    connection.execute(submissions.update().where(_submission(submission)).values(fhir_version=fhir_version))


def find_manifest(connection: sa.Connection, submission: Submission, manifest_url: str) -> tuple[int, bytes] | None:
    """Id and kickoff digest of the submission's manifest of that URL, replaced ones aside."""
    row = connection.execute(
        sa.select(manifests.c.id, manifests.c.kickoff_digest).where(
            manifests.c.tenant_id == submission.tenant_id,
            manifests.c.submission_id == submission.id,
            manifests.c.manifest_url == manifest_url,
            manifests.c.status != "replaced",
        )
    ).one_or_none()
    return None if row is None else (row.id, row.kickoff_digest)


def has_manifests(connection: sa.Connection, submission: Submission) -> bool:
    """Whether any manifest was ever submitted under it."""
    any_manifest = sa.exists().where(
        manifests.c.tenant_id == submission.tenant_id, manifests.c.submission_id == submission.id
    )
    return bool(connection.execute(sa.select(any_manifest)).scalar_one())


def add_manifest(
    connection: sa.Connection,
    submission: Submission,
    *,
    manifest_url: str | None,
    replaces_url: str | None,
    kickoff_digest: bytes,
    parameters: FetchParameters,
) -> int:
    """A new manifest with its fetch parameters and its first steps; returns its id."""
    place: dict[str, Any] = {"tenant_id": submission.tenant_id}
    place["manifest_id"] = connection.execute(
        manifests.insert()
        .values(
            tenant_id=submission.tenant_id,
            submission_id=submission.id,
            manifest_url=manifest_url,
            replaces_url=replaces_url,
            kickoff_digest=kickoff_digest,
        )
        .returning(manifests.c.id)
    ).scalar_one()
    connection.execute(
        fetch_parameters.insert().values(
            **place,
            fhir_base_url=parameters.fhir_base_url,
            output_format=parameters.output_format,
            oauth_metadata_urls=list(parameters.oauth_metadata_urls),
            metadata=list(parameters.metadata),
            import_directives=list(parameters.import_directives),
            sealed_secrets=parameters.sealed_secrets,
        )
    )
    connection.execute(
        steps.insert(),
        [{**place, "kind": "plan", "state": "ready"}, {**place, "kind": "publish", "state": "waiting"}],
    )
    return int(place["manifest_id"])


def revoke(connection: sa.Connection, submission: Submission, status: str) -> list[int]:
    """End the submission's live manifests as `stopped` or `replaced`, and forget their secrets; returns their ids.

    Commits and claims hold the manifest's row, so this waits for those under way, and none can come after it. Who holds
    it for longer than a commit takes is frozen: its session is ended.
    """
    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{REVOKE_LOCK_SECONDS}s'"))
    try:
        with connection.begin_nested():
            ended = _end_manifests(connection, submission, status)
    except sa.exc.OperationalError as error:
        if not is_conflict(error):
            raise
        evict_submission(connection, submission.tenant_id, submission.id)
        ended = _end_manifests(connection, submission, status)
    connection.execute(
        fetch_parameters.update()
        .where(fetch_parameters.c.tenant_id == submission.tenant_id, fetch_parameters.c.manifest_id.in_(ended))
        .values(sealed_secrets=None)
    )
    return ended


def _end_manifests(connection: sa.Connection, submission: Submission, status: str) -> list[int]:
    return list(
        connection.execute(
            manifests.update()
            .where(
                manifests.c.tenant_id == submission.tenant_id,
                manifests.c.submission_id == submission.id,
                manifests.c.status.in_(LIVE_MANIFEST_STATUSES),
            )
            .values(status=status, finished_at=sa.func.clock_timestamp())
            .returning(manifests.c.id)
        ).scalars()
    )


def progress(connection: sa.Connection, submission: Submission) -> list[ManifestProgress]:
    """How far each of the submission's manifests is, in the order they came."""
    rows = connection.execute(_PROGRESS, {"tenant_id": submission.tenant_id, "submission_id": submission.id})
    return [ManifestProgress(**row._mapping) for row in rows]


def ensure_transaction_time(connection: sa.Connection, submission: Submission) -> datetime:
    """The instant of the submission's status manifest: set the first time it is asked for, then the same for ever."""
    if submission.transaction_time is not None:
        return submission.transaction_time
    time = connection.execute(
        submissions.update()
        .where(_submission(submission))
        .values(transaction_time=sa.func.coalesce(submissions.c.transaction_time, sa.func.clock_timestamp()))
        .returning(submissions.c.transaction_time)
    ).scalar_one()
    assert isinstance(time, datetime)
    return time


def mint_poll_token(
    connection: sa.Connection,
    submission: Submission,
    token_hash: bytes,
    seconds: float,
    *,
    owner_subject: str | None,
    separate_export_status: bool,
) -> None:
    """Let a token, of which only the hash is kept, stand for the submission for `seconds`."""
    connection.execute(
        poll_tokens.insert().values(
            tenant_id=submission.tenant_id,
            token_hash=token_hash,
            submission_id=submission.id,
            owner_subject=owner_subject,
            separate_export_status=separate_export_status,
            expires_at=sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds),
        )
    )


def resolve_poll_token(connection: sa.Connection, tenant_id: int, token_hash: bytes) -> PollToken | None:
    """What a token stands for; None after its deletion or expiry, or that of its submission."""
    row = connection.execute(
        sa.select(*_SUBMISSION_COLUMNS, poll_tokens.c.separate_export_status, poll_tokens.c.expires_at)
        .join(
            submissions,
            sa.and_(
                submissions.c.tenant_id == poll_tokens.c.tenant_id,
                submissions.c.id == poll_tokens.c.submission_id,
            ),
        )
        .where(
            poll_tokens.c.tenant_id == tenant_id,
            poll_tokens.c.token_hash == token_hash,
            poll_tokens.c.expires_at > sa.func.clock_timestamp(),
            submissions.c.expired_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        return None
    values = dict(row._mapping)
    of_token = {name: values.pop(name) for name in ("separate_export_status", "expires_at")}
    return PollToken(Submission(**values), **of_token)


def clear_poll_token(connection: sa.Connection, tenant_id: int, token_hash: bytes) -> bool:
    """Forget a token; whether there was one. The submission and other tokens for it stay."""
    return (
        connection.execute(
            poll_tokens.delete().where(poll_tokens.c.tenant_id == tenant_id, poll_tokens.c.token_hash == token_hash)
        ).rowcount
        == 1
    )
