"""Receipts cut into parts, the lines they are made of, and the store they go to."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from schema.fhir_types import TYPE_NUMBERS
from schema.results import Action, CommittedBatch, Issue, LineResults, pack
from workers.artifact_store import ArtifactMissingError, ArtifactStore, ArtifactStoreError
from workers.receipts.outcomes import line_outcome
from workers.receipts.parts import Part, Receipt, ReceiptName
from workers.receipts.render import fhir_instant, render_batch
from workers.urls import public_url


class Deliveries:
    """Reads each part as it is delivered."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.contents: list[list[str]] = []

    def __call__(self, part: Part) -> None:
        data = part.path.read_bytes()
        assert hashlib.sha256(data).digest() == part.sha256()
        plain = gzip.decompress(data)
        assert (part.byte_count, part.line_count) == (len(plain), plain.count(b"\n"))
        self.parts.append(part)
        self.contents.append(plain.decode().splitlines())


def write(directory: Path, calls: list[list[str]], *, max_lines: int, max_bytes: int) -> Deliveries:
    deliveries = Deliveries()
    receipt = Receipt(ReceiptName("ledger"), directory, deliveries, max_lines=max_lines, max_bytes=max_bytes)
    for lines in calls:
        receipt.add([f"{line}\n" for line in lines])
    receipt.close()
    return deliveries


def test_a_part_holds_as_many_lines_as_the_limit_allows_however_they_come(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(10)]
    deliveries = write(tmp_path, [numbers[:2], numbers[2:9], numbers[9:]], max_lines=4, max_bytes=1024)
    assert deliveries.contents == [numbers[:4], numbers[4:8], numbers[8:]]
    assert [part.number for part in deliveries.parts] == [0, 1, 2]


def test_a_part_holds_no_more_bytes_than_the_limit_allows(tmp_path: Path) -> None:
    deliveries = write(tmp_path, [["12345678é"] * 5], max_lines=100, max_bytes=22)
    assert [len(lines) for lines in deliveries.contents] == [2, 2, 1]


def test_a_line_larger_than_the_limit_is_a_part_of_its_own(tmp_path: Path) -> None:
    deliveries = write(tmp_path, [["a", "b" * 50, "c"]], max_lines=100, max_bytes=10)
    assert deliveries.contents == [["a"], ["b" * 50], ["c"]]


def test_a_receipt_without_lines_has_no_part(tmp_path: Path) -> None:
    assert write(tmp_path, [[], []], max_lines=1, max_bytes=1).parts == []


def test_a_delivered_part_leaves_the_spool_even_when_delivery_fails(tmp_path: Path) -> None:
    def refuse(part: Part) -> None:
        assert part.path.exists()
        raise ArtifactStoreError("full")

    receipt = Receipt(ReceiptName("outcome"), tmp_path, refuse, max_lines=1, max_bytes=10)
    receipt.add(["1\n"], "error")
    with pytest.raises(ArtifactStoreError):
        receipt.add(["2\n"], "error")
    receipt.abandon()
    assert list(tmp_path.iterdir()) == []


def test_severities_are_counted_for_each_part(tmp_path: Path) -> None:
    deliveries = Deliveries()
    receipt = Receipt(ReceiptName("outcome"), tmp_path, deliveries, max_lines=3, max_bytes=1024)
    receipt.add(["1\n", "2\n"], "error")
    receipt.add(["3\n", "4\n"], "information")
    receipt.close()
    assert [dict(part.severity_counts) for part in deliveries.parts] == [
        {"error": 2, "information": 1},
        {"information": 1},
    ]


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://files.example/a/b.ndjson?sig=secret#x", "https://files.example/a/b.ndjson"),
        ("https://user:secret@files.example:8443/b", "https://files.example:8443/b"),
        ("http://[broken/a?b", "http://[broken/a"),
        ("file:///tmp/x@y", "file:///tmp/x@y"),
    ],
)
def test_a_public_url_has_neither_credentials_nor_a_query(url: str, public: str) -> None:
    assert public_url(url) == public


