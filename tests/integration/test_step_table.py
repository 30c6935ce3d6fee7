"""The step machine as a table: in every state, what every event does to state, token, attempts, worker and lease."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from devstack.servers import EmbeddedPostgres
from schema import files, leases
from schema.files import Problem
from schema.leases import Lease, LeaseLost, Progress
from schema.tables import LIVE_MANIFEST_STATUSES, MANIFEST_STATUSES
from settings import Settings
from tests.support.stage import Stage

HOLDER, NEXT = "holder/1", "next/1"
TOKEN, ATTEMPTS = 7, 2


@dataclass(frozen=True)
class Row:
    """What is seen of a step and its manifest. `lease`: None, lasts, or over."""

    state: str
    worker: str | None
    lease: str | None
    token: int
    attempts: int
    manifest: str


STATES: dict[str, tuple[str, str | None, str | None, float]] = {
    "waiting": ("waiting", None, None, 0),
    "ready": ("ready", None, None, 0),
    "delayed": ("ready", None, None, 3600),
    "leased": ("ready", HOLDER, "lasts", 0),
    "expired": ("ready", HOLDER, "over", 0),
    "expired, delayed": ("ready", HOLDER, "over", 3600),
    "done": ("done", None, None, 0),
    "failed": ("failed", None, None, 0),
}
"""Step state, worker, lease, seconds until it is due."""

CELLS: dict[str, dict[str, Any]] = {
    "-": {},
    "keep": {"lease": "lasts"},
    "told": {"lease": "lasts"},
    "again": {"token": TOKEN + 1, "attempts": ATTEMPTS + 1, "worker": HOLDER, "lease": "lasts"},
    "next": {"token": TOKEN + 1, "attempts": ATTEMPTS + 1, "worker": NEXT, "lease": "lasts"},
    "move": {"attempts": 0, "lease": "lasts"},
    "free": {"worker": None, "lease": None},
    "back": {"worker": None, "lease": None, "attempts": ATTEMPTS - 1},
    "done": {"worker": None, "lease": None, "state": "done"},
    "fail": {"worker": None, "lease": None, "state": "failed"},
    "stop": {"manifest": "stopped"},
}
"""What becomes different. `-`: refused, and nothing at all does; `told`: the holder learns that its manifest ended."""

LIVE = """
                  claim  claim  renew  renew  fence  fence  release release release finish finish finish sweep  revoke
                  again  next          stale         stale          back    stale          failed stale
waiting           -      -      -      -      -      -      -       -       -       -      -      -      -      stop
ready             again  next   -      -      -      -      -       -       -       -      -      -      -      stop
delayed           -      -      -      -      -      -      -       -       -       -      -      -      -      stop
leased            -      -      keep   -      move   -      free    back    -       done   fail   -      -      stop
expired           again  next   keep   -      move   -      free    back    -       done   fail   -      free   stop
expired, delayed  -      -      keep   -      move   -      free    back    -       done   fail   -      free   stop
done              -      -      -      -      -      -      -       -       -       -      -      -      -      stop
failed            -      -      -      -      -      -      -       -       -       -      -      -      -      stop
"""

ENDED = """
                  claim  claim  renew  renew  fence  fence  release release release finish finish finish sweep  revoke
                  again  next          stale         stale          back    stale          failed stale
