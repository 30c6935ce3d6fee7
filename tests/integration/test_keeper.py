"""A lease kept while its holder works: renewed in time, given up when it is lost, cancelled, or the hand hangs."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from devstack.servers import free_port
from devstack.stack import wait_until
from schema import leases
from schema.database import create_engine
from schema.leases import Lease, LeaseLost
from settings import Settings
from tests.support.stage import Stage
from workers.keeper import Keeper

LEASE_SECONDS = 1.5


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with Stage(Settings(database_url=database_url, lease_seconds=LEASE_SECONDS)) as stage:
        yield stage


@pytest.fixture
def keeper_engine(stage: Stage) -> sa.Engine:
    return create_engine(stage.settings, application="test keeper", pooled=False)


@pytest.fixture
def lease(stage: Stage) -> Lease:
    """A lease as short as the settings say."""
    stage.add_manifest()
    return stage.claim("node@host/1", seconds=LEASE_SECONDS)


def ran_out(stage: Stage) -> bool:
    return bool(stage.rows("SELECT 1 FROM steps WHERE lease_expires_at <= clock_timestamp()"))


def threads_of(lease: Lease) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == f"keeper-{lease.step_id}"]


def lost(keeper: Keeper) -> bool:
    try:
        keeper.alive()
    except LeaseLost:
        return True
    return False


def test_a_lease_outlives_its_seconds_while_it_is_kept_and_no_longer(
    stage: Stage, keeper_engine: sa.Engine, lease: Lease
) -> None:
    claimed_at = time.monotonic()
    with Keeper(keeper_engine, lease, stage.settings, claimed_at=claimed_at) as keeper:

        def two_leases_later() -> bool:
            keeper.alive()
            assert not ran_out(stage)
            return time.monotonic() > claimed_at + 2 * LEASE_SECONDS

        wait_until(two_leases_later, "two leases have gone by", seconds=10)
        assert not keeper.drain
        assert leases.claim_next(stage.connection, "test/2", 30, 0) is None
    wait_until(lambda: ran_out(stage), "the lease runs out once nobody keeps it", seconds=10)
    wait_until(lambda: not threads_of(lease), "the keeper ends", seconds=10)
    assert stage.claim().step_id == lease.step_id


def test_a_holder_learns_that_another_has_claimed_its_step(
    stage: Stage, keeper_engine: sa.Engine, lease: Lease
) -> None:
    with Keeper(keeper_engine, lease, stage.settings, claimed_at=time.monotonic() + 3600) as keeper:
        stage.expire(lease)
        stage.claim("test/2")
        wait_until(lambda: lost(keeper), "the work is told", seconds=10)
        wait_until(lambda: not threads_of(lease), "the keeper ends", seconds=10)
    assert stage.rows("SELECT worker_id FROM steps WHERE worker_id IS NOT NULL") == [("test/2",)]


def test_a_holder_learns_that_its_manifest_was_stopped(stage: Stage, keeper_engine: sa.Engine, lease: Lease) -> None:
    with Keeper(keeper_engine, lease, stage.settings, claimed_at=time.monotonic() + 3600) as keeper:
        keeper.alive()
        stage.execute("UPDATE manifests SET status = 'stopped'")
        wait_until(lambda: lost(keeper), "the work is told", seconds=10)


def test_a_holder_learns_that_its_node_is_to_leave_and_keeps_its_lease_until_then(
    stage: Stage, keeper_engine: sa.Engine, lease: Lease
) -> None:
    stage.execute("INSERT INTO fleet_workers (name, pid, slots, drain) VALUES ('node@host', 1, 1, true)")
    with Keeper(keeper_engine, lease, stage.settings, claimed_at=time.monotonic()) as keeper:
        wait_until(lambda: keeper.drain, "the work is told", seconds=10)
        keeper.alive()
    assert not ran_out(stage)


def test_a_heartbeat_cut_off_is_taken_up_on_a_new_connection(
    stage: Stage, keeper_engine: sa.Engine, lease: Lease
) -> None:
    sessions = "FROM pg_stat_activity WHERE application_name = 'test keeper' AND datname = current_database()"
    with Keeper(keeper_engine, lease, stage.settings, claimed_at=time.monotonic()) as keeper:
        wait_until(lambda: stage.rows(f"SELECT 1 {sessions}"), "the keeper has connected", seconds=10)
        [(first, _)] = stage.rows(f"SELECT pid, pg_terminate_backend(pid) {sessions}")
        wait_until(lambda: stage.rows(f"SELECT 1 {sessions} AND pid <> {first}"), "it connects again", seconds=10)
        claimed_at = time.monotonic()
        wait_until(lambda: time.monotonic() > claimed_at + 1.5 * LEASE_SECONDS, "a lease has gone by", seconds=10)
        keeper.alive()
        assert not ran_out(stage)
    wait_until(lambda: not stage.rows(f"SELECT 1 {sessions}"), "its connection is closed", seconds=10)


def test_a_lease_that_cannot_be_renewed_counts_as_lost_when_its_seconds_are_over(stage: Stage, lease: Lease) -> None:
    nowhere = stage.settings.model_copy(update={"database_url": f"postgresql://postgres@127.0.0.1:{free_port()}/none"})
    engine = create_engine(nowhere, application="test keeper", pooled=False)
    claimed_at = time.monotonic()
    with Keeper(engine, lease, stage.settings, claimed_at=claimed_at) as keeper:
        keeper.alive()
        wait_until(lambda: lost(keeper), "the work is told", seconds=10)
        assert time.monotonic() - claimed_at >= LEASE_SECONDS


def test_a_commit_that_renewed_the_lease_is_trusted_from_before_it_was_sent(
    stage: Stage, keeper_engine: sa.Engine, lease: Lease
) -> None:
    now = time.monotonic()
    keeper = Keeper(keeper_engine, lease, stage.settings, claimed_at=now - 2 * LEASE_SECONDS)
    assert lost(keeper)
    keeper.renewed(now - 1.5 * LEASE_SECONDS)
    assert lost(keeper)
    keeper.renewed(time.monotonic() + 3600)
    keeper.renewed(now)
    assert not lost(keeper)


def hang(database_url: str, lease: Lease) -> None:
    """A hand that never moves again."""
    settings = Settings(database_url=database_url, lease_seconds=LEASE_SECONDS, stall_seconds=LEASE_SECONDS)
    engine = create_engine(settings, application="test keeper", pooled=False)
    with Keeper(engine, lease, settings, claimed_at=time.monotonic()):
        threading.Event().wait()


def stumble(database_url: str, lease: Lease) -> None:
    """A hand that does not move for longer than it may, and then tries to go on: it is told, and leaves with code 3."""
    settings = Settings(database_url=database_url, lease_seconds=3, stall_seconds=3)
    engine = create_engine(settings, application="test keeper", pooled=False)
    hasty = settings.model_copy(update={"stall_seconds": 0.5})
    began = time.monotonic()
    with Keeper(engine, lease, hasty, claimed_at=began + 3600) as keeper:
        wait_until(lambda: time.monotonic() > began + 2.5, "the stall limit has passed")
        if lost(keeper):
            raise SystemExit(3)


def in_process(work: Callable[[str, Lease], None], stage: Stage, lease: Lease) -> int | None:
    """Exit code of a process that did it."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(stage.settings.database_url, lease))
    process.start()
    process.join(30)
    return process.exitcode


def test_a_hand_that_comes_back_after_it_hung_is_told_that_its_lease_is_lost(stage: Stage, lease: Lease) -> None:
    assert in_process(stumble, stage, lease) == 3


def test_a_hand_that_hangs_loses_its_lease_and_then_its_process(stage: Stage, lease: Lease) -> None:
    assert in_process(hang, stage, lease) == -signal.SIGKILL
    assert ran_out(stage)
    assert stage.claim().step_id == lease.step_id
