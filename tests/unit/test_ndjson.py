"""Blocks of whole lines: the same lines, numbers and offsets however a stream is cut."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.fetch.ndjson import Block, OverlongLine, blocks


class Line(NamedTuple):
    """One line; of an overlong one its length and digest instead of its bytes."""

    number: int
    offset: int
    content: bytes | tuple[int, bytes]
    terminated: bool


DATA = st.lists(st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"bc", b"defg", b"\0", b"\xff", b"0123456789"])).map(
    b"".join
)
CUTS = st.lists(st.integers(0, 60))
LIMITS = st.integers(1, 12)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The data in chunks that end at those places, empty ones among them."""
    borders = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(borders)]


def expected(data: bytes, limit: int) -> list[Line]:
    raws = data.split(b"\n")
    last_is_open = raws[-1] != b""
    if not last_is_open:
        raws.pop()
    lines, offset = [], 0
    for number, raw in enumerate(raws, start=1):
        content = raw if len(raw) <= limit else (len(raw), hashlib.sha256(raw).digest())
        lines.append(Line(number, offset, content, number < len(raws) or not last_is_open))
        offset += len(raw) + 1
    return lines


def taken_apart(items: Iterable[Block | OverlongLine]) -> Iterator[Line]:
    for item in items:
        if isinstance(item, OverlongLine):
            yield Line(item.line, item.offset, (item.length, item.digest), item.terminated)
            continue
        assert item.data
        number, offset = item.line, item.offset
        for raw in _split(item.data):
            yield Line(number, offset, raw.removesuffix(b"\n"), raw.endswith(b"\n"))
            number += 1
            offset += len(raw)


def _split(data: bytes) -> Iterator[bytes]:
    while data:
        line, end, data = data.partition(b"\n")
        yield line + end


@given(DATA, CUTS, LIMITS)
def test_any_bytes_in_any_chunks_are_the_lines_that_a_split_gives(data: bytes, cuts: list[int], limit: int) -> None:
    assert list(taken_apart(blocks(cut(data, cuts), limit))) == expected(data, limit)


@given(DATA, CUTS, LIMITS, st.data())
def test_from_any_line_on_the_tail_is_the_same(data: bytes, cuts: list[int], limit: int, draw: st.DataObject) -> None:
    lines = expected(data, limit)
    begun = draw.draw(st.integers(0, len(lines)))
    offset = lines[begun].offset if begun < len(lines) else len(data)
    tail = blocks(cut(data[offset:], cuts), limit, offset=offset, line=begun + 1)
    assert list(taken_apart(tail)) == lines[begun:]


@pytest.mark.parametrize("chunks", [[], [b""], [b"", b""]])
def test_an_empty_file_has_no_lines(chunks: list[bytes]) -> None:
    assert list(blocks(chunks, 10)) == []


def test_a_last_line_without_line_end_is_a_line() -> None:
    assert list(blocks([b"a\nb"], 10)) == [Block(b"a\n", 0, 1), Block(b"b", 2, 2)]


def test_a_carriage_return_belongs_to_its_line() -> None:
    assert list(blocks([b"a\r", b"\nb\r\n"], 10)) == [Block(b"a\r\nb\r\n", 0, 1)]


def test_a_line_over_the_limit_is_told_by_length_and_digest_and_the_rest_goes_on() -> None:
    digest = hashlib.sha256(b"x" * 11).digest()
    assert list(blocks([b"a\n" + b"x" * 11 + b"\nb\n"], 10)) == [
        Block(b"a\n", 0, 1),
        OverlongLine(2, 2, 11, digest, terminated=True),
        Block(b"b\n", 14, 3),
    ]


def test_a_line_of_exactly_the_limit_is_not_overlong() -> None:
    assert list(blocks([b"x" * 10 + b"\n"], 10)) == [Block(b"x" * 10 + b"\n", 0, 1)]


def test_an_overlong_last_line_without_line_end_says_so() -> None:
    [line] = blocks([b"x" * 6, b"x" * 6], 10)
    assert line == OverlongLine(1, 0, 12, hashlib.sha256(b"x" * 12).digest(), terminated=False)


def test_a_line_without_end_is_not_held_in_memory() -> None:
    chunk, limit, count = 64 * 1024, 256 * 1024, 400
    tracemalloc.start()
    try:
        [line] = blocks((bytes([65 + number % 26]) * chunk for number in range(count)), limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(line, OverlongLine)
    assert line.length == chunk * count
    assert peak < 4 * limit
