"""The tables of the first release"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

# A server built without lz4 keeps its default, which is slower and no less right.
LZ4_BODIES = """
DO $$ BEGIN
    ALTER TABLE resource_versions ALTER COLUMN body SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    RAISE NOTICE 'this server has no lz4: bodies are compressed with its default';
END $$
"""

# Names for what keys hold as numbers. An affirm keeps what stands, so it is not shown.
VIEWS = """
CREATE VIEW resource_history AS
SELECT t.name AS tenant, y.name AS type, v.resource_id AS id, v.version,
       (ARRAY['create', 'update', 'delete', 'restore', 'affirm'])[v.op] AS op,
       b.committed_at AS last_updated, b.manifest_id, b.file_id, v.line, v.body, v.key, v.seq
FROM resource_versions v
CROSS JOIN LATERAL (SELECT uuid_send(v.key) AS k) bytes
JOIN tenants t ON t.id = (get_byte(k, 0)::bigint << 24) + (get_byte(k, 1) << 16) + (get_byte(k, 2) << 8) + get_byte(k, 3)
JOIN resource_types y ON y.number = (get_byte(k, 4) << 8) + get_byte(k, 5)
JOIN ingest_batches b ON b.tenant_id = t.id AND b.id = v.batch_id;

CREATE VIEW current_resources AS
SELECT tenant, type, id, version, last_updated, manifest_id, file_id, line, body
FROM (
    SELECT DISTINCT ON (key) * FROM resource_history WHERE op <> 'affirm' ORDER BY key, seq DESC
) newest
WHERE op <> 'delete';
"""

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "egress_log",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("file_id", sa.BigInteger(), nullable=True),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("egress_log_pkey")),
        comment="Every request made on a submitter's behalf. url: without its query.",
    )
    op.create_index("egress_log_at_idx", "egress_log", ["at"], unique=False)
    op.create_table(
        "entry_issues",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("file_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("byte_offset", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("resource_type", sa.Text(), nullable=True),
        sa.Column("resource_id", sa.Text(), nullable=True),
        sa.Column("diagnostics", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('validation-error', 'processing-error')", name=op.f("entry_issues_outcome_check")
        ),
        sa.PrimaryKeyConstraint("tenant_id", "file_id", "generation", "line", name=op.f("entry_issues_pkey")),
        comment="One row per line that failed.",
    )
    op.create_table(
        "fleet_workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("drain", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "started_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "last_seen_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("fleet_workers_pkey")),
        comment="Celery worker nodes of the whole fleet, whatever the tenant.",
    )
    op.create_table(
        "ingest_batches",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("file_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("first_byte", sa.BigInteger(), nullable=False),
        sa.Column("end_byte", sa.BigInteger(), nullable=False),
        sa.Column("first_line", sa.BigInteger(), nullable=False),
        sa.Column("line_count", sa.BigInteger(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("digest", postgresql.BYTEA(), nullable=False),
        sa.Column("created", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("updated", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unchanged", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("affirmed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("skipped", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "committed_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("results", postgresql.BYTEA(), nullable=True),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("ingest_batches_pkey")),
        sa.UniqueConstraint(
            "tenant_id",
            "file_id",
            "generation",
            "first_byte",
            name=op.f("ingest_batches_tenant_id_file_id_generation_first_byte_key"),
        ),
        comment="One row per committed batch. results: what became of each line, packed (schema/results.py).",
    )
    op.create_index("ingest_batches_manifest_idx", "ingest_batches", ["tenant_id", "manifest_id", "id"], unique=False)
    op.create_table(
        "lease_events",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("lease_events_pkey")),
    )
    op.create_index("lease_events_at_idx", "lease_events", ["at"], unique=False)
    op.create_index("lease_events_manifest_idx", "lease_events", ["tenant_id", "manifest_id"], unique=False)
    op.create_table(
        "resource_types",
        sa.Column("number", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("resource_types_pkey")),
        sa.UniqueConstraint("name", name=op.f("resource_types_name_key")),
        comment="Names for the type numbers inside keys; filled from schema/fhir_types.py, for the views.",
    )
    op.create_table(
        "resource_versions",
        sa.Column("key", sa.UUID(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False),
        sa.Column("op", sa.SmallInteger(), nullable=False),
        sa.Column("content_hash", sa.UUID(), nullable=True),
        sa.Column("resource_id", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("key", "seq", name=op.f("resource_versions_pkey")),
        comment="The store and its history, append-only. key: tenant (4 bytes) | type (2) | hash of the id (10).",
    )
    op.create_table(
        "sweeps",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("report", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("failures", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("sweeps_pkey")),
        comment="The last run of each sweep that ended well, and how many have failed since.",
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.REAL(), server_default=sa.text("1"), nullable=False),
        sa.Column("max_leased_steps", sa.Integer(), nullable=True),
        sa.Column("max_active_submissions", sa.Integer(), nullable=True),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("weight > 0", name=op.f("tenants_weight_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("tenants_pkey")),
        sa.UniqueConstraint("name", name=op.f("tenants_name_key")),
        comment="weight: share of the fleet's slots. max_*: caps, NULL for none.",
    )
    op.create_table(
        "submitters",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column(
            "egress_policy", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False
        ),
        sa.Column("oauth_client", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("jwks", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("ignore_meta", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("submitters_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("submitters_pkey")),
        sa.UniqueConstraint("tenant_id", "system", "value", name=op.f("submitters_tenant_id_system_value_key")),
        comment="ignore_meta: compare content without meta.versionId and meta.lastUpdated.",
    )
    op.create_table(
        "submissions",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("submitter_id", sa.BigInteger(), nullable=False),
        sa.Column("submission_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="in-progress", nullable=False),
        sa.Column("owner_subject", sa.Text(), nullable=True),
        sa.Column("request_url", sa.Text(), nullable=True),
        sa.Column("requires_access_token", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("fhir_version", sa.Text(), nullable=True),
        sa.Column("transaction_time", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "updated_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("completed_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("expired_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("expiry_failed_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("status IN ('in-progress', 'completed', 'stopped')", name=op.f("submissions_status_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "submitter_id"],
            ["submitters.tenant_id", "submitters.id"],
            name=op.f("submissions_tenant_id_submitter_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("submissions_pkey")),
        sa.UniqueConstraint(
            "tenant_id",
            "submitter_id",
            "submission_id",
            name=op.f("submissions_tenant_id_submitter_id_submission_id_key"),
        ),
        comment="expired_at: all that it was told is deleted. expiry_failed_at: the artifact store did not let it go.",
    )
    op.create_index(
        "submissions_ended_idx",
        "submissions",
        ["completed_at"],
        unique=False,
        postgresql_where=sa.text("expired_at IS NULL"),
    )
    op.create_index(
        "submissions_open_idx",
        "submissions",
        ["updated_at"],
        unique=False,
        postgresql_where=sa.text("status = 'in-progress'"),
    )
    op.create_table(
        "manifests",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("submission_id", sa.BigInteger(), nullable=False),
        sa.Column("manifest_url", sa.Text(), nullable=True),
        sa.Column("replaces_url", sa.Text(), nullable=True),
        sa.Column("kickoff_digest", postgresql.BYTEA(), nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("problems", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("notes", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finished_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'replaced', 'stopped')",
            name=op.f("manifests_status_check"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "submission_id"],
            ["submissions.tenant_id", "submissions.id"],
            name=op.f("manifests_tenant_id_submission_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("manifests_pkey")),
        comment="problems: manifest-level errors ({code, diagnostics}). kickoff_digest: tells a repeated request.",
    )
    op.create_index("manifests_submission_idx", "manifests", ["tenant_id", "submission_id"], unique=False)
    op.create_index(
        "manifests_url_key",
        "manifests",
        ["tenant_id", "submission_id", "manifest_url"],
        unique=True,
        postgresql_where=sa.text("status <> 'replaced'"),
    )
    op.create_table(
        "poll_tokens",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("token_hash", postgresql.BYTEA(), nullable=False),
        sa.Column("submission_id", sa.BigInteger(), nullable=False),
        sa.Column("owner_subject", sa.Text(), nullable=True),
        sa.Column("separate_export_status", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "submission_id"],
            ["submissions.tenant_id", "submissions.id"],
            name=op.f("poll_tokens_tenant_id_submission_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "token_hash", name=op.f("poll_tokens_pkey")),
        comment="separate_export_status: what the request preferred of its polls.",
    )
    op.create_index("poll_tokens_expiry_idx", "poll_tokens", ["expires_at"], unique=False)
    op.create_table(
        "artifacts",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("submission_id", sa.BigInteger(), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("resource_type", sa.Text(), nullable=True),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("line_count", sa.BigInteger(), nullable=True),
        sa.Column("byte_count", sa.BigInteger(), nullable=True),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", postgresql.BYTEA(), nullable=True),
        sa.Column("severity_counts", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("published", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("removal_failed_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "type IN ('output', 'outcome', 'deleted', 'ledger', 'summary')", name=op.f("artifacts_type_check")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "manifest_id"],
            ["manifests.tenant_id", "manifests.id"],
            name=op.f("artifacts_tenant_id_manifest_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("artifacts_pkey")),
        sa.UniqueConstraint("tenant_id", "path", name=op.f("artifacts_tenant_id_path_key")),
        comment="Recorded before its object is written, so that no object is without a row; published with the manifest.",
    )
    op.create_index("artifacts_manifest_idx", "artifacts", ["tenant_id", "manifest_id"], unique=False)
    op.create_index("artifacts_submission_idx", "artifacts", ["tenant_id", "submission_id"], unique=False)
    op.create_index(
        "artifacts_unpublished_idx",
        "artifacts",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("NOT published"),
    )
    op.create_table(
        "fetch_parameters",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("fhir_base_url", sa.Text(), nullable=True),
        sa.Column("output_format", sa.Text(), nullable=True),
        sa.Column(
            "oauth_metadata_urls",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'[]'"),
            nullable=False,
        ),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column(
            "import_directives", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("sealed_secrets", postgresql.BYTEA(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "manifest_id"],
            ["manifests.tenant_id", "manifests.id"],
            name=op.f("fetch_parameters_tenant_id_manifest_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "manifest_id", name=op.f("fetch_parameters_pkey")),
        comment="Written in the manifest's own transaction. sealed_secrets: request headers and the file encryption key.",
    )
    op.create_table(
        "manifest_files",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("declared_type", sa.Text(), nullable=True),
        sa.Column("organized_by", sa.Text(), nullable=True),
        sa.Column("declared_count", sa.BigInteger(), nullable=True),
        sa.Column("declared_bytes", sa.BigInteger(), nullable=True),
        sa.Column("validator", sa.Text(), nullable=True),
        sa.Column("problems", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.CheckConstraint("kind IN ('output', 'deleted', 'outcome')", name=op.f("manifest_files_kind_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "manifest_id"],
            ["manifests.tenant_id", "manifests.id"],
            name=op.f("manifest_files_tenant_id_manifest_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("manifest_files_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "manifest_id", "position", name=op.f("manifest_files_tenant_id_manifest_id_position_key")
        ),
        comment="validator: strong ETag of the body being read. problems: file-level errors and warnings.",
    )
    op.create_table(
        "steps",
        sa.Column("tenant_id", sa.Integer(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("manifest_id", sa.BigInteger(), nullable=False),
        sa.Column("file_id", sa.BigInteger(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("fencing_token", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("ready_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("generation", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("cursor_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cursor_lines", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("created", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("updated", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("unchanged", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("affirmed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("skipped", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("kind IN ('plan', 'ingest', 'publish')", name=op.f("steps_kind_check")),
        sa.CheckConstraint("state IN ('waiting', 'ready', 'done', 'failed')", name=op.f("steps_state_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "file_id"],
            ["manifest_files.tenant_id", "manifest_files.id"],
            name=op.f("steps_tenant_id_file_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "manifest_id"],
            ["manifests.tenant_id", "manifests.id"],
            name=op.f("steps_tenant_id_manifest_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("steps_pkey")),
        comment="What a worker leases. Nothing a heartbeat changes is indexed, so that renewals stay in the page (HOT).",
        postgresql_with={"fillfactor": 50},
    )
    op.create_index(
        "steps_file_idx",
        "steps",
        ["tenant_id", "file_id"],
        unique=False,
        postgresql_where=sa.text("file_id IS NOT NULL"),
    )
    op.create_index(
        "steps_leased_idx", "steps", ["tenant_id"], unique=False, postgresql_where=sa.text("worker_id IS NOT NULL")
    )
    op.create_index("steps_manifest_idx", "steps", ["tenant_id", "manifest_id"], unique=False)
    op.create_index(
        "steps_open_idx",
        "steps",
        ["tenant_id", "manifest_id", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('waiting', 'ready')"),
    )
    op.execute(LZ4_BODIES)
    op.execute(VIEWS)
    op.execute("INSERT INTO tenants (name) VALUES ('default')")


def downgrade() -> None:
    op.execute("DROP VIEW current_resources")
    op.execute("DROP VIEW resource_history")
    op.drop_index("steps_open_idx", table_name="steps", postgresql_where=sa.text("state IN ('waiting', 'ready')"))
    op.drop_index("steps_manifest_idx", table_name="steps")
    op.drop_index("steps_leased_idx", table_name="steps", postgresql_where=sa.text("worker_id IS NOT NULL"))
    op.drop_index("steps_file_idx", table_name="steps", postgresql_where=sa.text("file_id IS NOT NULL"))
    op.drop_table("steps")
    op.drop_table("manifest_files")
    op.drop_table("fetch_parameters")
    op.drop_index("artifacts_unpublished_idx", table_name="artifacts", postgresql_where=sa.text("NOT published"))
    op.drop_index("artifacts_submission_idx", table_name="artifacts")
    op.drop_index("artifacts_manifest_idx", table_name="artifacts")
    op.drop_table("artifacts")
    op.drop_index("poll_tokens_expiry_idx", table_name="poll_tokens")
    op.drop_table("poll_tokens")
    op.drop_index("manifests_url_key", table_name="manifests", postgresql_where=sa.text("status <> 'replaced'"))
    op.drop_index("manifests_submission_idx", table_name="manifests")
    op.drop_table("manifests")
    op.drop_index("submissions_open_idx", table_name="submissions", postgresql_where=sa.text("status = 'in-progress'"))
    op.drop_index("submissions_ended_idx", table_name="submissions", postgresql_where=sa.text("expired_at IS NULL"))
    op.drop_table("submissions")
    op.drop_table("submitters")
    op.drop_table("tenants")
    op.drop_table("sweeps")
    op.drop_table("resource_versions")
    op.drop_table("resource_types")
    op.drop_index("lease_events_manifest_idx", table_name="lease_events")
    op.drop_index("lease_events_at_idx", table_name="lease_events")
    op.drop_table("lease_events")
    op.drop_index("ingest_batches_manifest_idx", table_name="ingest_batches")
    op.drop_table("ingest_batches")
    op.drop_table("fleet_workers")
    op.drop_table("entry_issues")
    op.drop_index("egress_log_at_idx", table_name="egress_log")
    op.drop_table("egress_log")
