"""Does the store hold what was served, line by line?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import psycopg

STORED = "SELECT type, id, convert_to(body, 'UTF8') FROM current_resources WHERE tenant = %s"


def differences(
    database_url: str, expected: Iterable[tuple[str, str, bytes]], *, tenant: str = "default"
) -> Iterator[str]:
    """What is missing from the store, different in it, or in it without having been served."""
    digests = {(kind, resource_id): hashlib.sha256(body).digest() for kind, resource_id, body in expected}
    with psycopg.connect(database_url) as connection, connection.cursor("stored") as cursor:
        cursor.itersize = 5000
        for kind, resource_id, body in cursor.execute(STORED, (tenant,)):
            digest = digests.pop((kind, resource_id), None)
            if digest is None:
                yield f"{kind}/{resource_id} is in the store and was not served"
            elif digest != hashlib.sha256(body).digest():
                yield f"{kind}/{resource_id} differs from what was served"
    for kind, resource_id in digests:
        yield f"{kind}/{resource_id} was served and is not in the store"
