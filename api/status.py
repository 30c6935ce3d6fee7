"""The poll URL: 202 while the submission is under way, then 200 with the status manifest (BulkSubmitStatusManifest)."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Response

from api.context import Context, InContext
from api.errors import FHIR_JSON, Refusal, json_response, outcome_response
from api.submit import token_hash
from schema import artifacts, submissions
from schema.artifacts import Artifact
from schema.submissions import ManifestProgress, PollToken, Submission
from schema.tables import LIVE_MANIFEST_STATUSES
from submit_tasks.outcomes import Issue, information, outcome

MANIFEST_TYPE = "http://hl7.org/fhir/uv/bulkdata/StructureDefinition/BulkSubmitStatusManifest"
BESIDE = {"ledger": "urn:bulk-submit:ledger", "summary": "urn:bulk-submit:reconciliation"}

router = APIRouter()


def resolve(connection: sa.Connection, context: Context, token: str) -> PollToken:
    """What a poll token stands for; a `Refusal` (404) for a token that is unknown, deleted or expired."""
    found = submissions.resolve_poll_token(connection, context.tenant_id(connection), token_hash(token))
    if found is None:
        raise Refusal(404, "there is no such status request; it may have been deleted or have expired")
    return found


@router.get("/bulk-status/{token}")
def poll(token: str, context: InContext) -> Response:
    """How far the submission is, or its status manifest."""
    with context.engine.begin() as connection:
        poll_token = resolve(connection, context, token)
        submission, separate = poll_token.submission, poll_token.separate_export_status
        if submission.status == "stopped":
            return _stopped(submission, separate=separate)
        manifests = submissions.progress(connection, submission)
        if submission.status != "completed" or any(item.status in LIVE_MANIFEST_STATUSES for item in manifests):
            return _under_way(context, manifests, separate=separate)
        transaction_time = submissions.ensure_transaction_time(connection, submission)
        receipts = artifacts.of_submission(connection, submission.tenant_id, submission.id)
    headers = {"Expires": format_datetime(poll_token.expires_at.astimezone(UTC), usegmt=True)}
    if separate:
        headers["X-Export-Status"] = "200 OK"
    manifest = status_manifest(submission, transaction_time, receipts, f"{context.base}/bulk-status/{token}/files")
    return json_response(manifest, media_type="application/json", headers=headers)


@router.delete("/bulk-status/{token}")
def forget(token: str, context: InContext) -> Response:
    """End this status request; the submission and other requests for it stay."""
    with context.engine.begin() as connection:
        if not submissions.clear_poll_token(connection, context.tenant_id(connection), token_hash(token)):
            raise Refusal(404, "there is no such status request; it may have been deleted or have expired")
    return outcome_response([information("The status request is deleted.")], status=202)


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


def _under_way(context: Context, manifests: list[ManifestProgress], *, separate: bool) -> Response:
    headers = {"X-Progress": progress_text(manifests), "Retry-After": str(context.settings.poll_interval_seconds)}
    if separate:
        headers["X-Export-Status"] = "202 Accepted"
    return Response(status_code=200 if separate else 202, headers=headers)


def _stopped(submission: Submission, *, separate: bool) -> Response:
    issue = Issue("error", "suppressed", f"submission {submission.submission_id} was stopped")
    if separate:
        return json_response(outcome(issue), headers={"X-Export-Status": "410 Gone"}, media_type=FHIR_JSON)
    return outcome_response([issue], status=410)
