"""Everything an operator can set, read from the environment (prefix ``BULK_SUBMIT_``).

One frozen object, `settings()`, cached per process. Durations are seconds, sizes are bytes. Secrets are
`SecretStr`, and URLs that may hold one are left out, so that printing the settings never prints them.
"""

from __future__ import annotations

from functools import cache
from urllib.parse import urlsplit

from cryptography.fernet import Fernet
from jwcrypto.common import JWException
from jwcrypto.jwk import JWKSet
from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024
SCHEMES = {
    "database_url": ("postgresql", "postgres"),
    "broker_url": ("redis", "rediss"),
    "artifact_store_url": ("file", "s3", "gs", "az"),
    "public_url": ("http", "https"),
}


class Settings(BaseSettings):
    """The environment's answers, checked once at start-up."""

    model_config = SettingsConfigDict(env_prefix="BULK_SUBMIT_", frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: str = Field(
        "postgresql://postgres@127.0.0.1:5432/postgres",
        repr=False,
        description="libpq URL of the Postgres (15 or later) that holds the store and every lease.",
    )
    broker_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis or Valkey URL of the Celery broker. Holds nothing that matters.",
    )
    artifact_store_url: str = Field(
        "file:///var/lib/bulk-submit/artifacts",
        description="Where receipts are kept: file://, s3://, gs:// or az:// (whatever obstore understands).",
    )
    spool_directory: str = Field("", description="Local directory for files being built; empty: the system's own.")
    public_url: str = Field(
        "http://127.0.0.1:8000",
        description="Scheme, host and path prefix under which providers reach the API.",
    )

    sealing_keys: SecretStr = Field(
        SecretStr(""),
        description="Fernet keys, comma separated, that seal request headers and file keys at rest. The first seals, "
        "all of them open: put a new key in front to rotate, and drop the last once nothing is sealed with it.",
    )
    private_jwks: SecretStr = Field(
        SecretStr(""),
        description="Our private JWK Set (JSON). Keys with use=enc open what senders encrypt to us.",
    )

    lease_seconds: float = Field(30.0, gt=0, description="How long a lease lasts without a renewal.")
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="A hand that reads no byte, sends no row and commits nothing for so long loses its lease.",
    )
    slice_seconds: float = Field(30.0, gt=0, description="How long a hand goes on before it lets others have a turn.")
    max_attempts: int = Field(5, ge=1, description="Claims of a step without progress before it fails.")
    retry_delay_seconds: float = Field(2.0, gt=0, description="Delay before the second attempt; doubles each time.")
    retry_delay_cap_seconds: float = Field(300.0, gt=0, description="Longest delay between attempts.")
    sweep_seconds: float = Field(5.0, gt=0, description="Period of the sweep of leases.")
    fleet_forget_seconds: float = Field(
        86400.0, ge=60, description="A worker node not seen for so long is struck out of the fleet's record."
    )

    batch_lines: int = Field(4000, ge=1, description="Lines in one transaction.")
    batch_bytes: int = Field(8 * MEBIBYTE, ge=1, description="Bytes of lines in one transaction.")
    max_line_bytes: int = Field(16 * MEBIBYTE, ge=1024, description="A longer line is an error of that line.")
    max_file_bytes: int = Field(1 << 40, ge=1, description="Decoded bytes of one file.")
    max_manifest_bytes: int = Field(16 * MEBIBYTE, ge=1, description="Decoded bytes of one manifest page.")
    max_manifest_pages: int = Field(1000, ge=1, description="Pages that one manifest may link together.")
    max_manifest_files: int = Field(100_000, ge=1, description="Files on all pages of one manifest.")
    max_compression_ratio: int = Field(200, ge=2, description="Decoded over received bytes, past the first 16 MiB.")

    connect_timeout_seconds: float = Field(10.0, gt=0, description="For a connection to a provider.")
    read_timeout_seconds: float = Field(
        30.0, gt=0, description="Longest silence of a provider in the middle of a body."
    )
    fetch_retries: int = Field(3, ge=0, description="Retries of one request inside one attempt.")
    fetch_backoff_seconds: float = Field(0.5, gt=0, description="First back-off; doubles each time, with jitter.")
    retry_after_cap_seconds: float = Field(
        60.0, gt=0, description="Longest Retry-After of a provider that is believed."
    )

    receipt_part_lines: int = Field(1_000_000, ge=1, description="Lines in one part of a receipt.")
    receipt_part_bytes: int = Field(512 * MEBIBYTE, ge=1024, description="Bytes, before compression, in one part.")
    receipt_ttl_seconds: float = Field(7 * 86400.0, gt=0, description="How long receipts and poll URLs are kept.")
    idle_submission_seconds: float = Field(
        30 * 86400.0,
        gt=0,
        description="A submission left open with which nothing happened for so long is stopped, so that it can expire.",
    )
    orphan_grace_seconds: float = Field(
        3600.0,
        gt=0,
        description="How long an unpublished object is kept: longer than the upload of a frozen worker may take.",
    )
    log_ttl_seconds: float = Field(30 * 86400.0, gt=0, description="How long the logs of leases and requests are kept.")
    retention_sweep_seconds: float = Field(
        120.0, gt=0, description="Period of the sweeps that delete what is past its time."
    )
    poll_interval_seconds: int = Field(5, ge=1, description="Retry-After of an unfinished poll.")

    @field_validator("database_url", "broker_url", "artifact_store_url", "public_url")
    @classmethod
    def _known_scheme(cls, url: str, info: ValidationInfo) -> str:
        schemes = SCHEMES[str(info.field_name)]
        if urlsplit(url).scheme not in schemes:
            raise ValueError(f"not a URL that begins with one of {', '.join(f'{scheme}://' for scheme in schemes)}")
        return url

    @field_validator("sealing_keys")
    @classmethod
    def _fernet_keys(cls, keys: SecretStr) -> SecretStr:
        for number, key in enumerate(keys.get_secret_value().split(","), 1):
            try:
                if key.strip():
                    Fernet(key.strip())
            except ValueError:
                raise ValueError(f"key {number} is not a Fernet key (32 bytes, URL-safe base64)") from None
        return keys

    @field_validator("private_jwks")
    @classmethod
    def _jwk_set(cls, jwks: SecretStr) -> SecretStr:
        if jwks.get_secret_value():
            try:
                JWKSet.from_json(jwks.get_secret_value())
            except (JWException, ValueError, TypeError, AttributeError):
                raise ValueError("not a JWK Set (RFC 7517) in JSON") from None
        return jwks

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.stall_seconds < self.lease_seconds:
            raise ValueError("stall_seconds must not be shorter than lease_seconds")
        return self


@cache
def settings() -> Settings:
    """The process's settings; raises `pydantic.ValidationError` that names the variable at fault."""
    return Settings()
