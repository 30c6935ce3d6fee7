"""What may be asked of whom: every outgoing request passes here before it is made.

Fail-closed: what is not understood is refused. A submitter's own policy (origins, address ranges) belongs here as well.
Source: RFC 3986 (URLs), RFC 9110 sections 5.1 and 5.5 (field names and values).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from workers.fetch.errors import Refused

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FORBIDDEN_IN_URL = re.compile(r"[\x00-\x20\x7f\\]")

OUR_OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "if-range",
        "keep-alive",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields that shape the request itself: a submitter's header may not set them."""


def check_url(url: str) -> str:
    """The URL, if it may be fetched; raises `Refused`."""
    if _FORBIDDEN_IN_URL.search(url):
        raise Refused("the URL holds a space, a control character or a backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Refused("the URL cannot be parsed") from error
    if parts.scheme not in ("http", "https"):
        raise Refused("the URL is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise Refused("the URL holds a user name or a password")
    if not parts.hostname:
        raise Refused("the URL has no host")
    if port == 0:
        raise Refused("the URL names port 0")
    return url


def check_header(name: str, value: str) -> tuple[str, str]:
    """The header as it is sent, if a submitter may have it sent; raises `Refused`, which does not repeat the value."""
    if not _TOKEN.fullmatch(name):
        raise Refused("a request header's name is not an HTTP token")
    lowered = name.lower()
    if lowered in OUR_OWN_HEADERS or lowered.startswith("proxy-"):
        raise Refused(f"the request header {name} may not be set by a submitter")
    if not _VALUE.fullmatch(value):
        raise Refused(f"the value of the request header {name} holds characters that HTTP does not allow")
    return name, value.strip()


def headers_for(url: str, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The submitter's headers that go with a request to `url`: built anew for each request."""
    check_url(url)
    return [check_header(name, value) for name, value in headers]
