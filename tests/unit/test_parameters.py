"""FHIR Parameters of both operations: what is read, and that every fault is named with its place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from submit_tasks.outcomes import outcome
from submit_tasks.parameters import MAX_ISSUES, InvalidRequest, KickoffRequest, parse_kickoff, parse_status
from tests.support.api import header, manifest, parameters, status, submission, submitter

URL = "https://files.test/exp/manifest.json?sig=a%20b"
KEY = {
    "name": "fileEncryptionKey",
    "part": [
        {"name": "coding", "valueCoding": {"system": "urn:keys", "code": "jwe"}},
        {"name": "value", "valueString": "secret-key"},
    ],
}


def directive(name: str, url: Any = "https://consumer.test/mode", value: Any = "replace") -> dict[str, Any]:
    part = [{"name": "parameterUrl", "valueUri": url}, {"name": "parameterValue", "valueString": value}]
    return {"name": name, "part": part}


FULL = manifest(
    "s-1",
    URL,
    status("completed"),
    {"name": "replacesManifestUrl", "valueUrl": "https://files.test/old"},
    {"name": "outputFormat", "valueString": "application/fhir+ndjson; fhirVersion=4.0"},
    header("X-Batch", "secret-77"),
    header("Authorization", "Bearer secret-token"),
    {"name": "oauthMetadataUrl", "valueUrl": "https://ehr.test/.well-known/smart-configuration"},
    KEY,
    directive("metadata"),
    directive("import"),
    directive("import", "urn:other", "merge"),
)
LARGE = {"resourceType": "Parameters", "parameter": [0] * 100_000}


def refused(body: Any, parse: Callable[[Any], object] = parse_kickoff) -> list[tuple[str, str]]:
    """Code and place of each fault."""
    with pytest.raises(InvalidRequest) as raised:
        parse(body)
    rendered = msgspec.json.decode(msgspec.json.encode(outcome(*raised.value.issues)))
    assert all(issue["severity"] == "error" and issue["details"]["text"] for issue in rendered["issue"])
    return [(issue["code"], issue.get("expression", [""])[0]) for issue in rendered["issue"]]


def test_everything_a_request_says_is_read() -> None:
    request = parse_kickoff(FULL)
    assert request == KickoffRequest(
        system="urn:test",
        value="north",
        submission_id="s-1",
        status="completed",
        manifest_url=URL,
        replaces_manifest_url="https://files.test/old",
        fhir_base_url="http://ehr.test/fhir",
        output_format="application/fhir+ndjson; fhirVersion=4.0",
        fhir_version="4.0",
        headers=[("X-Batch", "secret-77"), ("Authorization", "Bearer secret-token")],
        oauth_metadata_urls=["https://ehr.test/.well-known/smart-configuration"],
        file_encryption_key={"value": "secret-key", "coding": {"system": "urn:keys", "code": "jwe"}},
        metadata=[{"parameterUrl": "https://consumer.test/mode", "parameterValue": "replace"}],
        import_directives=[
            {"parameterUrl": "https://consumer.test/mode", "parameterValue": "replace"},
            {"parameterUrl": "urn:other", "parameterValue": "merge"},
        ],
        warnings=[],
    )


def test_a_request_shows_no_secret_when_printed() -> None:
    assert "secret" not in repr(parse_kickoff(FULL))


@pytest.mark.parametrize("code", ["in-progress", "completed", "stopped"])
def test_a_status_alone_is_enough(code: str) -> None:
    request = parse_kickoff(parameters(submitter(), submission("s"), status(code)))
    assert (request.status, request.manifest_url, request.headers, request.warnings) == (code, None, [], [])


def test_a_manifest_without_a_status_has_none() -> None:
    assert parse_kickoff(manifest("s", URL)).status is None


def test_a_status_request_is_read() -> None:
    request = parse_status(
        parameters(submitter(), submission("s"), {"name": "_outputFormat", "valueString": "ndjson"}),
    )
    assert (request.system, request.value, request.submission_id, request.warnings) == ("urn:test", "north", "s", [])


@pytest.mark.parametrize(
    ("parameter", "field", "value"),
    [
        ({"name": "manifestUrl", "valueString": URL}, "manifest_url", URL),
        ({"name": "manifestUrl", "valueUri": URL}, "manifest_url", URL),
        ({"name": "submissionStatus", "valueCoding": {"code": "completed"}}, "status", "completed"),
        (
            {
                "name": "submissionStatus",
                "valueCoding": {
                    "system": "http://hl7.org/fhir/uv/bulkdata/ValueSet/submission-status",
                    "code": "in-progress",
                },
            },
            "status",
            "in-progress",
        ),
        (status("complete"), "status", "completed"),
        (status("aborted"), "status", "stopped"),
        ({**header("A", "b"), "name": "fileRequestHeaders"}, "headers", [("A", "b")]),
        ({"name": "FHIRBaseUrl", "valueUrl": "http://old.test/fhir"}, "fhir_base_url", "http://old.test/fhir"),
    ],
)
def test_earlier_drafts_are_taken_with_a_warning_that_names_the_place(
    parameter: dict[str, Any], field: str, value: object
) -> None:
    given_names = {"manifestUrl": "manifestUrl", "FHIRBaseUrl": "fhirBaseUrl"}
    body = manifest("s", URL)
    body["parameter"] = [item for item in body["parameter"] if item["name"] != given_names.get(parameter["name"])]
    body["parameter"].append(parameter)
    request = parse_kickoff(body)
    assert getattr(request, field) == value
    place = f"Parameters.parameter[{len(body['parameter']) - 1}]"
    assert [issue.severity for issue in request.warnings] == ["warning"]
    assert request.warnings[0].expression[0].startswith(place)


def test_all_header_names_and_then_all_values_in_one_parameter() -> None:
    part = [
        {"name": "headerName", "valueString": "A"},
        {"name": "headerName", "valueString": "B"},
        {"name": "headerValue", "valueString": "1"},
        {"name": "headerValue", "valueString": "2"},
    ]
    request = parse_kickoff(manifest("s", URL, {"name": "fileRequestHeader", "part": part}))
    assert request.headers == [("A", "1"), ("B", "2")]


def test_a_directive_may_be_one_part_that_is_named_by_its_url() -> None:
    part = [{"name": "https://consumer.test/mode", "valueString": "replace"}]
    request = parse_kickoff(manifest("s", URL, {"name": "metadata", "part": part}))
    assert request.metadata == [{"parameterUrl": "https://consumer.test/mode", "parameterValue": "replace"}]


@pytest.mark.parametrize("body", [None, True, 1, 1.5, "Parameters", [], [{"resourceType": "Parameters"}]], ids=repr)
@pytest.mark.parametrize("parse", [parse_kickoff, parse_status])
def test_what_is_no_object_is_refused(body: object, parse: Callable[[Any], object]) -> None:
    assert refused(body, parse) == [("invalid", "Parameters")]


@pytest.mark.parametrize("parse", [parse_kickoff, parse_status])
def test_another_resource_and_a_parameter_that_is_no_array_are_refused(parse: Callable[[Any], object]) -> None:
    assert refused({}, parse) == [("invalid", "Parameters.resourceType")]
    assert refused({"resourceType": "Bundle", "parameter": []}, parse) == [("invalid", "Parameters.resourceType")]
    for value in (None, {}, "x", 3):
        assert refused({"resourceType": "Parameters", "parameter": value}, parse) == [
            ("invalid", "Parameters.parameter")
        ]


def test_what_is_required_and_missing_is_named_all_at_once() -> None:
    required = ("required", "Parameters.parameter")
    assert refused({"resourceType": "Parameters"}) == [required] * 3
    assert refused(parameters(), parse_status) == [required] * 2
    assert refused(parameters(submitter(), submission("s"))) == [required]
    without_base = parameters(submitter(), submission("s"), {"name": "manifestUrl", "valueUrl": URL})
    assert refused(without_base) == [required]


BAD = {
    "no object": 5,
    "no name": {"valueString": "x"},
    "name no text": {"name": 5, "valueString": "x"},
    "unknown": {"name": "colour", "valueString": "red"},
    "unknown, half a surrogate pair": {"name": "\ud800"},
    "status of another kind": {"name": "submissionStatus", "valueCode": "completed"},
    "status unknown": status("finished"),
    "status in a list": {"name": "submissionStatus", "valueCoding": {"code": ["completed"]}},
    "status of another system": {"name": "submissionStatus", "valueCoding": {"system": "urn:x", "code": "completed"}},
    "status, system no text": {"name": "submissionStatus", "valueCoding": {"system": [], "code": "completed"}},
    "format unknown": {"name": "outputFormat", "valueString": "text/csv"},
    "format of an unknown FHIR version": {
        "name": "outputFormat",
        "valueString": "application/fhir+ndjson;fhirVersion=3.0",
    },
    "format with an underscore": {"name": "_outputFormat", "valueString": "ndjson"},
    "replaced URL relative": {"name": "replacesManifestUrl", "valueUrl": "manifest.json"},
    "metadata URL with a password": {"name": "oauthMetadataUrl", "valueUrl": "https://u:p@h.test/"},
    "metadata URL of another scheme": {"name": "oauthMetadataUrl", "valueUrl": "file:///etc/passwd"},
    "URL twice": {"name": "oauthMetadataUrl", "valueUrl": URL, "valueString": URL},
    "URL too long": {"name": "oauthMetadataUrl", "valueUrl": "https://h.test/" + "x" * 2048},
    "URL too long in bytes": {"name": "oauthMetadataUrl", "valueUrl": "https://h.test/" + "é" * 1200},
    "URL with a space": {"name": "oauthMetadataUrl", "valueUrl": "https://h.test/a b"},
    "URL with half a bracket": {"name": "oauthMetadataUrl", "valueUrl": "https://[::1/"},
    "URL without a host": {"name": "oauthMetadataUrl", "valueUrl": "https:///path"},
    "URL with NUL": {"name": "oauthMetadataUrl", "valueUrl": "https://h.test/\0"},
    "URL with half a surrogate pair": {"name": "oauthMetadataUrl", "valueUrl": "https://h.test/\udfff"},
    "header, no parts": {"name": "fileRequestHeader", "valueString": "A: b"},
    "header, parts no objects": {"name": "fileRequestHeader", "part": [1, 2]},
    "header, no value": {"name": "fileRequestHeader", "part": [{"name": "headerName", "valueString": "A"}]},
    "header, one part more": {"name": "fileRequestHeader", "part": [*header("A", "b")["part"], {"name": "x"}]},
    "header name with a line end": header("A\r\nHost: x", "b"),
    "header value with a line end": header("A", "b\r\nHost: x"),
    "header name with a colon": header("A:", "b"),
    "header not latin": header("A", "b\u2028"),
    "header empty": header("A", ""),
    **{f"header {name}": header(name, "b") for name in ("Connection", "host", "TRANSFER-ENCODING", "Proxy-Auth", "Te")},
    "key, no parts": {"name": "fileEncryptionKey", "valueString": "k"},
    "key, no value": {"name": "fileEncryptionKey", "part": KEY["part"][:1]},
    "key, part twice": {"name": "fileEncryptionKey", "part": [KEY["part"][1]] * 2},
    "key, coding no object": {
        "name": "fileEncryptionKey",
        "part": [{"name": "coding", "valueCoding": 10**30}, KEY["part"][1]],
    },
    "key, code no text": {
        "name": "fileEncryptionKey",
        "part": [{"name": "coding", "valueCoding": {"code": {"a": 1}}}, KEY["part"][1]],
    },
    "directive, no parts": {"name": "metadata", "valueString": "x"},
    "directive, no value": {"name": "metadata", "part": [{"name": "parameterUrl", "valueUri": "urn:x"}]},
    "directive, URL relative": directive("import", "mode"),
    "directive, URL illegible": directive("import", "http://[x"),
    "directive, value no text": directive("import", value=5),
    "directive named by a URL with NUL": {"name": "import", "part": [{"name": "urn:x\0", "valueString": "v"}]},
    "directive named by half a surrogate pair": {"name": "import", "part": [{"name": "urn:\ud800"}]},
    "directive named by a URL too long": {
        "name": "import",
        "part": [{"name": "urn:" + "x" * 3000, "valueString": "v"}],
    },
    "submitter twice": submitter(),
    "submission twice": submission("s"),
    "manifest twice": {"name": "manifestUrl", "valueUrl": URL},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_fault_is_named_with_its_place(bad: object) -> None:
    body = manifest("s", URL, bad)
    [(code, place)] = refused(body)
    assert place.startswith(f"Parameters.parameter[{len(body['parameter']) - 1}]")
    assert code in ("invalid", "not-supported", "code-invalid", "required")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("submitter", {"valueString": "north"}),
        ("submitter", {"valueIdentifier": {"value": "north"}}),
        ("submitter", {"valueIdentifier": {"system": "urn:test", "value": 5}}),
        ("submitter", {"valueIdentifier": {"system": "urn:test", "value": "x\0"}}),
        ("submitter", {"valueIdentifier": {"system": "urn:test", "value": " "}}),
        ("submissionId", {"valueId": "s"}),
        ("submissionId", {"valueString": None}),
        ("submissionId", {"valueString": ""}),
        ("submissionId", {"valueString": "s" * 257}),
        ("submissionId", {"valueString": "s\0"}),
        ("submissionId", {"valueString": "\ud83d"}),
        ("submissionId", {}),
    ],
)
def test_an_illegible_submitter_or_submission_is_one_fault_at_its_place(name: str, bad: dict[str, Any]) -> None:
    for parse, rest in ((parse_kickoff, [status("completed")]), (parse_status, [])):
        good = [item for item in (submitter(), submission("s"), *rest) if item["name"] != name]
        [(code, place)] = refused(parameters({"name": name, **bad}, *good), parse)
        assert (code, place.removesuffix(".valueString")) == ("invalid", "Parameters.parameter[0]")


def test_all_faults_of_a_request_are_told_at_once() -> None:
    bad = [item for item in BAD.values() if not isinstance(item, dict) or not str(item.get("name")).startswith("sub")]
    found = refused(parameters(*bad))
    places = {place.split("]")[0] for _, place in found}
    assert {f"Parameters.parameter[{index}" for index in range(len(bad) - 1)} <= places
    assert ("required", "Parameters.parameter") in found


def test_faults_repeat_no_secret() -> None:
    secret = "Bearer secret-token"
    bad = [header("Authorization", f"{secret}\n"), header("Host", secret), header("A\n", secret), header(secret, "x")]
    with pytest.raises(InvalidRequest) as raised:
        parse_kickoff(manifest("s", URL, *bad, {**KEY, "part": [*KEY["part"], {"name": "more"}]}))
    assert len(raised.value.issues) == len(bad) + 1
    assert "secret" not in str(raised.value)


def test_an_answer_does_not_grow_with_the_faults() -> None:
    assert len(refused(LARGE)) == MAX_ISSUES + 1
    old = [{"name": "oauthMetadataUrl", "valueString": URL}] * 1000
    assert len(parse_kickoff(manifest("s", URL, *old)).warnings) == MAX_ISSUES


texts = st.text(st.characters(), max_size=12) | st.sampled_from(["\0", "\ud800", " ", URL, "http://[", "\r\n", "urn:x"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
WORDS = sorted(
    {item["name"] for item in FULL["parameter"]}
    | {"resourceType", "parameter", "name", "part", "headerName", "headerValue", "coding", "value", "valueString"}
    | {"parameterUrl", "parameterValue", "valueUrl", "valueUri", "valueCoding", "valueIdentifier", "system", "code"}
)
keys = st.sampled_from(WORDS) | texts
values = st.recursive(
    scalars | keys,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
bodies = values | st.lists(values, max_size=6).map(lambda items: parameters(*items))


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from places_in(inner, (*path, step))


PLACES = list(places_in(FULL))


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The full request with up to three of its places replaced, removed or doubled."""
    body = copy.deepcopy(FULL)
    for *way, last in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        holder: Any = body
        try:
            for step in way:
                holder = holder[step]
            old = holder[last]
        except (KeyError, IndexError, TypeError):
            continue
        what = draw(st.sampled_from(["replace", "remove", "double"]))
        if what == "replace" and not isinstance(holder, str):
            holder[last] = draw(values)
        elif what == "remove" and not isinstance(holder, str):
            del holder[last]
        elif isinstance(holder, list):
            holder.append(old)
        elif isinstance(holder, dict):
            holder[draw(keys)] = old
    return body


def texts_of(value: Any) -> Iterator[str]:
    """Every text in what was read."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts_of(getattr(value, field.name))
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_of([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)
    else:
        assert value is None


def check(body: Any, parse: Callable[[Any], object]) -> None:
    """Either it is refused, with faults that can be sent, or all that was read can be stored."""
    try:
        request, faults = parse(body), []
    except InvalidRequest as error:
        request, faults = None, error.issues
    assert (request is None) is bool(faults)
    msgspec.json.encode(outcome(*faults))
    for text in texts_of(request):
        assert "\0" not in text
        text.encode()


@given(bodies)
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_json_value_is_read_or_refused(body: Any) -> None:
    check(body, parse_kickoff)
    check(body, parse_status)


@given(mutated())
@hypothesis_settings(max_examples=400, deadline=None)
def test_any_mutation_of_a_request_is_read_or_refused(body: Any) -> None:
    check(body, parse_kickoff)
    check(body, parse_status)
