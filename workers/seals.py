"""Sealing what must not lie in the database in the clear: request headers and file encryption keys.

Fernet (AES-128-CBC with HMAC-SHA256, authenticated) by the `cryptography` library; its MultiFernet gives rotation: the
first of `BULK_SUBMIT_SEALING_KEYS` seals, any of them opens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from settings import Settings


class SealError(Exception):
    """Base of what can go wrong with seals."""


class NoSealingKey(SealError):  # noqa: N818
    """Secrets were sent, and no sealing key is set. The operator sets BULK_SUBMIT_SEALING_KEYS."""


class SealNotOpened(SealError):  # noqa: N818
    """No key at hand opens the seal. The operator puts the key that sealed it back into BULK_SUBMIT_SEALING_KEYS."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a kickoff said in confidence. `file_encryption_key` is the parameter's parts: value, and coding if given."""

    headers: list[tuple[str, str]] = field(default_factory=list, repr=False)
    file_encryption_key: dict[str, Any] | None = field(default=None, repr=False)


def _keys(settings: Settings) -> MultiFernet:
    keys = [key.strip() for key in settings.sealing_keys.get_secret_value().split(",") if key.strip()]
    if not keys:
        raise NoSealingKey
    return MultiFernet([Fernet(key) for key in keys])


def seal(settings: Settings, secrets: Secrets) -> bytes | None:
    """The sealed secrets, or None when there are none to seal. Raises `NoSealingKey`."""
    if not secrets.headers and secrets.file_encryption_key is None:
        return None
    return _keys(settings).encrypt(msgspec.json.encode(secrets))


def unseal(settings: Settings, sealed: bytes | None) -> Secrets:
    """What was sealed; raises `NoSealingKey` or `SealNotOpened`."""
    if sealed is None:
        return Secrets()
    try:
        return msgspec.json.decode(_keys(settings).decrypt(bytes(sealed)), type=Secrets)
    except InvalidToken as error:
        raise SealNotOpened from error
