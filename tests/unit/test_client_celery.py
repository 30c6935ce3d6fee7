"""The client over the broker, and the messages it sends, as far as neither broker nor consumer is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from bulk_submit_client import Submitter
from bulk_submit_client.celery import CelerySubmitClient
from bulk_submit_client.errors import Unreachable
from bulk_submit_client.parameters import kickoff_parameters, secret_parameters
from jwcrypto.jwk import JWK, JWKSet

from devstack.servers import free_port
from settings import Settings
from submit_tasks.jwe import NotDecrypted, decrypt
from submit_tasks.parameters import InvalidRequest, parse_kickoff, parse_kickoff_message

NORTH = Submitter("urn:test", "north")
MANIFEST = "http://provider.test/manifest.json"
SECRET = "Bearer eyJ-very-secret"


def client(**options: Any) -> CelerySubmitClient:
    """One whose broker does not exist."""
    return CelerySubmitClient(f"redis://127.0.0.1:{free_port()}/0", submitter=NORTH, **options)


def parameters() -> dict[str, Any]:
    optional: dict[str, Any] = {"output_format": None, "replaces": None, "oauth_metadata_urls": ()}
    directives: dict[str, Any] = {"metadata": (), "import_directives": ()}
    return kickoff_parameters(
        NORTH, "s-1", MANIFEST, status=None, fhir_base_url="http://ehr.test", **optional, **directives
    )


def faults(error: pytest.ExceptionInfo[InvalidRequest]) -> list[tuple[str, str]]:
    return [(issue.code, issue.text) for issue in error.value.issues]


def test_the_client_over_http_needs_no_celery() -> None:
    absent = "sys.modules.update(dict.fromkeys(['celery', 'kombu', 'redis', 'jwcrypto']))"
    subprocess.run([sys.executable, "-c", f"import sys; {absent}; import bulk_submit_client"], check=True)


def test_a_secret_without_a_key_to_encrypt_to_is_not_sent() -> None:
    with pytest.raises(ValueError, match="public_jwk") as error:
        client().submit("s-1", MANIFEST, headers={"Authorization": SECRET})
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("wrong", [{"use": "sig"}, {"kid": ""}], ids=["for signatures", "without kid"])
def test_a_key_that_is_not_for_encryption_is_not_taken(wrong: dict[str, str]) -> None:
    key = json.loads(JWK.generate(kty="EC", crv="P-256", use="enc", kid="a").export_public())
    with pytest.raises(ValueError, match="public_jwk"):
        client(public_jwk={**key, **wrong})


def test_a_broker_that_is_not_there_is_said_to_be_unreachable() -> None:
    for call in (lambda: client().submit("s-1", MANIFEST), lambda: client().outcome("r-1")):
        with pytest.raises(Unreachable):
            call()


@pytest.mark.parametrize(
    "header",
    [("Host", "a"), ("A b", "c"), ("A", "b\r\nC: d"), ("A", ""), ("A", "x" * 20_000), (5, "a")],
    ids=["ours", "no token", "two lines", "empty", "too long", "no text"],
)
def test_encrypted_headers_are_refused_for_what_plain_ones_are(header: tuple[Any, str]) -> None:
    plain = parameters()
    plain["parameter"] += secret_parameters([header], None)
    with pytest.raises(InvalidRequest) as over_http:
        parse_kickoff(plain)
    with pytest.raises(InvalidRequest) as over_broker:
        parse_kickoff_message(parameters(), {"headers": [list(header)]})
    assert faults(over_broker) == faults(over_http)


@pytest.mark.parametrize(
    "secrets",
    [
        [],
        {"header": []},
        {"headers": "A: b"},
        {"headers": [["A"]]},
        {"file_encryption_key": "k"},
        {"file_encryption_key": {"coding": {"code": "jwe"}}},
        {"file_encryption_key": {"value": 5}},
        {"file_encryption_key": {"value": "k", "more": "m"}},
        {"manifest_url": "http://elsewhere.test/manifest.json"},
    ],
)
def test_secrets_of_another_shape_are_refused(secrets: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_kickoff_message(parameters(), secrets)


def test_a_file_encryption_key_is_taken_as_parts_or_as_a_jwk() -> None:
    parts = {"value": "k", "coding": {"code": "jwe"}}
    assert parse_kickoff_message(parameters(), {"file_encryption_key": parts}).file_encryption_key == parts
    jwk = {"kty": "oct", "k": "AAAA"}
    taken = parse_kickoff_message(parameters(), {"file_encryption_key": jwk}).file_encryption_key
    assert taken is not None
    assert json.loads(taken["value"]) == jwk


@pytest.mark.parametrize("made", [{"kty": "EC", "crv": "P-256"}, {"kty": "RSA", "size": 2048}], ids=["EC", "RSA"])
def test_what_the_client_encrypts_is_opened_with_the_private_key_alone(made: dict[str, Any]) -> None:
    keys = [JWK.generate(**made, use="enc", kid="a"), JWK.generate(**made, use="enc", kid="a")]
    token = client(public_jwk=keys[0].export_public(as_dict=True))._encrypt({"headers": [["A", SECRET]]})
    theirs, other = (JWKSet(keys=key).export(private_keys=True) for key in keys)
    assert decrypt(Settings(private_jwks=theirs), token) == {"headers": [["A", SECRET]]}
    unmarked = json.dumps({"keys": [{**key, "use": None} for key in json.loads(theirs)["keys"]]})
    for private in (other, unmarked, theirs.replace('"enc"', '"sig"'), theirs.replace('"kid":"a"', '"kid":"b"'), ""):
        with pytest.raises(NotDecrypted):
            decrypt(Settings(private_jwks=private), token)
