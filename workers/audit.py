"""The audit: does the store hold what the product guarantees? For anyone to ask, at any time, also while work goes on.

Statements find what rows alone can show (`schema/audit.py`). Here are the checks that unpack results or read objects,
and the order of them all. Nothing is written and nobody is kept waiting; memory does not grow with the store.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from uuid import UUID

import msgspec
import sqlalchemy as sa
import zstandard

from schema import audit as rows
from schema.audit import AuditedBatch, Check, StoredLine
from schema.database import create_engine
from schema.fhir_types import RESOURCE_TYPES
from schema.resources import Op, key_prefix, resource_key
from schema.results import STORED_ACTIONS, Action, LineResults, unpack
from settings import Settings
from workers.artifact_store import ArtifactMissingError, ArtifactStore

OFFENDERS_NAMED = 20
"""Offenders that a check names; it stops looking there."""

MORE = "and more"
"""The last of the offenders, where there are more than are named."""

_DIGEST_BYTES = 32
_KNOWN_ACTIONS = frozenset(int(action) for action in Action)
_STORED = frozenset(int(action) for action in STORED_ACTIONS)
_OPS = {int(Action.CREATED): Op.CREATE, int(Action.UPDATED): Op.UPDATE, int(Action.AFFIRMED): Op.AFFIRM}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found. `offenders` are named by ids, at most `OFFENDERS_NAMED` and `MORE`.

    `skipped` batches could not be looked into any more: their packed results were cleared, at the end of their time.
    """

    name: str
    proves: str
    examined: int
    offenders: list[str]
    seconds: float
    skipped: int = 0


class _Findings:
    """What a check has found so far."""

    def __init__(self) -> None:
        self.examined = 0
        self.skipped = 0
        self.offenders: list[str] = []

    @property
    def room(self) -> int:
        """How many more offenders to look for, one past those that are named."""
        return OFFENDERS_NAMED + 1 - len(self.offenders)

    def add(self, offenders: Iterator[str] | list[str]) -> None:
        self.offenders += islice(offenders, self.room)


def audit(settings: Settings, *, quick: bool = False) -> Iterator[CheckResult]:
    """Make every check, and yield what each found as it ends. `quick` leaves out those that read the store's every row.

    Raises what a database raises (`schema.database.DATABASE_ERRORS`), and `ArtifactStoreError`.
    """
    engine = create_engine(settings, application="bulk-submit audit", pooled=False)
    run = _Audit(engine, settings)
    try:
        with rows.snapshot(engine) as connection:
            yield run.check("lines", "Batches tile every file, up to its step's cursor.", run.lines, connection)
            yield run.check("entries", "Every input line has one entry in the ledger.", run.entries, connection)
            yield run.check("counters", "Counts are the sums of what was committed.", run.counters, connection)
            yield run.check("tokens", "Nothing was committed under an older fencing token.", run.tokens, connection)
            if not quick:
                yield run.check("versions", "Versions of a resource have no gap and no fork.", run.versions, connection)
                yield run.check("written", "The store has what batches say they wrote.", run.written, connection)
            yield run.check("endings", "What is over is over, what is not has a step due.", run.endings, connection)
            started, receipts = time.monotonic(), _Findings()
            run.receipts(receipts, connection)
        with engine.connect() as connection:
            run.objects(receipts, connection)
        yield _result("receipts", "Receipts are complete, and stored as they were written.", receipts, started)
    finally:
        engine.dispose()


def _result(name: str, proves: str, findings: _Findings, started: float) -> CheckResult:
    offenders = findings.offenders
    if len(offenders) > OFFENDERS_NAMED:
        offenders = [*offenders[:OFFENDERS_NAMED], MORE]
    return CheckResult(name, proves, findings.examined, offenders, time.monotonic() - started, findings.skipped)


