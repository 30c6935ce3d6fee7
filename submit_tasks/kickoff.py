"""Kickoff: a submission, its manifest and how to fetch it, written in one transaction; then a call for a hand.

The same request may come twice, because its answer was lost: it is known by a digest over everything that concerns the
manifest, and answered as the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import sqlalchemy as sa

from schema import submissions
from schema.database import retried
from schema.submissions import FetchParameters, Submission
from settings import Settings
from submit_tasks.messages import ring
from submit_tasks.outcomes import Issue, information
from submit_tasks.parameters import KickoffRequest
from workers.seals import NoSealingKey, Secrets, seal


class KickoffRefused(Exception):  # noqa: N818
    """The request is understood and not accepted; nothing was changed. `status` is HTTP's, `issues` say why.

    `parameter` names the one that is to blame.
    """

    def __init__(self, status: int, code: str, text: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        places = [] if parameter is None else [f"Parameters.parameter.where(name='{parameter}')"]
        self.issues = [Issue("error", code, text, expression=places)]


@dataclass(frozen=True, slots=True)
class KickoffResult:
    """An accepted request. `manifest_id` is None where it brought no manifest, or one known already."""

    manifest_id: int | None
    issues: list[Issue]


def kickoff(
    engine: sa.Engine,
    settings: Settings,
    tenant: str,
    request: KickoffRequest,
    *,
    owner_subject: str | None = None,
    request_url: str | None = None,
    ring: Callable[[Sequence[int]], None] = ring,
) -> KickoffResult:
    """Accept a $bulk-submit, or raise `KickoffRefused`. The call for a hand follows the commit, and may be lost."""
    if request.replaces_manifest_url is not None:
        raise KickoffRefused(
            422, "not-supported", "replacesManifestUrl is not supported by this server yet", "replacesManifestUrl"
        )
    result = retried(lambda: _transaction(engine, settings, tenant, request, owner_subject, request_url))
    if result.manifest_id is not None:
        ring([result.manifest_id])
    return result


def _transaction(
    engine: sa.Engine,
    settings: Settings,
    tenant: str,
    request: KickoffRequest,
    owner_subject: str | None,
    request_url: str | None,
) -> KickoffResult:
    with engine.begin() as connection:
        tenant_id, submitter_id = identify(connection, tenant, request.system, request.value)
        submission = submissions.hold_submission(
            connection,
            tenant_id,
            submitter_id,
            request.submission_id,
            owner_subject=owner_subject,
            request_url=request_url,
        )
        return _accept(connection, settings, submission, request)


def identify(connection: sa.Connection, tenant: str, system: str, value: str) -> tuple[int, int]:
    """The ids of a tenant and its submitter; raises `KickoffRefused` for one that is not registered."""
    tenant_id = submissions.find_tenant(connection, tenant)
    if tenant_id is None:
        raise KickoffRefused(404, "not-found", "there is no such tenant")
    submitter_id = submissions.find_submitter(connection, tenant_id, system, value)
    if submitter_id is None:
        raise KickoffRefused(403, "forbidden", "the submitter is not registered here", "submitter")
    return tenant_id, submitter_id


def _accept(
    connection: sa.Connection, settings: Settings, submission: Submission, request: KickoffRequest
) -> KickoffResult:
    manifest_id = None
    if request.status == "stopped":
        issues = [_stop(connection, submission)]
    elif request.manifest_url is None:
        _refuse_ended(submission, repeats=request.status == submission.status)
        issues = []
    else:
        digest = _digest(request)
        known = submissions.find_manifest(connection, submission, request.manifest_url)
        repeats = known is not None and known[1] == digest and submission.status != "stopped"
        _refuse_ended(submission, repeats=repeats)
        if known is None:
            manifest_id = _add_manifest(connection, settings, submission, request, digest)
            issues = [information("The manifest is accepted.")]
        elif known[1] == digest:
            issues = [information("The manifest was accepted already; this request is answered as the first.")]
        else:
            raise KickoffRefused(
                409, "duplicate", "this manifestUrl was submitted already, with other parameters", "manifestUrl"
            )
    if request.status == "completed":
        if submission.status != "completed":
            submissions.set_status(connection, submission, "completed")
        issues.append(information("The submission is complete: no further manifests are expected."))
    if request.status in ("completed", "stopped") and not submissions.has_manifests(connection, submission):
        text = "no manifest was ever submitted under this submission id: it ends empty"
        issues.append(Issue("warning", "not-found", text))
    return KickoffResult(manifest_id, [*(issues or [information("The submission is in progress.")]), *request.warnings])


def _refuse_ended(submission: Submission, *, repeats: bool) -> None:
    """Raise unless the submission takes requests, or the request only repeats the one that ended it."""
    if submission.status != "in-progress" and not repeats:
        raise KickoffRefused(
            409, "conflict", f"the submission is {submission.status}: it takes no further requests", "submissionId"
        )


def _stop(connection: sa.Connection, submission: Submission) -> Issue:
    """End the submission and its manifests; a manifest that the same request names is not fetched."""
    _refuse_ended(submission, repeats=submission.status == "stopped")
    if submission.status != "stopped":
        submissions.set_status(connection, submission, "stopped")
        submissions.revoke(connection, submission, "stopped")
    return information("The submission is stopped: no further data is ingested.")


def _add_manifest(
    connection: sa.Connection, settings: Settings, submission: Submission, request: KickoffRequest, digest: bytes
) -> int:
    if request.fhir_version is not None:
        if submission.fhir_version not in (None, request.fhir_version):
            raise KickoffRefused(
                422,
                "business-rule",
                f"the submission's manifests are of FHIR version {submission.fhir_version}",
                "outputFormat",
            )
        submissions.set_fhir_version(connection, submission, request.fhir_version)
    try:
        sealed = seal(settings, Secrets(request.headers, request.file_encryption_key))
    except NoSealingKey as error:
        raise KickoffRefused(
            422,
            "not-supported",
            "this server is not set up to keep request headers and keys in confidence",
            "fileRequestHeader",
        ) from error
    return submissions.add_manifest(
        connection,
        submission,
        manifest_url=request.manifest_url,
        replaces_url=request.replaces_manifest_url,
        kickoff_digest=digest,
        parameters=FetchParameters(
            fhir_base_url=request.fhir_base_url,
            output_format=request.output_format,
            oauth_metadata_urls=request.oauth_metadata_urls,
            metadata=request.metadata,
            import_directives=request.import_directives,
            sealed_secrets=sealed,
        ),
    )


def _digest(request: KickoffRequest) -> bytes:
    """What tells one manifest's parameters from another's. Secrets go through a slow hash: the digest is stored."""
    secrets = msgspec.json.encode([request.headers, request.file_encryption_key])
    plain = [
        request.manifest_url,
        request.replaces_manifest_url,
        request.fhir_base_url,
        request.output_format,
        request.oauth_metadata_urls,
        request.metadata,
        request.import_directives,
    ]
    salt = hashlib.sha256(msgspec.json.encode([request.system, request.value, request.submission_id])).digest()
    hidden = (
        hashlib.scrypt(secrets, salt=salt, n=2**12, r=8, p=1) if request.headers or request.file_encryption_key else b""
    )
    return hashlib.sha256(msgspec.json.encode(plain) + hidden).digest()
