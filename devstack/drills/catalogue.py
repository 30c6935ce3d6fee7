"""The drills: what each does to the fleet, and what must follow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import redis

from devstack.drills.rig import LEASE_SECONDS, STALL_SECONDS, Rig, Trial, alive
from devstack.drills.verdict import Outcome, conclude, failed
from devstack.provider import Fault
from devstack.proxy import KEEPER, Act, Point, Trigger
from devstack.stack import NotReady, wait_until

MANIFESTS = "manifests"
COPIES = 20
SECOND_SWEEPER = "sweeper2"
AWAY_SECONDS = 1.0
FULL_SECONDS = 3.0
SKEWED_HOURS = {"alpha": 8.0, "beta": -8.0}
SWEEPER_SKEW_HOURS = 5.0
AFTER_A_DEATH = LEASE_SECONDS + 2.0
POLL_P99_SECONDS = 0.05


@dataclass(frozen=True)
class Drill:
    """One fault.

    `inject` does all there is to do between submission and end; `around` is what the fleet is like from before the
    submission on. `quick` ones belong to every test run. `recover_within`, in seconds, is what the command asks for.
    """

    name: str
    summary: str
    inject: Callable[[Trial], None]
    quick: bool = False
    around: Callable[[Rig], contextlib.AbstractContextManager[object]] | None = None
    recover_within: float | None = None

    def figures_missed(self, outcome: Outcome) -> list[str]:
        """What took longer than promised. Nothing that a test should ask: machines differ."""
        missed = []
        if self.recover_within and outcome.recovery and outcome.recovery > self.recover_within:
            missed.append(f"recovered after {outcome.recovery:.2f} s; promised are {self.recover_within:g} s")
        if outcome.poll_p99 > POLL_P99_SECONDS:
            missed.append(f"status polls took {outcome.poll_p99 * 1000:.0f} ms (p99); promised are 50 ms")
        return missed


def run(rig: Rig, drill: Drill) -> Outcome:
    """Run the drill on a calm rig, and verify."""
    rig.calm()
    with contextlib.nullcontext() if drill.around is None else drill.around(rig) as given:
        trial = rig.trial(drill.name, given=given)
        try:
            drill.inject(trial)
            return conclude(trial)
        except NotReady as error:
            return failed(trial, error)
        finally:
            trial.poller.stop()
            rig.proxy.clear()
            rig.provider.clear()


def matching(name: str) -> list[Drill]:
    """The drills of that name, or whose name it begins; `all` is all of them."""
    return [drill for drill in DRILLS if name in ("all", drill.name) or drill.name.startswith(f"{name}-")]


def kill_worker(trial: Trial) -> None:
    """SIGKILL to a node's process group, in the middle of a file."""
    holder = trial.holder()
    trial.rig.node(holder.node).kill()
    trial.struck(holder)
    trial.did(f"SIGKILL to all processes of {holder.node} after line {holder.lines} of {holder.file}")


def kill_child(trial: Trial) -> None:
    """SIGKILL to the pool's process alone; its node lives on, and starts another."""
    holder = trial.holder()
    os.kill(holder.pid, signal.SIGKILL)
    trial.struck(holder)
    trial.did(f"SIGKILL to the pool process of {holder.node} after line {holder.lines} of {holder.file}")
    trial.wait_for_end()
    trial.expect(trial.rig.node(holder.node).running, f"{holder.node} did not survive the end of its pool process")


def _freeze_at(point: Point) -> Callable[[Trial], None]:
    def freeze(trial: Trial) -> None:
        held = trial.rig.proxy.add(Trigger(point, Act.HOLD, skip=5))
        trial.wait(lambda: held.fired, f"a hand at {point.value}")
        holder = trial.holder(worker_id=held.fired[0].worker_id)
        node = trial.rig.node(holder.node)
        node.signal(signal.SIGSTOP)
        try:
            trial.struck(holder, at=held.fired[0].at, by_claim=True)
            trial.did(f"{holder.node} frozen before its {point.value}, in {holder.file} after line {holder.lines}")
            trial.wait_for_end()
            before = trial.everything()
        finally:
            asleep = node.log.stat().st_size
            held.release.set()
            node.signal(signal.SIGCONT)
        trial.did("thawed after another had finished, and what it had sent let through")
        trial.wait(lambda: b"lease lost" in node.log.read_bytes()[asleep:], f"{holder.node} notices its loss")
        trial.expect(trial.everything() == before, f"{holder.node} changed something after it woke")
        trial.expect(trial.claimed_again(holder), "nobody else claimed the step")

    return freeze


