"""A batch: consecutive lines of one file, taken apart, and waiting to be written in one transaction."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from schema.results import Action, Issue, LineResults

PENDING = 0
"""The action of a line whose fate is decided when its batch is written."""


@dataclass(slots=True)
class Batch:
    """Columns over the batch's lines (`results`, `line_hashes`) and over its entries: lines that hold a resource.

    `places` are the entries' indexes among the lines. Offsets are bytes of the decoded file, lines count from 1.
    """

    first_byte: int
    first_line: int
    results: LineResults = field(default_factory=LineResults)
    line_hashes: list[bytes] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    content_hashes: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    size: int = 0

    @property
    def line_count(self) -> int:
        """Lines in the batch, of whatever kind."""
        return len(self.line_hashes)

    @property
    def end_byte(self) -> int:
        """Where the next batch begins."""
        return self.first_byte + self.size

    @property
    def end_line(self) -> int:
        """Lines of the file up to the end of this batch."""
        return self.first_line + self.line_count - 1

    @property
    def skipped(self) -> int:
        """Lines that are neither entries nor failures: blank ones and headers."""
        return self.results.actions.count(Action.BLANK) + self.results.actions.count(Action.HEADER)

    def digest(self) -> bytes:
        """What tells these lines from others: of a file that is read again, batch by batch."""
        return digest(self.line_hashes, self.results.lengths)


def digest(line_hashes: list[bytes], lengths: list[int]) -> bytes:
    """SHA-256 over the hashes and lengths of lines."""
    return hashlib.sha256(b"".join(line_hashes) + array("Q", lengths).tobytes()).digest()
