"""The provider's manifest: its linked pages followed, its shape checked, its URLs made absolute.

Source: Bulk Data Access 4.0.0-ballot, logical model BulkDataManifest. Lenient where providers are known to differ: an
empty `outputOrganizedBy`, missing `type`, `error` for `outcome`, a single object for `link`, `request`, relative URLs.

A page is not believed to be small or sane: of what it holds only the known fields are decoded, lists are given up where
they become too long, and no text is copied that is longer than it may be.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urljoin

import msgspec

from settings import Settings
from workers.fetch.errors import BadManifest, TooLarge
from workers.fetch.http import Fetcher
from workers.urls import public_url

MAX_URL = 2048
"""Bytes of a URL, as it stands and made absolute."""

MAX_CODE = 64
"""Bytes of `type` and `outputOrganizedBy`: names of resource types."""

MAX_LINKS = 100
"""Entries of one page's `link`."""

MAX_NOTES = 100
"""Notes kept of one manifest."""

_NULL = msgspec.Raw(b"null")
_FALSE = msgspec.Raw(b"false")
_TRUE = msgspec.Raw(b"true")
_EMPTY = msgspec.Raw(b'""')
_BYTES_OF_A_CODE_POINT = 12
"""At most: a surrogate pair, escaped."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file. `type` None: lines of any type. `count` and `size` (bytes) are the provider's word, hints only."""

    url: str
    type: str | None = None
    count: int | None = None
    size: int | None = None
    organized_by: str | None = None


@dataclass(slots=True)
class Manifest:
    """All pages together, in their order. `notes` are for the submitter: what was tolerated."""

    files: list[ManifestFile] = field(default_factory=list)
    deleted: list[ManifestFile] = field(default_factory=list)
    outcomes: list[ManifestFile] = field(default_factory=list)
    requires_access_token: bool = False
    notes: list[str] = field(default_factory=list)
    pages: int = 0


def fetch_manifest(fetcher: Fetcher, url: str, settings: Settings) -> Manifest:
    """Fetch the manifest and the pages it links to. Raises `FetchError`; `BadManifest` names page and place."""
    manifest = Manifest()
    seen: set[str] = set()
    next_url: str | None = url
    while next_url is not None:
        if next_url in seen:
            raise BadManifest(f"{public_url(next_url)}: link leads back to a page that was read already")
        if manifest.pages >= settings.max_manifest_pages:
            raise TooLarge(f"the manifest has more than {settings.max_manifest_pages:,} linked pages")
        seen.add(next_url)
        document = fetcher.get_json(next_url, _decode_document)
        next_url = _Page(next_url, document, settings.max_manifest_files).add_to(manifest)
    return manifest


class _TooMany(Exception):  # noqa: N818
    pass


class _Reading:
    """A list being decoded: how many entries of it are there, and may be."""

    def __init__(self, limit: int) -> None:
        self.entries = 0
        self._limit = limit

    def add_one(self) -> None:
        self.entries += 1
        if self.entries > self._limit:
            raise _TooMany


_reading: ContextVar[_Reading] = ContextVar("reading")


class _Document(msgspec.Struct):
    requiresAccessToken: msgspec.Raw = _FALSE  # noqa: N815 - FHIR's spelling
    outputOrganizedBy: msgspec.Raw = _NULL  # noqa: N815
    output: msgspec.Raw = _NULL
    deleted: msgspec.Raw = _NULL
    outcome: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL
    link: msgspec.Raw = _NULL


class _Entry(msgspec.Struct):
    url: msgspec.Raw = _NULL

    def __post_init__(self) -> None:
        _reading.get().add_one()


class _File(_Entry):
    type: msgspec.Raw = _NULL
    count: msgspec.Raw = _NULL
    fileSize: msgspec.Raw = _NULL  # noqa: N815


class _Link(_Entry):
    relation: msgspec.Raw = _NULL


_AnyEntry = TypeVar("_AnyEntry", bound=_Entry)

_decode_files = msgspec.json.Decoder(list[_File])
_decode_links = msgspec.json.Decoder(list[_Link])
_decode_text = msgspec.json.Decoder(str).decode
_decode_int = msgspec.json.Decoder(int).decode


def _decode_document(data: memoryview) -> _Document | None:
    """None: JSON, but no object."""
    try:
        return msgspec.json.decode(data, type=_Document)
    except msgspec.ValidationError:
        msgspec.json.decode(data, type=msgspec.Raw)
        return None