class _Audit:
    """The checks of one run. Each adds to the findings that it is given."""

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._prefixes: dict[tuple[int, int], bytes] = {}

    def check(
        self, name: str, proves: str, make: Callable[[_Findings, sa.Connection], None], connection: sa.Connection
    ) -> CheckResult:
        """Make one check."""
        started, findings = time.monotonic(), _Findings()
        make(findings, connection)
        return _result(name, proves, findings, started)

    def lines(self, findings: _Findings, connection: sa.Connection) -> None:
        self._by_statements(findings, connection, rows.LINES)

    def entries(self, findings: _Findings, connection: sa.Connection) -> None:
        """Each batch's packed results are whole, and of as many lines and bytes as the batch."""
        with closing(rows.batches(connection)) as batches:
            for batch in batches:
                findings.examined += 1
                if batch.results is None:
                    findings.skipped += 1
                findings.add(f"batch {batch.id}: {fault}" for fault in _faults(batch, _unpacked(batch)))
                if not findings.room:
                    return

    def counters(self, findings: _Findings, connection: sa.Connection) -> None:
        """By statements, and: each batch counts what its packed results say."""
        self._by_statements(findings, connection, rows.COUNTERS)
        with closing(rows.batches(connection)) as batches:
            for batch in batches:
                results = _unpacked(batch)
                if results is None:
                    findings.skipped += batch.results is None
                    continue
                *packed, blank, headers = map(results.actions.count, Action)
                packed.append(blank + headers)
                counted = [batch.created, batch.updated, batch.unchanged, batch.affirmed, batch.failed, batch.skipped]
                if packed != counted:
                    findings.add([f"batch {batch.id}: its counts are not those of its results"])
                if not findings.room:
                    return

    def tokens(self, findings: _Findings, connection: sa.Connection) -> None:
        self._by_statements(findings, connection, rows.TOKENS)

    def versions(self, findings: _Findings, connection: sa.Connection) -> None:
        self._by_statements(findings, connection, rows.VERSIONS)

    def written(self, findings: _Findings, connection: sa.Connection) -> None:
        """By statements, and: each line that is said to stand in the store stands there, as that line wrote it."""
        self._by_statements(findings, connection, rows.WRITTEN)
        with closing(rows.batches(connection)) as batches:
            for batch in batches:
                results = _unpacked(batch)
                if results is None or any(_faults(batch, results)):
                    findings.skipped += batch.results is None
                    continue
                findings.add(rows.wrong_lines(connection, batch, self._stored_lines(batch, results)))
                if not findings.room:
                    return

    def endings(self, findings: _Findings, connection: sa.Connection) -> None:
        self._by_statements(findings, connection, rows.ENDINGS)

    def receipts(self, findings: _Findings, connection: sa.Connection) -> None:
        self._by_statements(findings, connection, rows.RECEIPTS)

    def objects(self, findings: _Findings, connection: sa.Connection) -> None:
        """Each receipt's object is there, with the bytes that were written. No transaction is open meanwhile.

        A receipt may reach the end of its time while it is looked at: it offends only if its row outlives its object.
        """
        store: ArtifactStore | None = None
        published = rows.published_artifacts(connection, ttl_seconds=self._settings.receipt_ttl_seconds)
        for artifact in published:
            if not findings.room:
                return
            store = store or ArtifactStore(self._settings.artifact_store_url)
            size, digest = 0, hashlib.sha256()
            try:
                for chunk in store.read(artifact.path):
                    size += len(chunk)
                    digest.update(chunk)
            except ArtifactMissingError:
                if not artifact.expired and rows.still_there(connection, artifact):
                    findings.add([f"artifact {artifact.id}: its object is missing"])
                continue
            if size != artifact.stored_bytes:
                findings.add([f"artifact {artifact.id}: its object has {size} bytes, not {artifact.stored_bytes}"])
            elif digest.digest() != artifact.sha256:
                findings.add([f"artifact {artifact.id}: its object is not the one that was written"])

    def _by_statements(self, findings: _Findings, connection: sa.Connection, check: Check) -> None:
        findings.examined += rows.examined(connection, check)
        ttl = self._settings.receipt_ttl_seconds
        findings.add(rows.offenders(connection, check, findings.room, ttl_seconds=ttl))

    def _stored_lines(self, batch: AuditedBatch, results: LineResults) -> list[StoredLine]:
        lines = (line for line, action in enumerate(results.actions, batch.first_line) if action in _STORED)
        actions = (action for action in results.actions if action in _STORED)
        columns = zip(lines, actions, results.types, results.ids, results.seqs, results.versions, strict=True)
        return [
            StoredLine(
                line,
                UUID(bytes=resource_key(self._prefix(batch.tenant_id, number), resource_id)),
                seq,
                version,
                _OPS.get(action, 0),
                resource_id,
            )
            for line, action, number, resource_id, seq, version in columns
        ]

    def _prefix(self, tenant_id: int, number: int) -> bytes:
        prefix = self._prefixes.get((tenant_id, number))
        if prefix is None:
            prefix = self._prefixes[tenant_id, number] = key_prefix(tenant_id, RESOURCE_TYPES[number - 1])
        return prefix


def _unpacked(batch: AuditedBatch) -> LineResults | None:
    """The batch's results; None where they were cleared or cannot be read."""
    if batch.results is None:
        return None
    try:
        return unpack(batch.results)
    except (zstandard.ZstdError, msgspec.DecodeError):
        return None


def _faults(batch: AuditedBatch, results: LineResults | None) -> Iterator[str]:
    """What is wrong with the batch's results, in themselves and beside its row."""
    if len(batch.digest) != _DIGEST_BYTES:
        yield f"a digest of {len(batch.digest)} bytes"
    if results is None:
        if batch.results is not None:
            yield "its results cannot be read"
        return
    if not len(results.actions) == len(results.lengths) == batch.line_count:
        yield f"{batch.line_count} lines, results of {len(results.actions)} actions and {len(results.lengths)} lengths"
    if sum(results.lengths) != batch.end_byte - batch.first_byte:
        yield f"{batch.end_byte - batch.first_byte} bytes, results of {sum(results.lengths)}"
    if not _KNOWN_ACTIONS.issuperset(results.actions):
        yield "an action that there is not"
    stored = sum(map(results.actions.count, _STORED))
    columns = {len(column) for column in (results.types, results.ids, results.versions, results.seqs)}
    if columns != {stored}:
        yield f"{stored} stored lines, results that name {', '.join(map(str, sorted(columns)))}"
    if results.types and not 1 <= min(results.types) <= max(results.types) <= len(RESOURCE_TYPES):
        yield "a resource type that there is not"
