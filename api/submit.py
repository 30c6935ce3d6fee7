"""POST $bulk-submit, and POST $bulk-submit-status (Bulk Data Access 4.0.0-ballot, "Bulk Submit")."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.context import Context, InContext
from api.errors import Refusal, outcome_response
from schema import submissions
from submit_tasks.kickoff import identify, kickoff
from submit_tasks.outcomes import information
from submit_tasks.parameters import parse_kickoff, parse_status
from submit_tasks.status import token_hash

MAX_BODY_BYTES = 4 * 1024 * 1024
JSON_TYPES = {"application/fhir+json", "application/json", "application/json+fhir"}

router = APIRouter()


@router.post("/$bulk-submit")
async def bulk_submit(request: Request, context: InContext) -> Response:
    """Accept a manifest, or change a submission's status: 200 with an OperationOutcome."""
    kickoff_request = parse_kickoff(await _json_body(request))
    result = await run_in_threadpool(
        kickoff,
        context.engine,
        context.settings,
        context.tenant,
        kickoff_request,
        request_url=f"{context.base}/$bulk-submit",
    )
    return outcome_response(result.issues)


@router.post("/$bulk-submit-status")
async def bulk_submit_status(request: Request, context: InContext) -> Response:
    """Give out a poll URL: 202 with an absolute Content-Location, whether or not the submission has ended."""
    status_request = parse_status(await _json_body(request))
    token = secrets.token_urlsafe(32)
    separate = _separate_export_status(request)

    def mint(context: Context) -> None:
        with context.engine.begin() as connection:
            tenant_id, submitter_id = identify(connection, context.tenant, status_request.system, status_request.value)
            submission = submissions.find_submission(connection, tenant_id, submitter_id, status_request.submission_id)
            if submission is None:
                raise Refusal(404, "there is no such submission")
            submissions.mint_poll_token(
                connection,
                submission,
                token_hash(token),
                context.settings.receipt_ttl_seconds,
                owner_subject=None,
                separate_export_status=separate,
            )

    await run_in_threadpool(mint, context)
    headers = {"Content-Location": f"{context.base}/bulk-status/{token}"}
    if separate:
        headers["Preference-Applied"] = "respond-async, separate-export-status"
    issues = [information("Poll the URL in Content-Location."), *status_request.warnings]
    return outcome_response(issues, status=202, headers=headers)


def _separate_export_status(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("Prefer")).lower()
    return "separate-export-status" in (token.strip() for token in preferences.split(","))


async def _json_body(request: Request) -> Any:
    media_type = request.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if media_type not in JSON_TYPES:
        raise Refusal(415, "the body must be application/fhir+json")
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
        raise Refusal(415, "the body must come without Content-Encoding")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    except ClientDisconnect as error:
        raise Refusal(400, "the body ended early", code="incomplete") from error
    try:
        return msgspec.json.decode(bytes(body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="structure") from error
    except RecursionError as error:
        raise Refusal(400, "the body is nested too deeply", code="structure") from error
