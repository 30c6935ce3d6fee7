"""Cutting a stream of bytes into blocks of whole lines, in memory that one line bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines, their line ends with them; the last line of a file may lack its own.

    `offset` is where the block begins in the decoded file, in bytes; `line` the number of its first line, from 1.
    """

    data: bytes
    offset: int
    line: int


@dataclass(frozen=True, slots=True)
class OverlongLine:
    """A line over the limit, passed over without being held. `length` is without its line end, `digest` its SHA-256."""

    line: int
    offset: int
    length: int
    digest: bytes
    terminated: bool


def blocks(
    chunks: Iterable[bytes], max_line_bytes: int, *, offset: int = 0, line: int = 1
) -> Iterator[Block | OverlongLine]:
    """Blocks of about a chunk's size, in order, that together hold every line of the stream.

    `offset` and `line` say where the stream begins in its file. At most `max_line_bytes` and one chunk are held.
    """
    held: list[bytes] = []
    held_bytes = 0
    overlong: _Overlong | None = None
    for received in chunks:
        chunk = received
        if overlong is not None:
            end = chunk.find(b"\n")
            overlong.add(chunk if end < 0 else chunk[:end])
            if end < 0:
                continue
            yield overlong.ended(terminated=True)
            offset, line = overlong.offset + overlong.length + 1, line + 1
            overlong = None
            chunk = chunk[end + 1 :]
        cut = chunk.rfind(b"\n") + 1
        if cut:
            data = b"".join((*held, chunk[:cut]))
            for item in _within_limit(data, max_line_bytes, offset, line):
                yield item
                line += item.data.count(b"\n") if isinstance(item, Block) else 1
            offset += len(data)
            held, held_bytes = [], 0
        if cut < len(chunk):
            held.append(chunk[cut:])
            held_bytes += len(chunk) - cut
        if held_bytes > max_line_bytes:
            overlong = _Overlong(line, offset)
            for part in held:
                overlong.add(part)
            held, held_bytes = [], 0
    if overlong is not None:
        yield overlong.ended(terminated=False)
    elif held:
        yield from _within_limit(b"".join(held), max_line_bytes, offset, line)


def _within_limit(data: bytes, max_line_bytes: int, offset: int, line: int) -> Iterator[Block | OverlongLine]:
    """The whole lines in `data`, with those over the limit taken out."""
    if len(data) <= max_line_bytes or max(map(len, data.split(b"\n"))) <= max_line_bytes:
        yield Block(data, offset, line)
        return
    start = position = 0
    first_line = line
    for raw in data.split(b"\n"):
        end = position + len(raw)
        if len(raw) > max_line_bytes:
            if position > start:
                yield Block(data[start:position], offset + start, first_line)
            yield OverlongLine(line, offset + position, len(raw), hashlib.sha256(raw).digest(), end < len(data))
            start, first_line = min(end + 1, len(data)), line + 1
        position = end + 1
        line += 1
    if start < len(data):
        yield Block(data[start:], offset + start, first_line)


class _Overlong:
    def __init__(self, line: int, offset: int) -> None:
        self.line, self.offset, self.length = line, offset, 0
        self._sha256 = hashlib.sha256()

    def add(self, part: bytes) -> None:
        self.length += len(part)
        self._sha256.update(part)

    def ended(self, *, terminated: bool) -> OverlongLine:
        return OverlongLine(self.line, self.offset, self.length, self._sha256.digest(), terminated)
