"""What a submission's submitter is told when it asks how far it is: over HTTP and over the broker alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from schema import artifacts, submissions
from schema.artifacts import Artifact
from schema.submissions import ManifestProgress, Submission
from schema.tables import LIVE_MANIFEST_STATUSES
from submit_tasks.outcomes import Issue

MANIFEST_TYPE = "http://hl7.org/fhir/uv/bulkdata/StructureDefinition/BulkSubmitStatusManifest"
BESIDE = {"ledger": "urn:bulk-submit:ledger", "summary": "urn:bulk-submit:reconciliation"}


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Not ended. `progress` reads `41% (7 of 17 files)`."""

    progress: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Completed, and so are its manifests: the status manifest (BulkSubmitStatusManifest)."""

    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stopped:
    """Stopped by its submitter; `issue` says so."""

    issue: Issue


def submission_status(connection: sa.Connection, submission: Submission, files_url: str) -> UnderWay | Ended | Stopped:
    """How far the submission is. Its receipts are downloaded from `files_url`, a slash and their id."""
    if submission.status == "stopped":
        return Stopped(Issue("error", "suppressed", f"submission {submission.submission_id} was stopped"))
    manifests = submissions.progress(connection, submission)
    if submission.status != "completed" or any(item.status in LIVE_MANIFEST_STATUSES for item in manifests):
        return UnderWay(progress_text(manifests))
    transaction_time = submissions.ensure_transaction_time(connection, submission)
    receipts = artifacts.of_submission(connection, submission.tenant_id, submission.id)
    return Ended(status_manifest(submission, transaction_time, receipts, files_url))


def token_hash(token: str) -> bytes:
    """What is kept of a poll token."""
    return hashlib.sha256(token.encode()).digest()


def progress_text(manifests: list[ManifestProgress]) -> str:
    """`41% (7 of 17 files)`: over files, never 100 before the end."""
    files = sum(manifest.files for manifest in manifests)
    ended = sum(manifest.files_ended for manifest in manifests)
    weights = [max(manifest.files, 1) for manifest in manifests]
    done = sum(
        weight * (manifest.fraction if manifest.files else manifest.status not in LIVE_MANIFEST_STATUSES)
        for weight, manifest in zip(weights, manifests, strict=True)
    )
    percent = min(int(100 * done / max(sum(weights), 1)), 99)
    return f"{percent}% ({ended} of {files} files)"


def status_manifest(
    submission: Submission, transaction_time: datetime, receipts: list[Artifact], files_url: str
) -> dict[str, Any]:
    """The status manifest, in the shape of 4.0.0-ballot. Ledger and reconciliation stand beside it, as extensions."""
    manifest: dict[str, Any] = {
        "submissionId": submission.submission_id,
        "manifestType": MANIFEST_TYPE,
        "transactionTime": transaction_time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "requiresAccessToken": False,
        "outputFormat": "application/fhir+ndjson",
        "output": [],
        "outcome": [],
    }
    for receipt in receipts:
        url = f"{files_url}/{receipt.id}"
        if receipt.type in BESIDE:
            parts: list[dict[str, Any]] = [{"url": "url", "valueUrl": url}]
            if receipt.manifest_url is not None:
                parts.append({"url": "manifestUrl", "valueUrl": receipt.manifest_url})
            manifest.setdefault("extension", []).append({"url": BESIDE[receipt.type], "extension": parts})
            continue
        item: dict[str, Any] = {"url": url, "count": receipt.line_count, "fileSize": receipt.byte_count}
        if receipt.manifest_url is not None and receipt.type != "deleted":
            item["manifestUrl"] = receipt.manifest_url
        if receipt.type == "output":
            item["type"] = receipt.resource_type
        if receipt.type == "outcome":
            counts = receipt.severity_counts or {}
            item["countSeverity"] = [{"code": code, "count": count} for code, count in sorted(counts.items())]
        manifest.setdefault(receipt.type, []).append(item)
    return manifest
