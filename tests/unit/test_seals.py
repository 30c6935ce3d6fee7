"""Secrets at rest: sealed by the first key, opened by any, and never to be seen."""

from __future__ import annotations

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from settings import Settings
from workers.seals import NoSealingKey, SealNotOpened, Secrets, seal, unseal

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
SECRETS = Secrets(
    [("Authorization", "Bearer abc"), ("X-Tenant", "Zoë"), ("X-Tenant", "again")],
    {"value": "k3y", "coding": {"code": "jwe"}},
)


def keys(*each: str) -> Settings:
    return Settings(sealing_keys=SecretStr(",".join(each)))


def sealed(settings: Settings, secrets: Secrets = SECRETS) -> bytes:
    value = seal(settings, secrets)
    assert value is not None
    return value


@given(st.lists(st.tuples(st.text(), st.text())), st.none() | st.dictionaries(st.text(), st.text()))
def test_what_is_opened_is_what_was_sealed(headers: list[tuple[str, str]], key: dict[str, str] | None) -> None:
    secrets = Secrets(headers, key)
    assert unseal(keys(NEW), seal(keys(NEW), secrets)) == secrets


def test_nothing_to_seal_needs_no_key() -> None:
    assert seal(keys(), Secrets()) is None
    assert unseal(keys(), None) == Secrets()


def test_an_empty_key_parameter_is_sealed_too() -> None:
    assert unseal(keys(NEW), sealed(keys(NEW), Secrets([], {}))) == Secrets([], {})


def test_the_first_key_seals_and_any_opens() -> None:
    value = sealed(keys(NEW, OLD))
    assert unseal(keys(NEW), value) == SECRETS
    assert unseal(keys(OLD, NEW), value) == SECRETS
    with pytest.raises(SealNotOpened):
        unseal(keys(OLD), value)


def test_blanks_around_keys_do_not_matter() -> None:
    assert unseal(keys(f" {NEW} ", " "), sealed(keys(NEW))) == SECRETS


@pytest.mark.parametrize("none", ["", " , "])
def test_without_a_key_secrets_are_refused_rather_than_kept_in_the_clear(none: str) -> None:
    with pytest.raises(NoSealingKey):
        seal(keys(none), SECRETS)
    with pytest.raises(NoSealingKey):
        unseal(keys(none), sealed(keys(NEW)))


def test_a_seal_that_was_changed_is_not_opened() -> None:
    value = bytearray(sealed(keys(NEW)))
    value[len(value) // 2] ^= 1
    with pytest.raises(SealNotOpened):
        unseal(keys(NEW), bytes(value))


def test_a_database_driver_may_give_the_seal_as_a_view() -> None:
    assert unseal(keys(NEW), memoryview(sealed(keys(NEW)))) == SECRETS


def test_the_same_secrets_are_sealed_differently_each_time() -> None:
    assert sealed(keys(NEW)) != sealed(keys(NEW))


def test_neither_the_seal_nor_the_printed_secrets_show_anything() -> None:
    shown = sealed(keys(NEW)) + repr(SECRETS).encode() + str(keys(NEW)).encode()
    for secret in (b"Bearer", b"abc", b"k3y", b"X-Tenant", NEW.encode()):
        assert secret not in shown
