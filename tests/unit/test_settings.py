"""Settings from the environment: defaults that work, bad values that are named, secrets that are not shown."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr, ValidationError

import settings
from settings import Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().startswith("BULK_SUBMIT_"):
            monkeypatch.delenv(name)
    yield
    settings.settings.cache_clear()


def test_an_empty_environment_gives_settings_that_hold_together() -> None:
    defaults = Settings()
    assert defaults.stall_seconds >= defaults.lease_seconds
    assert defaults.batch_bytes <= defaults.max_file_bytes
    assert defaults.sweep_seconds < defaults.lease_seconds


def test_the_environment_is_read_under_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULK_SUBMIT_BATCH_LINES", "7")
    monkeypatch.setenv("BATCH_BYTES", "7")
    assert (Settings().batch_lines, Settings().batch_bytes) == (7, 8 * settings.MEBIBYTE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_SECONDS", "half a minute"),
        ("LEASE_SECONDS", "0"),
        ("STALL_SECONDS", "-1"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_ATTEMPTS", "1.5"),
        ("BATCH_LINES", ""),
        ("MAX_LINE_BYTES", "16 MB"),
        ("MAX_COMPRESSION_RATIO", "1"),
        ("FETCH_RETRIES", "-1"),
        ("RECEIPT_TTL_SECONDS", "0"),
    ],
)
def test_a_bad_value_is_refused_and_its_variable_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"BULK_SUBMIT_{name}", value)
    with pytest.raises(ValidationError) as refusal:
        Settings()
    assert [error["loc"] for error in refusal.value.errors()] == [(name.lower(),)]
    assert name.lower() in str(refusal.value)


def test_a_stall_limit_below_the_lease_is_refused_and_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULK_SUBMIT_STALL_SECONDS", "29")
    with pytest.raises(ValidationError, match="stall_seconds must not be shorter than lease_seconds"):
        Settings()


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seal, jwks = Fernet.generate_key().decode(), '{"keys":[{"kty":"oct","k":"aGlkZGVu"}]}'
    monkeypatch.setenv("BULK_SUBMIT_SEALING_KEYS", seal)
    monkeypatch.setenv("BULK_SUBMIT_PRIVATE_JWKS", jwks)
    given = Settings()
    for shown in (repr(given), str(given), str(given.model_dump()), given.model_dump_json()):
        assert seal not in shown
        assert "aGlkZGVu" not in shown
    assert given.sealing_keys == SecretStr(seal)


def test_passwords_in_urls_are_not_shown() -> None:
    given = Settings(database_url="postgresql://u:hidden@db/x", broker_url="redis://:hidden@broker/0")
    assert "hidden" not in repr(given)


def test_a_refusal_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULK_SUBMIT_SEALING_KEYS", "hidden")
    monkeypatch.setenv("BULK_SUBMIT_STALL_SECONDS", "1")
    with pytest.raises(ValidationError) as refusal:
        Settings()
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://db/x"),
        ("BROKER_URL", "amqp://broker"),
        ("ARTIFACT_STORE_URL", "/var/lib/receipts"),
        ("PUBLIC_URL", "fhir.example.org"),
        ("SEALING_KEYS", "too-short"),
        ("PRIVATE_JWKS", "{}"),
        ("PRIVATE_JWKS", "not json"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"BULK_SUBMIT_{name}", value)
    with pytest.raises(ValidationError) as refusal:
        Settings()
    [fault] = refusal.value.errors()
    assert fault["loc"] == (name.lower(),)
    assert value not in str(refusal.value)


def test_settings_do_not_change_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.settings.cache_clear()
    first = settings.settings()
    monkeypatch.setenv("BULK_SUBMIT_BATCH_LINES", "7")
    assert settings.settings() is first
    with pytest.raises(ValidationError, match="frozen"):
        first.batch_lines = 7  # type: ignore[misc]
