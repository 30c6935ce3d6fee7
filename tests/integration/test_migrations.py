"""Migrations on a real Postgres: several processes at once, a second time, and the same schema as the tables say."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from devstack.servers import EmbeddedPostgres
from schema.database import driver_url
from schema.fhir_types import TYPE_NUMBERS
from schema.tables import metadata
from schema.upgrade import upgrade

WITHOUT_TENANT = {
    "tenants": "is the tenant",
    "resource_versions": "the tenant is the first four bytes of `key`",
    "resource_types": "names of type numbers, the same for everybody",
    "fleet_workers": "nodes serve every tenant",
    "sweeps": "so do they",
}

UPGRADE_ON_CALL = """
import sys
from schema.upgrade import upgrade

print("ready", flush=True)
sys.stdin.readline()
upgrade(sys.argv[1])
"""

# What a table is made of, in Postgres's own words.
CATALOGUE = {
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
               pg_get_expr(d.adbin, d.adrelid)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'alembic_version'""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'""",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'",
    "options": """
        SELECT relname, reloptions::text, obj_description(oid) FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'""",
}


def connect(database_url: str) -> sa.Connection:
    return sa.create_engine(driver_url(database_url), poolclass=sa.pool.NullPool).connect()


def catalogue(database_url: str) -> dict[str, list[Any]]:
    with connect(database_url) as connection:
        return {
            name: sorted(str(tuple(row)) for row in connection.exec_driver_sql(query))
            for name, query in CATALOGUE.items()
        }


@pytest.fixture
def empty_database_url(postgres: EmbeddedPostgres) -> str:
    return postgres.create_database(f"test_{uuid.uuid4().hex[:12]}")


def test_the_migrated_schema_is_the_one_the_tables_describe(database_url: str) -> None:
    with connect(database_url) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_the_migrations_make_what_the_tables_would_make_down_to_every_check(
    database_url: str, empty_database_url: str
) -> None:
    with connect(empty_database_url) as connection, connection.begin():
        metadata.create_all(connection)
    assert catalogue(database_url) == catalogue(empty_database_url)


def test_processes_that_upgrade_at_once_do_not_collide(empty_database_url: str, database_url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE_ON_CALL, empty_database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    assert [process.stdout and process.stdout.readline() for process in processes] == [b"ready\n"] * 4
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=60)[1].decode(), process.returncode) for process in processes]
    assert [code for _, code in ends] == [0] * 4, ends
    assert catalogue(empty_database_url) == catalogue(database_url)
    with connect(empty_database_url) as connection:
        assert connection.exec_driver_sql("SELECT name FROM tenants").scalars().all() == ["default"]
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar_one() == 1


def test_a_second_upgrade_changes_nothing(database_url: str) -> None:
    def everything() -> dict[str, list[str]]:
        with connect(database_url) as connection:
            return {
                name: sorted(connection.exec_driver_sql(f"SELECT row::text || row.xmin FROM {name} row").scalars())
                for name in [*metadata.tables, "alembic_version"]
            }

    before, schema_before = everything(), catalogue(database_url)
    upgrade(database_url)
    assert everything() == before
    assert catalogue(database_url) == schema_before


def test_every_type_number_has_its_name_in_the_database(database_url: str) -> None:
    with connect(database_url) as connection:
        named = connection.exec_driver_sql("SELECT name, number FROM resource_types").all()
    assert {row.name: row.number for row in named} == TYPE_NUMBERS


def test_the_tenant_is_in_every_key_but_those_with_a_reason() -> None:
    without = {
        table.name
        for table in metadata.tables.values()
        for key in [table.primary_key, *table.constraints]
        if isinstance(key, sa.PrimaryKeyConstraint | sa.UniqueConstraint) and "tenant_id" not in key.columns
    }
    assert without == set(WITHOUT_TENANT)


def test_every_reference_between_tables_stays_within_the_tenant() -> None:
    for table in metadata.tables.values():
        for reference in table.foreign_key_constraints:
            assert "tenant_id" in reference.columns, f"{table.name}: {reference.column_keys}"


def test_ids_counters_lines_and_offsets_are_64_bit_and_times_have_a_zone() -> None:
    small = {
        "tenant_id": "few tenants; four bytes of a resource's key",
        "tenants.id": "the same",
        "tenants.max_leased_steps": "a cap",
        "tenants.max_active_submissions": "a cap",
        "steps.attempts": "capped by the settings",
        "generation": "how often a file was started over",
        "artifacts.part": "a million lines or more each",
        "fleet_workers.pid": "the system's",
        "fleet_workers.slots": "of one node",
        "resource_types.number": "two bytes of a resource's key",
        "resource_versions.op": "one of five",
        "egress_log.status": "an HTTP status",
    }
    for table in metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, sa.Integer) and not isinstance(column.type, sa.BigInteger):
                assert {column.name, f"{table.name}.{column.name}"} & small.keys(), f"{table.name}.{column.name}"
            if isinstance(column.type, sa.DateTime):
                assert column.type.timezone, f"{table.name}.{column.name}"


def test_a_password_with_special_characters_reaches_the_database(empty_database_url: str) -> None:
    upgrade(empty_database_url.replace("postgres@", "postgres:p%40ss%25@"))
    with connect(empty_database_url) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar_one() == 1
