"""One stack for all scenarios; its workers and its broker are driven through pytest-celery's fixtures."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu import pools
from pytest_celery import CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster, RedisTestBroker

from devstack.provider import SampleProvider
from devstack.stack import Stack
from tests.support.nodes import BrokerContainer, BrokerNode, ProcessNode, WorkerContainer
from tests.support.scene import Scene

WORKERS = ("alpha", "beta")
SETTINGS = {
    "BULK_SUBMIT_LEASE_SECONDS": "3",
    "BULK_SUBMIT_STALL_SECONDS": "20",
    "BULK_SUBMIT_SLICE_SECONDS": "5",
    "BULK_SUBMIT_SWEEP_SECONDS": "1",
    "BULK_SUBMIT_MAX_ATTEMPTS": "3",
    "BULK_SUBMIT_RETRY_DELAY_SECONDS": "0.2",
    "BULK_SUBMIT_FETCH_BACKOFF_SECONDS": "0.05",
    "BULK_SUBMIT_BATCH_LINES": "500",
    "BULK_SUBMIT_POLL_INTERVAL_SECONDS": "1",
}


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Postgres, Redis, API, sweeper and beat, with short leases; workers come with `celery_setup`."""
    with Stack(overrides=SETTINGS) as running:
        ready = [running.launch_api(), *(running.launch_worker(name) for name in WORKERS)]
        running.launch_sweeps()
        for wait in ready:
            wait()
        yield running


@pytest.fixture
def celery_broker(stack: Stack) -> RedisTestBroker:
    """The stack's Redis, which outlives the test."""
    return RedisTestBroker(BrokerContainer(BrokerNode(stack.redis)))


@pytest.fixture
def celery_backend_cluster() -> None:
    """No results are kept."""


@pytest.fixture
def celery_worker_cluster(stack: Stack, celery_setup_app: Celery) -> CeleryWorkerCluster:
    """The stack's workers; those that an earlier test killed are started again."""
    for wait in [stack.launch_worker(name) for name in WORKERS if not stack.child(name).running]:
        wait()
    nodes = [CeleryTestWorker(WorkerContainer(ProcessNode(stack, name)), celery_setup_app) for name in WORKERS]
    return CeleryWorkerCluster(*nodes)


class Setup(CeleryTestSetup):
    """A client of the stack's broker, with connections of its own."""

    @classmethod
    def create_setup_app(cls, celery_setup_config: dict[str, str], celery_setup_app_name: str) -> Celery:
        pools.reset()  # an earlier test may have restarted the broker
        return super().create_setup_app(celery_setup_config, celery_setup_app_name)


@pytest.fixture
def celery_setup_cls() -> type[CeleryTestSetup]:
    """The setup class of this project."""
    return Setup


@pytest.fixture
def scene(stack: Stack, celery_setup: CeleryTestSetup, tmp_path: Path) -> Iterator[Scene]:
    """A provider, and a tenant of its own on the running fleet."""
    served = tmp_path / "served"
    served.mkdir()
    assert celery_setup.ready(control=True)
    with SampleProvider(served) as provider:
        yield Scene(stack, provider, f"t-{uuid.uuid4().hex[:12]}", tmp_path)