class _Page:
    def __init__(self, url: str, document: _Document | None, max_files: int) -> None:
        self._url = url
        if document is None:
            raise self._bad("the page is not a JSON object")
        self._document = document
        self._max_files = max_files

    def add_to(self, manifest: Manifest) -> str | None:
        """Add what the page lists; returns the URL of the page that follows."""
        manifest.pages += 1
        document = self._document
        required = document.requiresAccessToken
        if required not in (_TRUE, _FALSE):
            raise self._bad("requiresAccessToken is not a boolean")
        manifest.requires_access_token |= required == _TRUE
        organized_by = self._text(document.outputOrganizedBy, "outputOrganizedBy", MAX_CODE) or None
        self._add_files(manifest, manifest.files, "output", document.output, organized_by)
        self._add_files(manifest, manifest.deleted, "deleted", document.deleted)
        self._add_files(manifest, manifest.outcomes, "outcome", document.outcome)
        self._add_files(manifest, manifest.outcomes, "error", document.error)
        return self._next()

    def _add_files(
        self,
        manifest: Manifest,
        files: list[ManifestFile],
        name: str,
        raw: msgspec.Raw,
        organized_by: str | None = None,
    ) -> None:
        listed = len(manifest.files) + len(manifest.deleted) + len(manifest.outcomes)
        try:
            entries = self._entries(_decode_files, raw, name, self._max_files - listed)
        except _TooMany:
            raise TooLarge(f"the manifest lists more than {self._max_files:,} files") from None
        for index, entry in enumerate(entries):
            place = f"{name}[{index}]"
            type_ = self._text(entry.type, f"{place}.type", MAX_CODE) or None
            files.append(
                ManifestFile(
                    url=self._absolute(entry, place),
                    type=type_ if organized_by is None and name == "output" else None,
                    count=self._hint(entry.count, f"{place}.count", manifest),
                    size=self._hint(entry.fileSize, f"{place}.fileSize", manifest),
                    organized_by=organized_by,
                )
            )

    def _next(self) -> str | None:
        raw = self._document.link
        if raw in (_NULL, _EMPTY):
            return None
        if not _begins(raw, b"["):
            raw = msgspec.Raw(b"[" + bytes(raw) + b"]")
        try:
            links = self._entries(_decode_links, raw, "link", MAX_LINKS)
        except _TooMany:
            raise self._bad(f"link has more than {MAX_LINKS} entries") from None
        for index, link in enumerate(links):
            if _is_next(link):
                return self._absolute(link, f"link[{index}]")
        return None

    def _absolute(self, entry: _Entry, place: str) -> str:
        place += ".url"
        url = self._text(entry.url, place, MAX_URL)
        if not url:
            raise self._bad(f"{place} is missing")
        try:
            absolute = urljoin(self._url, url)
        except ValueError as error:
            raise self._bad(f"{place} cannot be parsed") from error
        if len(absolute.encode()) > MAX_URL:
            raise self._bad(f"{place} has more than {MAX_URL:,} bytes")
        return absolute

    def _entries(
        self, decoder: msgspec.json.Decoder[list[_AnyEntry]], raw: msgspec.Raw, name: str, limit: int
    ) -> list[_AnyEntry]:
        if raw == _NULL:
            return []
        if not _begins(raw, b"["):
            raise self._bad(f"{name} is not an array")
        reading = _Reading(limit)
        token = _reading.set(reading)
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError:
            raise self._bad(f"{name}[{reading.entries}] is not a JSON object") from None
        finally:
            _reading.reset(token)

    def _text(self, raw: msgspec.Raw, place: str, limit: int) -> str:
        """ "" for null. `limit` is in bytes."""
        if raw == _NULL:
            return ""
        if not _begins(raw, b'"'):
            raise self._bad(f"{place} is not a string")
        text = _decode_text(raw) if _length(raw) <= _BYTES_OF_A_CODE_POINT * limit + 2 else None
        if text is None or len(text.encode()) > limit:
            raise self._bad(f"{place} has more than {limit:,} bytes")
        if "\0" in text:
            raise self._bad(f"{place} is not a string")
        return text

    def _hint(self, raw: msgspec.Raw, place: str, manifest: Manifest) -> int | None:
        if raw == _NULL:
            return None
        try:
            value = _decode_int(raw)
        except msgspec.ValidationError:
            value = -1
        if 0 <= value < 2**63:
            return value
        if len(manifest.notes) < MAX_NOTES:
            manifest.notes.append(f"{public_url(self._url)}: {place} is no count and was ignored")
        elif len(manifest.notes) == MAX_NOTES:
            manifest.notes.append("there are more counts that are none, and were ignored")
        return None

    def _bad(self, what: str) -> BadManifest:
        return BadManifest(f"{public_url(self._url)}: {what}")


def _is_next(link: _Link) -> bool:
    try:
        return _length(link.relation) <= MAX_CODE and _decode_text(link.relation) == "next"
    except msgspec.ValidationError:
        return False


def _begins(raw: msgspec.Raw, start: bytes) -> bool:
    return memoryview(raw)[:1] == start


def _length(raw: msgspec.Raw) -> int:
    return memoryview(raw).nbytes
