"""The `summary` receipt: what was declared against what was read, stored and refused, for each file and in all."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict
from typing import Any

from schema.artifacts import ReportedFile
from schema.files import Problem
from schema.results import STORED_ACTIONS, Action, CommittedBatch


class Tally:
    """Counts of one file or of all of them. `digest` runs over the digests of the batches, or of the files."""

    def __init__(self) -> None:
        self.counts: Counter[Action] = Counter()
        self.lines = 0
        self.bytes = 0
        self.declared_count: int | None = None
        self.declared_bytes: int | None = None
        self._count_difference: int | None = None
        self._byte_difference: int | None = None
        self._digest = hashlib.sha256()

    def add_batch(self, batch: CommittedBatch, counts: Counter[Action]) -> None:
        """Count a batch of the file."""
        self.counts += counts
        self.lines += batch.line_count
        self.bytes += batch.end_byte - batch.first_byte
        self._digest.update(batch.digest)

    def declare(self, count: int | None, size: int | None) -> None:
        """Compare the file with what the manifest says of it, once all its batches are counted."""
        self.declared_count, self.declared_bytes = count, size
        self._count_difference = None if count is None else self.resources - count
        self._byte_difference = None if size is None else self.bytes - size

    def add_file(self, file: Tally) -> None:
        """Count a file of the manifest."""
        self.counts += file.counts
        self.lines += file.lines
        self.bytes += file.bytes
        self.declared_count = _sum(self.declared_count, file.declared_count)
        self.declared_bytes = _sum(self.declared_bytes, file.declared_bytes)
        self._count_difference = _sum(self._count_difference, file._count_difference)
        self._byte_difference = _sum(self._byte_difference, file._byte_difference)
        self._digest.update(file._digest.digest())

    @property
    def resources(self) -> int:
        """Lines that hold a resource, or should."""
        return self.lines - self.counts[Action.BLANK] - self.counts[Action.HEADER]

    @property
    def stored(self) -> int:
        """Lines whose resource stands in the store."""
        return sum(self.counts[action] for action in STORED_ACTIONS)

    def as_json(self) -> dict[str, Any]:
        """The counts by name. A difference is what was read minus what was declared, where something was declared."""
        return {
            "declaredCount": self.declared_count,
            "declaredBytes": self.declared_bytes,
            "lines": self.lines,
            "bytes": self.bytes,
            "created": self.counts[Action.CREATED],
            "updated": self.counts[Action.UPDATED],
            "unchanged": self.counts[Action.UNCHANGED],
            "affirmed": self.counts[Action.AFFIRMED],
            "stored": self.stored,
            "failed": self.counts[Action.FAILED],
            "skipped": self.counts[Action.BLANK] + self.counts[Action.HEADER],
            "countDifference": self._count_difference,
            "byteDifference": self._byte_difference,
            "digest": self._digest.hexdigest(),
        }

    def in_words(self) -> str:
        """The counts for people."""
        return (
            "{lines} lines read, {stored} stored ({created} created, {updated} updated, {unchanged} unchanged, "
            "{affirmed} affirmed), {failed} failed, {skipped} skipped"
        ).format_map(self.as_json())


def _sum(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def problems_as_json(problems: list[Problem]) -> list[dict[str, str]]:
    """Problems as the summary shows them."""
    return [asdict(problem) for problem in problems]


def file_as_json(file: ReportedFile, url: str, problems: list[Problem], tally: Tally) -> dict[str, Any]:
    """One file's entry in the summary."""
    return {
        "file": url,
        "position": file.position,
        "kind": file.kind,
        "type": file.declared_type,
        "status": file.state,
        **tally.as_json(),
        "problems": problems_as_json(problems),
    }
