"""Reading what is stored over real HTTP: read, vread, history, and what the server says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jwcrypto.jwk import JWK, JWKSet

from devstack.provider import SampleProvider
from devstack.servers import EmbeddedPostgres, EmbeddedRedis
from tests.support.api import FHIR_JSON, SUBMITTER, Api, issues, serve
from tests.support.stage import patient

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
EXACT = (
    '{"id":"exact","resourceType":"Patient","active" : true,"meta":{"versionId":"77","tag":[{"code":"x"}],'
    '"lastUpdated":"1999-01-01T00:00:00Z","source":"urn:s"},"extension":[{"url":"urn:d","valueDecimal":1.10},'
    '{"url":"urn:big","valueDecimal":123456789012345678901234567890.000}],'
    '"name":[{"family":"Åsa \\u00e9 \\ud83d\\ude00 😀"}]}'
).encode()


@pytest.fixture(scope="module")
def keys() -> JWKSet:
    keys = JWKSet()
    keys.add(JWK.generate(kty="EC", crv="P-256", use="enc", kid="enc-1"))
    return keys


@pytest.fixture(scope="module")
def api(
    postgres: EmbeddedPostgres,
    migrated_template: str,
    redis_server: EmbeddedRedis,
    keys: JWKSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """An API before a store that three manifests were ingested into, and one deletion."""
    database_url = postgres.create_database("api_resources", template=migrated_template)
    with (
        Api(
            database_url,
            tmp_path_factory.mktemp("api"),
            broker_url=redis_server.url,
            private_jwks=keys.export(private_keys=True),
        ) as api,
        SampleProvider(tmp_path_factory.mktemp("provider")) as provider,
    ):
        odd = [
            f'{{"resourceType":"Patient","id":"odd-{n}","meta":{meta}}}'.encode() for n, meta in enumerate(ODD_METAS)
        ]
        first = [
            patient("changing", name="Ada"),
            patient("same"),
            patient("deleted"),
            EXACT,
            b'{"resourceType":"Patient","gender":"other"}',
            *odd,
        ]
        api.finish("first", serve(provider, "first", a=first))
        for number, name in enumerate(("Bea", "Cleo"), 2):
            lines = [patient("changing", name=name), patient("same")]
            api.finish(f"m-{number}", serve(provider, f"m-{number}", a=lines))
        api.execute(
            """INSERT INTO resource_versions (key, seq, version, batch_id, line, op, resource_id)
               SELECT key, seq + 1, version + 1, batch_id, line, 3, resource_id
               FROM resource_versions WHERE resource_id = 'deleted'"""
        )
        api.add_submitter(SUBMITTER, tenant="second")
        yield api


ODD_METAS = ["null", "[]", '"x"', "5", "{}"]


def names(bundle: dict[str, Any]) -> list[str]:
    return [entry["resource"]["name"][0]["family"] for entry in bundle["entry"]]


def test_a_resource_is_read_with_its_version(api: Api) -> None:
    answer = api.get("Patient/changing")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, FHIR_JSON)
    resource = answer.json()
    meta = resource.pop("meta")
    assert resource == {"resourceType": "Patient", "id": "changing", "name": [{"family": "Cleo"}]}
    assert meta.keys() == {"versionId", "lastUpdated"}
    assert (meta["versionId"], answer.headers["ETag"]) == ("3", 'W/"3"')
    assert INSTANT.fullmatch(meta["lastUpdated"])
    modified = parsedate_to_datetime(answer.headers["Last-Modified"])
    assert modified.strftime("%Y-%m-%dT%H:%M:%S") == meta["lastUpdated"][:19]


def test_what_was_not_changed_has_one_version(api: Api) -> None:
    assert api.get("Patient/same").headers["ETag"] == 'W/"1"'
    assert len(api.get("Patient/same/_history").json()["entry"]) == 1


def test_everything_but_id_and_version_is_given_back_as_it_came(api: Api) -> None:
    text = api.get("Patient/exact").content.decode()
    meta = json.loads(text)["meta"]
    assert (meta["versionId"], meta["tag"], meta["source"]) == ("1", [{"code": "x"}], "urn:s")
    assert meta["lastUpdated"] != "1999-01-01T00:00:00Z"
    for part in ('"valueDecimal":1.10}', "123456789012345678901234567890.000", '"Åsa \\u00e9 \\ud83d\\ude00 😀"'):
        assert part in text
    received = json.loads(EXACT)
    assert json.loads(text) == {**received, "meta": {**received["meta"], **meta}}


@pytest.mark.parametrize("number", range(len(ODD_METAS)), ids=ODD_METAS)
def test_a_meta_that_is_no_object_is_replaced(api: Api, number: int) -> None:
    meta = api.get(f"Patient/odd-{number}").json()["meta"]
    assert meta.keys() == {"versionId", "lastUpdated"}
    assert api.get(f"Patient/odd-{number}/_history").json()["entry"][0]["resource"]["meta"] == meta


def test_a_resource_that_came_without_an_id_has_the_one_it_was_given(api: Api) -> None:
    [(number,)] = api.rows("SELECT resource_id FROM resource_versions WHERE body LIKE '%other%'")
    resource = api.get(f"Patient/{number}").json()
    assert (resource["id"], resource["gender"]) == (number, "other")


def test_the_history_is_newest_first_and_says_what_each_version_did(api: Api) -> None:
    answer = api.get("Patient/changing/_history")
    assert answer.headers["Content-Type"] == FHIR_JSON
    bundle = answer.json()
    assert (bundle["resourceType"], bundle["type"]) == ("Bundle", "history")
    assert "link" not in bundle
    assert names(bundle) == ["Cleo", "Bea", "Ada"]
    assert [entry["response"]["status"] for entry in bundle["entry"]] == ["200", "200", "201"]
    assert [entry["response"]["etag"] for entry in bundle["entry"]] == ['W/"3"', 'W/"2"', 'W/"1"']
    for entry in bundle["entry"]:
        assert entry["fullUrl"] == f"{api.base_url}/Patient/changing"
        assert entry["request"] == {"method": "PUT", "url": "Patient/changing"}
        assert entry["response"]["lastModified"] == entry["resource"]["meta"]["lastUpdated"]


def test_the_history_comes_in_pages(api: Api) -> None:
    found: list[str] = []
    url: str | None = "Patient/changing/_history?_count=2"
    pages = 0
    while url is not None:
        bundle = api.get(url).json()
        found += names(bundle)
        links = {link["relation"]: link["url"] for link in bundle.get("link", [])}
        url = links.get("next")
        pages += 1
    assert (found, pages) == (["Cleo", "Bea", "Ada"], 2)


def test_each_version_can_be_read(api: Api) -> None:
    for version, name in enumerate(("Ada", "Bea", "Cleo"), 1):
        answer = api.get(f"Patient/changing/_history/{version}")
        assert answer.status_code == 200
        assert answer.headers["ETag"] == f'W/"{version}"'
        assert answer.json()["name"] == [{"family": name}]
        assert answer.json()["meta"]["versionId"] == str(version)


def test_a_deleted_resource_is_gone_and_its_history_is_not(api: Api) -> None:
    assert issues(api.get("Patient/deleted"), 410)[0]["code"] == "deleted"
    assert issues(api.get("Patient/deleted/_history/2"), 410)[0]["code"] == "deleted"
    assert api.get("Patient/deleted/_history/1").json()["id"] == "deleted"
    [deletion, creation] = api.get("Patient/deleted/_history").json()["entry"]
    assert "resource" not in deletion
    assert (deletion["request"]["method"], deletion["response"]["status"]) == ("DELETE", "204")
    assert creation["resource"]["id"] == "deleted"


@pytest.mark.parametrize(
    "path",
    [
        "Patient/nobody",
        "Patient/Changing",
        "Observation/changing",
        "patient/changing",
        "Patients/changing",
        "Patient/" + "x" * 65,
        "Patient/" + "x" * 20_000,
        "Patient/a_b",
        "Patient/%00",
        "Patient/changing%00",
        "Patient/%0d%0aX:%20y",
        "Patient/%ff",
        "Patient/%F0%9F%98%80",
        "Patient/%",
        "%00/changing",
        "Patient%00/changing",
        "Patient/changing/",
        "Patient/changing/name",
    ],
    ids=lambda path: path[:24],
)
def test_what_is_not_stored_is_not_found(api: Api, path: str) -> None:
    for suffix in ("", "/_history", "/_history/1"):
        assert issues(api.raw("GET", f"/default/fhir/{path}{suffix}"), 404)[0]["code"] == "not-found"


@pytest.mark.parametrize("version", ["0", "-1", "4", "9" * 30, "9" * 5000, "x", "%00"], ids=lambda version: version[:5])
def test_a_version_that_never_was_is_not_found(api: Api, version: str) -> None:
    issues(api.raw("GET", f"/default/fhir/Patient/changing/_history/{version}"), 404)


@pytest.mark.parametrize(
    "query", ["_count=0", "_count=-1", "_count=1001", "_count=x", "_count=", "before=0", "before=x", "before=%00"]
)
def test_a_bad_page_is_refused(api: Api, query: str) -> None:
    [issue] = issues(api.get(f"Patient/changing/_history?{query}"), 400)
    assert query.split("=")[0] in issue["details"]["text"]


def test_a_page_before_all_versions_is_empty(api: Api) -> None:
    assert api.get("Patient/changing/_history?before=1").json()["entry"] == []
    assert len(api.get(f"Patient/changing/_history?before={'9' * 300}").json()["entry"]) == 3


def test_tenants_do_not_see_each_others_resources(api: Api) -> None:
    for path in ("Patient/changing", "Patient/changing/_history", "Patient/changing/_history/1"):
        issues(api.raw("GET", f"/second/fhir/{path}"), 404)
        issues(api.raw("GET", f"/nowhere/fhir/{path}"), 404)
        issues(api.raw("GET", f"/%00/fhir/{path}"), 404)
    for path in ("metadata", ".well-known/jwks.json"):
        assert api.raw("GET", f"/second/fhir/{path}").status_code == 200
        issues(api.raw("GET", f"/nowhere/fhir/{path}"), 404)
        issues(api.raw("GET", f"/%00/fhir/{path}"), 404)


@pytest.mark.parametrize("path", ["Patient/changing", "Patient/changing/_history", "metadata"])
def test_methods_other_than_get_are_refused(api: Api, path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = api.raw(method, f"/default/fhir/{path}", b"{}")
        assert issues(answer, 405)[0]["code"] == "not-supported"
        assert set(answer.headers["Allow"].split(", ")) == ({"GET"} if path == "metadata" else {"GET", "HEAD"})


def test_head_is_get_without_the_body(api: Api) -> None:
    got, head = (api.raw(method, "/default/fhir/Patient/changing") for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["ETag"] == got.headers["ETag"]


def test_the_capability_statement_names_the_operations(api: Api) -> None:
    answer = api.get("metadata")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, FHIR_JSON)
    statement = answer.json()
    assert (statement["resourceType"], statement["kind"], statement["status"]) == (
        "CapabilityStatement",
        "instance",
        "active",
    )
    assert statement["implementation"]["url"] == api.base_url
    assert statement["fhirVersion"] == "4.0.1"
    guide = "http://hl7.org/fhir/uv/bulkdata"
    assert f"{guide}/CapabilityStatement/bulk-submit" in statement["instantiates"]
    [rest] = statement["rest"]
    assert {operation["name"]: operation["definition"] for operation in rest["operation"]} == {
        name: f"{guide}/OperationDefinition/{name}" for name in ("bulk-submit", "bulk-submit-status")
    }


def test_keys_are_published_without_their_private_part(api: Api, keys: JWKSet) -> None:
    answer = api.get(".well-known/jwks.json")
    [key] = answer.json()["keys"]
    [private] = json.loads(keys.export(private_keys=True))["keys"]
    assert key == {name: value for name, value in private.items() if name != "d"}
    assert private["d"] not in answer.text
    assert answer.headers["Cache-Control"] == "max-age=300"


def test_the_server_answers_for_its_health(api: Api) -> None:
    assert api.get(f"{api.public_url}/healthz").json() == {"status": "ok"}


def test_any_path_is_answered_in_order(api: Api) -> None:
    segments = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
        ["default", "fhir", "Patient", "changing", "_history", "bulk-status", "files", "metadata", "1", "..", "\0", "%"]
    )
    answered = []

    @given(st.lists(segments, max_size=7), st.booleans())
    @hypothesis_settings(max_examples=60, deadline=None, database=None)
    def ask(path: list[str], below: bool) -> None:
        target = ("/default/fhir/" if below else "/") + "/".join(quote(segment, safe="") for segment in path)
        answer = api.raw("GET", target)
        answered.append(answer.status_code)
        assert answer.status_code < 500
        if answer.status_code >= 400:
            issues(answer)

    ask()
    assert len(answered) >= 60


def test_nothing_here_was_an_error_of_ours(api: Api) -> None:
    assert "Traceback" not in api.log.read_text()
