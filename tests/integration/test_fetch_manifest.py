"""Manifests from a real server: pages, relative URLs, what is tolerated, and each refusal in the submitter's terms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from devstack.provider import Fault, SampleProvider
from settings import Settings
from workers.fetch.errors import BadManifest, FetchError, Refused, TooLarge
from workers.fetch.http import Fetcher
from workers.fetch.manifest import Manifest, ManifestFile, fetch_manifest

SETTINGS = Settings(fetch_retries=1, fetch_backoff_seconds=0.01, read_timeout_seconds=2)
PATH = "out/manifest.json"


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[SampleProvider]:
    (tmp_path / "out").mkdir()
    with SampleProvider(tmp_path) as provider:
        yield provider


def serve(provider: SampleProvider, document: Any, path: str = PATH) -> None:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    (provider.directory / path).write_bytes(content)


def fetch(
    provider: SampleProvider, path: str = PATH, headers: Sequence[tuple[str, str]] = (), **settings: Any
) -> Manifest:
    changed = SETTINGS.model_copy(update=settings)
    with Fetcher(headers, changed, lambda: None) as fetcher:
        return fetch_manifest(fetcher, f"{provider.url}/{path}", changed)


def fetched(provider: SampleProvider, document: Any, **settings: Any) -> Manifest:
    serve(provider, document)
    return fetch(provider, **settings)


def refusal(provider: SampleProvider, document: Any, **settings: Any) -> FetchError:
    """Why the manifest is refused: for good, and in words for a submitter."""
    serve(provider, document)
    with pytest.raises(FetchError) as refused:
        fetch(provider, f"{PATH}?sig=s3cr3t", **settings)
    reason = refused.value.reason
    assert not refused.value.retryable
    for internal in ("s3cr3t", "Error", "msgspec", "Traceback", "object at", "None", "dict", "<class"):
        assert internal not in reason
    return refused.value


def test_every_list_is_kept_in_its_order_with_its_hints(provider: SampleProvider) -> None:
    manifest = fetched(
        provider,
        {
            "transactionTime": "2026-01-01T00:00:00Z",
            "requiresAccessToken": True,
            "output": [
                {"type": "Patient", "url": "http://a.test/1", "count": 3, "fileSize": 2**63 - 1},
                {"type": "Group", "url": "http://a.test/2", "count": 0},
            ],
            "deleted": [{"type": "Bundle", "url": "http://a.test/3", "count": 1}],
            "error": [{"type": "OperationOutcome", "url": "http://a.test/4"}],
            "outcome": [{"type": "OperationOutcome", "url": "http://a.test/5"}],
        },
    )
    assert manifest.files == [
        ManifestFile("http://a.test/1", "Patient", 3, 2**63 - 1),
        ManifestFile("http://a.test/2", "Group", 0),
    ]
    assert [(file.url, file.count) for file in manifest.deleted] == [("http://a.test/3", 1)]
    assert [file.url for file in manifest.outcomes] == ["http://a.test/5", "http://a.test/4"]
    assert (manifest.requires_access_token, manifest.pages, manifest.notes) == (True, 1, [])


@pytest.mark.parametrize("document", [{}, {"output": []}, {"output": None, "deleted": None, "error": [], "link": None}])
def test_a_manifest_may_list_nothing(provider: SampleProvider, document: dict[str, Any]) -> None:
    assert fetched(provider, document) == Manifest(pages=1)


@pytest.mark.parametrize(
    "item", [{"url": "1.ndjson"}, {"url": "1.ndjson", "type": ""}, {"url": "1.ndjson", "type": None}]
)
def test_a_file_without_type_may_hold_any(provider: SampleProvider, item: dict[str, Any]) -> None:
    [file] = fetched(provider, {"output": [item]}).files
    assert file.type is None


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("1.ndjson", "/out/1.ndjson"),
        ("./1.ndjson?sig=a%20b", "/out/1.ndjson?sig=a%20b"),
        ("../1.ndjson", "/1.ndjson"),
        ("/1.ndjson", "/1.ndjson"),
        ("?part=1", "/out/manifest.json?part=1"),
    ],
)
def test_a_relative_url_is_taken_from_where_its_page_was(provider: SampleProvider, url: str, absolute: str) -> None:
    manifest = fetched(provider, {"output": [{"url": url}], "deleted": [{"url": url}], "outcome": [{"url": url}]})
    for [file] in (manifest.files, manifest.deleted, manifest.outcomes):
        assert file.url == provider.url + absolute


def test_a_url_without_scheme_has_its_page_s(provider: SampleProvider) -> None:
    [file] = fetched(provider, {"output": [{"url": "//other.test/1.ndjson"}]}).files
    assert file.url == "http://other.test/1.ndjson"


def test_a_file_that_is_listed_twice_is_two_files(provider: SampleProvider) -> None:
    files = fetched(provider, {"output": [{"type": "Patient", "url": "1.ndjson"}] * 2}).files
    assert len(files) == 2
    assert files[0] == files[1]


def test_files_of_an_organized_output_have_no_type_of_their_own(provider: SampleProvider) -> None:
    manifest = fetched(
        provider,
        {
            "outputOrganizedBy": "Patient",
            "output": [{"type": "Patient", "url": "1.ndjson"}],
            "deleted": [{"type": "Bundle", "url": "2.ndjson"}],
        },
    )
    assert [(file.type, file.organized_by) for file in manifest.files] == [(None, "Patient")]
    assert [(file.type, file.organized_by) for file in manifest.deleted] == [(None, None)]


def test_an_empty_word_on_the_organization_is_none(provider: SampleProvider) -> None:
    [file] = fetched(provider, {"outputOrganizedBy": "", "output": [{"type": "Patient", "url": "1"}]}).files
    assert (file.type, file.organized_by) == ("Patient", None)


@pytest.mark.parametrize("hint", [-1, 1.5, "3", True, [], 2**63, 10**30])
@pytest.mark.parametrize("name", ["count", "fileSize"])
def test_a_hint_that_is_no_count_is_ignored_with_a_note(provider: SampleProvider, name: str, hint: Any) -> None:
    manifest = fetched(provider, {"output": [{"url": "0"}, {"url": "1", name: hint}]})
    assert (manifest.files[1].count, manifest.files[1].size) == (None, None)
    assert manifest.notes == [f"{provider.url}/{PATH}: output[1].{name} is no count and was ignored"]


def page(number: int, following: str | None) -> dict[str, Any]:
    link = {"link": [{"relation": "self", "url": "x"}, {"relation": "next", "url": following}]} if following else {}
    return {"output": [{"type": "Patient", "url": f"{number}.ndjson"}], **link}


def test_linked_pages_are_read_in_order_each_with_its_own_base(provider: SampleProvider) -> None:
    (provider.directory / "more").mkdir()
    serve(provider, page(1, "../more/2.json?sig=a"))
    serve(provider, {**page(2, f"{provider.url}/more/3.json"), "requiresAccessToken": True}, "more/2.json")
    serve(provider, page(3, None), "more/3.json")
    manifest = fetch(provider)
    assert [file.url for file in manifest.files] == [
        f"{provider.url}/out/1.ndjson",
        f"{provider.url}/more/2.ndjson",
        f"{provider.url}/more/3.ndjson",
    ]
    assert (manifest.pages, manifest.requires_access_token) == (3, True)
    assert [request.path for request in provider.requests] == [f"/{PATH}", "/more/2.json?sig=a", "/more/3.json"]


def test_a_link_may_be_a_single_object(provider: SampleProvider) -> None:
    serve(provider, {**page(1, None), "link": {"relation": "next", "url": "2.json"}})
    serve(provider, page(2, None), "out/2.json")
    assert len(fetch(provider).files) == 2


@pytest.mark.parametrize("back", [["manifest.json"], ["2.json"], ["2.json", "3.json", "2.json"]])
def test_pages_that_lead_in_a_circle_are_refused(provider: SampleProvider, back: list[str]) -> None:
    names = ["manifest.json", *[name for name in ("2.json", "3.json") if name in back]]
    for number, (name, following) in enumerate(zip(names, [*names[1:], back[-1]], strict=True)):
        serve(provider, page(number, following), f"out/{name}")
    with pytest.raises(BadManifest, match="link leads back to a page that was read already"):
        fetch(provider)
    assert len(provider.requests) == len(names)


def test_more_pages_than_the_limit_are_refused_and_not_asked_for(provider: SampleProvider) -> None:
    for number in range(5):
        serve(provider, page(number, f"{number + 1}.json"), f"out/{number}.json")
    serve(provider, page(5, None), "out/5.json")
    assert len(fetch(provider, "out/0.json", max_manifest_pages=6).files) == 6
    asked = len(provider.requests)
    with pytest.raises(TooLarge, match="more than 5 linked pages"):
        fetch(provider, "out/0.json", max_manifest_pages=5)
    assert len(provider.requests) == asked + 5


def test_a_page_that_is_not_there_fails_the_manifest_by_its_url(provider: SampleProvider) -> None:
    serve(provider, page(1, "2.json?sig=s3cr3t"))
    with pytest.raises(FetchError) as missing:
        fetch(provider)
    assert missing.value.reason == f"{provider.url}/out/2.json answered 404"


def test_a_page_that_links_to_what_may_not_be_asked_is_refused(provider: SampleProvider) -> None:
    serve(provider, page(1, "file:///etc/passwd"))
    with pytest.raises(Refused):
        fetch(provider)


def test_pages_are_asked_for_with_the_submitter_s_headers(provider: SampleProvider) -> None:
    provider.add(Fault(require_header=("X-Key", "abc")))
    serve(provider, page(1, "2.json"))
    serve(provider, page(2, None), "out/2.json")
    assert len(fetch(provider, headers=[("X-Key", "abc")]).files) == 2


def test_files_of_all_pages_and_kinds_count_against_the_limit(provider: SampleProvider) -> None:
    lists = {"output": [{"url": "1"}, {"url": "2"}], "deleted": [{"url": "3"}], "error": [{"url": "4"}]}
    serve(provider, {"output": [{"url": "5"}]}, "out/2.json")
    document = {**lists, "link": [{"relation": "next", "url": "2.json"}]}
    assert fetched(provider, document, max_manifest_files=5).pages == 2
    error = refusal(provider, document, max_manifest_files=4)
    assert (error.code, error.reason) == ("too-costly", "the manifest lists more than 4 files")


def test_a_list_that_is_too_long_is_not_read_to_its_end(provider: SampleProvider) -> None:
    document = {"output": [*({"url": str(number)} for number in range(11)), "no object"]}
    assert refusal(provider, document, max_manifest_files=10).reason == "the manifest lists more than 10 files"
    error = refusal(provider, document, max_manifest_files=11)
    assert error.reason == f"{provider.url}/{PATH}: output[11] is not a JSON object"


def test_what_a_page_holds_beside_the_known_fields_is_passed_over(provider: SampleProvider) -> None:
    junk = {"extension": [{"x": [[], {}, None, 1e5, "\0"]}], "request": "http://a.test/$export", "OUTPUT": 5}
    manifest = fetched(provider, {**junk, "output": [{**junk, "url": "1"}], "link": [{**junk, "relation": "self"}]})
    assert [file.url for file in manifest.files] == [f"{provider.url}/out/1"]


def test_text_as_long_as_it_may_be_is_accepted(provider: SampleProvider) -> None:
    url = "http://a.test/".ljust(2048, "x")
    escaped = "".join(f"\\u{ord(character):04x}" for character in url)
    text = f'{{"outputOrganizedBy":"{"g" * 64}","output":[{{"url":"{escaped}","type":"{"t" * 64}"}}]}}'
    [file] = fetched(provider, text.encode()).files
    assert (file.url, file.organized_by) == (url, "g" * 64)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"output": [{"url": "http://a.test/".ljust(2049, "x")}]}, "output[0].url has more than 2,048 bytes"),
        ({"output": [{"url": "http://a.test/" + "ä" * 1020}]}, "output[0].url has more than 2,048 bytes"),
        ({"output": [{"url": "x" * 2040}]}, "output[0].url has more than 2,048 bytes"),
        ({"output": [{"url": "x" * 200_000}]}, "output[0].url has more than 2,048 bytes"),
        ({"deleted": [{"url": "1"}, {"url": "x" * 3000}]}, "deleted[1].url has more than 2,048 bytes"),
        ({"output": [{"url": "1", "type": "x" * 65}]}, "output[0].type has more than 64 bytes"),
        ({"output": [{"url": "1", "type": "x" * 200_000}]}, "output[0].type has more than 64 bytes"),
        ({"outputOrganizedBy": "x" * 65}, "outputOrganizedBy has more than 64 bytes"),
        ({"link": {"relation": "next", "url": "x" * 3000}}, "link[0].url has more than 2,048 bytes"),
        ({"link": [{"relation": "self"}] * 101}, "link has more than 100 entries"),
    ],
)
def test_more_than_may_be_is_refused_by_page_and_place(provider: SampleProvider, document: Any, what: str) -> None:
    assert refusal(provider, document).reason == f"{provider.url}/{PATH}: {what}"


@pytest.mark.parametrize("relation", [None, 5, ["next"], "x" * 3000])
def test_a_link_of_another_relation_is_passed_over(provider: SampleProvider, relation: Any) -> None:
    assert fetched(provider, {"link": [{"relation": relation, "url": 5}]}).pages == 1


def test_notes_are_few_however_many_hints_are_ignored(provider: SampleProvider) -> None:
    manifest = fetched(provider, {"output": [{"url": "1", "count": -1, "fileSize": "x"}] * 200})
    assert len(manifest.notes) == 101
    assert manifest.notes[99].endswith("output[49].fileSize is no count and was ignored")
    assert manifest.notes[100] == "there are more counts that are none, and were ignored"


def test_a_manifest_over_the_limit_of_bytes_is_refused(provider: SampleProvider) -> None:
    document = json.dumps({"output": []}).encode().ljust(500)
    assert fetched(provider, document, max_manifest_bytes=500).pages == 1
    error = refusal(provider, document, max_manifest_bytes=499)
    assert error.reason == f"{provider.url}/{PATH} has more than 499 bytes"


@pytest.mark.parametrize(
    "document", [b"", b"{", b"<!DOCTYPE html><html>", b'{"output":[]', b'{"output":"\xff"}', b'"\\ud800"']
)
def test_what_is_not_json_is_refused_by_its_url(provider: SampleProvider, document: bytes) -> None:
    error = refusal(provider, document)
    assert error.code == "structure"
    assert error.reason.startswith(f"{provider.url}/{PATH} is not JSON: ")


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (b'{"output":[]', "it ends too early"),
        (b'{"output":[{"url":"1"},]}', "trailing comma in array (byte 23)"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"x":"\xff"}', "not UTF-8 at byte 6"),
        (b'{"x":"\\ud800"}', "a \\u escape is half of a surrogate pair, the other half is missing (byte 6)"),
    ],
)
def test_what_is_wrong_with_the_json_is_said(provider: SampleProvider, document: bytes, fault: str) -> None:
    assert refusal(provider, document).reason == f"{provider.url}/{PATH} is not JSON: {fault}"


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ([], "the page is not a JSON object"),
        (None, "the page is not a JSON object"),
        ("manifest", "the page is not a JSON object"),
        (5, "the page is not a JSON object"),
        ({"output": {}}, "output is not an array"),
        ({"output": "x"}, "output is not an array"),
        ({"output": 0}, "output is not an array"),
        ({"deleted": {}}, "deleted is not an array"),
        ({"error": {}}, "error is not an array"),
        ({"outcome": {}}, "outcome is not an array"),
        ({"output": ["x"]}, "output[0] is not a JSON object"),
        ({"output": [{"url": "1"}, None]}, "output[1] is not a JSON object"),
        ({"output": [{"type": "Patient"}]}, "output[0].url is missing"),
        ({"output": [{"url": ""}]}, "output[0].url is missing"),
        ({"output": [{"url": None}]}, "output[0].url is missing"),
        ({"output": [{"url": 5}]}, "output[0].url is not a string"),
        ({"output": [{"url": ["1"]}]}, "output[0].url is not a string"),
        ({"output": [{"url": "a\0b"}]}, "output[0].url is not a string"),
        ({"output": [{"url": "http://[broken"}]}, "output[0].url cannot be parsed"),
        ({"error": [{"url": "//[broken"}]}, "error[0].url cannot be parsed"),
        ({"output": [{"url": "1", "type": 5}]}, "output[0].type is not a string"),
        ({"output": [{"url": "1", "type": "Pat\0ient"}]}, "output[0].type is not a string"),
        ({"deleted": [{"url": 5}]}, "deleted[0].url is not a string"),
        ({"outputOrganizedBy": 5}, "outputOrganizedBy is not a string"),
        ({"requiresAccessToken": "true"}, "requiresAccessToken is not a boolean"),
        ({"requiresAccessToken": 1}, "requiresAccessToken is not a boolean"),
        ({"link": "next"}, "link[0] is not a JSON object"),
        ({"link": [{"relation": "next"}]}, "link[0].url is missing"),
        ({"link": [{"relation": "next", "url": 5}]}, "link[0].url is not a string"),
        ({"link": [{"relation": "next", "url": "http://[broken"}]}, "link[0].url cannot be parsed"),
    ],
)
def test_another_shape_is_refused_by_page_and_place(provider: SampleProvider, document: Any, what: str) -> None:
    error = refusal(provider, document)
    assert isinstance(error, BadManifest)
    assert (error.code, error.reason) == ("structure", f"{provider.url}/{PATH}: {what}")
