"""Workers killed and frozen, Redis emptied, Postgres restarted, in the middle: nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal

import pytest
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from devstack.provider import Fault
from tests.support.scene import Receipts, Scene, bulk_submit, patients
from workers.audit import audit

LINES = 6000


def _node(setup: CeleryTestSetup, name: str) -> CeleryTestWorker:
    [node] = [node for node in setup.worker_cluster if node.name() == name]
    return node


def _in_the_middle_of_a_file(scene: Scene) -> tuple[str, list[dict[str, object]]]:
    """Submit one file that stalls at its half, and wait until a worker has committed lines of it."""
    lines = patients(LINES)
    stalled = scene.stall(scene.serve("p.ndjson", lines))
    scene.submit(scene.manifest("p.ndjson"))
    scene.wait_for_lines()
    assert scene.committed_lines() < LINES
    holder = scene.holder()
    assert stalled.applied == 1
    return holder, lines


def _every_line_once(scene: Scene, receipts: Receipts, lines: list[dict[str, object]]) -> None:
    assert receipts.actions() == {"created": len(lines)}
    assert scene.differences(lines) == []
    assert scene.versions() == len(lines)
    assert receipts.errors == []
    assert [offender for check in audit(scene.stack.settings) for offender in check.offenders] == []


def test_killed_worker_is_replaced(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    holder, lines = _in_the_middle_of_a_file(scene)
    committed = scene.committed_lines()
    _node(celery_setup, holder).kill()
    receipts = scene.wait()

    _every_line_once(scene, receipts, lines)
    ranges = [request.headers.get("Range") for request in scene.provider.requests if request.path == "/p.ndjson"]
    assert ranges[0] is None
    assert ranges[-1] is not None, "the second worker read the file from its start again"
    assert committed > 0
    workers = scene.rows(
        "SELECT DISTINCT split_part(worker_id, '@', 1) FROM lease_events"
        " WHERE tenant_id = %(tenant)s AND event = 'claimed'"
    )
    assert len(workers) == 2


def test_frozen_worker_changes_nothing_when_it_wakes(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    holder, lines = _in_the_middle_of_a_file(scene)
    frozen = _node(celery_setup, holder)
    frozen.kill("SIGSTOP")
    try:
        receipts = scene.wait()
        _every_line_once(scene, receipts, lines)
        before = _everything(scene)
    finally:
        asleep = len(frozen.logs())
        scene.provider.clear()
        frozen.kill("SIGCONT")
    scene.wait_for(lambda: '"lease lost"' in frozen.logs()[asleep:], "the woken worker notices")

    assert _everything(scene) == before
    again = scene.run(scene.manifest(scene.serve("q.ndjson", patients(10, "q")), name="q.json"), "two")
    assert again.actions() == {"created": 10}


def test_file_that_kills_its_workers_fails_and_the_rest_goes_on(scene: Scene) -> None:
    good = patients(500, "good")
    scene.provider.add(Fault(scene.serve("poison.ndjson", patients(500, "bad")), stall_after=100))
    scene.submit(scene.manifest("poison.ndjson", scene.serve("good.ndjson", good)))
    leased = (
        "SELECT fencing_token, worker_id FROM steps JOIN manifest_files f ON f.id = file_id"
        " WHERE steps.tenant_id = %(tenant)s AND url LIKE '%%poison.ndjson' AND worker_id IS NOT NULL"
    )
    for attempt in (1, 2, 3):
        scene.wait_for(
            lambda attempt=attempt: [token for token, _ in scene.rows(leased)] == [attempt], f"claim {attempt}"
        )
        [(_, worker)] = scene.rows(leased)
        os.kill(int(worker.partition("/")[2].partition("-")[0]), signal.SIGKILL)
    receipts = scene.wait()

    assert receipts.texts == ["given up after 3 attempts that failed on our side"]
    assert receipts.actions() == {"created": 500}
    assert scene.differences(good) == []


def test_sweep_alone_calls_for_hands(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    names = [scene.serve(f"p{number}.ndjson", patients(1000, f"f{number}")) for number in range(6)]
    for node in celery_setup.worker_cluster:
        node.kill()
    scene.submit(scene.manifest(*names))
    broker = celery_setup.broker.container.client
    scene.wait_for(lambda: broker.llen("manifests"), "the kickoff's message waits")
    broker.flushall()
    for node in celery_setup.worker_cluster:
        node.container.restart()

    assert scene.wait().actions() == {"created": 6000}


def test_emptied_broker(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    names = [scene.serve(f"p{number}.ndjson", patients(1000, f"f{number}")) for number in range(6)]
    stalled = scene.stall("p0.ndjson")
    scene.submit(scene.manifest(*names))
    scene.wait_for_lines()
    assert celery_setup.broker is not None
    celery_setup.broker.container.client.flushall()
    stalled.release.set()
    receipts = scene.wait()

    assert receipts.actions() == {"created": 6000}
    assert scene.versions() == 6000


def test_restarted_broker(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    names = [scene.serve(f"p{number}.ndjson", patients(1000, f"f{number}")) for number in range(6)]
    stalled = scene.stall("p0.ndjson")
    scene.submit(scene.manifest(*names))
    scene.wait_for_lines()
    scene.stack.redis.kill()
    scene.client.submit(
        "offline",
        scene.manifest(scene.serve("late.ndjson", patients(5, "late")), name="late.json"),
        fhir_base_url="http://ehr.test/fhir",
        status="completed",
    )
    stalled.release.set()
    scene.stack.redis.start()

    assert scene.wait().actions() == {"created": 6000}
    assert scene.wait("offline").actions() == {"created": 5}


def test_restarted_database(scene: Scene) -> None:
    lines = patients(LINES)
    stalled = scene.stall(scene.serve("p.ndjson", lines))
    scene.submit(scene.manifest("p.ndjson"))
    scene.wait_for_lines()
    scene.stack.postgres.kill()
    stalled.release.set()
    scene.stack.postgres.start()

    _every_line_once(scene, scene.wait(), lines)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGQUIT"])
def test_worker_that_leaves_hands_back(scene: Scene, celery_setup: CeleryTestSetup, how: str) -> None:
    holder, lines = _in_the_middle_of_a_file(scene)
    _node(celery_setup, holder).kill(how)  # while it waits for a provider that has fallen silent

    _every_line_once(scene, scene.wait(), lines)
    scene.wait_for(lambda: _node(celery_setup, holder).container.status == "exited", "the node's process has ended")
    events = scene.rows("SELECT event FROM lease_events WHERE tenant_id = %(tenant)s AND event <> 'claimed'")
    assert ("released",) in events
    assert ("expired",) not in events
    attempts = scene.rows("SELECT max(attempts) FROM steps WHERE tenant_id = %(tenant)s")
    assert attempts <= [(1,)]


def test_drained_node_hands_back_and_leaves(scene: Scene, celery_setup: CeleryTestSetup) -> None:
    holder, lines = _in_the_middle_of_a_file(scene)
    drained = bulk_submit(scene, "drain", holder)
    assert (drained.returncode, drained.stderr) == (0, "")
    assert f"asked to leave: {holder}@" in drained.stdout

    _every_line_once(scene, scene.wait(), lines)
    scene.wait_for(lambda: _node(celery_setup, holder).container.status == "exited", "the node's process has ended")
    released, claimed = scene.rows(
        "SELECT min(at) FILTER (WHERE event = 'released'), max(at) FILTER (WHERE event = 'claimed')"
        " FROM lease_events JOIN steps s ON s.id = step_id AND s.kind = 'ingest'"
        " WHERE lease_events.tenant_id = %(tenant)s"
    )[0]
    assert released < claimed

    [[manifest]] = scene.rows("SELECT id FROM manifests WHERE tenant_id = %(tenant)s")
    drawn = bulk_submit(scene, "leases", str(manifest))
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert "released (this worker is leaving)" in drawn.stdout
    assert bulk_submit(scene, "leases", "http://never.heard/of").returncode == 1
    assert bulk_submit(scene, "drain", "nobody").returncode == 1


def _everything(scene: Scene) -> list[tuple[object, ...]]:
    """What a worker could have changed, row by row."""
    found: list[tuple[object, ...]] = []
    for table in ("manifests", "manifest_files", "steps", "ingest_batches", "entry_issues", "artifacts"):
        found += scene.rows(f"SELECT '{table}', t::text FROM {table} t WHERE tenant_id = %(tenant)s ORDER BY 2")
    return found + scene.rows(
        "SELECT type, id, version, md5(body) FROM resource_history WHERE tenant = %(v0)s ORDER BY 1, 2, 3", scene.tenant
    )
