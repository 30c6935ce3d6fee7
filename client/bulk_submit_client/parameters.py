"""FHIR Parameters of $bulk-submit and $bulk-submit-status (Bulk Data Access 4.0.0-ballot)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EVENT_STATUS = "http://hl7.org/fhir/event-status"

Headers = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Submitter:
    """The identifier under which the consumer knows the sender."""

    system: str
    value: str


def submitter_parameters(submitter: Submitter, submission_id: str) -> list[dict[str, Any]]:
    """What every request begins with."""
    return [
        {"name": "submitter", "valueIdentifier": {"system": submitter.system, "value": submitter.value}},
        {"name": "submissionId", "valueString": submission_id},
    ]


def parameters(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The Parameters resource."""
    return {"resourceType": "Parameters", "parameter": list(items)}


def kickoff_parameters(
    submitter: Submitter,
    submission_id: str,
    manifest_url: str | None,
    *,
    status: str | None,
    fhir_base_url: str | None,
    output_format: str | None,
    replaces: str | None,
    oauth_metadata_urls: Iterable[str],
    metadata: Iterable[tuple[str, str]],
    import_directives: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """The Parameters of one $bulk-submit, without what is sent in confidence."""
    coding = {"system": EVENT_STATUS, "code": status}
    return parameters(
        [
            *submitter_parameters(submitter, submission_id),
            *([] if status is None else [{"name": "submissionStatus", "valueCoding": coding}]),
            *_optional("manifestUrl", "valueUrl", manifest_url),
            *_optional("fhirBaseUrl", "valueUrl", fhir_base_url),
            *_optional("replacesManifestUrl", "valueUrl", replaces),
            *_optional("outputFormat", "valueString", output_format),
            *({"name": "oauthMetadataUrl", "valueUrl": url} for url in oauth_metadata_urls),
            *_directives("metadata", metadata),
            *_directives("import", import_directives),
        ]
    )


def secret_parameters(headers: Headers, file_encryption_key: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What is sent in confidence: the headers of file requests, and the file encryption key's `value` and `coding`."""
    secrets = [
        {
            "name": "fileRequestHeader",
            "part": [{"name": "headerName", "valueString": name}, {"name": "headerValue", "valueString": value}],
        }
        for name, value in header_pairs(headers)
    ]
    if file_encryption_key is not None:
        coding = file_encryption_key.get("coding")
        parts = [] if coding is None else [{"name": "coding", "valueCoding": coding}]
        parts.append({"name": "value", "valueString": file_encryption_key["value"]})
        secrets.append({"name": "fileEncryptionKey", "part": parts})
    return secrets


def header_pairs(headers: Headers) -> list[tuple[str, str]]:
    """Headers as names and values, in their order."""
    return list(headers.items() if isinstance(headers, Mapping) else headers)


def _optional(name: str, kind: str, value: str | None) -> list[dict[str, Any]]:
    return [] if value is None else [{"name": name, kind: value}]


def _directives(name: str, directives: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "part": [{"name": "parameterUrl", "valueUri": url}, {"name": "parameterValue", "valueString": value}],
        }
        for url, value in directives
    ]
