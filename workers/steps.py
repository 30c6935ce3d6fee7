"""What a hand does for each kind of step. Each function works under a lease and ends its step in a fenced transaction.

plan      fetch the manifest and its linked pages, write a row and a step for each file
ingest    fetch a file and write its lines, batch by batch, from the cursor on
publish   write the receipts and end the manifest
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from schema import files, results
from schema.database import DATABASE_ERRORS, is_conflict, is_disconnect
from schema.files import FileView, ManifestView, PlannedFile
from schema.leases import Lease, LeaseLost, cursor_after_lost_commit, others_wait
from settings import Settings
from workers import receipts
from workers.artifact_store import ArtifactStore
from workers.draining import drain_ordered
from workers.fetch.http import Fetcher, Stream
from workers.fetch.manifest import fetch_manifest
from workers.fetch.ndjson import blocks
from workers.ingest.batch import Batch
from workers.ingest.lines import LineReader, LineRules
from workers.ingest.prefetch import Prefetch
from workers.ingest.resume import after_committed
from workers.ingest.write import Origins, write_batch
from workers.keeper import Keeper
from workers.seals import unseal

NDJSON = "application/fhir+ndjson, application/ndjson, */*;q=0.5"
CONFLICTS_BEFORE_GIVING_UP = 100


class HandBack(Exception):  # noqa: N818
    """The step goes back unfinished, at a batch's border: this node leaves, or another tenant waits for its turn."""


@dataclass(slots=True)
class Work:
    """One step in hand. `connect` opens a connection, again and again while the lease lasts; `progressed` tells whether
    the cursor moved under this lease; `hands_wanted` how many more steps became due."""

    lease: Lease
    connection: sa.Connection
    keeper: Keeper
    settings: Settings
    store: ArtifactStore
    connect: Callable[[Callable[[], None]], sa.Connection]
    progressed: bool = False
    hands_wanted: int = 0

    def check(self) -> None:
        """Between batches and while waiting: raises `LeaseLost`, or `HandBack` if this node is to leave."""
        self.keeper.check()
        if self.keeper.drain or drain_ordered():
            raise HandBack("this worker is leaving")

    def moved(self) -> None:
        """The same where something moves: bytes came."""
        self.keeper.alive()
        self.check()


def plan(work: Work) -> None:
    """Turn the manifest into rows. Raises `FetchError`, `LeaseLost`."""
    view = _view(work)
    if view.manifest_url is None:
        files.finish_plan(work.connection, work.lease, [])
        return
    with _fetcher(work, view) as fetcher:
        manifest = fetch_manifest(fetcher, view.manifest_url, work.settings)
    listed = [
        *(
            PlannedFile("output", file.url, file.type, file.organized_by, file.count, file.size)
            for file in manifest.files
        ),
        *(
            PlannedFile("deleted", file.url, declared_count=file.count, declared_bytes=file.size)
            for file in manifest.deleted
        ),
        *(
            PlannedFile("outcome", file.url, declared_count=file.count, declared_bytes=file.size)
            for file in manifest.outcomes
        ),
    ]
    files.finish_plan(work.connection, work.lease, listed, notes=manifest.notes)
    work.hands_wanted = len(manifest.files)


def ingest(work: Work) -> None:
    """Write the file's lines from the cursor on. Raises `FetchError`, `FileChanged`, `HandBack`, `LeaseLost`."""
    view = _view(work)
    lease = work.lease
    with work.connection.begin():
        file = files.file_view(work.connection, lease)
        borders = results.batch_borders(work.connection, lease) if lease.cursor_bytes else []
    with _fetcher(work, view) as fetcher:
        stream = fetcher.open(file.url, accept=NDJSON, offset=lease.cursor_bytes, validator=file.validator)
        if not lease.cursor_bytes:
            files.note_validator(work.connection, lease, stream.etag if stream.identity else None)
        items = _batches(work, view, file, stream, borders)
        with Prefetch(items, ahead=2, close=stream.close, waiting=work.check) as batches:
            _write(work, batches)
    with work.connection.begin():
        file = files.file_view(work.connection, lease)
    files.finish_file(work.connection, lease, file.problems)


def publish(work: Work) -> None:
    """Write the receipts and end the manifest. Raises `ArtifactStoreError`, `HandBack`, `LeaseLost`."""
    receipts.publish(work.connection, work.lease, work.settings, work.store, work.moved)


def _view(work: Work) -> ManifestView:
    with work.connection.begin():
        return files.manifest_view(work.connection, work.lease.tenant_id, work.lease.manifest_id)


def _fetcher(work: Work, view: ManifestView) -> Fetcher:
    secrets = unseal(work.settings, view.sealed_secrets)
    return Fetcher(secrets.headers, work.settings, work.moved)


def _batches(
    work: Work, view: ManifestView, file: FileView, stream: Stream, borders: list[results.BatchBorder]
) -> Iterator[Batch]:
    lease, settings = work.lease, work.settings
    reader = LineReader(
        LineRules(
            tenant_id=lease.tenant_id,
            manifest_id=lease.manifest_id,
            position=file.position,
            declared_type=file.declared_type,
            organized_by=file.organized_by,
            ignore_meta=view.ignore_meta,
            batch_lines=settings.batch_lines,
            batch_bytes=settings.batch_bytes,
            max_line_bytes=settings.max_line_bytes,
        )
    )
    if stream.resumed_at == lease.cursor_bytes:
        lines = blocks(stream, settings.max_line_bytes, offset=lease.cursor_bytes, line=lease.cursor_lines + 1)
    else:
        lines = after_committed(blocks(stream, settings.max_line_bytes), borders)
    return reader.batches(lines, lease.cursor_bytes, lease.cursor_lines + 1)


def _write(work: Work, batches: Iterable[Batch]) -> None:
    origins = Origins(work.lease)
    slice_ends = math.inf
    by_key = False
    for batch in batches:
        if slice_ends == math.inf:  # reading again what is committed already does not count
            slice_ends = time.monotonic() + work.settings.slice_seconds
        by_key = _write_until_committed(work, batch, origins, by_key=by_key)
        work.progressed = True
        work.check()
        if time.monotonic() > slice_ends:
            if others_wait(work.connection, work.lease):
                raise HandBack("another tenant waits")
            slice_ends = time.monotonic() + work.settings.slice_seconds


def _write_until_committed(work: Work, batch: Batch, origins: Origins, *, by_key: bool) -> bool:
    """Write the batch, again after a conflict or a lost connection. Returns whether keys are contended."""
    for _ in range(CONFLICTS_BEFORE_GIVING_UP):
        work.keeper.alive()
        sent_at = time.monotonic()
        try:
            write_batch(
                work.connection, work.lease, batch, origins, by_key=by_key, lease_seconds=work.settings.lease_seconds
            )
        except DATABASE_ERRORS as error:
            if is_conflict(error):
                by_key = True
            elif is_disconnect(error):
                work.connection.invalidate()
                work.connection.close()
                work.connection = work.connect(work.keeper.alive)
                if _landed(work, batch):
                    return by_key
            else:
                raise
        else:
            work.keeper.renewed(sent_at)
            work.keeper.alive()
            return by_key
    raise HandBack("somebody else writes the same resources all the time")


def _landed(work: Work, batch: Batch) -> bool:
    cursor = cursor_after_lost_commit(work.connection, work.lease)
    if cursor not in (batch.first_byte, batch.end_byte):
        raise LeaseLost("the cursor stands elsewhere")
    return cursor == batch.end_byte
