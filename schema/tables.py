"""Every table, as SQLAlchemy Core.

What holds for all of them: the tenant is part of every key; ids, counters and line numbers are 64-bit; times are
`timestamptz` written from the database's clock. The migrations in `schema/migrations` create them; a test compares
the two.

    tenants 1─n submitters 1─n submissions 1─n manifests 1─1 fetch_parameters
                                               manifests 1─n manifest_files 1─n ingest_batches 1─n resource_versions
                                               manifests 1─n steps           (what a worker leases)
                                               manifests 1─n artifacts       (receipts)
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import BYTEA, JSONB, UUID

metadata = sa.MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

_now = sa.text("clock_timestamp()")
_zero = sa.text("0")


def _time(name: str, *, default: bool = False) -> Column[object]:
    return Column(name, sa.TIMESTAMP(timezone=True), nullable=not default, server_default=_now if default else None)


def _id() -> Column[int]:
    return Column("id", BigInteger, sa.Identity(always=True), nullable=False)


def _tenant() -> Column[int]:
    return Column("tenant_id", Integer, nullable=False)


def _counter(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=_zero)


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    words = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({words})", name=f"{column}_check")


SUBMISSION_STATUSES = ("in-progress", "completed", "stopped")
MANIFEST_STATUSES = ("pending", "processing", "completed", "failed", "replaced", "stopped")
LIVE_MANIFEST_STATUSES = ("pending", "processing")
STEP_KINDS = ("plan", "ingest", "publish")
STEP_STATES = ("waiting", "ready", "done", "failed")
FILE_KINDS = ("output", "deleted", "outcome")
ARTIFACT_TYPES = ("output", "outcome", "deleted", "ledger", "summary")

tenants = Table(
    "tenants",
    metadata,
    Column("id", Integer, sa.Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", sa.REAL, nullable=False, server_default=sa.text("1")),
    Column("max_leased_steps", Integer),
    Column("max_active_submissions", Integer),
    _time("created_at", default=True),
    CheckConstraint("weight > 0", name="weight_check"),
    comment="weight: share of the fleet's slots. max_*: caps, NULL for none.",
)

submitters = Table(
    "submitters",
    metadata,
    _tenant(),
    _id(),
    Column("system", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("egress_policy", JSONB, nullable=False, server_default=sa.text("'{}'")),
    Column("oauth_client", JSONB),
    Column("jwks", JSONB),
    Column("ignore_meta", Boolean, nullable=False, server_default=sa.false()),
    _time("created_at", default=True),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    sa.UniqueConstraint("tenant_id", "system", "value"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    comment="ignore_meta: compare content without meta.versionId and meta.lastUpdated.",
)

submissions = Table(
    "submissions",
    metadata,
    _tenant(),
    _id(),
    Column("submitter_id", BigInteger, nullable=False),
    Column("submission_id", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="in-progress"),
    Column("owner_subject", Text),
    Column("request_url", Text),
    Column("requires_access_token", Boolean, nullable=False, server_default=sa.false()),
    Column("fhir_version", Text),
    _time("transaction_time"),
    _time("created_at", default=True),
    _time("updated_at", default=True),
    _time("completed_at"),
    _time("expired_at"),
    _time("expiry_failed_at"),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    sa.UniqueConstraint("tenant_id", "submitter_id", "submission_id"),
    ForeignKeyConstraint(["tenant_id", "submitter_id"], ["submitters.tenant_id", "submitters.id"]),
    _one_of("status", SUBMISSION_STATUSES),
    Index("submissions_ended_idx", "completed_at", postgresql_where=sa.text("expired_at IS NULL")),
    Index("submissions_open_idx", "updated_at", postgresql_where=sa.text("status = 'in-progress'")),
    comment="expired_at: all that it was told is deleted. expiry_failed_at: the artifact store did not let it go.",
)

manifests = Table(
    "manifests",
    metadata,
    _tenant(),
    _id(),
    Column("submission_id", BigInteger, nullable=False),
    Column("manifest_url", Text),
    Column("replaces_url", Text),
    Column("kickoff_digest", BYTEA, nullable=False),
    Column("status", Text, nullable=False, server_default="pending"),
    Column("problems", JSONB, nullable=False, server_default=sa.text("'[]'")),
    Column("notes", JSONB, nullable=False, server_default=sa.text("'[]'")),
    _time("created_at", default=True),
    _time("started_at"),
    _time("finished_at"),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "submission_id"], ["submissions.tenant_id", "submissions.id"]),
    _one_of("status", MANIFEST_STATUSES),
    Index(
        "manifests_url_key",
        "tenant_id",
        "submission_id",
        "manifest_url",
        unique=True,
        postgresql_where=sa.text("status <> 'replaced'"),
    ),
    Index("manifests_submission_idx", "tenant_id", "submission_id"),
    comment="problems: manifest-level errors ({code, diagnostics}). kickoff_digest: tells a repeated request.",
)

fetch_parameters = Table(
    "fetch_parameters",
    metadata,
    _tenant(),
    Column("manifest_id", BigInteger, nullable=False),
    Column("fhir_base_url", Text),
    Column("output_format", Text),
    Column("oauth_metadata_urls", JSONB, nullable=False, server_default=sa.text("'[]'")),
    Column("metadata", JSONB, nullable=False, server_default=sa.text("'[]'")),
    Column("import_directives", JSONB, nullable=False, server_default=sa.text("'[]'")),
    Column("sealed_secrets", BYTEA),
    sa.PrimaryKeyConstraint("tenant_id", "manifest_id"),
    ForeignKeyConstraint(["tenant_id", "manifest_id"], ["manifests.tenant_id", "manifests.id"], ondelete="CASCADE"),
    comment="Written in the manifest's own transaction. sealed_secrets: request headers and the file encryption key.",
)

manifest_files = Table(
    "manifest_files",
    metadata,
    _tenant(),
    _id(),
    Column("manifest_id", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("declared_type", Text),
    Column("organized_by", Text),
    Column("declared_count", BigInteger),
    Column("declared_bytes", BigInteger),
    Column("validator", Text),
    Column("problems", JSONB, nullable=False, server_default=sa.text("'[]'")),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    sa.UniqueConstraint("tenant_id", "manifest_id", "position"),
    ForeignKeyConstraint(["tenant_id", "manifest_id"], ["manifests.tenant_id", "manifests.id"], ondelete="CASCADE"),
    _one_of("kind", FILE_KINDS),
    comment="validator: strong ETag of the body being read. problems: file-level errors and warnings.",
)

steps = Table(
    "steps",
    metadata,
    _tenant(),
    _id(),
    Column("manifest_id", BigInteger, nullable=False),
    Column("file_id", BigInteger),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("worker_id", Text),
    _time("lease_expires_at"),
    _counter("fencing_token"),
    Column("attempts", Integer, nullable=False, server_default=_zero),
    _time("ready_at", default=True),
    Column("generation", Integer, nullable=False, server_default=sa.text("1")),
    _counter("cursor_bytes"),
    _counter("cursor_lines"),
    _counter("created"),
    _counter("updated"),
    _counter("unchanged"),
    _counter("affirmed"),
    _counter("failed"),
    _counter("skipped"),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "manifest_id"], ["manifests.tenant_id", "manifests.id"], ondelete="CASCADE"),
    ForeignKeyConstraint(
        ["tenant_id", "file_id"], ["manifest_files.tenant_id", "manifest_files.id"], ondelete="CASCADE"
    ),
    _one_of("kind", STEP_KINDS),
    _one_of("state", STEP_STATES),
    Index(
        "steps_open_idx",
        "tenant_id",
        "manifest_id",
        "id",
        postgresql_where=sa.text("state IN ('waiting', 'ready')"),
    ),
    Index("steps_leased_idx", "tenant_id", postgresql_where=sa.text("worker_id IS NOT NULL")),
    Index("steps_manifest_idx", "tenant_id", "manifest_id"),
    Index("steps_file_idx", "tenant_id", "file_id", postgresql_where=sa.text("file_id IS NOT NULL")),
    postgresql_with={"fillfactor": 50},
    comment="What a worker leases. Nothing a heartbeat changes is indexed, so that renewals stay in the page (HOT).",
)

ingest_batches = Table(
    "ingest_batches",
    metadata,
    _tenant(),
    Column("id", BigInteger, sa.Identity(always=False), nullable=False),
    Column("manifest_id", BigInteger, nullable=False),
    Column("file_id", BigInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("first_byte", BigInteger, nullable=False),
    Column("end_byte", BigInteger, nullable=False),
    Column("first_line", BigInteger, nullable=False),
    Column("line_count", BigInteger, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("digest", BYTEA, nullable=False),
    _counter("created"),
    _counter("updated"),
    _counter("unchanged"),
    _counter("affirmed"),
    _counter("failed"),
    _counter("skipped"),
    _time("committed_at", default=True),
    Column("results", BYTEA),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    sa.UniqueConstraint("tenant_id", "file_id", "generation", "first_byte"),
    Index("ingest_batches_manifest_idx", "tenant_id", "manifest_id", "id"),
    comment="One row per committed batch. results: what became of each line, packed (schema/results.py).",
)

entry_issues = Table(
    "entry_issues",
    metadata,
    _tenant(),
    Column("file_id", BigInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("code", Text, nullable=False),
    Column("resource_type", Text),
    Column("resource_id", Text),
    Column("diagnostics", Text, nullable=False),
    sa.PrimaryKeyConstraint("tenant_id", "file_id", "generation", "line"),
    _one_of("outcome", ("validation-error", "processing-error")),
    comment="One row per line that failed.",
)

resource_types = Table(
    "resource_types",
    metadata,
    Column("number", sa.SmallInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False, unique=True),
    comment="Names for the type numbers inside keys; filled from schema/fhir_types.py, for the views.",
)

resource_versions = Table(
    "resource_versions",
    metadata,
    Column("key", UUID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("op", sa.SmallInteger, nullable=False),
    Column("content_hash", UUID),
    Column("resource_id", Text, nullable=False),
    Column("body", Text),
    sa.PrimaryKeyConstraint("key", "seq"),
    comment="The store and its history, append-only. key: tenant (4 bytes) | type (2) | hash of the id (10).",
)

artifacts = Table(
    "artifacts",
    metadata,
    _tenant(),
    _id(),
    Column("submission_id", BigInteger, nullable=False),
    Column("manifest_id", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("resource_type", Text),
    Column("part", Integer, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("line_count", BigInteger),
    Column("byte_count", BigInteger),
    Column("stored_bytes", BigInteger),
    Column("sha256", BYTEA),
    Column("severity_counts", JSONB),
    Column("published", Boolean, nullable=False, server_default=sa.false()),
    _time("created_at", default=True),
    _time("removal_failed_at"),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    sa.UniqueConstraint("tenant_id", "path"),
    ForeignKeyConstraint(["tenant_id", "manifest_id"], ["manifests.tenant_id", "manifests.id"]),
    _one_of("type", ARTIFACT_TYPES),
    Index("artifacts_submission_idx", "tenant_id", "submission_id"),
    Index("artifacts_manifest_idx", "tenant_id", "manifest_id"),
    Index("artifacts_unpublished_idx", "created_at", postgresql_where=sa.text("NOT published")),
    comment="Recorded before its object is written, so that no object is without a row; published with the manifest.",
)

poll_tokens = Table(
    "poll_tokens",
    metadata,
    _tenant(),
    Column("token_hash", BYTEA, nullable=False),
    Column("submission_id", BigInteger, nullable=False),
    Column("owner_subject", Text),
    Column("separate_export_status", Boolean, nullable=False, server_default=sa.false()),
    _time("created_at", default=True),
    _time("expires_at"),
    sa.PrimaryKeyConstraint("tenant_id", "token_hash"),
    ForeignKeyConstraint(["tenant_id", "submission_id"], ["submissions.tenant_id", "submissions.id"]),
    Index("poll_tokens_expiry_idx", "expires_at"),
    comment="separate_export_status: what the request preferred of its polls.",
)

lease_events = Table(
    "lease_events",
    metadata,
    _tenant(),
    _id(),
    Column("manifest_id", BigInteger, nullable=False),
    Column("step_id", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("worker_id", Text),
    Column("fencing_token", BigInteger, nullable=False),
    Column("reason", Text),
    _time("at", default=True),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    Index("lease_events_manifest_idx", "tenant_id", "manifest_id"),
    Index("lease_events_at_idx", "at"),
)

fleet_workers = Table(
    "fleet_workers",
    metadata,
    Column("name", Text, primary_key=True),
    Column("pid", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("drain", Boolean, nullable=False, server_default=sa.false()),
    _time("started_at", default=True),
    _time("last_seen_at", default=True),
    comment="Celery worker nodes of the whole fleet, whatever the tenant.",
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("name", Text, primary_key=True),
    _time("finished_at"),
    Column("seconds", sa.Double),
    Column("report", JSONB, nullable=False, server_default=sa.text("'{}'")),
    _counter("failures"),
    comment="The last run of each sweep that ended well, and how many have failed since.",
)

egress_log = Table(
    "egress_log",
    metadata,
    _tenant(),
    _id(),
    Column("manifest_id", BigInteger, nullable=False),
    Column("file_id", BigInteger),
    Column("method", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("status", Integer),
    Column("bytes", BigInteger),
    Column("verdict", Text, nullable=False),
    _time("at", default=True),
    sa.PrimaryKeyConstraint("tenant_id", "id"),
    Index("egress_log_at_idx", "at"),
    comment="Every request made on a submitter's behalf. url: without its query.",
)
