"""What can go wrong between a sender and the consumer."""

from __future__ import annotations

from typing import Any


class SubmitError(Exception):
    """The consumer refused, or answered what is not the protocol. `outcome` is its OperationOutcome, where it sent one:
    mend what its issues name, and send again."""

    def __init__(self, message: str, *, status: int | None = None, outcome: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.outcome = outcome


class SubmissionStopped(SubmitError):  # noqa: N818
    """The submission was stopped; it takes nothing more. Open a new one."""


class WaitTimeout(SubmitError):  # noqa: N818
    """The submission had not ended when the time was up. It goes on all the same: wait again."""
