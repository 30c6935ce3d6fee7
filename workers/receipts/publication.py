"""The `publish` step: stream a manifest's receipts from its rows, store them, and end the manifest.

One pass over the files writes everything. A part's row comes before its object, so that a lost lease leaves nothing
that a sweep cannot find; all rows become visible with the manifest's terminal status, in one fenced transaction.
Neither memory nor the spool grows with lines, files or errors: rows are read by pages (`schema/artifacts.py`), parts
are uploaded as they fill up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import sqlalchemy as sa
import structlog

from schema import artifacts
from schema.artifacts import ReportedFile
from schema.files import ManifestView, Problem, finish_manifest, manifest_view
from schema.leases import Lease
from schema.results import Action, unpack
from settings import Settings
from workers.artifact_store import ArtifactStore
from workers.receipts.outcomes import file_name, line_outcome, outcome, problem_outcome
from workers.receipts.parts import Part, Receipt, ReceiptName
from workers.receipts.reconciliation import Tally, file_as_json, problems_as_json
from workers.receipts.render import json_text, render_batch
from workers.receipts.spool import spool
from workers.urls import public_url

log = structlog.get_logger(__name__)

_ERRORS = frozenset({"fatal", "error"})
_UNREAD = Problem("error", "incomplete", "the file was not read to its end")


def publish(
    connection: sa.Connection,
    lease: Lease,
    settings: Settings,
    store: ArtifactStore,
    alive: Callable[[], None],
) -> str:
    """Write the manifest's receipts and end it; returns its status, `completed` or `failed`. Commits.

    `connection` has no transaction open. Raises `LeaseLost` (nothing was published), `ArtifactStoreError`.
    """
    with connection.begin():
        manifest = manifest_view(connection, lease.tenant_id, lease.manifest_id)
    with spool(settings) as directory, ExitStack() as cleanup:
        publication = _Publication(connection, lease, settings, store, alive, manifest, Path(directory), cleanup)
        status = publication.write()
    alive()
    finish_manifest(connection, lease, status)
    log.info("manifest published", manifest=lease.manifest_id, status=status, parts=publication.parts)
    return status


class _Publication:
    """The receipts of one manifest in the making."""

    def __init__(
        self,
        connection: sa.Connection,
        lease: Lease,
        settings: Settings,
        store: ArtifactStore,
        alive: Callable[[], None],
        manifest: ManifestView,
        directory: Path,
        cleanup: ExitStack,
    ) -> None:
        self._connection = connection
        self._lease = lease
        self._settings = settings
        self._store = store
        self._alive = alive
        self._manifest = manifest
        self._directory = directory
        self._cleanup = cleanup
        self._receipts: dict[ReceiptName, Receipt] = {}
        self._failed = False
        self.parts = 0

    def write(self) -> str:
        """Write and store everything; returns the status that the manifest ends with."""
        manifest = self._manifest
        url = None if manifest.manifest_url is None else public_url(manifest.manifest_url)
        for problem in manifest.problems:
            self._outcome(problem.severity, problem_outcome(problem, url))
        for note in manifest.notes:
            self._outcome("information", outcome("information", "informational", note, diagnostics=url))

        summary = Part(ReceiptName("summary"), 0, self._directory)
        self._cleanup.callback(summary.close)
        summary.append(f'{{"manifestUrl":{json_text(url)},"files":['.encode(), 0)
        total = Tally()
        comma = ""
        for file in artifacts.files(self._connection, self._lease.tenant_id, self._lease.manifest_id):
            entry, tally = self._file(file)
            summary.append((comma + entry).encode(), 0)
            total.add_file(tally)
            comma = ","
        status = "failed" if self._failed else "completed"
        rest = {
            "total": total.as_json(),
            "status": status,
            "problems": problems_as_json(manifest.problems),
            "notes": manifest.notes,
        }
        summary.append(f"],{json_text(rest)[1:]}\n".encode(), 1)
        summary.close()
        for receipt in self._receipts.values():
            receipt.close()
        self._deliver(summary)
        return status

    def _receipt(self, name: ReceiptName) -> Receipt:
        if name not in self._receipts:
            receipt = Receipt(
                name,
                self._directory,
                self._deliver,
                max_lines=self._settings.receipt_part_lines,
                max_bytes=self._settings.receipt_part_bytes,
            )
            self._cleanup.callback(receipt.abandon)
            self._receipts[name] = receipt
        return self._receipts[name]

    def _outcome(self, severity: str, *lines: str) -> None:
        self._failed = self._failed or severity in _ERRORS
        self._receipt(ReceiptName("outcome")).add(lines, severity)

    def _file(self, file: ReportedFile) -> tuple[str, Tally]:
        """Write what there is to say about a file; returns its entry in the summary, and its counts."""
        self._alive()
        url = public_url(file.url)
        tally = self._lines(file, url)
        tally.declare(file.declared_count, file.declared_bytes)
        problems = list(file.problems)
        if file.state == "failed" and not any(problem.severity in _ERRORS for problem in problems):
            problems.append(_UNREAD)
        for problem in problems:
            self._outcome(problem.severity, problem_outcome(problem, url))
        if file.state is None:
            words = f"listed under {file.kind}; it was not read"
        else:
            words = tally.in_words()
            # The size is not compared: manifests give that of the compressed file as well as of the other.
            if file.declared_count is not None and file.declared_count != tally.resources:
                text = f"{file_name(url)}: {tally.resources} resources read, {file.declared_count} declared"
                self._outcome("warning", outcome("warning", "value", text, diagnostics=url))
        text = f"{file_name(url)}: {words}"
        self._outcome("information", outcome("information", "informational", text, diagnostics=url))
        return json_text(file_as_json(file, url, problems, tally)), tally

    def _lines(self, file: ReportedFile, url: str) -> Tally:
        """Write what became of the file's lines."""
        tally = Tally()
        for batch in artifacts.batches(self._connection, file):
            self._alive()
            results = unpack(batch.results)
            issues = (
                artifacts.issues_of_batch(self._connection, file, batch) if Action.FAILED in results.actions else []
            )
            rendered = render_batch(batch, results, url, {issue.line: issue for issue in issues})
            self._receipt(ReceiptName("ledger")).add(rendered.ledger)
            for resource_type, lines in rendered.outputs.items():
                self._receipt(ReceiptName("output", resource_type)).add(lines)
            base = self._manifest.fhir_base_url
            self._receipt(ReceiptName("outcome")).add([line_outcome(issue, url, base) for issue in issues], "error")
            tally.add_batch(batch, rendered.counts)
        return tally

    def _deliver(self, part: Part) -> None:
        """Announce a closed part, store it, and note what it is."""
        lease, seconds = self._lease, self._settings.lease_seconds
        self._alive()
        place = f"{lease.tenant_id}/{self._manifest.submission_id}/{lease.manifest_id}"
        path = f"{place}/{part.name}-{part.number}.{lease.fencing_token}.ndjson.gz"
        artifact_id = artifacts.record(
            self._connection,
            lease,
            submission_id=self._manifest.submission_id,
            type=part.name.type,
            resource_type=part.name.resource_type,
            part=part.number,
            path=path,
            seconds=seconds,
        )
        self._store.write(path, part.path, self._alive)
        artifacts.complete(
            self._connection,
            lease,
            artifact_id,
            line_count=part.line_count,
            byte_count=part.byte_count,
            stored_bytes=part.path.stat().st_size,
            sha256=part.sha256(),
            severity_counts=dict(part.severity_counts) or None,
            seconds=seconds,
        )
        self.parts += 1