waiting           -      -      -      -      -      -      -       -       -       -      -      -      -      -
ready             -      -      -      -      -      -      -       -       -       -      -      -      -      -
delayed           -      -      -      -      -      -      -       -       -       -      -      -      -      -
leased            -      -      told   -      -      -      free    back    -       -      -      -      -      -
expired           -      -      told   -      -      -      free    back    -       -      -      -      free   -
expired, delayed  -      -      told   -      -      -      free    back    -       -      -      -      free   -
done              -      -      -      -      -      -      -       -       -       -      -      -      -      -
failed            -      -      -      -      -      -      -       -       -       -      -      -      -      -
"""


class Scene:
    """One manifest with one file, whose ingest step is put into any state, again and again."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        first = stage.ingest_lease(HOLDER)
        self.holder = replace(first, fencing_token=TOKEN, attempts=ATTEMPTS)
        self.stale = replace(self.holder, fencing_token=TOKEN - 1)

    def put(self, state: str, status: str) -> None:
        step, worker, lease, delay = STATES[state]
        self.stage.execute(
            """WITH publish AS (UPDATE steps SET state = 'waiting' WHERE kind = 'publish'),
                    manifest AS (UPDATE manifests SET status = :status),
                    file AS (UPDATE manifest_files SET problems = '[]'),
                    events AS (DELETE FROM lease_events)
               UPDATE steps
               SET state = :state, worker_id = :worker, fencing_token = :token, attempts = :attempts,
                   lease_expires_at = clock_timestamp() + make_interval(secs => :seconds), cursor_bytes = 0,
                   ready_at = clock_timestamp() + make_interval(secs => :delay)
               WHERE kind = 'ingest'""",
            status=status,
            state=step,
            worker=worker,
            token=TOKEN,
            attempts=ATTEMPTS,
            seconds={None: None, "lasts": 30, "over": -1}[lease],
            delay=delay,
        )

    def look(self) -> Row:
        [row] = self.stage.rows(
            """SELECT s.state, s.worker_id,
                      CASE WHEN s.lease_expires_at > clock_timestamp() THEN 'lasts'
                           WHEN s.lease_expires_at IS NOT NULL THEN 'over' END,
                      s.fencing_token, s.attempts, m.status
               FROM steps s JOIN manifests m ON m.id = s.manifest_id WHERE s.kind = 'ingest'"""
        )
        return Row(*row)

    def everything(self) -> list[tuple[Any, ...]]:
        """The rows that an event may touch, in full."""
        tables = ("steps", "manifests", "manifest_files", "lease_events")
        return self.stage.rows(" UNION ALL ".join(f"SELECT row::text FROM {table} row" for table in tables))

    def claim(self, worker: str) -> Lease | None:
        return leases.claim_next(self.stage.connection, worker, 30, 0)

    def renew(self, lease: Lease) -> str:
        return "told" if self.stage.renew(lease).cancelled else "renewed"

    def fence(self, lease: Lease) -> bool:
        with self.stage.connection.begin():
            leases.hold_manifest(self.stage.connection, lease)
            leases.fence(self.stage.connection, lease, Progress(0, 10, 1), 30)
        return True

    def release(self, lease: Lease, *, give_back: bool) -> bool:
        return leases.release(self.stage.connection, lease, delay=0, give_back=give_back, reason="test")

    def finish(self, lease: Lease, *problems: Problem) -> bool:
        files.finish_file(self.stage.connection, lease, problems)
        return True


GONE = Problem("error", "not-found", "the provider answered 404")

EVENTS: dict[str, Callable[[Scene], object]] = {
    "claim again": lambda scene: scene.claim(HOLDER),
    "claim next": lambda scene: scene.claim(NEXT),
    "renew": lambda scene: scene.renew(scene.holder),
    "renew stale": lambda scene: scene.renew(scene.stale),
    "fence": lambda scene: scene.fence(scene.holder),
    "fence stale": lambda scene: scene.fence(scene.stale),
    "release": lambda scene: scene.release(scene.holder, give_back=False),
    "release back": lambda scene: scene.release(scene.holder, give_back=True),
    "release stale": lambda scene: scene.release(scene.stale, give_back=True),
    "finish": lambda scene: scene.finish(scene.holder),
    "finish failed": lambda scene: scene.finish(scene.holder, GONE),
    "finish stale": lambda scene: scene.finish(scene.stale),
    "sweep": lambda scene: leases.expire(scene.stage.connection, 10),
    "revoke": lambda scene: scene.stage.revoke(scene.holder.manifest_id),
}


def read(table: str) -> dict[tuple[str, str], str]:
    """The cells by state and event."""
    first, second, *rows = table.strip("\n").splitlines()
    columns = [index for index, char in enumerate(first) if char != " " and first[index - 1] == " "]
    ends = [*columns[1:], None]
    events = [
        f"{first[begin:end].strip()} {second[begin:end].strip()}".strip()
        for begin, end in zip(columns, ends, strict=True)
    ]
    return {
        (row[: columns[0]].strip(), event): row[begin:end].strip()
        for row in rows
        for event, begin, end in zip(events, columns, ends, strict=True)
    }


TABLES = {status: read(LIVE if status in LIVE_MANIFEST_STATUSES else ENDED) for status in MANIFEST_STATUSES}


@pytest.fixture(scope="module")
def scene(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[Scene]:
    url = postgres.create_database(f"table_{uuid.uuid4().hex[:12]}", template=migrated_template)
    with Stage(Settings(database_url=url)) as stage:
        yield Scene(stage)


@pytest.mark.parametrize("status", MANIFEST_STATUSES)
def test_every_event_has_its_place_in_every_state(status: str) -> None:
    assert set(TABLES[status]) == {(state, event) for state in STATES for event in EVENTS}


@pytest.mark.parametrize("status", MANIFEST_STATUSES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_does_what_the_table_says(scene: Scene, status: str, state: str, event: str) -> None:
    cell = TABLES[status][state, event]
    scene.put(state, status)
    before, all_before = scene.look(), scene.everything()
    try:
        accepted = EVENTS[event](scene)
    except LeaseLost:
        accepted = None
    assert scene.look() == replace(before, **CELLS[cell])
    assert bool(accepted) == (cell != "-")
    assert (accepted == "told") == (cell == "told")
    if cell == "-":
        assert scene.everything() == all_before
