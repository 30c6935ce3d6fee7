"""What became of every line: batches, their packed results, and the issues of lines that failed.

A batch's results are one value: msgpack of columns, compressed with zstd. Lines are in the order of the file; `ids`,
`types`, `versions` and `seqs` have an entry for each line that names a stored resource, the others for each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
import zstandard

from schema.leases import Lease, LeaseLost, Progress
from schema.tables import entry_issues, ingest_batches


class Action(IntEnum):
    """What became of one line. Stored; numbers never change."""

    CREATED = 1
    UPDATED = 2
    UNCHANGED = 3
    AFFIRMED = 4
    FAILED = 5
    BLANK = 6
    HEADER = 7


STORED_ACTIONS = frozenset({Action.CREATED, Action.UPDATED, Action.UNCHANGED, Action.AFFIRMED})
"""Actions of lines whose resource stands in the store."""

WRITTEN_ACTIONS = frozenset({Action.CREATED, Action.UPDATED})
"""Actions of lines that made a new version."""


class LineResults(msgspec.Struct, array_like=True):
    """The results of a batch's lines, as columns. `lengths` are the lines' bytes with their line ends."""

    actions: bytearray = msgspec.field(default_factory=bytearray)
    lengths: list[int] = msgspec.field(default_factory=list)
    types: list[int] = msgspec.field(default_factory=list)
    ids: list[str] = msgspec.field(default_factory=list)
    versions: list[int] = msgspec.field(default_factory=list)
    seqs: list[int] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Issue:
    """Why one line failed. `diagnostics` is written for the submitter. `outcome` is a contract term."""

    line: int
    byte_offset: int
    code: str
    diagnostics: str
    outcome: str = "validation-error"
    resource_type: str | None = None
    resource_id: str | None = None


@dataclass(frozen=True, slots=True)
class CommittedBatch:
    """A row of `ingest_batches` with its results still packed."""

    id: int
    file_id: int
    first_byte: int
    end_byte: int
    first_line: int
    line_count: int
    digest: bytes
    committed_at: datetime
    results: bytes = field(repr=False)


_NEXT_ID = sa.text("SELECT nextval(pg_get_serial_sequence('ingest_batches', 'id'))")

_BATCH_BORDERS = sa.text("""
SELECT first_byte, end_byte, line_count, digest FROM ingest_batches
WHERE tenant_id = :tenant_id AND file_id = :file_id AND generation = :generation
ORDER BY first_byte
""")


def pack(results: LineResults) -> bytes:
    """The value kept in `ingest_batches.results`."""
    return zstandard.ZstdCompressor(level=1).compress(msgspec.msgpack.encode(results))


def unpack(value: bytes) -> LineResults:
    """The columns that `pack` packed."""
    return msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(value), type=LineResults)


def next_batch_id(connection: sa.Connection) -> int:
    """A fresh id: the versions that a batch writes carry it before its own row exists."""
    return int(connection.execute(_NEXT_ID).scalar_one())


def record_batch(
    connection: sa.Connection,
    lease: Lease,
    batch_id: int,
    progress: Progress,
    *,
    first_line: int,
    line_count: int,
    digest: bytes,
    results: LineResults,
    issues: Sequence[Issue],
) -> None:
    """Write the batch's row and its issues, in the batch's own transaction.

    Raises `LeaseLost` if a batch that begins there is recorded already.
    """
    counts = ("created", "updated", "unchanged", "affirmed", "failed", "skipped")
    place: dict[str, Any] = {
        "tenant_id": lease.tenant_id,
        "file_id": lease.file_id,
        "generation": lease.generation,
    }
    statement = ingest_batches.insert().values(
        **place,
        id=batch_id,
        manifest_id=lease.manifest_id,
        first_byte=progress.first_byte,
        end_byte=progress.end_byte,
        first_line=first_line,
        line_count=line_count,
        fencing_token=lease.fencing_token,
        digest=digest,
        results=pack(results),
        **{name: getattr(progress, name) for name in counts},
    )
    try:
        connection.execute(statement)
    except sa.exc.IntegrityError as error:
        raise LeaseLost from error
    if issues:
        connection.execute(
            entry_issues.insert(),
            [
                {
                    **place,
                    "line": issue.line,
                    "batch_id": batch_id,
                    "byte_offset": issue.byte_offset,
                    "outcome": issue.outcome,
                    "code": issue.code,
                    "resource_type": issue.resource_type,
                    "resource_id": issue.resource_id,
                    "diagnostics": issue.diagnostics,
                }
                for issue in issues
            ],
        )


def _of_file(tenant_id: int, file_id: int, generation: int) -> dict[str, int]:
    return {"tenant_id": tenant_id, "file_id": file_id, "generation": generation}


class BatchBorder(NamedTuple):
    """Where a committed batch lies, and the digest of its lines."""

    first_byte: int
    end_byte: int
    line_count: int
    digest: bytes


def batch_borders(connection: sa.Connection, lease: Lease) -> list[BatchBorder]:
    """The borders and digests of what was committed before this claim, to check a file that is read again."""
    assert lease.file_id is not None
    rows = connection.execute(_BATCH_BORDERS, _of_file(lease.tenant_id, lease.file_id, lease.generation))
    return [BatchBorder(*row) for row in rows]