def stuck_hand_provider(trial: Trial) -> None:
    """The provider falls silent for longer than the stall limit, in the middle of a body; its connection stands."""
    file = trial.rig.samples.files[-3]
    stalled = trial.rig.provider.add(Fault(file.name, times=1, stall_after=file.size // 2))
    trial.wait(lambda: stalled.applied, f"a request for {file.name}")
    holder = trial.holder(file=file.name)
    trial.struck(holder, by_claim=True)
    trial.did(f"the provider fell silent in the middle of {file.name}; {holder.node} waits for it")
    trial.wait_for_end()
    trial.expect(trial.logged("hand does not move", holder.node), "the keeper did not notice that its hand hung")
    stalled.release.set()


def stuck_hand_database(trial: Trial) -> None:
    """The database falls silent on one hand's connection; the keeper, on its own, goes on renewing."""
    held = trial.rig.proxy.add(Trigger(Point.COPY, Act.HOLD, skip=3))
    trial.wait(lambda: held.fired, "a hand in its COPY")
    holder = trial.holder(worker_id=held.fired[0].worker_id)
    trial.struck(holder, at=held.fired[0].at, by_claim=True)
    trial.did(f"{holder.node}'s connection fell silent inside COPY, in {holder.file}; its keeper's did not")
    trial.wait(lambda: not alive(holder.pid), "the hung process ends itself", seconds=STALL_SECONDS + 4 * LEASE_SECONDS)
    trial.did("the keeper ended the process, whose hand did not let go")
    trial.wait_for_end()
    trial.expect(trial.logged("hand does not move", holder.node), "the keeper did not notice that its hand hung")


def _cut_at_commit(act: Act) -> Callable[[Trial], None]:
    def cut(trial: Trial) -> None:
        trigger = trial.rig.proxy.add(Trigger(Point.COMMIT, act, times=3, skip=3))
        trial.wait(lambda: trigger.fired, "a COMMIT of a batch")
        first = trigger.fired[0]
        trial.struck(trial.holder(worker_id=first.worker_id), at=first.at)
        reached = "which reached the server; the answer did not come back" if act is Act.CUT_AFTER else "never sent"
        trial.wait_for_end()
        trial.did(f"the connection was cut at {len(trigger.fired)} COMMITs, {reached}")

    return cut


def restart_database(trial: Trial) -> None:
    """Postgres is killed, as by a power cut, and comes back a second later."""
    trial.wait_for_load()
    trial.rig.stack.postgres.kill()
    trial.struck()
    time.sleep(AWAY_SECONDS)
    trial.rig.stack.postgres.start()
    trial.did(f"Postgres killed, and started again after {AWAY_SECONDS:g} s")


def flush_broker(trial: Trial) -> None:
    """Redis forgets every message; a worker dies too, so that somebody has to be called again."""
    holder = trial.holder()
    trial.rig.stack.redis.flush()
    trial.rig.node(holder.node).kill()
    trial.struck(holder)
    trial.did(f"FLUSHALL; SIGKILL to all processes of {holder.node}")
    trial.rig.launch(holder.node)()


def restart_broker(trial: Trial) -> None:
    """Redis is killed and comes back empty a second later."""
    trial.wait_for_load()
    trial.rig.stack.redis.kill()
    trial.struck(by_claim=True)
    time.sleep(AWAY_SECONDS)
    trial.rig.stack.redis.start()
    trial.did(f"Redis killed, and started again, empty, after {AWAY_SECONDS:g} s")


def duplicate_messages(trial: Trial) -> None:
    """Every message that calls for a hand stands in the queue twenty times, that of the kickoff too."""
    copied = trial.given
    assert isinstance(copied, set)
    holder = trial.holder()
    trial.rig.node(holder.node).kill()
    trial.struck(holder)
    trial.did(f"SIGKILL to all processes of {holder.node}, so that more messages are sent")
    trial.rig.launch(holder.node)()
    trial.wait_for_end()
    trial.expect(len(copied) > 1, f"{len(copied)} messages were seen")
    trial.did(f"{len(copied)} messages, each {COPIES} times in the queue")


@contextlib.contextmanager
def _duplicated(rig: Rig) -> Iterator[set[str]]:
    """Puts copies beside every message as soon as it is sent; yields their originals' delivery tags."""
    copied: set[str] = set()
    ours: set[str] = set()
    ended = threading.Event()

    def copy(payload: str) -> None:
        message = json.loads(payload)
        tag = message["properties"]["delivery_tag"]
        if tag in ours or tag in copied:
            return
        copied.add(tag)
        for _ in range(COPIES - 1):
            message["properties"]["delivery_tag"] = str(uuid.uuid4())
            ours.add(message["properties"]["delivery_tag"])
            client.lpush(MANIFESTS, json.dumps(message))

    def watch() -> None:
        with watcher.monitor() as monitor:
            for command in monitor.listen():
                if ended.is_set():
                    return
                name, _, rest = command["command"].partition(" ")
                queue, _, payload = rest.partition(" ")
                if name.upper() == "LPUSH" and queue == MANIFESTS:
                    copy(payload)

    with redis.Redis.from_url(rig.stack.redis.url) as client, redis.Redis.from_url(rig.stack.redis.url) as watcher:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        wait_until(lambda: any(each["cmd"] == "monitor" for each in client.client_list()), "the watcher watches")
        try:
            yield copied
        finally:
            ended.set()
            client.ping()
            thread.join(5)


def two_beats(trial: Trial) -> None:
    """A second scheduler and a second sweeper, side by side with the first; a worker is killed for them to see."""
    holder = trial.holder()
    trial.rig.node(holder.node).kill()
    trial.struck(holder)
    trial.did(f"two of each; SIGKILL to all processes of {holder.node}")
    trial.wait_for_end()
    query = "SELECT step_id, fencing_token FROM lease_events WHERE tenant_id = %s AND event = 'expired'"
    expired = trial.rig.rows(query, trial.tenant_id)
    trial.expect(len(set(expired)) == len(expired), "a lease expired twice")
    trial.wait(lambda: trial.swept(SECOND_SWEEPER) and trial.swept("sweeper"), "both sweepers sweep")


@contextlib.contextmanager
def _second_scheduler(rig: Rig) -> Iterator[None]:
    sweeper = rig.stack.run(SECOND_SWEEPER, "worker", "--name", SECOND_SWEEPER, "--slots", "1", "--queues", "sweeps")
    beat = rig.stack.run("beat2", "beat")
    try:
        wait_until(lambda: b"sweep_leases[" in sweeper.log.read_bytes(), "the second sweeper sweeps")
        yield
    finally:
        beat.stop()
        sweeper.stop()


def slow_heartbeat(trial: Trial) -> None:
    """Renewals take longer than the lease, and a hand waits for a slow provider meanwhile."""
    file = trial.rig.samples.files[-3]
    stalled = trial.rig.provider.add(Fault(file.name, times=1, stall_after=file.size // 2))
    trial.wait(lambda: stalled.applied, f"a request for {file.name}")
    holder = trial.holder(file=file.name)
    slow = trial.rig.proxy.add(
        Trigger(
            Point.RENEW, Act.DELAY, times=None, seconds=2 * LEASE_SECONDS, application=f"{KEEPER} {holder.worker_id}"
        )
    )
    trial.struck(holder, by_claim=True)
    trial.did(f"renewals of {holder.node} delayed by {2 * LEASE_SECONDS:g} s, while {file.name} does not move")
    trial.wait(lambda: trial.claimed_again(holder), "the step is claimed again")
    trial.wait(lambda: trial.logged("lease lost", holder.node), f"{holder.node} notices its loss")
    trial.expect(slow.fired, "no renewal was delayed")
    trial.expect(
        not trial.logged("hand does not move", holder.node), "the lease was given up for the stall, not for the delay"
    )
    stalled.release.set()


def clock_skew(trial: Trial) -> None:
    """Wall clocks hours ahead and hours behind: of both workers and of the sweeper. See `devstack/skewed.py`."""
    holder = trial.holder()
    trial.rig.stack.redis.flush()
    trial.rig.node(holder.node).kill()
    trial.struck(holder)
    trial.wait_for_end()
    trial.expect(trial.swept("sweeper"), "no sweep was made: its message had expired by that clock")
    trial.did(
        ", ".join(f"{name}'s clock {hours:+g} h" for name, hours in SKEWED_HOURS.items())
        + f", the sweeper's {SWEEPER_SKEW_HOURS:+g} h; FLUSHALL; SIGKILL to all processes of {holder.node}"
    )


@contextlib.contextmanager
def _skewed(rig: Rig) -> Iterator[None]:
    stack = rig.stack
    try:
        for name in [*rig.workers, "sweeper"]:
            stack.child(name).kill()
        stack.run(
            "sweeper",
            *("worker", "--name", "sweeper", "--slots", "1", "--queues", "sweeps"),
            module=("devstack.skewed", f"{SWEEPER_SKEW_HOURS:g}"),
        )
        hours = {name: SKEWED_HOURS[name] for name in rig.workers}
        for wait in [rig.launch(name, module=("devstack.skewed", f"{ahead:g}")) for name, ahead in hours.items()]:
            wait()
        yield
    finally:
        for name in [*rig.workers, "sweeper"]:
            stack.child(name).kill()
        stack.run("sweeper", "worker", "--name", "sweeper", "--slots", "1", "--queues", "sweeps")


def full_disk(trial: Trial) -> None:
    """The artifact store refuses every write for a while, when the receipts are due."""
    trial.wait_for_load()
    store = trial.rig.stack.directory / "artifacts"
    aside = store.with_name("artifacts.aside")
    store.rename(aside)
    store.write_text("")
    try:
        trial.wait(lambda: trial.logged("step put off"), "a worker that cannot write receipts", seconds=60)
        trial.struck()
        time.sleep(FULL_SECONDS)
        trial.expect(trial.poller.report is None, "the submission ended without its receipts")
    finally:
        store.unlink()
        aside.rename(store)
    trial.did(f"the artifact store refused writes, for {FULL_SECONDS:g} s after the first that failed")


def drain(trial: Trial) -> None:
    """SIGTERM to a node: it hands back at a batch's border, and another goes on."""
    holder = trial.holder()
    node = trial.rig.node(holder.node)
    trial.struck(holder, by_claim=True)
    node.process.terminate()
    trial.wait(lambda: trial.claimed_again(holder), "another worker claims the step")
    trial.wait(lambda: not node.running, f"{holder.node} ends")
    assert trial.strike is not None
    trial.did(f"SIGTERM to {holder.node}, which ended {time.time() - trial.strike.at:.1f} s later")
    query = """
        SELECT count(*) FROM lease_events
        WHERE tenant_id = %s AND step_id = %s AND event = 'released' AND worker_id = %s
    """
    [[released]] = trial.rig.rows(query, trial.tenant_id, holder.step_id, holder.worker_id)
    trial.expect(released == 1, "the lease was not handed back")


DRILLS = [
    Drill(
        "kill-worker",
        "SIGKILL to a node's processes, in the middle of a file",
        kill_worker,
        quick=True,
        recover_within=AFTER_A_DEATH,
    ),
    Drill(
        "kill-child",
        "SIGKILL to the pool process alone",
        kill_child,
        recover_within=AFTER_A_DEATH,
    ),
    Drill(
        "freeze-worker-copy",
        "a node frozen inside COPY, past its lease",
        _freeze_at(Point.COPY),
        recover_within=AFTER_A_DEATH,
    ),
    Drill(
        "freeze-worker-fence",
        "a node frozen before the fence, past its lease",
        _freeze_at(Point.FENCE),
        recover_within=AFTER_A_DEATH,
    ),
    Drill(
        "freeze-worker-commit",
        "a node frozen between fence and COMMIT, past its lease",
        _freeze_at(Point.COMMIT),
        quick=True,
        recover_within=AFTER_A_DEATH,
    ),
    Drill("stuck-hand-provider", "a hand that waits for a silent provider past the stall limit", stuck_hand_provider),
    Drill("stuck-hand-database", "a hand that hangs in a statement while its keeper renews", stuck_hand_database),
    Drill("cut-database-before", "connections cut before COMMIT reaches the server", _cut_at_commit(Act.CUT_BEFORE)),
    Drill(
        "cut-database-after",
        "connections cut after COMMIT, before the answer: a lost COMMIT",
        _cut_at_commit(Act.CUT_AFTER),
        quick=True,
    ),
    Drill("restart-database", "Postgres killed and started again", restart_database),
    Drill("flush-broker", "Redis emptied, and a worker killed", flush_broker),
    Drill("restart-broker", "Redis killed and started again, empty", restart_broker),
    Drill(
        "duplicate-messages",
        f"every message {COPIES} times, and a worker killed",
        duplicate_messages,
        quick=True,
        around=_duplicated,
    ),
    Drill(
        "two-beats",
        "a second scheduler and a second sweeper, and a worker killed",
        two_beats,
        around=_second_scheduler,
    ),
    Drill("slow-heartbeat", "renewals delayed past the lease", slow_heartbeat),
    Drill(
        "clock-skew",
        "wall clocks of workers and sweeper wrong by hours, and a worker killed",
        clock_skew,
        around=_skewed,
    ),
    Drill("full-disk", "the artifact store refuses writes for a while", full_disk),
    Drill("drain", "SIGTERM to a node", drain, recover_within=2.0),
]
