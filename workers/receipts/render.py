"""What became of a batch's lines, as lines of the `output` receipts and of the ledger.

    output  one line for each version written: the resource cut down to its type, id and meta
    ledger  one line for each line of the input, in order

This is the hot path of publishing, a million lines a second: strings are put together from pieces that a batch's lines
have in common. Ids need no escaping (FHIR "Datatypes, id"); what a submitter wrote otherwise goes through the encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from schema.fhir_types import RESOURCE_TYPES, type_name
from schema.results import STORED_ACTIONS, WRITTEN_ACTIONS, Action, CommittedBatch, Issue, LineResults

_WORDS = {int(action): action.name.lower() for action in Action}
_STORED = frozenset(int(action) for action in STORED_ACTIONS)
_WRITTEN = frozenset(int(action) for action in WRITTEN_ACTIONS)
_OUTPUT_HEADS = {number: f'{{"resourceType":"{name}","id":"' for number, name in enumerate(RESOURCE_TYPES, start=1)}
_LEDGER_REFERENCES = {number: f'","reference":"{name}/' for number, name in enumerate(RESOURCE_TYPES, start=1)}
_OUTPUT_TAIL = '","tag":[{"system":"http://terminology.hl7.org/CodeSystem/v3-ObservationValue","code":"SUBSETTED"}]}}\n'


@dataclass(frozen=True, slots=True)
class BatchLines:
    """A batch rendered: `outputs` by resource type, `ledger`, and how many of the batch's lines had which action."""

    outputs: Mapping[str, list[str]]
    ledger: list[str]
    counts: Counter[Action]


def json_text(value: object) -> str:
    """The value as JSON, on one line."""
    return msgspec.json.encode(value).decode()


def fhir_instant(time: datetime) -> str:
    """The time as a FHIR instant: UTC, milliseconds."""
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def render_batch(batch: CommittedBatch, results: LineResults, url: str, issues: Mapping[int, Issue]) -> BatchLines:
    """The batch's lines. `url` is the file's public URL, `issues` are those of the batch by line number."""
    quoted_url = json_text(url)
    ledger_head = f'{{"file":{quoted_url},"line":'
    output_middle = f'","lastUpdated":"{fhir_instant(batch.committed_at)}","source":{quoted_url[:-1]}#'
    outputs: dict[int, list[str]] = {}
    ledger: list[str] = []
    stored = zip(results.types, results.ids, results.versions, strict=True)
    offset = batch.first_byte
    for line, (action, length) in enumerate(zip(results.actions, results.lengths, strict=True), batch.first_line):
        if action in _STORED:
            number, resource_id, version = next(stored)
            ledger.append(
                f'{ledger_head}{line},"offset":{offset},"action":"{_WORDS[action]}'
                f'{_LEDGER_REFERENCES[number]}{resource_id}","version":"{version}"}}\n'
            )
            if action in _WRITTEN:
                rendered = (
                    f'{_OUTPUT_HEADS[number]}{resource_id}","meta":{{"versionId":"{version}'
                    f"{output_middle}{line}{_OUTPUT_TAIL}"
                )
                if number in outputs:
                    outputs[number].append(rendered)
                else:
                    outputs[number] = [rendered]
        elif action == Action.FAILED:
            ledger.append(_failed_line(url, line, offset, issues.get(line)))
        else:
            ledger.append(f'{ledger_head}{line},"offset":{offset},"action":"{_WORDS[action]}"}}\n')
        offset += length
    return BatchLines(
        outputs={type_name(number): lines for number, lines in outputs.items()},
        ledger=ledger,
        counts=Counter({action: results.actions.count(action) for action in Action}),
    )


def _failed_line(url: str, line: int, offset: int, issue: Issue | None) -> str:
    entry: dict[str, object] = {"file": url, "line": line, "offset": offset, "action": _WORDS[Action.FAILED]}
    if issue is not None:
        if issue.resource_type and issue.resource_id:
            entry["reference"] = f"{issue.resource_type}/{issue.resource_id}"
        entry["cause"] = issue.diagnostics
    return json_text(entry) + "\n"
