"""Why something could not be fetched, in words that a submitter may read."""

from __future__ import annotations


class FetchError(Exception):
    """Base: a URL that the submission named could not be had. `reason` and `code` (FHIR issue type) tell the submitter.

    `retryable`: another attempt may succeed.
    """

    code = "exception"
    retryable = False

    def __init__(self, reason: str, *, http_status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.http_status = http_status


class Refused(FetchError):  # noqa: N818
    """We do not make such a request. The submitter sends another URL or header, or asks the operator to allow it."""

    code = "security"


class NotRetrieved(FetchError):  # noqa: N818
    """The provider answered with a status that is no success. The submitter mends its server or its manifest."""

    code = "not-found"

    def __init__(self, reason: str, *, http_status: int, code: str, retryable: bool) -> None:
        super().__init__(reason, http_status=http_status)
        self.code = code
        self.retryable = retryable


class Unreachable(FetchError):  # noqa: N818
    """No connection to the provider, again and again. The submitter makes its server reachable from here."""

    code = "transient"
    retryable = True


class BrokenStream(FetchError):  # noqa: N818
    """A body ended early, stood still, or could not be decoded. Tried again from what is committed."""

    code = "incomplete"
    retryable = True


class TooLarge(FetchError):  # noqa: N818
    """More bytes than this server accepts. The submitter splits the file, or the operator raises the limit."""

    code = "too-costly"


class BadManifest(FetchError):  # noqa: N818
    """What was fetched is not a Bulk Data manifest. The submitter mends it; `reason` names the page and the place."""

    code = "structure"
