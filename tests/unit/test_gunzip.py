"""gzip as it comes: any chunks, several members, damage told, a bomb never unfolded at once."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.fetch.gunzip import MAGIC, gunzip

MEMBERS = st.lists(st.binary(max_size=60).map(lambda data: data * 20), min_size=1, max_size=4)
LINES = b'{"resourceType":"Patient"}\n' * 50


def in_chunks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@given(MEMBERS, st.integers(1, 200), st.integers(1, 500))
def test_any_members_in_any_chunks_give_the_data_in_bounded_pieces(members: list[bytes], size: int, limit: int) -> None:
    packed = b"".join(map(gzip.compress, members))
    pieces = list(gunzip(in_chunks(packed, size), limit))
    assert b"".join(pieces) == b"".join(members)
    assert all(0 < len(piece) <= limit for piece in pieces)


@given(MEMBERS, st.integers(1, 200), st.data())
def test_data_that_ends_inside_a_member_is_an_error(members: list[bytes], size: int, draw: st.DataObject) -> None:
    *whole, last = map(gzip.compress, members)
    end = draw.draw(st.integers(1, len(last) - 1))
    with pytest.raises(EOFError):
        list(gunzip(in_chunks(b"".join(whole) + last[:end], size), 100))


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_never_passes_for_other_data(data: bytes, draw: st.DataObject) -> None:
    packed = bytearray(gzip.compress(data))
    place = draw.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        unpacked = b"".join(gunzip(iter([bytes(packed)]), 100))
    except (EOFError, OSError):
        return
    assert unpacked == data


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("garbage", [b"junk", b"x" * 40, LINES])
def test_garbage_after_the_last_member_is_an_error(garbage: bytes, size: int) -> None:
    with pytest.raises((EOFError, OSError)):
        list(gunzip(in_chunks(gzip.compress(LINES) + garbage, size), 100))


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_zeros_between_and_after_members_are_padding(size: int) -> None:
    packed = gzip.compress(LINES) + bytes(9) + gzip.compress(b"more\n") + bytes(500)
    assert b"".join(gunzip(in_chunks(packed, size), 100)) == LINES + b"more\n"


def test_what_is_no_gzip_data_is_an_error() -> None:
    with pytest.raises(OSError, match="not gzip"):
        list(gunzip(iter([LINES]), 100))


def test_nothing_is_nothing() -> None:
    assert list(gunzip(iter([]), 100)) == []


def test_gzip_data_begins_with_the_magic() -> None:
    assert gzip.compress(b"").startswith(MAGIC)


def test_a_bomb_unfolds_in_bounded_memory() -> None:
    size, limit = 64 << 20, 64 << 10
    bomb = gzip.compress(bytes(size), 9)
    assert len(bomb) < size / 900
    tracemalloc.start()
    try:
        unfolded = sum(map(len, gunzip(iter([bomb]), limit)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert unfolded == size
    assert peak < len(bomb) + 8 * limit
