"""Bringing a database to the present schema: `bulk-submit migrate`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.dialects.postgresql import insert

from schema.database import driver_url
from schema.fhir_types import TYPE_NUMBERS
from schema.tables import resource_types


def alembic_config(database_url: str) -> Config:
    """Alembic's configuration, without a file: the migrations live beside this module."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(database_url: str) -> None:
    """Run every migration that is due and name the resource types. Any number of processes may do so at once."""
    command.upgrade(alembic_config(database_url), "head")
    engine = sa.create_engine(driver_url(database_url), poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.execute(
            insert(resource_types).on_conflict_do_nothing(),
            [{"number": number, "name": name} for name, number in TYPE_NUMBERS.items()],
        )
    engine.dispose()
