"""Workers that claim, write, hang, die, come back too late and are stopped, in any order: a model says what must stand.

The model is of one tenant. Every lease ever given stays in somebody's hands, so that most of what is tried late is
tried by a holder that has long lost its step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from schema import artifacts, files, leases
from schema.database import DATABASE_ERRORS
from schema.files import PlannedFile, Problem
from schema.leases import Lease, LeaseLost, Progress
from schema.results import Action, unpack
from settings import Settings
from tests.support.stage import Stage, patient

WORKERS = ("node/1", "node/2", "node/3")
LIVE = ("pending", "processing")
GONE = Problem("error", "not-found", "the provider answered 404")

STEPS = """
SELECT s.id, s.manifest_id, s.kind, s.state, s.worker_id, s.fencing_token, s.attempts, s.cursor_bytes, s.cursor_lines,
       s.lease_expires_at <= clock_timestamp() AS over, s.created, s.updated, s.unchanged, s.affirmed, s.failed,
       s.skipped
FROM steps s ORDER BY s.id
"""

BATCHES = """
SELECT s.id, b.first_byte, b.end_byte, b.first_line, b.line_count, b.fencing_token, b.results
FROM ingest_batches b JOIN steps s ON s.file_id = b.file_id
ORDER BY s.id, b.first_byte
"""

ISSUES = "SELECT s.id, i.line FROM entry_issues i JOIN steps s ON s.file_id = i.file_id ORDER BY s.id, i.line"

VERSIONS = """
SELECT s.id, b.first_line, v.line, v.resource_id, v.op, v.body
FROM resource_versions v JOIN ingest_batches b ON b.id = v.batch_id JOIN steps s ON s.file_id = b.file_id
"""

LINES = ("a1", "a2", "b1", "b1", "c1", "!", " ")


@dataclass
class Step:
    """What the model knows of a step. `lines` are its file's lines so far, with what became of each."""

    manifest_id: int
    kind: str
    state: str = "ready"
    worker: str | None = None
    token: int = 0
    attempts: int = 0
    over: bool | None = None
    delayed: bool = False
    cursor: int = 0
    lines: list[tuple[bytes, Action]] = field(default_factory=list)
    batches: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def give(self, worker: str) -> None:
        self.worker, self.over = worker, False
        self.token += 1
        self.attempts += 1
        self.delayed = self.attempts > 1

    def leave(self) -> None:
        self.worker = self.over = None


def line_of(choice: str) -> bytes:
    """`a1` is the resource a with content 1; `!` is no JSON; a blank is a blank line."""
    if choice in "! ":
        return {"!": b"no JSON", " ": b""}[choice]
    return patient(choice[0], name=choice[1])


