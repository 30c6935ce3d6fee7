"""Requests to providers: one session, time-outs everywhere, retries with back-off, bodies as streams.

No redirect is followed, no proxy or netrc of the environment is used, and the submitter's headers are checked for every
request (`workers/fetch/egress.py`). Source: RFC 9110 (ranges, conditional requests, Retry-After).
"""

from __future__ import annotations

import codecs
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import msgspec
import requests
import urllib3

from settings import MEBIBYTE, Settings
from workers.fetch.egress import headers_for
from workers.fetch.errors import (
    BadManifest,
    BrokenStream,
    FetchError,
    NotRetrieved,
    Refused,
    TooLarge,
    Unreachable,
)
from workers.fetch.gunzip import MAGIC, gunzip
from workers.fetch.json_text import json_fault, utf8_fault
from workers.urls import public_url

CHUNK = MEBIBYTE
RATIO_FREE_BYTES = 16 * MEBIBYTE
MANIFEST_TYPES = "application/json, application/fhir+json;q=0.9, */*;q=0.1"
USER_AGENT = "bulk-submit"
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_LENGTH = re.compile(r"[0-9]{1,18}")
_CODES = {401: "login", 403: "forbidden", 404: "not-found", 408: "timeout", 410: "not-found", 429: "throttled"}


