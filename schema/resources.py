"""The versioned store: `resource_versions`, append-only, newest row first.

    key = tenant (4 bytes) | type number (2) | blake2b of the id (10)      primary key (key, seq)

The newest row of a key says what stands; an `affirm` says that what stood before it still does, and that one more
manifest vouches for it. Reading never needs a second table, and the rows of one resource are its history.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

from schema.database import driver
from schema.fhir_types import TYPE_NUMBERS


class Op(IntEnum):
    """What a row did. Stored; numbers never change."""

    CREATE = 1
    UPDATE = 2
    DELETE = 3
    RESTORE = 4
    AFFIRM = 5


def key_prefix(tenant_id: int, resource_type: str) -> bytes:
    """The first six bytes of every key of that tenant and type."""
    return struct.pack("!IH", tenant_id, TYPE_NUMBERS[resource_type])


def resource_key(prefix: bytes, resource_id: str) -> bytes:
    """The 16 bytes under which a resource's versions are kept. The hash is cryptographic because ids can be chosen."""
    return prefix + hashlib.blake2b(resource_id.encode(), digest_size=10).digest()


class Standing(NamedTuple):
    """The newest row of a key, looked up by its place (from 1) in the list of keys."""

    place: int
    seq: int
    version: int
    op: int
    content_hash: bytes | None
    batch_id: int
    resource_id: str


class VersionRow(NamedTuple):
    """A row to append, in COPY's column order."""

    key: bytes
    seq: int
    version: int
    batch_id: int
    line: int
    op: int
    content_hash: bytes | None
    resource_id: str
    body: bytes | None


# One index probe a key, newest first. The keys travel as one binary uuid[].
_NEWEST = """
SELECT k.place, v.seq, v.version, v.op, uuid_send(v.content_hash), v.batch_id, v.resource_id
FROM unnest(%b::uuid[]) WITH ORDINALITY AS k(key, place)
CROSS JOIN LATERAL (
    SELECT r.seq, r.version, r.op, r.content_hash, r.batch_id, r.resource_id
    FROM resource_versions r
    WHERE r.key = k.key
    ORDER BY r.seq DESC
    LIMIT 1
) v
"""

_COPY = """
COPY resource_versions (key, seq, version, batch_id, line, op, content_hash, resource_id, body)
FROM STDIN (FORMAT BINARY)
"""

# The types on the wire: a uuid's 16 bytes and a text's UTF-8 are sent as they are.
_COPY_TYPES = ("bytea", "int8", "int8", "int8", "int8", "int2", "bytea", "text", "bytea")

_MANIFESTS_OF = sa.text(
    "SELECT id, manifest_id FROM ingest_batches WHERE tenant_id = :tenant_id AND id = ANY(:batches)"
)

_READ = """
SELECT v.version, v.op, v.resource_id, v.body, b.committed_at
FROM resource_versions v
JOIN ingest_batches b ON b.tenant_id = :tenant_id AND b.id = v.batch_id
WHERE v.key = :key AND v.resource_id = :resource_id AND v.op <> 5
"""
_READ_NEWEST = sa.text(_READ + " ORDER BY v.seq DESC LIMIT 1")
_READ_VERSION = sa.text(_READ + " AND v.version = :version ORDER BY v.seq DESC LIMIT 1")
_READ_HISTORY = sa.text(_READ + " AND v.version < :before ORDER BY v.seq DESC LIMIT :limit")


class _Keys:
    """Keys of 16 bytes each, to be sent as one uuid[]."""

    __slots__ = ("keys",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = keys


class _KeysDumper(Dumper):
    format = Format.BINARY
    oid = 2951  # uuid[]

    def dump(self, obj: _Keys) -> Buffer:
        if not obj.keys:
            return struct.pack("!iiI", 0, 0, 2950)
        header = struct.pack("!iiIii", 1, 0, 2950, len(obj.keys), 1)
        length = struct.pack("!i", 16)
        return header + length + length.join(obj.keys)


def newest(connection: sa.Connection, keys: Sequence[bytes]) -> list[Standing]:
    """The newest row of each key that has one, in no particular order."""
    with driver(connection).cursor(binary=True) as cursor:
        cursor.adapters.register_dumper(_Keys, _KeysDumper)
        return [Standing(*row) for row in cursor.execute(_NEWEST, (_Keys(keys),))]


def manifests_of_batches(connection: sa.Connection, tenant_id: int, batches: Iterable[int]) -> dict[int, int]:
    """Which manifest wrote each of the batches."""
    rows = connection.execute(_MANIFESTS_OF, {"tenant_id": tenant_id, "batches": list(batches)})
    return {row.id: row.manifest_id for row in rows}


def append(connection: sa.Connection, rows: Iterable[VersionRow]) -> None:
    """COPY rows into the store; a unique violation means that somebody else wrote one of the keys."""
    with driver(connection).cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(_COPY_TYPES)
        write_row = copy.write_row
        for row in rows:
            write_row(row)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version of a resource as it is read. `body` is what was received, None for a deletion."""

    version: int
    op: Op
    resource_id: str
    body: str | None
    last_updated: datetime


def _stored(row: sa.Row[Any]) -> StoredVersion:
    return StoredVersion(row.version, Op(row.op), row.resource_id, row.body, row.committed_at)


def _address(tenant_id: int, resource_type: str, resource_id: str) -> dict[str, Any]:
    key = resource_key(key_prefix(tenant_id, resource_type), resource_id)
    return {"tenant_id": tenant_id, "key": key.hex(), "resource_id": resource_id}


def read(
    connection: sa.Connection,
    tenant_id: int,
    resource_type: str,
    resource_id: str,
    version: int | None = None,
) -> StoredVersion | None:
    """What stands under that id, or the version asked for; None where there never was one."""
    address = _address(tenant_id, resource_type, resource_id)
    if version is None:
        row = connection.execute(_READ_NEWEST, address).one_or_none()
    else:
        row = connection.execute(_READ_VERSION, {**address, "version": version}).one_or_none()
    return None if row is None else _stored(row)


def history(
    connection: sa.Connection,
    tenant_id: int,
    resource_type: str,
    resource_id: str,
    *,
    before: int | None = None,
    limit: int = 100,
) -> list[StoredVersion]:
    """Up to `limit` versions below version `before`, newest first."""
    parameters = {
        **_address(tenant_id, resource_type, resource_id),
        "before": before or 2**62,
        "limit": limit,
    }
    return [_stored(row) for row in connection.execute(_READ_HISTORY, parameters)]
