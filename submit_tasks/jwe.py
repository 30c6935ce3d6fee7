"""Opening what was encrypted to us: compact JWE (RFC 7516) to a key of use `enc` of our JWK Set, named by its `kid`."""

from __future__ import annotations

import json
import re
from typing import Any

from jwcrypto.common import JWException
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK, JWKSet

from settings import Settings

KEY_MANAGEMENT = ("ECDH-ES", "ECDH-ES+A256KW", "RSA-OAEP-256")
CONTENT_ENCRYPTION = ("A256GCM",)
MAX_CHARACTERS = 4 * 1024 * 1024

_COMPACT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*){4}")


class NotDecrypted(Exception):  # noqa: N818
    """It cannot be decrypted, or does not hold JSON. The sender encrypts again; the message says how."""


def decrypt(settings: Settings, token: Any) -> Any:
    """The JSON value in a compact JWE (any JSON value in the place of one); raises `NotDecrypted`."""
    if not isinstance(token, str) or len(token) > MAX_CHARACTERS or not _COMPACT.fullmatch(token):
        raise NotDecrypted("the secrets are not a compact JWE")
    jwe = JWE(algs=[*KEY_MANAGEMENT, *CONTENT_ENCRYPTION])
    try:
        jwe.deserialize(token)
        header = jwe.jose_header
    except (JWException, ValueError, TypeError, RecursionError):
        raise NotDecrypted("the secrets are not a compact JWE") from None
    if header.get("alg") not in KEY_MANAGEMENT or header.get("enc") not in CONTENT_ENCRYPTION or "zip" in header:
        allowed = f"{', '.join(KEY_MANAGEMENT)} with {', '.join(CONTENT_ENCRYPTION)}"
        raise NotDecrypted(f"the secrets are not encrypted by one of {allowed}, without compression")
    key = _key(settings, header.get("kid"))
    if key is None:
        raise NotDecrypted(
            "the secrets are not encrypted to a key of this server: take one of use enc, and name its kid"
        )
    try:
        jwe.decrypt(key)
        return json.loads(jwe.payload)
    except (JWException, ValueError, RecursionError):
        raise NotDecrypted("the secrets cannot be decrypted, or are not JSON: encrypt them anew") from None


def _key(settings: Settings, kid: object) -> JWK | None:
    private = settings.private_jwks.get_secret_value()
    keys = JWKSet.from_json(private)["keys"] if private and kid is not None else ()
    return next((key for key in keys if key.get("use") == "enc" and key.get("kid") == kid), None)
