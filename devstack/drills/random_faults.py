"""Faults at random: workers killed, frozen, sent away, and their pool processes killed, over a long run under load."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from devstack.drills.rig import SETTINGS, Rig, Trial
from devstack.drills.verdict import Outcome, audited, conclude, failed
from devstack.provider import Fault
from devstack.stack import Child, NotReady

SUMMARY = "workers killed, frozen and sent away at random: --events --resources --minutes --seed"
WORKERS = ("alpha", "beta", "gamma")
LEASE_SECONDS = 1.5
FILES = 50
AWAY_SECONDS = 0.5
TICK_SECONDS = 0.02
HASTE = 1.5
"""How much faster the provider serves than the run would need if no worker were ever away."""

EVENTS = ("kill", "freeze", "terminate", "kill pool process")


def run(
    *, resources: int, events: int, seconds: float, seed: int, say: Callable[[str], object] = lambda text: None
) -> Outcome:
    """Inject so many faults, spread over `seconds`; submissions follow each other until all are injected.

    Each submission is verified as in any drill; the audit of everything comes last. The same seed chooses the same
    faults; what they meet depends on the machine.
    """
    settings = {**SETTINGS, "BULK_SUBMIT_LEASE_SECONDS": f"{LEASE_SECONDS:g}"}
    with Rig(
        resources=resources,
        lines_per_file=max(resources // FILES, 500),
        workers=WORKERS,
        settings=settings,
        proxied=False,
    ) as rig:
        size = sum(file.size for file in rig.samples.files)
        rig.rate = max(int(size / seconds / len(WORKERS) * HASTE), 100_000)
        rig.calm()
        return _Run(rig, random.Random(seed), events, seconds, say).run()


class _Run:
    def __init__(
        self, rig: Rig, choice: random.Random, events: int, seconds: float, say: Callable[[str], object]
    ) -> None:
        self._rig = rig
        self._choice = choice
        self._events = events
        self._pause = seconds / events
        self._say = say
        self._done: Counter[str] = Counter()
        self._thaw_at: dict[Child, float] = {}
        self._back_at: dict[str, float] = {}
        self._outcomes: list[Outcome] = []

    def run(self) -> Outcome:
        began = time.monotonic()
        next_event = began + self._pause
        trial = self._rig.trial("random")
        try:
            while self._done.total() < self._events:
                now = time.monotonic()
                self._mend(now)
                if trial.poller.report is not None:
                    self._outcomes.append(self._conclude(trial))
                    trial = self._rig.trial("random")
                if now >= next_event:
                    self._strike(now)
                    next_event = max(next_event + self._pause * self._choice.uniform(0.5, 1.5), now)
                time.sleep(TICK_SECONDS)
            self._say(f"{self._events} faults are injected; waiting for the end ...")
            self._rig.provider.clear()
            self._rig.provider.add(Fault(bytes_per_second=10 * self._rig.rate))
            while self._thaw_at or self._back_at or trial.poller.report is None:
                self._mend(time.monotonic())
                if time.monotonic() > began + 3 * self._pause * self._events + 300:
                    raise NotReady("the last submission did not end")
                time.sleep(TICK_SECONDS)
            self._outcomes.append(self._conclude(trial))
        except NotReady as error:
            self._outcomes.append(failed(trial, error))
        finally:
            trial.poller.stop()
            for child in self._rig.stack.children:
                child.signal(signal.SIGCONT)
        return self._summary(time.monotonic() - began)

    def _conclude(self, trial: Trial) -> Outcome:
        outcome = conclude(trial, audit_too=False)
        self._say(f"submission {len(self._outcomes) + 1}: {'clean' if outcome.clean else outcome.faults}")
        return outcome

    def _strike(self, now: float) -> None:
        nodes = [self._rig.node(name) for name in self._rig.workers]
        nodes = [
            node for node in nodes if node.running and node not in self._thaw_at and node.name not in self._back_at
        ]
        if not nodes:
            return
        node, event = self._choice.choice(nodes), self._choice.choice(EVENTS)
        self._done[event] += 1
        if event == "kill":
            node.kill()
            self._back_at[node.name] = now + AWAY_SECONDS
        elif event == "freeze":
            node.signal(signal.SIGSTOP)
            self._thaw_at[node] = now + LEASE_SECONDS * self._choice.uniform(0.5, 3)
        elif event == "terminate":
            node.process.terminate()
            self._back_at[node.name] = now + AWAY_SECONDS
        else:
            for pid in _pool(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _mend(self, now: float) -> None:
        """Thaw what was frozen long enough, and start again what has ended."""
        for node in [node for node, at in self._thaw_at.items() if now >= at]:
            node.signal(signal.SIGCONT)
            del self._thaw_at[node]
        for name, at in list(self._back_at.items()):
            if now >= at and not self._rig.node(name).running:
                self._rig.launch(name)
                del self._back_at[name]

    def _summary(self, seconds: float) -> Outcome:
        outcomes = self._outcomes
        lines = sum(self._rig.resources for _ in outcomes)
        [[tokens, claims]] = self._rig.rows(
            "SELECT count(*) FILTER (WHERE fencing_token > 1), sum(fencing_token) FROM steps WHERE kind = 'ingest'"
        )
        events = self._rig.rows("SELECT event, count(*) FROM lease_events GROUP BY event ORDER BY event")
        return Outcome(
            name="random",
            deeds=[
                ", ".join(f"{event}: {count}" for event, count in sorted(self._done.items())),
                f"{len(outcomes)} submissions, {lines:,} lines",
            ],
            fleet=[
                f"{tokens} files changed hands, {claims} claims of files",
                ", ".join(f"{event}: {count}" for event, count in events),
            ],
            recovery=None,
            polls=sum(outcome.polls for outcome in outcomes),
            polls_refused=sum(outcome.polls_refused for outcome in outcomes),
            poll_p99=max(outcome.poll_p99 for outcome in outcomes),
            seconds=seconds,
            faults=[*(fault for outcome in outcomes for fault in outcome.faults), *audited(self._rig)],
        )


def _pool(node: Child) -> list[int]:
    """The processes of the node's pool."""
    pid = node.process.pid
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
