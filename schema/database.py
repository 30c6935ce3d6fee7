"""Connections to Postgres, and what an error from it means.

Rooms above pass SQLAlchemy connections around; the hot statements reach the psycopg connection below them
(`driver(connection)`). Time-outs are set on every session: they are the second net under the lease protocol, whose
first one is that sessions of lost leases are terminated (`schema/leases.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import psycopg
import sqlalchemy as sa
from psycopg import errors
from sqlalchemy.pool import NullPool

from settings import Settings

LOCK_TIMEOUT_SECONDS = 10
IDLE_IN_TRANSACTION_SECONDS = 60


def driver_url(database_url: str) -> sa.URL:
    """The libpq URL as SQLAlchemy spells it, for the psycopg 3 driver."""
    return sa.make_url(database_url).set(drivername="postgresql+psycopg")


def create_engine(
    settings: Settings, *, application: str, pooled: bool, answer_within: float | None = None
) -> sa.Engine:
    """An engine for one process.

    `application` is shown in `pg_stat_activity`. `pooled` suits a server with many short requests; a worker keeps its
    two connections itself. `answer_within`, in seconds, ends what takes longer: connecting, a statement, a network that
    acknowledges nothing. An engine must not cross a fork: make it after.
    """
    connect_seconds = min(settings.connect_timeout_seconds, answer_within or settings.connect_timeout_seconds)
    statement_milliseconds = int(1000 * (answer_within or 0))
    options: dict[str, Any] = (
        {"pool_size": 10, "max_overflow": 20, "pool_pre_ping": True} if pooled else {"poolclass": NullPool}
    )
    return sa.create_engine(
        driver_url(settings.database_url),
        hide_parameters=True,  # an error's message may be logged; what a submitter sent may not
        connect_args={
            "application_name": application,
            "connect_timeout": max(int(connect_seconds), 1),
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": statement_milliseconds or 30_000,
            "options": f"-c lock_timeout={LOCK_TIMEOUT_SECONDS}s -c statement_timeout={statement_milliseconds}ms "
            f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_SECONDS}s -c TimeZone=UTC",
        },
        **options,
    )


def driver(connection: sa.Connection) -> psycopg.Connection[Any]:
    """The psycopg connection under a SQLAlchemy one, inside the same transaction."""
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def _original(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, sa.exc.DBAPIError) else error


def is_conflict(error: BaseException) -> bool:
    """Whether somebody else wrote the same rows: nothing is wrong, the transaction is to be done again."""
    return isinstance(
        _original(error),
        errors.UniqueViolation | errors.DeadlockDetected | errors.SerializationFailure | errors.LockNotAvailable,
    )


def is_disconnect(error: BaseException) -> bool:
    """Whether the session is gone, so that what became of its last statement is not known."""
    original = _original(error)
    if isinstance(
        original,
        errors.AdminShutdown | errors.CrashShutdown | errors.CannotConnectNow | errors.IdleInTransactionSessionTimeout,
    ):
        return True
    return (
        isinstance(original, psycopg.OperationalError | psycopg.InterfaceError)
        and getattr(original, "sqlstate", None) is None
    )


RETRY_PAUSES_SECONDS = (0.1, 0.3, 0.6)

Result = TypeVar("Result")


def passes(error: BaseException) -> bool:
    """Whether the same may succeed in a moment: somebody else was in the way, or the database is away."""
    return is_conflict(error) or is_disconnect(error)


def retried(attempt: Callable[[], Result], pauses: Sequence[float] = RETRY_PAUSES_SECONDS) -> Result:
    """What `attempt` returns, tried again after each pause, in seconds, while its error is one that `passes`."""
    for pause in pauses:
        try:
            return attempt()
        except DATABASE_ERRORS as error:
            if not passes(error):
                raise
        time.sleep(pause)
    return attempt()


DATABASE_ERRORS = (psycopg.Error, sa.exc.SQLAlchemyError)
"""What a statement may raise: SQLAlchemy wraps its own, the hot paths raise psycopg's."""