def test_an_instant_is_utc_with_milliseconds() -> None:
    time = datetime(2026, 3, 1, 1, 0, 0, 120_999, tzinfo=timezone(timedelta(hours=2)))
    assert fhir_instant(time) == "2026-02-28T23:00:00.120Z"
    assert fhir_instant(datetime(2026, 3, 1, tzinfo=UTC)) == "2026-03-01T00:00:00.000Z"


def test_what_a_submitter_wrote_cannot_break_a_line() -> None:
    url = 'https://files.example/"quoted"\n.ndjson'
    results = LineResults(
        bytearray([Action.CREATED, Action.FAILED]), [10, 20], [TYPE_NUMBERS["Patient"]], ["p"], [1], [1]
    )
    batch = CommittedBatch(1, 1, 0, 30, 1, 2, b"", datetime(2026, 3, 1, tzinfo=UTC), pack(results))
    issue = Issue(2, 10, "invalid", 'no "id"\n', resource_type="Patient", resource_id='x"\n')
    rendered = render_batch(batch, results, url, {2: issue})
    lines = [*rendered.ledger, *rendered.outputs["Patient"], line_outcome(issue, url, None)]
    assert all(line.count("\n") == 1 for line in lines)
    created, failed, output, outcome = (json.loads(line) for line in lines)
    assert (created["file"], failed["file"], output["meta"]["source"]) == (url, url, f"{url}#1")
    assert (failed["reference"], failed["cause"]) == ('Patient/x"\n', 'no "id"\n')
    assert outcome["extension"][0]["valueReference"] == {"reference": 'Patient/x"\n'}


def nothing() -> None:
    """An `alive` that is always content."""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path}/not/yet/there")


def local_file(directory: Path, size: int) -> Path:
    path = directory / f"local-{size}"
    path.write_bytes(os.urandom(size))
    return path


SIZES = pytest.mark.parametrize("size", [10, 9 * 1024 * 1024], ids=["in one request", "in parts"])


@SIZES
def test_an_object_is_read_as_it_was_written(tmp_path: Path, store: ArtifactStore, size: int) -> None:
    source = local_file(tmp_path, size)
    store.write("1/2/x.gz", source, nothing)
    assert b"".join(store.read("1/2/x.gz")) == source.read_bytes()
    assert store.size("1/2/x.gz") == size


@SIZES
def test_an_object_is_never_overwritten(tmp_path: Path, store: ArtifactStore, size: int) -> None:
    first = local_file(tmp_path, 11)
    store.write("1/x.gz", first, nothing)
    with pytest.raises(ArtifactStoreError):
        store.write("1/x.gz", local_file(tmp_path, size), nothing)
    assert b"".join(store.read("1/x.gz")) == first.read_bytes()


def test_an_upload_that_is_interrupted_leaves_no_object(tmp_path: Path, store: ArtifactStore) -> None:
    class Lost(Exception):  # noqa: N818
        pass

    def lost_after(calls: int) -> Callable[[], None]:
        def alive() -> None:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Lost

        return alive

    with pytest.raises(Lost):
        store.write("1/x.gz", local_file(tmp_path, 9 * 1024 * 1024), lost_after(7))
    assert not store.exists("1/x.gz")


def test_deleting_twice_is_no_error_and_spares_the_others(tmp_path: Path, store: ArtifactStore) -> None:
    for path in ("a", "b", "c"):
        store.write(path, local_file(tmp_path, 1), nothing)
    store.delete(["missing", "a", "b"])
    store.delete(["a", "b"])
    assert [store.exists(path) for path in ("a", "b", "c")] == [False, False, True]


def test_an_object_that_is_gone_says_so_before_its_first_byte(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactMissingError):
        store.read("1/x.gz")
    with pytest.raises(ArtifactMissingError):
        store.size("1/x.gz")


def test_a_store_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ArtifactStoreError):
        ArtifactStore("gopher://bucket/x").exists("x")
