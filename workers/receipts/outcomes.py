"""OperationOutcomes of the `outcome` receipts, one issue each, so that counts of issues are counts of resources.

Source: Bulk Data "Bulk Submit" (status manifest, `outcome`); FHIR R4 OperationOutcome; the extension
operationoutcome-sourceResource names the resource that an issue is about.
"""

from __future__ import annotations

from typing import Any

from schema.files import Problem
from schema.results import Issue
from workers.receipts.render import json_text

SOURCE_RESOURCE = "http://hl7.org/fhir/StructureDefinition/operationoutcome-sourceResource"


def file_name(url: str) -> str:
    """What people call a file: the last part of its public URL."""
    return url.rstrip("/").rpartition("/")[2] or url


def outcome(severity: str, code: str, text: str, *, diagnostics: str | None = None, source: str | None = None) -> str:
    """One OperationOutcome as a line. `source` is the reference of the resource it is about."""
    issue: dict[str, Any] = {"severity": severity, "code": code, "details": {"text": text}}
    if diagnostics is not None:
        issue["diagnostics"] = diagnostics
    resource: dict[str, Any] = {"resourceType": "OperationOutcome"}
    if source is not None:
        resource["extension"] = [{"url": SOURCE_RESOURCE, "valueReference": {"reference": source}}]
    resource["issue"] = [issue]
    return json_text(resource) + "\n"


def line_outcome(issue: Issue, url: str, fhir_base_url: str | None) -> str:
    """Why a line failed, and where it is. `url` is its file's public URL."""
    source = None
    if issue.resource_type and issue.resource_id:
        base = f"{fhir_base_url.rstrip('/')}/" if fhir_base_url else ""
        source = f"{base}{issue.resource_type}/{issue.resource_id}"
    return outcome(
        "error",
        issue.code,
        f"line {issue.line} of {file_name(url)}: {issue.diagnostics}",
        diagnostics=f"{url}, line {issue.line}, byte offset {issue.byte_offset}",
        source=source,
    )


def problem_outcome(problem: Problem, url: str | None) -> str:
    """What went wrong with a file or a manifest. `url` is its public URL."""
    return outcome(problem.severity, problem.code, problem.diagnostics, diagnostics=url)
