"""Submit NDJSON manifests to a FHIR Bulk Submit Data Consumer.

`SubmitClient` speaks HTTP. `bulk_submit_client.celery.CelerySubmitClient`, of the extra `celery`, sends the same
requests over the consumer's broker.
"""

from __future__ import annotations

from bulk_submit_client.errors import IncompleteDownload, SubmissionStopped, SubmitError, Unreachable, WaitTimeout
from bulk_submit_client.http import Progress, Report, StatusHandle, SubmitClient
from bulk_submit_client.parameters import Submitter

__all__ = [
    "IncompleteDownload",
    "Progress",
    "Report",
    "StatusHandle",
    "SubmissionStopped",
    "SubmitClient",
    "SubmitError",
    "Submitter",
    "Unreachable",
    "WaitTimeout",
]
