"""Receipts, streamed. They are stored as gzip, and sent so to whoever offers to take it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from api.context import InContext
from api.errors import Refusal
from api.status import resolve
from schema import artifacts
from workers.artifact_store import ArtifactMissingError, ArtifactStoreError
from workers.fetch.gunzip import gunzip

CHUNK = 1024 * 1024
MEDIA_TYPES = {"ledger": "application/x-ndjson", "summary": "application/json"}

router = APIRouter()


@router.api_route("/bulk-status/{token}/files/{artifact_id}", methods=["GET", "HEAD"])
def receipt(
    token: str, artifact_id: Annotated[int, Path(ge=1, lt=2**63)], request: Request, context: InContext
) -> Response:
    """One receipt of the submission that the token stands for."""
    with context.engine.begin() as connection:
        submission = resolve(connection, context, token).submission
        artifact = artifacts.get(connection, submission.tenant_id, submission.id, artifact_id)
    if artifact is None:
        raise Refusal(404, "there is no such file")
    headers = {"Vary": "Accept-Encoding"}
    if offers_gzip(request.headers.get("Accept-Encoding", "")):
        headers |= {"Content-Encoding": "gzip", "Content-Length": str(artifact.stored_bytes)}
    else:
        headers["Content-Length"] = str(artifact.byte_count)
    media_type = MEDIA_TYPES.get(artifact.type, "application/fhir+ndjson")
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    try:
        stored = context.store.read(artifact.path)
    except ArtifactMissingError as error:
        raise Refusal(404, "there is no such file any more") from error
    except ArtifactStoreError as error:
        raise Refusal(503, "the file cannot be had just now", code="transient") from error
    body = stored if "Content-Encoding" in headers else gunzip(stored, CHUNK)
    return StreamingResponse(body, headers=headers, media_type=media_type)


def offers_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding field takes gzip (RFC 9110 section 12.5.3)."""
    weights = {}
    for item in accept_encoding.lower().split(","):
        name, _, weight = item.partition(";")
        try:
            weights[name.strip()] = float(weight.partition("=")[2] or 1)
        except ValueError:
            weights[name.strip()] = 0.0
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0
