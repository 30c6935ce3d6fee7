"""Keeping a lease while its holder works: a thread with a connection of its own.

A renewal is trusted from the moment before it was sent, on the monotonic clock, for as long as the lease lasts: past
that the lease counts as lost here, whatever the network does, and never later than in the database. The keeper renews
only for a hand that moves. A hand that does not move within the stall limit loses its lease, and if it then still does
not let go, its process ends.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import sqlalchemy as sa
import structlog

from schema import leases
from schema.database import DATABASE_ERRORS
from schema.leases import Lease, LeaseLost
from settings import Settings

log = structlog.get_logger(__name__)


class Keeper:
    """Use as a context around the work on one step; the hand calls `alive` wherever something moves."""

    def __init__(self, engine: sa.Engine, lease: Lease, settings: Settings, *, claimed_at: float) -> None:
        self._engine = engine
        self._lease = lease
        self._seconds = settings.lease_seconds
        self._stall = settings.stall_seconds
        self._trusted_until = claimed_at + self._seconds
        self._last_move = time.monotonic()
        self._lost: str | None = None
        self.drain = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"keeper-{lease.step_id}", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def alive(self) -> None:
        """Say that the hand moved; raises `LeaseLost` if it works for nothing."""
        self._last_move = time.monotonic()
        self.check()

    def check(self) -> None:
        """Raise `LeaseLost` if the hand works for nothing. Waiting is no move."""
        if self._lost is not None:
            raise LeaseLost(self._lost)
        if time.monotonic() >= self._trusted_until:
            raise LeaseLost("not renewed in time")

    def renewed(self, sent_at: float) -> None:
        """A commit renewed the lease; `sent_at` is the monotonic time before it was sent."""
        self._trusted_until = max(self._trusted_until, sent_at + self._seconds)

    def _keep(self) -> None:
        connection: sa.Connection | None = None
        try:
            pause = self._seconds / 3
            while not self._left.wait(pause):
                pause = self._seconds / 3
                if time.monotonic() - self._last_move > self._stall:
                    self._give_up()
                    return
                try:
                    connection = connection or self._engine.connect()
                    sent_at = time.monotonic()
                    left = max(int(1000 * (self._trusted_until - sent_at)), 1)
                    with connection.begin():
                        connection.execute(sa.text(f"SET LOCAL statement_timeout = {left}"))
                        orders = leases.renew(connection, self._lease, self._seconds)
                    self.renewed(sent_at)
                    self.drain = self.drain or orders.drain
                    if orders.cancelled:
                        raise LeaseLost("the manifest is not live any more")
                except LeaseLost as loss:
                    self._lost = str(loss)
                    return
                except DATABASE_ERRORS as error:
                    pause = self._seconds / 20
                    log.warning("heartbeat failed", step=self._lease.step_id, error=type(error).__name__)
                    if connection is not None:
                        connection.invalidate()
                        connection.close()
                        connection = None
        finally:
            if connection is not None:
                connection.close()

    def _give_up(self) -> None:
        """The hand hangs: let the lease run out, and end the process if the hand is still there by then."""
        self._lost = f"the hand did not move for {self._stall:g} seconds"
        log.error("hand does not move; its lease is given up", step=self._lease.step_id, seconds=self._stall)
        if not self._left.wait(self._seconds):
            os.kill(os.getpid(), signal.SIGKILL)
