"""OperationOutcomes: what a submitter reads when something went wrong, or right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Issue:
    """One issue. `severity` and `code` are FHIR's (issue-severity, issue-type); `expression` are FHIRPath places."""

    severity: str
    code: str
    text: str
    diagnostics: str | None = None
    expression: Sequence[str] = ()


def information(text: str) -> Issue:
    """An informational issue: nothing is wrong."""
    return Issue("information", "informational", text)


def outcome(*issues: Issue) -> dict[str, Any]:
    """The OperationOutcome resource with these issues, in their order."""
    return {"resourceType": "OperationOutcome", "issue": [_issue(issue) for issue in issues]}


def _issue(issue: Issue) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "severity": issue.severity,
        "code": issue.code,
        "details": {"text": issue.text},
    }
    if issue.diagnostics:
        rendered["diagnostics"] = issue.diagnostics
    if issue.expression:
        rendered["expression"] = list(issue.expression)
    return rendered
