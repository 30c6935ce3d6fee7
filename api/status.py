"""The poll URL: 202 while the submission is under way, then 200 with the status manifest (BulkSubmitStatusManifest)."""

from __future__ import annotations

from datetime import UTC
from email.utils import format_datetime

import sqlalchemy as sa
from fastapi import APIRouter, Response

from api.context import Context, InContext
from api.errors import FHIR_JSON, Refusal, json_response, outcome_response
from schema import submissions
from schema.submissions import PollToken
from submit_tasks.outcomes import Issue, information, outcome
from submit_tasks.status import Stopped, UnderWay, submission_status, token_hash

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
        status = submission_status(connection, poll_token.submission, f"{context.base}/bulk-status/{token}/files")
    separate = poll_token.separate_export_status
    if isinstance(status, Stopped):
        return _stopped(status.issue, separate=separate)
    if isinstance(status, UnderWay):
        return _under_way(context, status.progress, separate=separate)
    headers = {"Expires": format_datetime(poll_token.expires_at.astimezone(UTC), usegmt=True)}
    if separate:
        headers["X-Export-Status"] = "200 OK"
    return json_response(status.manifest, media_type="application/json", headers=headers)


@router.delete("/bulk-status/{token}")
def forget(token: str, context: InContext) -> Response:
    """End this status request; the submission and other requests for it stay."""
    with context.engine.begin() as connection:
        if not submissions.clear_poll_token(connection, context.tenant_id(connection), token_hash(token)):
            raise Refusal(404, "there is no such status request; it may have been deleted or have expired")
    return outcome_response([information("The status request is deleted.")], status=202)


def _under_way(context: Context, progress: str, *, separate: bool) -> Response:
    headers = {"X-Progress": progress, "Retry-After": str(context.settings.poll_interval_seconds)}
    if separate:
        headers["X-Export-Status"] = "202 Accepted"
    return Response(status_code=200 if separate else 202, headers=headers)


def _stopped(issue: Issue, *, separate: bool) -> Response:
    if separate:
        return json_response(outcome(issue), headers={"X-Export-Status": "410 Gone"}, media_type=FHIR_JSON)
    return outcome_response([issue], status=410)
