"""Kickoff and status over the broker, for services that share it and have no HTTP access.

The answer to a message is a value in the broker's Redis, kept for a day, which the sender polls for:

    bulk-submit:kickoff-request:{tenant}:{request id}      accepted, status, outcome, at
    bulk-submit:kickoff:{tenant}:{digest of submission}    a hash: request id -> the same
    bulk-submit:status:{tenant}:{request id}               status, with progress, manifest or outcome

`status` is what HTTP's would be. The digest is SHA-256, in hex, of the compact JSON array of the submitter's system and
value and the submission id; a request in which they are not legible is answered under its request id alone.

Whoever may write to the broker may submit as any submitter. Whoever may read it sees no header and no key: those come
encrypted to us, bound to the manifest that they are for.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets as randomness
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from traceback import extract_tb
from typing import Any

import redis
import sqlalchemy as sa
import structlog
from redis.exceptions import RedisError

from schema import submissions
from schema.database import DATABASE_ERRORS, create_engine, passes, retried
from settings import Settings
from submit_tasks.jwe import NotDecrypted, decrypt
from submit_tasks.kickoff import KickoffRefused, identify, kickoff
from submit_tasks.outcomes import Issue, outcome
from submit_tasks.parameters import (
    InvalidRequest,
    KickoffRequest,
    parse_kickoff_message,
    parse_status,
    submission_named,
)
from submit_tasks.status import Ended, Stopped, submission_status, token_hash

log = structlog.get_logger(__name__)

KEPT_SECONDS = 86_400
RETRY_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0)
PREFIX = "bulk-submit"

_TENANT = re.compile("[^\0\ud800-\udfff]{1,256}")
_REQUEST_ID = re.compile("[A-Za-z0-9._~-]{1,128}")

Answer = dict[str, Any]


def answer_kickoff(settings: Settings, tenant: str, request_id: str, parameters: Any, secrets: Any) -> None:
    """Accept or refuse a $bulk-submit. `parameters`: as over HTTP, without secrets; those are a compact JWE, or None.

    The same message again is answered as the first. Never raises.
    """

    def accept(engine: sa.Engine) -> Answer:
        result = kickoff(engine, settings, tenant, _kickoff_request(settings, parameters, secrets))
        return {"status": 200, "outcome": outcome(*result.issues)}

    if not _addressable(tenant, request_id):
        return
    answer = _answer(settings, request_id, accept)
    answer = {
        "accepted": answer["status"] == 200,
        **answer,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "digest": hashlib.sha256(json.dumps(parameters, sort_keys=True, default=repr).encode()).hexdigest(),
    }
    request_key = f"{PREFIX}:kickoff-request:{tenant}:{request_id}"
    named = submission_named(parameters)

    def write(client: redis.Redis) -> None:
        if _stands(client.get(request_key), answer):
            return
        with client.pipeline() as pipeline:
            pipeline.set(request_key, json.dumps(answer), ex=KEPT_SECONDS)
            if named is not None:
                key = f"{PREFIX}:kickoff:{tenant}:{submission_digest(*named)}"
                pipeline.hset(key, request_id, json.dumps(answer))
                pipeline.expire(key, KEPT_SECONDS)
            pipeline.execute()

    _write(settings, request_id, write)
    log.info("kickoff answered", request_id=request_id, status=answer["status"])


def answer_status(
    settings: Settings, tenant: str, request_id: str, system: Any, value: Any, submission_id: Any
) -> None:
    """Say how far a submission is, as a poll over HTTP would. Never raises."""

    def report(engine: sa.Engine) -> Answer:
        request = parse_status(
            {
                "resourceType": "Parameters",
                "parameter": [
                    {"name": "submitter", "valueIdentifier": {"system": system, "value": value}},
                    {"name": "submissionId", "valueString": submission_id},
                ],
            }
        )
        with engine.begin() as connection:
            tenant_id, submitter_id = identify(connection, tenant, request.system, request.value)
            submission = submissions.find_submission(connection, tenant_id, submitter_id, request.submission_id)
            if submission is None:
                raise KickoffRefused(404, "not-found", "there is no such submission")
            return _report(connection, settings, tenant, submission)

    if not _addressable(tenant, request_id):
        return
    answer = json.dumps(_answer(settings, request_id, report))
    key = f"{PREFIX}:status:{tenant}:{request_id}"
    _write(settings, request_id, lambda client: client.set(key, answer, ex=KEPT_SECONDS))


def submission_digest(system: str, value: str, submission_id: str) -> str:
    """What stands for a submission in a key."""
    named = json.dumps([system, value, submission_id], separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(named.encode()).hexdigest()


def _kickoff_request(settings: Settings, parameters: Any, secrets: Any) -> KickoffRequest:
    try:
        opened = None if secrets is None else decrypt(settings, secrets)
    except NotDecrypted as error:
        raise InvalidRequest([Issue("error", "security", str(error))]) from None
    return parse_kickoff_message(parameters, opened)


def _report(connection: sa.Connection, settings: Settings, tenant: str, submission: submissions.Submission) -> Answer:
    token = randomness.token_urlsafe(32)
    files_url = f"{settings.public_url.rstrip('/')}/{tenant}/fhir/bulk-status/{token}/files"
    status = submission_status(connection, submission, files_url)
    if isinstance(status, Stopped):
        return {"status": 410, "outcome": outcome(status.issue)}
    if isinstance(status, Ended):
        submissions.mint_poll_token(
            connection,
            submission,
            token_hash(token),
            settings.receipt_ttl_seconds,
            owner_subject=None,
            separate_export_status=False,
        )
        return {"status": 200, "manifest": status.manifest}
    return {"status": 202, "progress": status.progress, "retry_after": settings.poll_interval_seconds}


def _addressable(tenant: object, request_id: object) -> bool:
    """Whether an answer can be left under these names."""
    named = isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id)
    if named and isinstance(tenant, str) and _TENANT.fullmatch(tenant):
        return True
    log.warning("request dropped: its tenant or its request id is not one", request_id=request_id if named else None)
    return False


def _answer(settings: Settings, request_id: str, give: Callable[[sa.Engine], Answer]) -> Answer:
    """What `give` returns, or an OperationOutcome on why it did not."""
    engine = create_engine(settings, application="bulk-submit broker requests", pooled=False)
    try:
        return retried(lambda: give(engine), RETRY_PAUSES_SECONDS)
    except (InvalidRequest, KickoffRefused) as refused:
        return {"status": refused.status, "outcome": outcome(*refused.issues)}
    except Exception as error:  # noqa: BLE001 - answered; its message might hold what nobody should read
        if isinstance(error, DATABASE_ERRORS) and passes(error):
            log.warning("database not reachable", request_id=request_id, error=type(error).__name__)
            text = "not accepted: the database does not answer; send the same again"
            return {"status": 503, "outcome": outcome(Issue("error", "transient", text))}
        last = extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        log.error("request failed", request_id=request_id, error=type(error).__name__, place=place)
        issue = Issue("error", "exception", "the server failed; its operator can find out why", request_id)
        return {"status": 500, "outcome": outcome(issue)}
    finally:
        engine.dispose()


def _stands(earlier: Any, answer: Answer) -> bool:
    """Whether an earlier acceptance of the same request stands: its submission ended since, or the database is away."""
    if earlier is None or answer["accepted"]:
        return False
    first = json.loads(earlier)
    refused = answer["outcome"]["issue"][0]["code"]
    same = first["digest"] == answer["digest"]
    return bool(first["accepted"]) and same and refused in ("conflict", "transient")


def _write(settings: Settings, request_id: str, write: Callable[[redis.Redis], object]) -> None:
    try:
        with redis.Redis.from_url(settings.broker_url, socket_connect_timeout=3, socket_timeout=10) as client:
            write(client)
    except RedisError as error:
        log.error("answer not written", request_id=request_id, error=type(error).__name__)
