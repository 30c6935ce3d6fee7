"""Servers and databases for every test: started once, given out fresh."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from devstack.servers import EmbeddedPostgres, EmbeddedRedis
from schema.upgrade import upgrade


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A Postgres of this test run, durable as in production."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A Redis of this test run."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> str:
    """The name of a migrated database to copy."""
    upgrade(postgres.create_database("migrated"))
    return "migrated"


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, migrated_template: str) -> str:
    """A fresh, migrated database."""
    return postgres.create_database(f"test_{uuid.uuid4().hex[:12]}", template=migrated_template)


@pytest.fixture
def broker_url(redis_server: EmbeddedRedis) -> str:
    """An empty Redis."""
    redis_server.flush()
    return redis_server.url