class Fleet(RuleBasedStateMachine):
    """The model, and the database that has to agree with it after every rule."""

    def __init__(self, stage: Stage, other: Stage, seen: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.other = other
        self.seen = seen
        self.manifests: dict[int, str] = {}
        self.steps: dict[int, Step] = {}
        self.given: list[Lease] = []
        self.frozen: tuple[Stage, Lease] | None = None
        self.thawed: list[tuple[int, int]] = []
        self.standing: dict[str, tuple[bytes, int]] = {}
        self.ended: dict[int, tuple[Any, ...]] = {}
        self.published: dict[int, int | None] = {}
        stage.clear()

    def teardown(self) -> None:
        if self.frozen is not None:
            self.hang_up(self.frozen[0])

    # What the model says of the protocol.

    def held(self, lease: Lease) -> bool:
        step = self.steps[lease.step_id]
        return step.state == "ready" and (step.worker, step.token) == (lease.worker_id, lease.fencing_token)

    def live(self, lease: Lease) -> bool:
        return self.manifests[lease.manifest_id] in LIVE

    def due(self) -> list[int]:
        return [
            step_id
            for step_id, step in sorted(self.steps.items(), key=lambda item: (item[1].manifest_id, item[0]))
            if step.state == "ready"
            and not step.delayed
            and (step.worker is None or step.over)
            and self.manifests[step.manifest_id] in LIVE
        ]

    def some_lease(self, wanted: Callable[[Lease], bool]) -> Lease:
        lease = self.random.choice([lease for lease in self.given if wanted(lease)])
        note(str(lease))
        return lease

    def refused(self, operation: Callable[[], object]) -> None:
        """Nobody's lease: nothing may be different afterwards. What another has planned is not planned twice."""
        before = self.stage.dump()
        try:
            outcome = operation()
        except LeaseLost:
            outcome = None
        assert not outcome
        assert self.stage.dump() == before

    # Rules. One rule draws evenly among the moves that are possible, so that every run comes far.

    @initialize(random=st.randoms(use_true_random=True))
    def plan_two_manifests(self, random: Random) -> None:
        self.random = random
        for _ in range(2):
            self.kick_off()
            self.claim_for("plan/1")
            self.end(self.given[-1], failed=False, listed=2)
            self.note_end(self.given[-1], failed=False)

    @rule()
    def move(self) -> None:
        possible = [name for name, (weight, when) in MOVES.items() if when(self) for _ in range(weight)]
        name = self.random.choice(possible)
        note(name)
        getattr(self, name)()

    def kick_off(self) -> None:
        manifest_id = self.stage.add_manifest()
        self.manifests[manifest_id] = "pending"
        self.read_new_steps(manifest_id)

    def read_new_steps(self, manifest_id: int) -> None:
        for step_id, kind, state in self.stage.rows(
            "SELECT id, kind, state FROM steps WHERE manifest_id = :id ORDER BY id", id=manifest_id
        ):
            self.steps.setdefault(step_id, Step(manifest_id, kind, state))

    def claim(self) -> None:
        self.claim_for(self.random.choice(WORKERS))

    def claim_for(self, worker: str) -> None:
        due = self.due()
        lease = leases.claim_next(self.stage.connection, worker, 30, 0)
        assert (None if lease is None else lease.step_id) == next(iter(due), None)
        if lease is None:
            return
        step = self.steps[lease.step_id]
        assert lease.previous_worker == step.worker
        step.give(worker)
        assert (lease.fencing_token, lease.attempts) == (step.token, step.attempts)
        assert (lease.cursor_bytes, lease.cursor_lines) == (step.cursor, len(step.lines))
        if lease.kind == "plan":
            self.manifests[lease.manifest_id] = "processing"
        self.given.append(lease)

    def some_held(self) -> bool:
        return any(self.held(lease) for lease in self.given)

    def enters(self, lease: Lease) -> bool:
        """Whether a transaction of the step can begin: of a session that hangs in one, the next one waits for it."""
        return self.frozen is None or self.frozen[1].step_id != lease.step_id

    def works(self, lease: Lease) -> bool:
        return self.held(lease) and self.enters(lease)

    def came_too_late(self, lease: Lease) -> bool:
        return not self.held(lease) and self.enters(lease)

    def writes(self, lease: Lease) -> bool:
        return self.works(lease) and lease.kind == "ingest"

    def some_work(self) -> bool:
        return any(self.works(lease) for lease in self.given)

    def some_came_too_late(self) -> bool:
        return any(self.came_too_late(lease) for lease in self.given)

    def some_write(self) -> bool:
        return any(self.writes(lease) for lease in self.given)

    def renew(self) -> None:
        lease = self.some_lease(self.held)
        assert self.stage.renew(lease).cancelled is not self.live(lease)
        self.steps[lease.step_id].over = False

    def commit(self) -> None:
        """A batch; when its answer is lost, the holder asks where the cursor stands."""
        choices = self.random.choices(LINES, k=self.random.randint(1, 3))
        lost = self.random.random() < 0.5
        lease = self.some_lease(self.writes)
        step = self.steps[lease.step_id]
        at = replace(lease, cursor_bytes=step.cursor, cursor_lines=len(step.lines))
        written = [line_of(choice) for choice in choices]
        if not self.live(lease):
            self.refused(lambda: self.stage.write(at, *written))
            return
        progress = self.stage.write(at, *written)
        if lost:
            assert leases.cursor_after_lost_commit(self.other.connection, lease) == progress.end_byte
        self.note_batch(lease, choices)

    def note_batch(self, lease: Lease, choices: list[str]) -> None:
        step = self.steps[lease.step_id]
        size = sum(len(line_of(choice)) + 1 for choice in choices)
        step.batches.append((step.cursor, step.cursor + size, len(step.lines) + 1, len(choices), lease.fencing_token))
        step.cursor += size
        step.attempts, step.over, step.delayed = 0, False, False
        step.lines += [(line_of(choice), self.fate(choice, lease.manifest_id)) for choice in choices]

    def fate(self, choice: str, manifest_id: int) -> Action:
        if choice in "! ":
            return Action.FAILED if choice == "!" else Action.BLANK
        content = line_of(choice)
        before = self.standing.get(choice[0])
        self.standing[choice[0]] = (content, manifest_id)
        if before is None:
            return Action.CREATED
        if before[0] != content:
            return Action.UPDATED
        return Action.UNCHANGED if before[1] == manifest_id else Action.AFFIRMED

    def stall(self) -> None:
        """Nobody does anything."""

    def freeze(self) -> None:
        """A holder, or one that was, hangs inside its transaction."""
        lease = self.some_lease(lambda _: True)
        session = Stage(self.stage.settings).__enter__()
        session.connection.begin()
        leases.enter(session.connection, lease)
        leases.record_event(session.connection, lease, "thawed")
        self.frozen = session, lease

    def thaw(self) -> None:
        """It goes on as if nothing had happened: whether its session was ended meanwhile or not, it has to be held."""
        assert self.frozen is not None
        session, lease = self.frozen
        self.frozen = None
        try:
            leases.hold_manifest(session.connection, lease)
            leases.hold_step(session.connection, lease)
            session.connection.commit()
        except LeaseLost:
            assert not (self.held(lease) and self.live(lease))
        except DATABASE_ERRORS:
            assert not self.held(lease)
        else:
            assert self.held(lease)
            assert self.live(lease)
            self.thawed.append((lease.step_id, lease.fencing_token))
        finally:
            self.hang_up(session)

    def hang_up(self, session: Stage) -> None:
        session.connection.invalidate()
        session.__exit__()

    def lose(self) -> None:
        """A lease runs out; its holder does not notice."""
        lease = self.some_lease(self.held)
        self.stage.expire(lease)
        self.steps[lease.step_id].over = True
        self.steps[lease.step_id].delayed = False

    def release(self) -> None:
        give_back, delay = self.random.random() < 0.5, self.random.choice((0, 0, 3600))
        lease = self.some_lease(self.held)
        step = self.steps[lease.step_id]
        assert leases.release(self.stage.connection, lease, delay=delay, give_back=give_back, reason="test")
        step.leave()
        step.attempts = max(step.attempts - give_back, 0)
        step.delayed = delay > 0

    def wait(self) -> None:
        """Every delay passes."""
        self.stage.execute("UPDATE steps SET ready_at = clock_timestamp()")
        for step in self.steps.values():
            step.delayed = False

    def revoke(self) -> None:
        status = self.random.choice(("stopped", "replaced"))
        manifest_id = self.random.choice(sorted(self.manifests))
        live = self.manifests[manifest_id] in LIVE
        assert self.stage.revoke(manifest_id, status) == [manifest_id] * live
        if live:
            self.manifests[manifest_id] = status

    def sweep(self) -> None:
        over = [step for step in self.steps.values() if step.over]
        cleared = leases.expire(self.stage.connection, 100)
        assert sorted(cleared) == sorted(step.manifest_id for step in over)
        for step in over:
            step.leave()

    def come_back_too_late(self) -> None:
        """A zombie does what it was about to do, wherever it believes its cursor to be."""
        lease = self.some_lease(self.came_too_late)
        step = self.steps[lease.step_id]
        if self.random.random() < 0.5:
            lease = replace(lease, cursor_bytes=step.cursor, cursor_lines=len(step.lines))
        connection = self.stage.connection

        def fence() -> None:
            with connection.begin():
                leases.enter(connection, lease)
                leases.fence(connection, lease, Progress(lease.cursor_bytes, lease.cursor_bytes + 7, 1), 30)

        def hold() -> None:
            with connection.begin():
                leases.hold_step(connection, lease)

        attempts: dict[str, Callable[[], object]] = {
            "write": lambda: self.stage.write(lease, patient("z")) if lease.file_id else fence(),
            "fence": fence,
            "finish": lambda: self.end(lease, failed=False, listed=1),
            "renew": lambda: self.stage.renew(lease),
            "hold": hold,
            "release": lambda: leases.release(connection, lease, delay=0, give_back=True, reason="late"),
            "artifact": lambda: self.announce(lease),
            "note": lambda: files.note_validator(connection, lease, "late"),
            "ask for the cursor": lambda: leases.cursor_after_lost_commit(self.other.connection, lease),
        }
        self.refused(attempts[self.random.choice(sorted(attempts))])

    def finish(self) -> None:
        failed = self.random.choice((False, False, False, True))
        listed = self.random.choice((2, 1, 0))
        lease = self.some_lease(self.works)
        if not self.live(lease):
            self.refused(lambda: self.end(lease, failed=failed, listed=listed))
            return
        self.end(lease, failed=failed, listed=listed)
        self.note_end(lease, failed=failed)

    def note_end(self, lease: Lease, *, failed: bool) -> None:
        step = self.steps[lease.step_id]
        step.leave()
        step.state = "failed" if failed and lease.kind != "publish" else "done"
        if lease.kind == "publish":
            self.manifests[lease.manifest_id] = "failed" if failed else "completed"
            self.published[lease.manifest_id] = lease.fencing_token
        self.read_new_steps(lease.manifest_id)
        of_manifest = [step for step in self.steps.values() if step.manifest_id == lease.manifest_id]
        for publish in of_manifest:
            if publish.state == "waiting" and not any(s.kind == "ingest" and s.state == "ready" for s in of_manifest):
                publish.state = "ready"

    def announce(self, lease: Lease) -> int:
        [(after,)] = self.stage.rows("SELECT count(*) FROM artifacts")
        return artifacts.record(
            self.stage.connection,
            lease,
            submission_id=1,
            type="summary",
            resource_type=None,
            part=after,
            path=f"{lease.step_id}/{lease.fencing_token}/{after}",
            seconds=30,
        )

    def announce_receipt(self) -> None:
        lease = self.some_lease(self.works)
        if not self.live(lease):
            self.refused(lambda: self.announce(lease))
            return
        assert self.announce(lease)
        self.steps[lease.step_id].over = False

    def end(self, lease: Lease, *, failed: bool, listed: int) -> bool:
        connection, problems = self.stage.connection, [GONE] * failed
        if lease.kind == "plan":
            outputs = [PlannedFile("output", f"http://provider.test/{number}.ndjson") for number in range(listed)]
            files.finish_plan(connection, lease, [] if failed else outputs, problems=problems)
        elif lease.kind == "ingest":
            files.finish_file(connection, lease, problems)
        else:
            files.finish_manifest(connection, lease, "failed" if failed else "completed")
        return True

    def let_others_do_the_rest(self) -> None:
        """Whatever happened: once every holder is gone, somebody else can end every live manifest."""
        if self.frozen is not None:
            self.thaw()
        self.stage.execute("UPDATE steps SET lease_expires_at = clock_timestamp() WHERE worker_id IS NOT NULL")
        self.wait()
        for step in self.steps.values():
            step.over = None if step.worker is None else True
        while self.due():
            self.claim_for("rest/1")
            lease = self.given[-1]
            self.end(lease, failed=False, listed=1)
            self.note_end(lease, failed=False)
        assert not set(self.manifests.values()) & set(LIVE)

    # Invariants.

    @invariant()
    def steps_are_as_the_model_says(self) -> None:
        counters = (Action.CREATED, Action.UPDATED, Action.UNCHANGED, Action.AFFIRMED, Action.FAILED, Action.BLANK)
        rows = self.seen.rows(STEPS)
        assert rows == [
            (
                *(step_id, step.manifest_id, step.kind, step.state, step.worker, step.token, step.attempts),
                *(step.cursor, len(step.lines), step.over),
                *([action for _, action in step.lines].count(counter) for counter in counters),
            )
            for step_id, step in sorted(self.steps.items())
        ]
        for row in rows:
            if row[3] in ("done", "failed"):
                assert self.ended.setdefault(row[0], row) == row
        assert dict(self.seen.rows("SELECT id, status FROM manifests WHERE id = ANY(:ids)", ids=[*self.manifests])) == (
            self.manifests
        )

    @invariant()
    def one_holder_at_most_and_tokens_rise_by_one(self) -> None:
        for step_id in self.steps:
            assert sum(self.held(lease) for lease in self.given if lease.step_id == step_id) <= 1
        tokens = self.seen.rows(
            """SELECT step_id, array_agg(fencing_token ORDER BY id) FROM lease_events WHERE event = 'claimed'
               GROUP BY step_id"""
        )
        assert dict(tokens) == {
            step_id: [*range(1, step.token + 1)] for step_id, step in self.steps.items() if step.token
        }

    @invariant()
    def whoever_hung_is_heard_of_only_if_it_held_its_step(self) -> None:
        thawed = self.seen.rows("SELECT step_id, fencing_token FROM lease_events WHERE event = 'thawed' ORDER BY id")
        assert thawed == self.thawed

    @invariant()
    def every_line_stands_once(self) -> None:
        found: dict[int, list[tuple[int, ...]]] = {}
        fates: dict[int, list[int]] = {}
        for step_id, *place, results in self.seen.rows(BATCHES):
            found.setdefault(step_id, []).append(tuple(place))
            fates.setdefault(step_id, []).extend(unpack(results).actions)
        assert found == {step_id: step.batches for step_id, step in self.steps.items() if step.batches}
        for step_id, batches in found.items():
            step = self.steps[step_id]
            assert [first for first, *_ in batches] == [0, *(end for _, end, *_ in batches[:-1])]
            assert batches[-1][1] == step.cursor == sum(len(line) + 1 for line, _ in step.lines)
            assert fates[step_id] == [action for _, action in step.lines]
        written = {Action.CREATED, Action.UPDATED, Action.AFFIRMED}
        versions = sorted((row[0], row[2]) for row in self.seen.rows(VERSIONS))
        assert versions == self.places(written)
        assert self.seen.rows(ISSUES) == self.places({Action.FAILED})

    def places(self, actions: set[Action]) -> list[tuple[int, int]]:
        return [
            (step_id, number)
            for step_id, step in sorted(self.steps.items())
            for number, (_, action) in enumerate(step.lines, start=1)
            if action in actions
        ]

    @invariant()
    def what_stands_is_what_was_written_last(self) -> None:
        rows = self.seen.rows(
            """SELECT DISTINCT ON (key) resource_id, body FROM resource_versions WHERE body IS NOT NULL
               ORDER BY key, seq DESC"""
        )
        assert {name: json.loads(body) for name, body in rows} == {
            name: json.loads(content) for name, (content, _) in self.standing.items()
        }

    @invariant()
    def only_the_last_holder_s_receipts_are_shown(self) -> None:
        shown = self.seen.rows("SELECT manifest_id, fencing_token FROM artifacts WHERE published")
        assert all(self.published.get(manifest_id) == token for manifest_id, token in shown)


MOVES: dict[str, tuple[int, Callable[[Fleet], object]]] = {
    "kick_off": (1, lambda fleet: not fleet.due() and len(fleet.manifests) < 5),
    "claim": (8, lambda _: True),
    "renew": (2, Fleet.some_held),
    "commit": (14, Fleet.some_write),
    "stall": (1, lambda _: True),
    "freeze": (2, lambda fleet: fleet.frozen is None),
    "thaw": (1, lambda fleet: fleet.frozen is not None),
    "lose": (5, Fleet.some_held),
    "release": (2, Fleet.some_held),
    "wait": (2, lambda _: True),
    "revoke": (1, lambda fleet: len(fleet.given) > 8),
    "sweep": (3, lambda _: True),
    "come_back_too_late": (5, Fleet.some_came_too_late),
    "announce_receipt": (2, Fleet.some_work),
    "finish": (2, Fleet.some_work),
    "let_others_do_the_rest": (1, lambda fleet: len(fleet.given) > 14),
}
"""How often each is drawn, and when it is possible."""


def test_whatever_workers_do_the_store_is_as_the_model_says(database_url: str) -> None:
    profile = hypothesis_settings(
        max_examples=16,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings = Settings(database_url=database_url)
    with Stage(settings) as stage, Stage(settings) as other, Stage(settings) as seen:
        seen.connection.execution_options(isolation_level="AUTOCOMMIT")
        run_state_machine_as_test(lambda: Fleet(stage, other, seen), settings=profile)
