"""From lines to batches: what becomes of each line, where a batch ends, and a file that is read a second time."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.fhir_types import RESOURCE_TYPES, TYPE_NUMBERS
from schema.results import Action, BatchBorder
from settings import MEBIBYTE
from workers.fetch.ndjson import blocks
from workers.ingest.batch import PENDING, Batch
from workers.ingest.lines import (
    BLANK_HASH,
    BYTE_ORDER_MARK,
    LineReader,
    LineRules,
    assigned_id,
    content_hash_without_versions,
    hash_as_read,
    line_hash,
)
from workers.ingest.resume import FileChanged, after_committed

GOOD = b'{"resourceType":"Patient","id":"a","active":true}'
LIMIT = 200
LARGE = 1 << 40


class Verdict(NamedTuple):
    """What a reader makes of one line. `id` is of lines that hold a resource, `code` of those that failed."""

    line: int
    offset: int
    length: int
    action: int
    id: str | None = None
    code: str | None = None


def rules(**changes: Any) -> LineRules:
    defaults: dict[str, Any] = {
        "tenant_id": 1,
        "manifest_id": 2,
        "position": 3,
        "declared_type": None,
        "organized_by": None,
        "ignore_meta": False,
        "batch_lines": LARGE,
        "batch_bytes": LARGE,
        "max_line_bytes": LIMIT,
    }
    return LineRules(**{**defaults, **changes})


def in_chunks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def read(data: bytes, *, chunk: int = LARGE, **changes: Any) -> list[Batch]:
    held = rules(**changes)
    return list(LineReader(held).batches(blocks(in_chunks(data, chunk), held.max_line_bytes), 0, 1))


def verdicts(batches: Iterable[Batch]) -> list[Verdict]:
    """The batches' lines one by one. Fails where a batch's columns do not fit together."""
    found = []
    for batch in batches:
        issues = {issue.line: issue for issue in batch.issues}
        ids = dict(zip(batch.places, batch.ids, strict=True))
        assert len(issues) == len(batch.issues)
        offset = batch.first_byte
        lines = zip(batch.results.actions, batch.results.lengths, batch.line_hashes, strict=True)
        for place, (action, length, _) in enumerate(lines):
            line = batch.first_line + place
            issue = issues.pop(line, None)
            assert (issue is not None) == (action == Action.FAILED)
            assert (place in ids) == (action == PENDING)
            if issue is not None:
                assert issue.byte_offset == offset
            found.append(Verdict(line, offset, length, action, ids.get(place), issue and issue.code))
            offset += length
        assert not issues
        assert offset == batch.end_byte
    return found


def only(line: bytes, **changes: Any) -> Batch:
    """The batch of a file of this one line, between two good ones that it must not touch."""
    [batch] = read(GOOD + b"\n" + line + b"\n" + GOOD + b"\n", **changes)
    first, _, last = verdicts([batch])
    assert (first.action, last.action) == (PENDING, PENDING)
    return batch


def issue_of(line: bytes, **changes: Any) -> tuple[str, str]:
    """Why the line failed: code and diagnostics."""
    batch = only(line, **changes)
    [issue] = batch.issues
    assert (issue.line, issue.byte_offset) == (2, len(GOOD) + 1)
    assert issue.outcome == "validation-error"
    return issue.code, issue.diagnostics


def body_of(line: bytes, **changes: Any) -> bytes:
    """The line as it is stored."""
    _, body, _ = only(line, **changes).bodies
    return body


def patient(inner: bytes) -> bytes:
    return b'{"resourceType":"Patient","id":"a",' + inner + b"}"


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        b'  {"id" : "a" ,\t"resourceType" : "Patient"}  ',
        b'{"resourceType":"Bundle","id":"-.Z9","entry":[{"resource":{"resourceType":"Nonsense","id":"?"}}]}',
        b'{"resourceType":"Pat\\u0069ent","id":"\\u0061"}',
        patient('"name":"Zoë 漢字 🙂"'.encode()),
        patient(b'"name":"\\ud83d\\ude42"'),
        patient(b'"multipleBirthInteger":1.10,"x":123456789012345678901234567890,"y":1e400'),
        patient(b'"x":' + b"9" * 5000),
        patient(b'"x":' + b"[" * 90 + b"]" * 90),
        patient(b'"id":"b"'),
        patient(b'"text":"\\\\u0000"'),
        patient(b'"text":"' + b"\\" * 40 + b'u0000"'),
        patient(b'"x":' + b"9" * 5000 + b',"text":"\\\\u0000"'),
    ],
)
def test_a_resource_is_stored_as_the_bytes_received(line: bytes) -> None:
    assert body_of(line, max_line_bytes=LARGE) == line


@pytest.mark.parametrize("line", [BYTE_ORDER_MARK + GOOD, GOOD + b"\r", BYTE_ORDER_MARK + GOOD + b"\r"])
def test_a_byte_order_mark_and_a_carriage_return_are_stripped(line: bytes) -> None:
    batch = only(line)
    assert batch.bodies == [GOOD] * 3
    assert batch.line_hashes == [line_hash(GOOD)] * 3
    assert batch.results.lengths[1] == len(line) + 1


@pytest.mark.parametrize("line", [b"", b" ", b"\t  ", b"\r", b" \r", BYTE_ORDER_MARK, BYTE_ORDER_MARK + b"\r"])
def test_a_blank_line_is_passed_over_and_counted(line: bytes) -> None:
    batch = only(line)
    assert (batch.results.actions[1], batch.line_hashes[1]) == (Action.BLANK, BLANK_HASH)
    assert (batch.skipped, batch.line_count, batch.end_line) == (1, 3, 3)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (GOOD[:-1], "structure", "malformed JSON: it ends too early"),
        (b'{"resourceType":"Patient"', "structure", "malformed JSON: it ends too early"),
        (b"{", "structure", "malformed JSON: it ends too early"),
        (b"garbage", "structure", "malformed JSON"),
        (GOOD + GOOD, "structure", "malformed JSON: trailing characters"),
        (GOOD + b",", "structure", "malformed JSON: trailing characters"),
        (patient(b'"x":01'), "structure", "malformed JSON: invalid number"),
        (patient(b'"x":NaN'), "structure", "malformed JSON"),
        (patient(b'"x":[1,]'), "structure", "malformed JSON: trailing comma"),
        (patient(b'"x":"\\q"'), "structure", "malformed JSON: invalid escaped character"),
        (patient(b'"x":"a\tb"'), "structure", "malformed JSON: invalid character"),
        (patient(b'"x":"a\0b"'), "structure", "malformed JSON: invalid character"),
        (b"\0" * 20, "structure", "malformed JSON"),
        (patient(b'"x":"\\ud800"'), "structure", "half of a surrogate pair, the other half is missing (byte 40)"),
        (patient(b'"x":"\\ud800\\n"'), "structure", "half of a surrogate pair"),
        (patient(b'"x":"\\ud800","y":"some more"'), "structure", "half of a surrogate pair"),
        (patient(b'"x":"\\ud800\\u0041"'), "structure", "half of a surrogate pair"),
        (patient(b'"x":"\\udc00"'), "structure", "half of a surrogate pair"),
        (patient(b'"x":"\\\\\\ud800"'), "structure", "half of a surrogate pair"),
        (b'{"resourceType":"Patient","id":"\\ud800"}', "structure", "half of a surrogate pair"),
        (patient(b'"x":"\\ud83d')[:-1], "structure", "malformed JSON: it ends too early"),
        (patient(b'"x":"\\ud83d\\ude')[:-1], "structure", "malformed JSON: it ends too early"),
        (patient(b'"x":"\\\\ud83d"')[:-1], "structure", "malformed JSON: it ends too early"),
        (b"\r" + GOOD[:-1], "structure", "malformed JSON: it ends too early"),
        (b"[]", "structure", "the line is JSON, but not an object"),
        (b"null", "structure", "the line is JSON, but not an object"),
        (b"5", "structure", "the line is JSON, but not an object"),
        (b'"Patient"', "structure", "the line is JSON, but not an object"),
        (patient(b'"x":"\xff"'), "structure", "not UTF-8 at byte 40 of the line"),
        (patient(b'"x":"\xed\xa0\x80"'), "structure", "not UTF-8 at byte 40 of the line"),
        (patient('"x":"ä"'.encode("latin-1")), "structure", "not UTF-8 at byte 40 of the line"),
        (b'{"resourceType":"Patient","id":"a\xff"}', "structure", "not UTF-8 at byte 33 of the line"),
        (BYTE_ORDER_MARK + b'{"id":"\xff"}', "structure", "not UTF-8 at byte 7 of the line"),
        (GOOD.decode().encode("utf-16"), "structure", ""),
        (b'{"id":"a"}', "required", "resourceType is missing"),
        (b"{}", "required", "resourceType is missing"),
        (b'{"resourceType":"","id":"a"}', "required", "resourceType is missing"),
        (b'{"resourceType":"Pateint","id":"a"}', "value", "resourceType is not a FHIR resource type"),
        (b'{"resourceType":"patient","id":"a"}', "value", "resourceType is not a FHIR resource type"),
        (b'{"resourceType":"Resource","id":"a"}', "value", "resourceType is not a FHIR resource type"),
        (b'{"resourceType":"DomainResource","id":"a"}', "value", "resourceType is not a FHIR resource type"),
        (b'{"resourceType":"Patient\\u0000","id":"a"}', "value", ""),
        (b'{"resourceType":5,"id":"a"}', "structure", "resourceType is not a string"),
        (b'{"resourceType":["Patient"],"id":"a"}', "structure", "resourceType is not a string"),
        (b'{"resourceType":null,"id":"a"}', "structure", "resourceType is not a string"),
        (b'{"resourceType":"Patient","id":5}', "structure", "id is not a string"),
        (b'{"resourceType":"Patient","id":null}', "structure", "id is not a string"),
        (b'{"resourceType":"Patient","id":""}', "value", "id must be"),
        (b'{"resourceType":"Patient","id":"a b"}', "value", "id must be"),
        (b'{"resourceType":"Patient","id":"a_b"}', "value", "id must be"),
        (b'{"resourceType":"Patient","id":"../a"}', "value", "id must be"),
        (b'{"resourceType":"Patient","id":"a\\n"}', "value", "id must be"),
        ('{"resourceType":"Patient","id":"ä"}'.encode(), "value", "id must be"),
        (b'{"resourceType":"Patient","id":"' + b"x" * 65 + b'"}', "value", "id must be"),
        (patient(b'"x":"\\u0000"'), "value", "the character U+0000"),
        (patient(b'"x":[{"y":["a\\u0000"]}]'), "value", "the character U+0000"),
        (patient(b'"\\u0000":1'), "value", "the character U+0000"),
        (patient(b'"x":"\\u0000","x":"good"'), "value", "the character U+0000"),
        (patient(b'"x":"\\\\\\u0000"'), "value", "the character U+0000"),
        (patient(b'"x":"\\\\u0000\\u0000"'), "value", "the character U+0000"),
        (patient(b'"x":"' + b"\\" * 40 + b'\\u0000"'), "value", "the character U+0000"),
    ],
)
def test_a_line_that_breaks_a_rule_is_an_issue_of_that_line(line: bytes, code: str, says: str) -> None:
    given_code, diagnostics = issue_of(line)
    assert given_code == code
    assert says in diagnostics
    assert "msgspec" not in diagnostics
    assert "`" not in diagnostics


@pytest.mark.parametrize("opening", [b"[", b'{"x":'])
def test_a_line_nested_too_deeply_is_an_issue_of_that_line(opening: bytes) -> None:
    code, diagnostics = issue_of(patient(b'"x":' + opening * 100_000), max_line_bytes=LARGE)
    assert (code, diagnostics) == ("structure", "nested too deeply")


def test_a_line_over_the_limit_is_an_issue_that_gives_its_length() -> None:
    code, diagnostics = issue_of(patient(b'"x":"' + b"x" * 2000 + b'"'))
    assert code == "too-long"
    assert diagnostics == "the line has 2,042 bytes; at most 200 are accepted"


@pytest.mark.parametrize("id_", [b"a", b"A-Z.09", b"x" * 64, b"-", b"."])
def test_an_id_that_fhir_allows_is_kept(id_: bytes) -> None:
    assert only(b'{"resourceType":"Patient","id":"' + id_ + b'"}').ids[1] == id_.decode()


@pytest.mark.parametrize("declared", ["Observation", "Pateint"])
def test_another_type_than_the_declared_one_is_an_issue_that_names_both(declared: str) -> None:
    [batch] = read(GOOD + b"\n", declared_type=declared)
    [issue] = batch.issues
    assert (issue.code, issue.resource_type) == ("invalid", "Patient")
    assert issue.diagnostics == f"the manifest declares this file as {declared}, the line is a Patient"


def test_of_a_declared_type_that_is_long_an_issue_shows_the_beginning() -> None:
    [batch] = read(GOOD + b"\n", declared_type="x" * 200_000)
    [issue] = batch.issues
    assert issue.diagnostics == f"the manifest declares this file as {'x' * 64}…, the line is a Patient"


@pytest.mark.parametrize("character", ["ä", "漢", "🙂"])
@pytest.mark.parametrize("shift", range(4))
def test_a_character_may_stand_anywhere_in_a_long_line(character: str, shift: int) -> None:
    text = (b"x" * shift + character.encode() * (MEBIBYTE // 2)) + b'"'
    assert only(patient(b'"x":"' + text), max_line_bytes=LARGE).issues == []
    code, diagnostics = issue_of(patient(b'"x":"' + text + b',"y":"\xff"'), max_line_bytes=LARGE)
    assert (code, diagnostics) == ("structure", f"not UTF-8 at byte {40 + len(text) + 6} of the line")


def test_the_declared_type_is_accepted() -> None:
    assert body_of(GOOD, declared_type="Patient") == GOOD


def test_without_a_declared_type_every_fhir_type_is_accepted() -> None:
    data = b"".join(f'{{"resourceType":"{name}","id":"a"}}\n'.encode() for name in RESOURCE_TYPES)
    [batch] = read(data)
    assert batch.issues == []
    assert batch.types == list(TYPE_NUMBERS.values())
    assert len(set(batch.keys)) == len(RESOURCE_TYPES)


def test_of_a_key_that_comes_twice_the_last_one_holds() -> None:
    batch = only(b'{"resourceType":"Patient","id":"b","id":"c","resourceType":"Observation"}')
    assert (batch.types[1], batch.ids[1]) == (TYPE_NUMBERS["Observation"], "c")


def test_a_resource_without_id_is_given_one_by_its_place_alone() -> None:
    line = b'{"resourceType":"Patient"}'
    [batch] = read(line + b"\n" + line + b"\n")
    assert batch.ids == [assigned_id(1, 2, 3, 0), assigned_id(1, 2, 3, len(line) + 1)]
    assert [batch.ids for batch in read(line + b"\n" + line, chunk=5, batch_lines=1)] == [[id_] for id_ in batch.ids]
    assert batch.bodies == [line, line]


def test_the_id_given_differs_by_tenant_manifest_file_and_place() -> None:
    ids = [assigned_id(1, 2, 3, 4), assigned_id(9, 2, 3, 4), assigned_id(1, 9, 3, 4), assigned_id(1, 2, 9, 4)]
    ids += [assigned_id(1, 2, 3, 9), assigned_id(1, 23, 4, 0), assigned_id(12, 3, 4, 0)]
    assert len(set(ids)) == len(ids)
    assert {uuid.UUID(id_).version for id_ in ids} == {5}


def test_headers_of_an_organized_file_are_passed_over_and_any_type_is_accepted() -> None:
    header = b'{"resourceType":"Parameters","parameter":[{"name":"header"}]}'
    data = b"\n".join([header, GOOD, b'{"resourceType":"Observation","id":"o"}', header + b"\r", GOOD])
    [batch] = read(data, organized_by="Patient")
    actions = [Action.HEADER, PENDING, PENDING, Action.HEADER, PENDING]
    assert [verdict.action for verdict in verdicts([batch])] == actions
    assert batch.skipped == 2


def test_parameters_in_a_file_that_is_not_organized_are_a_resource() -> None:
    assert body_of(b'{"resourceType":"Parameters","id":"p"}') == b'{"resourceType":"Parameters","id":"p"}'


def test_an_issue_names_the_type_where_it_is_known_and_shows_no_content() -> None:
    [issue] = only(b'{"resourceType":"Patient","id":"no good","name":"Ada"}').issues
    assert issue.resource_type == "Patient"
    assert "Ada" not in issue.diagnostics
    assert "no good" not in issue.diagnostics


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (patient(b'"meta":{"versionId":"1"}'), GOOD.replace(b',"active":true', b"")),
        (
            patient(b'"meta":{"versionId":"1","lastUpdated":"x","tag":[]}'),
            patient(b'"meta":{"tag":[],"versionId":"9"}'),
        ),
        (patient(b'"active" : true'), GOOD),
    ],
)
def test_content_is_compared_without_the_source_s_versions_where_the_submitter_asks(one: bytes, other: bytes) -> None:
    batch, plain = (read(one + b"\n" + other + b"\n", ignore_meta=ignore)[0] for ignore in (True, False))
    assert batch.content_hashes[0] == batch.content_hashes[1]
    assert plain.content_hashes[0] != plain.content_hashes[1]
    assert batch.bodies == plain.bodies == [one, other]


@pytest.mark.parametrize("other", [patient(b'"meta":{"tag":[1]}'), patient(b'"meta":{}'), patient(b'"active":1')])
def test_what_else_differs_is_other_content_still(other: bytes) -> None:
    assert content_hash_without_versions(other) != content_hash_without_versions(patient(b'"active":true'))


@pytest.mark.parametrize("meta", [b"null", b"5", b'"x"', b"[]"])
def test_a_meta_that_is_no_object_is_content_like_any_other(meta: bytes) -> None:
    line = patient(b'"meta": ' + meta)
    assert body_of(line, ignore_meta=True) == line


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_no_bytes_end_a_file(data: bytes, ignore_meta: bool, organized: bool) -> None:
    batches = read(data, ignore_meta=ignore_meta, organized_by="Patient" if organized else None)
    assert sum(verdict.length for verdict in verdicts(batches)) == len(data)


JSON_PIECES = [
    b'"',
    b"\\",
    b"\\u0000",
    b"\\\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"9" * 5000,
    b"-",
    b"0",
]
OTHER_PIECES = [b".", b"e1", b"NaN", b"true", b" ", b"\t", b"\0", b"\r", b"\xff", b"\xc3\xa4", BYTE_ORDER_MARK]
PIECES = st.sampled_from([*JSON_PIECES, *OTHER_PIECES])


@given(st.lists(PIECES, max_size=6).map(b"".join), st.integers(0, 60))
def test_what_is_accepted_is_json_in_utf_8_of_the_type_and_id_that_are_stored(piece: bytes, place: int) -> None:
    line = patient(b'"x":["y",1.5,{"z":null}]')
    [batch] = read(line[:place] + piece + line[place:] + b"\n", max_line_bytes=LARGE)
    verdicts([batch])
    for number, resource_id, body in zip(batch.types, batch.ids, batch.bodies, strict=True):
        resource = json.loads(body.decode(), parse_int=str)
        assert (TYPE_NUMBERS[resource["resourceType"]], resource.get("id", resource_id)) == (number, resource_id)
        assert b"\0" not in body
        assert "\0" not in str(resource)


LINES = st.lists(
    st.sampled_from(
        [
            GOOD,
            GOOD + b"\r",
            BYTE_ORDER_MARK + GOOD,
            b'{"resourceType":"Patient"}',
            b'{"resourceType":"Observation","id":"o"}',
            b'{"resourceType":"Parameters","id":"h"}',
            b"",
            b" \r",
            b"{",
            b"{\r",
            patient(b'"x":"\xff"'),
            patient(b'"x":"\\u0000"'),
            b"x" * (LIMIT + 1),
            b"x" * (3 * LIMIT),
        ]
    ),
    max_size=30,
)
OPEN = st.booleans()
CHUNKS = st.integers(1, 2000)
BATCH_LINES = st.integers(1, 8)
BATCH_BYTES = st.integers(1, 1500)


def alone(line: bytes, place: int, offset: int, **changes: Any) -> Verdict:
    """What becomes of the line in a file of its own, told as if it stood there."""
    [found] = verdicts(read(line + b"\n", **changes))
    given_id = assigned_id(1, 2, 3, offset) if found.id == assigned_id(1, 2, 3, 0) else found.id
    return found._replace(line=place, offset=offset, id=given_id)


@given(
    LINES, OPEN, CHUNKS, BATCH_LINES, BATCH_BYTES, st.sampled_from([None, "Patient"]), st.sampled_from([None, "Group"])
)
def test_however_a_file_is_cut_each_line_is_what_it_is_alone(
    lines: list[bytes],
    last_is_open: bool,
    chunk: int,
    batch_lines: int,
    batch_bytes: int,
    declared: str | None,
    organized: str | None,
) -> None:
    data = b"".join(line + b"\n" for line in lines)
    if last_is_open and lines and lines[-1]:
        data = data[:-1]
    kind: dict[str, Any] = {"declared_type": declared, "organized_by": organized}
    batches = read(data, chunk=chunk, batch_lines=batch_lines, batch_bytes=batch_bytes, **kind)
    expected, offset = [], 0
    for place, line in enumerate(lines, start=1):
        verdict = alone(line, place, offset, **kind)
        offset += verdict.length
        expected.append(verdict._replace(length=verdict.length - max(0, offset - len(data))))
    assert verdicts(batches) == expected
    assert sum(batch.size for batch in batches) == len(data)
    assert all(0 < batch.line_count <= batch_lines for batch in batches)
    for batch, following in pairwise(batches):
        assert (following.first_byte, following.first_line) == (batch.end_byte, batch.end_line + 1)
    hashes = [hash_ for batch in batches for hash_ in batch.line_hashes]
    assert hashes == [
        hash_as_read(line) if len(line) <= LIMIT else hashlib.sha256(line).digest()[:16] for line in lines
    ]


def test_a_batch_is_full_at_its_lines() -> None:
    batches = read((GOOD + b"\n") * 8, batch_lines=3)
    assert [(batch.first_line, batch.line_count) for batch in batches] == [(1, 3), (4, 3), (7, 2)]


def test_a_batch_is_full_once_its_bytes_are_reached_by_a_block() -> None:
    size = len(GOOD) + 1
    batches = read((GOOD + b"\n") * 8, chunk=size, batch_bytes=2 * size + 1)
    assert [(batch.first_byte, batch.line_count) for batch in batches] == [(0, 3), (3 * size, 3), (6 * size, 2)]


def test_an_empty_file_has_no_batch() -> None:
    assert read(b"") == []


def test_lines_over_the_limit_fill_a_batch_as_well() -> None:
    [first, second, third] = read((b"x" * (LIMIT + 1) + b"\n") * 5 + GOOD + b"\n", batch_lines=2)
    assert (first.line_count, second.line_count, third.line_count) == (2, 2, 2)
    assert third.bodies == [GOOD]


def borders(batches: Iterable[Batch]) -> list[BatchBorder]:
    return [BatchBorder(batch.first_byte, batch.end_byte, batch.line_count, batch.digest()) for batch in batches]


def read_again(data: bytes, committed: list[Batch], chunk: int, **changes: Any) -> list[Batch]:
    """What comes after the committed batches when the file is read from its beginning."""
    held = rules(**changes)
    first_byte, first_line = (committed[-1].end_byte, committed[-1].end_line + 1) if committed else (0, 1)
    rest = after_committed(blocks(in_chunks(data, chunk), held.max_line_bytes), borders(committed))
    return list(LineReader(held).batches(rest, first_byte, first_line))


@given(LINES, OPEN, CHUNKS, CHUNKS, BATCH_LINES, BATCH_BYTES, st.data())
def test_a_file_read_again_goes_on_after_what_is_committed(
    lines: list[bytes],
    last_is_open: bool,
    chunk: int,
    other_chunk: int,
    batch_lines: int,
    batch_bytes: int,
    draw: st.DataObject,
) -> None:
    data = b"".join(line + b"\n" for line in lines)
    data = data[:-1] if last_is_open else data
    batches = read(data, chunk=chunk, batch_lines=batch_lines, batch_bytes=batch_bytes)
    count = draw.draw(st.integers(0, len(batches)))
    rest = read_again(data, batches[:count], other_chunk, batch_lines=batch_lines, batch_bytes=batch_bytes)
    assert verdicts([*batches[:count], *rest]) == verdicts(batches)


@given(LINES.filter(bool), CHUNKS, BATCH_LINES, st.data())
def test_a_file_that_changed_where_it_is_committed_is_noticed(
    lines: list[bytes], chunk: int, batch_lines: int, draw: st.DataObject
) -> None:
    data = b"".join(line + b"\n" for line in lines)
    batches = read(data, batch_lines=batch_lines)
    committed = batches[: draw.draw(st.integers(1, len(batches)))]
    place = draw.draw(st.integers(0, committed[-1].end_line - 1))
    others = b"".join(line + b"\n" for line in [*lines[:place], b"Q" + lines[place], *lines[place + 1 :]])
    with pytest.raises(FileChanged):
        read_again(others, committed, chunk)


@given(LINES.filter(bool), CHUNKS, st.data())
def test_a_file_that_is_shorter_than_what_is_committed_is_noticed(
    lines: list[bytes], chunk: int, draw: st.DataObject
) -> None:
    data = b"".join(line + b"\n" for line in lines)
    committed = read(data)
    with pytest.raises(FileChanged):
        read_again(data[: draw.draw(st.integers(0, len(data) - 1))], committed, chunk)
