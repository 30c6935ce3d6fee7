"""Receipts on their way to the store: gzip files in a spool directory, rolled into parts and handed on.

A part is as long as the limits allow and no longer; only a single line may be larger than the limit of bytes. A part
that is full is delivered and its file deleted before the next one begins: the spool holds one part a receipt at most.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

_COMPRESSION_LEVEL = 1
_GZIP = 31  # window bits that ask for gzip's header, without name and time: the same lines are the same bytes


@dataclass(frozen=True, slots=True)
class ReceiptName:
    """What a receipt is: its artifact type, and for `output` the type of its resources."""

    type: str
    resource_type: str | None = None

    def __str__(self) -> str:
        return self.type if self.resource_type is None else f"{self.type}-{self.resource_type}"


class Part:
    """One gzip file being written. `byte_count` is before compression."""

    def __init__(self, name: ReceiptName, number: int, directory: Path) -> None:
        self.name = name
        self.number = number
        self.path = directory / f"{name}-{number}.ndjson.gz"
        self.line_count = 0
        self.byte_count = 0
        self.severity_counts: Counter[str] = Counter()
        self._file = self.path.open("xb")
        self._gzip = isal_zlib.compressobj(level=_COMPRESSION_LEVEL, wbits=_GZIP)

    def append(self, data: bytes, line_count: int) -> None:
        """Write bytes that end `line_count` lines."""
        self._file.write(self._gzip.compress(data))
        self.line_count += line_count
        self.byte_count += len(data)

    def close(self) -> None:
        """Nothing more will be appended. May be called again."""
        if not self._file.closed:
            self._file.write(self._gzip.flush())
            self._file.close()

    def sha256(self) -> bytes:
        """SHA-256 of the closed file, as it will be stored."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()


class Receipt:
    """One receipt in the making. `deliver` is given each closed part; its file is deleted afterwards."""

    def __init__(
        self,
        name: ReceiptName,
        directory: Path,
        deliver: Callable[[Part], None],
        *,
        max_lines: int,
        max_bytes: int,
    ) -> None:
        self._name = name
        self._directory = directory
        self._deliver = deliver
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._number = 0
        self._part: Part | None = None

    def add(self, lines: Sequence[str], severity: str | None = None) -> None:
        """Append lines, each with its line end; `severity` is the one of their issues, in an `outcome`."""
        if not lines:
            return
        data = "".join(lines).encode()
        part = self._part
        fits = part is None or (
            part.line_count + len(lines) <= self._max_lines and part.byte_count + len(data) <= self._max_bytes
        )
        if len(lines) > 1 and (not fits or len(lines) > self._max_lines or len(data) > self._max_bytes):
            middle = len(lines) // 2
            self.add(lines[:middle], severity)
            self.add(lines[middle:], severity)
            return
        if not fits:
            self.close()
        if self._part is None:
            self._part = Part(self._name, self._number, self._directory)
            self._number += 1
        self._part.append(data, len(lines))
        if severity is not None:
            self._part.severity_counts[severity] += len(lines)

    def close(self) -> None:
        """Deliver what is left."""
        if self._part is None:
            return
        part, self._part = self._part, None
        part.close()
        try:
            self._deliver(part)
        finally:
            part.path.unlink()

    def abandon(self) -> None:
        """Let go of what was not delivered."""
        if self._part is not None:
            self._part.close()
            self._part = None
