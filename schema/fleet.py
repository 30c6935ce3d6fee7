"""The worker nodes of the fleet: who is up, with how many slots, and who was asked to leave."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from schema.tables import fleet_workers

SILENT_SECONDS = 30
"""A node not seen for so long does not count as a pair of hands any more."""


@dataclass(frozen=True, slots=True)
class FleetWorker:
    """A Celery worker node."""

    name: str
    pid: int
    slots: int
    drain: bool
    started_at: datetime
    last_seen_at: datetime


def report(connection: sa.Connection, name: str, pid: int, slots: int, *, started: bool) -> bool:
    """Say that the node is up; `started` begins its record anew. Returns whether it is asked to leave. Commits."""
    now = sa.func.clock_timestamp()
    values = {"pid": pid, "slots": slots, "last_seen_at": now}
    fresh = {"started_at": now, "drain": False} if started else {}
    with connection.begin():
        return bool(
            connection.execute(
                insert(fleet_workers)
                .values(name=name, pid=pid, slots=slots)
                .on_conflict_do_update(index_elements=["name"], set_={**values, **fresh})
                .returning(fleet_workers.c.drain)
            ).scalar_one()
        )


def ask_to_leave(connection: sa.Connection, name: str) -> list[str]:
    """Ask the node of that name, or all whose name before the @ it is, to leave. Returns their full names. Commits."""
    named = sa.or_(fleet_workers.c.name == name, sa.func.split_part(fleet_workers.c.name, "@", 1) == name)
    with connection.begin():
        asked = connection.execute(
            fleet_workers.update().where(named).values(drain=True).returning(fleet_workers.c.name)
        )
        return sorted(asked.scalars())


def leave(connection: sa.Connection, name: str) -> None:
    """Say that the node has ended. Commits."""
    with connection.begin():
        connection.execute(fleet_workers.delete().where(fleet_workers.c.name == name))


def slots(connection: sa.Connection) -> int:
    """How many steps the nodes seen lately can work on at once. Commits."""
    alive = fleet_workers.c.last_seen_at > sa.func.clock_timestamp() - sa.func.make_interval(
        0, 0, 0, 0, 0, 0, SILENT_SECONDS
    )
    with connection.begin():
        return int(
            connection.execute(
                sa.select(sa.func.coalesce(sa.func.sum(fleet_workers.c.slots), 0)).where(alive)
            ).scalar_one()
        )


def workers(connection: sa.Connection) -> list[FleetWorker]:
    """Every node on record, by name. Commits."""
    with connection.begin():
        return [FleetWorker(**row._mapping) for row in connection.execute(sa.select(fleet_workers).order_by("name"))]
