"""Alembic's entry: upgrades run under an advisory lock, so that several processes may start at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from schema.database import driver_url
from schema.tables import metadata
from settings import settings

MIGRATION_LOCK = -0x62756C6B  # any fixed number below zero: above it are the steps' locks

configured = context.config.get_main_option("sqlalchemy.url") or str(settings().database_url)
engine = sa.create_engine(driver_url(configured), poolclass=sa.pool.NullPool)
with engine.connect() as connection:
    connection.execute(sa.select(sa.func.pg_advisory_lock(MIGRATION_LOCK)))
    connection.commit()
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
