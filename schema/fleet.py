"""The worker nodes of the fleet: who is up, with how many slots, and who was asked to leave."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from schema.tables import STEP_KINDS, fleet_workers

SILENT_SECONDS = 30
"""A node not seen for so long does not count as a pair of hands any more."""

STEPS_COUNTED = 100_000
"""Where counting ends, so that it takes no longer than a moment."""


def _interval(seconds: float) -> sa.ColumnElement[Any]:
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)


_ALIVE = fleet_workers.c.last_seen_at > sa.func.clock_timestamp() - _interval(SILENT_SECONDS)

# Plan: steps_open_idx or a scan, ended at the limit; manifests hashed.
_STEPS = sa.text("""
SELECT kind, count(*) FILTER (WHERE leased) AS leased,
       count(*) FILTER (WHERE NOT leased AND ready_at <= statement_timestamp()) AS due
FROM (
    SELECT s.kind, s.ready_at, coalesce(s.lease_expires_at > statement_timestamp(), false) AS leased
    FROM steps s
    JOIN manifests m ON m.tenant_id = s.tenant_id AND m.id = s.manifest_id AND m.status IN ('pending', 'processing')
    WHERE s.state = 'ready'
    LIMIT :limit
) open
GROUP BY kind
""")


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
    with connection.begin():
        return int(
            connection.execute(
                sa.select(sa.func.coalesce(sa.func.sum(fleet_workers.c.slots), 0)).where(_ALIVE)
            ).scalar_one()
        )


def forget_silent(connection: sa.Connection, seconds: float, limit: int) -> list[str]:
    """Strike out up to `limit` nodes not seen for `seconds`, the longest silent first. Returns their names."""
    silent = (
        sa.select(fleet_workers.c.name)
        .where(fleet_workers.c.last_seen_at <= sa.func.clock_timestamp() - _interval(seconds))
        .order_by(fleet_workers.c.last_seen_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    struck = connection.execute(
        fleet_workers.delete().where(fleet_workers.c.name.in_(silent)).returning(fleet_workers.c.name)
    )
    return sorted(struck.scalars())


@dataclass(frozen=True, slots=True)
class Load:
    """What there is to do, and who is there to do it. `due` and `leased` count steps, by their kind."""

    due: dict[str, int]
    leased: dict[str, int]
    workers: int
    slots: int


def load(connection: sa.Connection) -> Load:
    """Steps that are due or leased, no more than `STEPS_COUNTED` of them, and the nodes seen lately."""
    due, leased = dict.fromkeys(STEP_KINDS, 0), dict.fromkeys(STEP_KINDS, 0)
    for row in connection.execute(_STEPS, {"limit": STEPS_COUNTED}):
        due[row.kind], leased[row.kind] = row.due, row.leased
    seen = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(fleet_workers.c.slots), 0)).where(_ALIVE)
    ).one()
    return Load(due, leased, *map(int, seen))


def workers(connection: sa.Connection) -> list[FleetWorker]:
    """Every node on record, by name. Commits."""
    with connection.begin():
        return [FleetWorker(**row._mapping) for row in connection.execute(sa.select(fleet_workers).order_by("name"))]
