"""What can go wrong between a submitter and the consumer. No message holds a token, a header's value or a key."""

from __future__ import annotations

from typing import Any


class SubmitError(Exception):
    """The consumer refused, or answered what is not the protocol.

    The message is the text of the consumer's OperationOutcome, where it sent one. On a 4xx, mend what it names and
    send again. On a 429 or 5xx, send the same again later: the consumer knows a repeated request.

    `status` is HTTP's, None where there was no answer; `outcome` is the OperationOutcome, None where there was none.
    """

    def __init__(self, message: str, *, status: int | None = None, outcome: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.outcome = outcome


class Unreachable(SubmitError):  # noqa: N818
    """The consumer was not reached, or the connection broke. Send the same again: a repeated request is safe."""


class SubmissionStopped(SubmitError):  # noqa: N818
    """The submission was stopped and takes nothing more. Send the data again under a new submission id."""


class WaitTimeout(SubmitError):  # noqa: N818
    """The time given for waiting is over; the consumer goes on all the same. Wait again."""


class IncompleteDownload(SubmitError):  # noqa: N818
    """A file did not arrive whole, and nothing of it was kept. Download again; if it recurs, tell the consumer."""


def refusal(kind: type[SubmitError], status: int, outcome: object) -> SubmitError:
    """The error for an answer of that HTTP status, whose body is `outcome` if that is an OperationOutcome."""
    if not isinstance(outcome, dict) or outcome.get("resourceType") != "OperationOutcome":
        return kind(f"the consumer answered {status}", status=status)
    issues = outcome.get("issue")
    texts = "; ".join(filter(None, map(_text, issues if isinstance(issues, list) else [])))
    return kind(f"the consumer answered {status}: {texts}", status=status, outcome=outcome)


def _text(issue: object) -> str:
    if not isinstance(issue, dict):
        return ""
    details = issue.get("details")
    text = details.get("text") if isinstance(details, dict) else None
    return str(text or issue.get("diagnostics") or issue.get("code", ""))
