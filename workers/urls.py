"""URLs as they may be shown."""

from __future__ import annotations

import re

_SECRETS = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)  # no parser: the URL may be one that no parser takes


def public_url(url: str) -> str:
    """The URL without what may be secret in it: credentials, query, fragment."""
    return _SECRETS.sub("", url)
