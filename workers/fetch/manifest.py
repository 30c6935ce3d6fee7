"""The provider's manifest: its linked pages followed, its shape checked, its URLs made absolute.

Source: Bulk Data Access 4.0.0-ballot, logical model BulkDataManifest. Lenient where providers are known to differ: an
empty `outputOrganizedBy`, missing `type`, `error` for `outcome`, a single object for `link`, `request`, relative URLs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

from settings import Settings
from workers.fetch.errors import BadManifest, TooLarge
from workers.fetch.http import Fetcher
from workers.urls import public_url


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
        next_url = _Page(next_url, fetcher.get_json(next_url)).add_to(manifest)
        total = len(manifest.files) + len(manifest.deleted) + len(manifest.outcomes)
        if total > settings.max_manifest_files:
            raise TooLarge(f"the manifest lists more than {settings.max_manifest_files:,} files")
    return manifest


class _Page:
    def __init__(self, url: str, document: Any) -> None:
        self._url = url
        self._document = self._object(document, "the page")

    def add_to(self, manifest: Manifest) -> str | None:
        """Add what the page lists; returns the URL of the page that follows."""
        manifest.pages += 1
        document = self._document
        required = document.get("requiresAccessToken", False)
        if not isinstance(required, bool):
            raise self._bad("requiresAccessToken is not a boolean")
        manifest.requires_access_token |= required
        organized_by = self._text(document, "outputOrganizedBy", "outputOrganizedBy") or None
        manifest.files += self._files("output", manifest.notes, organized_by)
        manifest.deleted += self._files("deleted", manifest.notes)
        manifest.outcomes += self._files("outcome", manifest.notes) + self._files("error", manifest.notes)
        return self._next()

    def _files(self, name: str, notes: list[str], organized_by: str | None = None) -> list[ManifestFile]:
        files = []
        for index, value in enumerate(self._list(name)):
            place = f"{name}[{index}]"
            item = self._object(value, place)
            url = self._text(item, "url", f"{place}.url")
            if not url:
                raise self._bad(f"{place}.url is missing")
            type_ = self._text(item, "type", f"{place}.type") or None
            files.append(
                ManifestFile(
                    url=self._absolute(url, f"{place}.url"),
                    type=type_ if organized_by is None and name == "output" else None,
                    count=self._hint(item, "count", place, notes),
                    size=self._hint(item, "fileSize", place, notes),
                    organized_by=organized_by,
                )
            )
        return files

    def _next(self) -> str | None:
        links = self._document.get("link") or []
        for index, value in enumerate(links if isinstance(links, list) else [links]):
            link = self._object(value, f"link[{index}]")
            if link.get("relation") == "next":
                url = self._text(link, "url", f"link[{index}].url")
                if not url:
                    raise self._bad(f"link[{index}].url is missing")
                return self._absolute(url, f"link[{index}].url")
        return None

    def _absolute(self, url: str, place: str) -> str:
        try:
            return urljoin(self._url, url)
        except ValueError as error:
            raise self._bad(f"{place} cannot be parsed") from error

    def _list(self, name: str) -> list[Any]:
        value = self._document.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._bad(f"{name} is not an array")
        return value

    def _object(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._bad(f"{place} is not a JSON object")
        return value

    def _text(self, item: dict[str, Any], name: str, place: str) -> str:
        value = item.get(name)
        if value is None:
            return ""
        if not isinstance(value, str) or "\0" in value:
            raise self._bad(f"{place} is not a string")
        return value

    def _hint(self, item: dict[str, Any], name: str, place: str, notes: list[str]) -> int | None:
        value = item.get(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63):
            return value
        notes.append(f"{public_url(self._url)}: {place}.{name} is no count and was ignored")
        return None

    def _bad(self, what: str) -> BadManifest:
        return BadManifest(f"{public_url(self._url)}: {what}")
