"""The record of the sweeps: when each was last done, how long it took, what it did. One row for each, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from schema.tables import sweeps


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """The last run that ended well, None in `age_seconds` and `seconds` before the first; `failures` since then.

    `age_seconds` is by the database's clock; `seconds` is how long the run took.
    """

    name: str
    age_seconds: float | None
    seconds: float | None
    report: dict[str, int]
    failures: int


_AGE = sa.func.extract("epoch", sa.func.clock_timestamp() - sweeps.c.finished_at).cast(sa.Double)


def record(connection: sa.Connection, name: str, seconds: float, report: Mapping[str, int]) -> None:
    """Note a run that ended well."""
    values = {"finished_at": sa.func.clock_timestamp(), "seconds": seconds, "report": dict(report), "failures": 0}
    connection.execute(
        insert(sweeps).values(name=name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def record_failure(connection: sa.Connection, name: str) -> None:
    """Note a run that failed."""
    connection.execute(
        insert(sweeps)
        .values(name=name, failures=1)
        .on_conflict_do_update(index_elements=["name"], set_={"failures": sweeps.c.failures + 1})
    )


def records(connection: sa.Connection) -> list[SweepRecord]:
    """Every sweep on record, by name."""
    columns = (sweeps.c.name, _AGE.label("age_seconds"), sweeps.c.seconds, sweeps.c.report, sweeps.c.failures)
    rows = connection.execute(sa.select(*columns).order_by(sweeps.c.name))
    return [SweepRecord(**row._mapping) for row in rows]
