"""Every error as an OperationOutcome, without internals (FHIR R4 "RESTful API", 3.1.0.1.5)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import psycopg
import sqlalchemy as sa
import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from schema.database import passes
from submit_tasks.kickoff import KickoffRefused
from submit_tasks.outcomes import Issue, outcome
from submit_tasks.parameters import InvalidRequest

log = structlog.get_logger(__name__)

FHIR_JSON = "application/fhir+json"
RETRY_AFTER_SECONDS = 5
_CODES = {404: "not-found", 405: "not-supported", 410: "deleted", 413: "too-costly", 415: "not-supported"}
NOTHING_HERE = "there is nothing under this URL"
_TEXTS = {404: NOTHING_HERE, 405: "this URL does not take that method"}


class Refusal(Exception):  # noqa: N818
    """An answer other than success, with one issue for the caller to read."""

    def __init__(
        self, status: int, text: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.issues = [Issue("error", code or _CODES.get(status, "processing"), text)]
        self.headers = headers


def json_response(
    body: Any, *, status: int = 200, media_type: str = FHIR_JSON, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type)


def outcome_response(
    issues: Sequence[Issue], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer that is an OperationOutcome."""
    return json_response(outcome(*issues), status=status, headers=headers)


def install(app: FastAPI) -> None:
    """Let the application answer its errors so."""

    @app.exception_handler(Refusal)
    def _refusal(_: Request, error: Refusal) -> Response:
        return outcome_response(error.issues, status=error.status, headers=error.headers)

    @app.exception_handler(KickoffRefused)
    def _kickoff(_: Request, error: KickoffRefused) -> Response:
        return outcome_response(error.issues, status=error.status)

    @app.exception_handler(InvalidRequest)
    def _invalid(_: Request, error: InvalidRequest) -> Response:
        return outcome_response(error.issues, status=400)

    @app.exception_handler(HTTPException)
    def _http(_: Request, error: HTTPException) -> Response:
        text = _TEXTS.get(error.status_code, "the request cannot be served")
        issue = Issue("error", _CODES.get(error.status_code, "processing"), text)
        return outcome_response([issue], status=error.status_code, headers=error.headers)

    @app.exception_handler(psycopg.Error)
    @app.exception_handler(sa.exc.SQLAlchemyError)
    def _database(request: Request, error: Exception) -> Response:
        if not passes(error):
            return _unexpected(request, error)
        log.warning("database busy or away", method=request.method, error=type(error).__name__)
        issue = Issue("error", "transient", "the server is busy or being restarted; send the same again")
        return outcome_response([issue], status=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    @app.exception_handler(Exception)
    def _unexpected(request: Request, error: Exception) -> Response:
        reference = secrets.token_hex(6)
        log.error("request failed", reference=reference, method=request.method, exc_info=error)
        issue = Issue("error", "exception", "the server failed; its operator can find out why", reference)
        return outcome_response([issue], status=500)
