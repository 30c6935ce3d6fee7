"""From lines to batches of entries, without parsing more of a resource than is needed.

A line is checked to be JSON (by msgspec, which keeps `resourceType` and `id` and skips the rest), UTF-8, free of NUL,
of a known type and, where the manifest declares one, of that type. What a line holds is otherwise left as it came: the
bytes received are the bytes stored. A rule that a line breaks becomes an `Issue` of that line; none ends the file.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from schema.fhir_types import ID, RESOURCE_TYPES, TYPE_NUMBERS
from schema.resources import key_prefix, resource_key
from schema.results import Action, Issue
from workers.fetch.json_text import json_fault, utf8_fault
from workers.fetch.ndjson import Block, OverlongLine
from workers.ingest.batch import PENDING, Batch

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK_HASH = bytes(16)
ASSIGNED_IDS = uuid.UUID("6f2f0a9e-5f0b-5c39-9d0c-0d1f0c7f6b1e")


class _Head(msgspec.Struct):
    resourceType: str = ""  # noqa: N815 - FHIR's spelling
    id: str | msgspec.UnsetType = msgspec.UNSET


_decode_head = msgspec.json.Decoder(_Head).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_escaped_nul = re.compile(rb"\\(?<!\\\\)(?:\\\\)*+u0000").search
_SHOWN = 64


def line_hash(line: bytes) -> bytes:
    """16 bytes of SHA-256: identical content has the same, and none other can be made to."""
    return hashlib.sha256(line).digest()[:16]


def hash_as_read(raw: bytes) -> bytes:
    """The hash that a batch keeps of a line: without byte order mark and CR, and zeros for a blank one."""
    line = _strip(raw)
    return line_hash(line) if line.strip() else BLANK_HASH


def content_hash_without_versions(line: bytes) -> bytes:
    """`line_hash` of the resource without `meta.versionId` and `meta.lastUpdated`."""
    resource = _decode_object(line)
    if bytes(resource.get("meta", b"")).startswith(b"{"):
        meta = _decode_object(resource["meta"])
        meta.pop("versionId", None)
        meta.pop("lastUpdated", None)
        resource["meta"] = msgspec.Raw(msgspec.json.encode(meta))
        if not meta:
            del resource["meta"]
    return line_hash(msgspec.json.encode(resource))


def assigned_id(tenant_id: int, manifest_id: int, position: int, offset: int) -> str:
    """The id of a resource that came without: the same whenever the same line is read again (UUID version 5)."""
    return str(uuid.uuid5(ASSIGNED_IDS, f"{tenant_id}/{manifest_id}/{position}/{offset}"))


@dataclass(frozen=True, slots=True)
class LineRules:
    """What holds for the lines of one file. `max_line_bytes` is for the message only: the reader enforces it."""

    tenant_id: int
    manifest_id: int
    position: int
    declared_type: str | None
    organized_by: str | None
    ignore_meta: bool
    batch_lines: int
    batch_bytes: int
    max_line_bytes: int


class _Refused(Exception):  # noqa: N818
    def __init__(self, code: str, diagnostics: str, resource_type: str | None = None) -> None:
        super().__init__(diagnostics)
        self.code, self.diagnostics, self.resource_type = code, diagnostics, resource_type


class LineReader:
    """Takes blocks of whole lines, gives batches. One for a file, used by one thread."""

    def __init__(self, rules: LineRules) -> None:
        self._rules = rules
        self._prefixes = [b"", *(key_prefix(rules.tenant_id, name) for name in RESOURCE_TYPES)]
        self._declared = rules.declared_type

    def batches(self, blocks: Iterable[Block | OverlongLine], first_byte: int, first_line: int) -> Iterator[Batch]:
        """The file's batches from the given place on; none is empty."""
        batch = Batch(first_byte, first_line)
        for block in blocks:
            if isinstance(block, OverlongLine):
                self._add_overlong(batch, block)
            else:
                lines = block.data.split(b"\n")
                terminated = not lines[-1]
                if terminated:
                    lines.pop()
                suspicious = self._suspicious(block.data)
                start = 0
                while start < len(lines):
                    end = min(start + self._rules.batch_lines - batch.line_count, len(lines))
                    self._add_lines(batch, lines[start:end], suspicious)
                    if end == len(lines) and not terminated:
                        batch.results.lengths[-1] -= 1
                        batch.size -= 1
                    start = end
                    if batch.line_count >= self._rules.batch_lines:
                        yield batch
                        batch = Batch(batch.end_byte, batch.end_line + 1)
                del lines
            del block  # not to be held while the next one is made: a line may be long
            if batch.size >= self._rules.batch_bytes or batch.line_count >= self._rules.batch_lines:
                yield batch
                batch = Batch(batch.end_byte, batch.end_line + 1)
        if batch.line_count:
            yield batch

    @staticmethod
    def _suspicious(data: bytes) -> bool:
        """Whether some line of the block needs more than the fast path looks at."""
        if b"\r" in data or b"\x00" in data or b"\\u0000" in data:
            return True
        return not data.isascii() and (utf8_fault(data) is not None or BYTE_ORDER_MARK in data)

    def _add_lines(self, batch: Batch, lines: list[bytes], suspicious: bool) -> None:
        results = batch.results
        actions, lengths, hashes = results.actions, results.lengths, batch.line_hashes
        place = len(hashes)
        offset = batch.end_byte
        prefixes, declared, organized = self._prefixes, self._declared, self._rules.organized_by
        ignore_meta = self._rules.ignore_meta
        sha256, valid_id, numbers = hashlib.sha256, ID.fullmatch, TYPE_NUMBERS
        for raw in lines:
            length = len(raw) + 1
            lengths.append(length)
            try:
                line = _strip(raw) if suspicious else raw
                try:
                    head = _decode_head(line)
                except (msgspec.DecodeError, RecursionError):
                    if not line.strip():
                        actions.append(Action.BLANK)
                        hashes.append(BLANK_HASH)
                        continue
                    raise
                if suspicious:
                    _check_text(line)
                name = head.resourceType
                number = numbers.get(name)
                if number is None or (declared is not None and name != declared):
                    raise _wrong_type(name, declared)
                if organized is not None and name == "Parameters":
                    actions.append(Action.HEADER)
                    hashes.append(line_hash(line))
                    continue
                resource_id = head.id
                if resource_id is msgspec.UNSET:
                    resource_id = self._assign_id(offset)
                elif not valid_id(resource_id):
                    raise _Refused("value", "id must be 1 to 64 letters, digits, '-' or '.'", name)
                whole = sha256(line).digest()[:16]
                content = content_hash_without_versions(line) if ignore_meta else whole
            except (_Refused, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                actions.append(Action.FAILED)
                hashes.append(hash_as_read(raw))
                batch.issues.append(_issue(error, raw, batch.first_line + place, offset))
            else:
                actions.append(PENDING)
                hashes.append(whole)
                batch.places.append(place)
                batch.types.append(number)
                batch.ids.append(resource_id)
                batch.keys.append(resource_key(prefixes[number], resource_id))
                batch.content_hashes.append(content)
                batch.bodies.append(line)
            finally:
                place += 1
                offset += length
        batch.size = offset - batch.first_byte

    def _assign_id(self, offset: int) -> str:
        rules = self._rules
        return assigned_id(rules.tenant_id, rules.manifest_id, rules.position, offset)

    def _add_overlong(self, batch: Batch, line: OverlongLine) -> None:
        batch.results.actions.append(Action.FAILED)
        batch.results.lengths.append(line.length + line.terminated)
        batch.line_hashes.append(line.digest[:16])
        batch.issues.append(
            Issue(
                line=line.line,
                byte_offset=line.offset,
                code="too-long",
                diagnostics=f"the line has {line.length:,} bytes; at most {self._rules.max_line_bytes:,} are accepted",
            )
        )
        batch.size += line.length + line.terminated


def _strip(raw: bytes) -> bytes:
    return raw.removesuffix(b"\r").removeprefix(BYTE_ORDER_MARK)


def _check_text(line: bytes) -> None:
    """Refuse what JSON allows and a FHIR string does not: bytes that are not UTF-8, and NUL."""
    fault = utf8_fault(line)
    if fault is not None:
        raise _Refused("structure", f"not UTF-8 at byte {fault} of the line")
    if b"\\u0000" in line and _escaped_nul(line):
        raise _Refused("value", "a string holds the character U+0000, which FHIR does not allow")


def _wrong_type(name: str, declared: str | None) -> _Refused:
    if not name:
        return _Refused("required", "resourceType is missing")
    if name not in TYPE_NUMBERS:
        return _Refused("value", "resourceType is not a FHIR resource type")
    shown = declared if declared is None or len(declared) <= _SHOWN else f"{declared[:_SHOWN]}…"
    return _Refused("invalid", f"the manifest declares this file as {shown}, the line is a {name}", name)


def _issue(error: Exception, raw: bytes, line: int, offset: int) -> Issue:
    if isinstance(error, _Refused):
        return Issue(line, offset, error.code, error.diagnostics, resource_type=error.resource_type)
    return Issue(line, offset, "structure", _structure_fault(error, _strip(raw)))


def _structure_fault(error: Exception, line: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {utf8_fault(line)} of the line"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, msgspec.ValidationError):
        place = str(error)
        for name in _Head.__struct_fields__:
            if place.endswith(f"`$.{name}`"):
                return f"{name} is not a string"
        return "the line is JSON, but not an object"
    return f"malformed JSON: {json_fault(error, line)}"