class Stream:
    """A body under way: iterating gives its decoded bytes. Close it, or use it as a context.

    `resumed_at` is the offset, in the decoded file, of the first byte it gives. `etag` is a strong validator or None.
    `identity`: offsets in the decoded file are offsets on the wire.
    """

    def __init__(
        self, response: requests.Response, url: str, settings: Settings, alive: Callable[[], None], resumed_at: int
    ) -> None:
        self.url = url
        self.resumed_at = resumed_at
        self.bytes_received = 0
        self._response = response
        self._settings = settings
        self._alive = alive
        self._name = public_url(url)
        headers = response.headers
        etag = headers.get("ETag", "")
        self.etag = etag if etag.startswith('"') else None
        length = headers.get("Content-Length", "")
        self.content_length = int(length) if _LENGTH.fullmatch(length) else None
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip"):
            raise NotRetrieved(
                f"{self._name} came with the content encoding {encoding[:40]!r}, which was not asked for",
                http_status=response.status_code,
                code="not-supported",
                retryable=False,
            )
        self._chunks = self._received()
        if encoding in ("gzip", "x-gzip"):
            self._chunks = self._gunzipped(self._chunks)
        self._first = next(self._chunks, b"")
        while self._first and len(self._first) < len(MAGIC) and (more := next(self._chunks, b"")):
            self._first += more
        is_gzip = resumed_at == 0 and self._first.startswith(MAGIC)
        self.identity = encoding in ("identity", "") and not is_gzip
        if is_gzip:
            self._chunks = self._gunzipped(self._all_of(self._first, self._chunks))
            self._first = next(self._chunks, b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up, whatever is left of the body."""
        self._response.close()

    def __iter__(self) -> Iterator[bytes]:
        decoded = 0
        settings = self._settings
        for chunk in self._all_of(self._first, self._chunks):
            decoded += len(chunk)
            if self.resumed_at + decoded > settings.max_file_bytes:
                raise TooLarge(f"{self._name} has more than {settings.max_file_bytes:,} bytes")
            if decoded > RATIO_FREE_BYTES and decoded > settings.max_compression_ratio * self.bytes_received:
                raise TooLarge(f"{self._name} expands more than {settings.max_compression_ratio}-fold")
            yield chunk

    @staticmethod
    def _all_of(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
        if first:
            yield first
        yield from rest

    def _gunzipped(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from gunzip(chunks, CHUNK)
        except (EOFError, OSError) as error:
            raise BrokenStream(f"{self._name}: the gzip data is damaged or ends early") from error

    def _received(self) -> Iterator[bytes]:
        raw = self._response.raw
        while True:
            try:
                chunk = raw.read1(CHUNK, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if isinstance(error, urllib3.exceptions.ReadTimeoutError):
                    silence = f"nothing came for {self._settings.read_timeout_seconds:g} seconds"
                    raise BrokenStream(f"{self._name}: {silence}") from error
                raise BrokenStream(f"{self._name}: the connection broke after {self.bytes_received:,} bytes") from error
            self._alive()
            if not chunk:
                break
            self.bytes_received += len(chunk)
            yield chunk
        if self.content_length is not None and self.bytes_received < self.content_length:
            raise BrokenStream(
                f"{self._name}: the connection ended after {self.bytes_received:,} of {self.content_length:,} bytes"
            )


class _Session(requests.Session):
    """Sees no redirects: the base class reads a redirect's whole body into memory even where it does not follow."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None, whatever the response."""


class Fetcher:
    """Fetches what one manifest names, with the submitter's headers. Use as a context; for one thread at a time.

    `alive` is called whenever something moves and while a retry is waited for; what it raises ends the request.
    """

    def __init__(self, headers: Sequence[tuple[str, str]], settings: Settings, alive: Callable[[], None]) -> None:
        self._headers = headers
        self._settings = settings
        self._alive = alive
        self._session = _Session()
        self._session.trust_env = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def open(self, url: str, *, accept: str, offset: int = 0, validator: str | None = None) -> Stream:
        """The body at `url`, from `offset` on where the server can do that for the body that `validator` names.

        Raises `FetchError`: `retryable` if the retries of this call (settings.fetch_retries) were not enough.
        """
        if offset and validator:
            ranged = {"Range": f"bytes={offset}-", "If-Range": validator, "Accept-Encoding": "identity"}
            response = self._get(url, {"Accept": accept, **ranged})
            if response.status_code == 206 and _goes_on(response, offset, validator):
                return Stream(response, url, self._settings, self._alive, offset)
            if response.status_code == 200:
                return Stream(response, url, self._settings, self._alive, 0)
            response.close()
        response = self._get(url, {"Accept": accept, "Accept-Encoding": "gzip, identity"})
        if response.status_code != 200:
            response.close()
            raise _not_retrieved(url, response.status_code)
        return Stream(response, url, self._settings, self._alive, 0)

    def get_json(self, url: str, decode: Callable[[memoryview], Any] = msgspec.json.decode) -> Any:
        """The JSON document at `url`, of at most settings.max_manifest_bytes, as `decode` gives it.

        Raises `FetchError`, also for what `decode` raises because the document is not JSON.
        """
        limit = self._settings.max_manifest_bytes
        received = bytearray()
        with self.open(url, accept=MANIFEST_TYPES) as stream:
            for chunk in stream:
                received += chunk
                if len(received) > limit:
                    raise TooLarge(f"{public_url(url)} has more than {limit:,} bytes")
        document = memoryview(received)[len(codecs.BOM_UTF8) if received.startswith(codecs.BOM_UTF8) else 0 :]
        fault = utf8_fault(document)
        if fault is not None:
            raise BadManifest(f"{public_url(url)} is not JSON: not UTF-8 at byte {fault}")
        try:
            return decode(document)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadManifest(f"{public_url(url)} is not JSON: {json_fault(error, document)}") from error

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        """A response that needs no retry: 200, 206 or 416. The last try's error otherwise."""
        settings = self._settings
        sent = {"User-Agent": USER_AGENT, **headers, **dict(headers_for(url, self._headers))}
        for retries_left in range(settings.fetch_retries, -1, -1):
            self._alive()
            pause: float | None = None
            try:
                response = self._session.get(
                    url,
                    headers=sent,
                    stream=True,
                    allow_redirects=False,
                    timeout=(settings.connect_timeout_seconds, settings.read_timeout_seconds),
                )
            except (requests.ConnectionError, requests.Timeout) as caught:
                error: FetchError = _unreachable(url, caught)
            except (requests.exceptions.InvalidURL, urllib3.exceptions.LocationValueError) as caught:
                raise Refused(f"{public_url(url)}: the URL's host cannot be one") from caught
            except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as caught:
                raise BrokenStream(f"{public_url(url)}: the answer is not HTTP as we know it") from caught
            else:
                if response.status_code in (200, 206, 416):
                    return response
                response.close()
                error = _not_retrieved(url, response.status_code)
                if not error.retryable:
                    raise error
                pause = self._retry_after(response.headers.get("Retry-After"))
            if retries_left:
                backoff = settings.fetch_backoff_seconds * 2 ** (settings.fetch_retries - retries_left)
                self._pause(backoff * random.uniform(0.75, 1.25) if pause is None else pause)  # noqa: S311
        raise error

    def _retry_after(self, value: str | None) -> float | None:
        """Seconds that the server asks for, capped; None where it says nothing that makes sense."""
        if value is None:
            return None
        if value.strip().isdecimal():
            seconds = float(value)
        else:
            try:
                when = parsedate_to_datetime(value)
            except (ValueError, OverflowError):
                return None
            seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        return min(max(seconds, 0.0), self._settings.retry_after_cap_seconds)

    def _pause(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            self._alive()
            time.sleep(min(left, 0.2))


def _goes_on(response: requests.Response, offset: int, validator: str) -> bool:
    """Whether the range is the one asked for, of the body asked for: some servers do not heed If-Range."""
    headers = response.headers
    same = headers.get("ETag", validator) == validator
    return same and headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _not_retrieved(url: str, status: int) -> NotRetrieved:
    name = public_url(url)
    if 300 <= status < 400:
        reason = f"{name} answered {status}: redirects are not followed"
        return NotRetrieved(reason, http_status=status, code="not-supported", retryable=False)
    code = _CODES.get(status, "transient" if status >= 500 else "not-found" if status == 404 else "processing")
    return NotRetrieved(f"{name} answered {status}", http_status=status, code=code, retryable=status in RETRIED)


def _unreachable(url: str, error: Exception) -> Unreachable:
    what = "did not answer in time" if isinstance(error, requests.Timeout) else "could not be reached"
    return Unreachable(f"{public_url(url)} {what}")
