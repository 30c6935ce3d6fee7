"""After a drill: was every line ingested exactly once, and how did the fleet get over the fault?"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from bulk_submit_client import Report

from devstack.drills.rig import MANIFEST, Rig, Trial
from devstack.generator import expected_store
from devstack.verify import differences
from workers.audit import audit

SHOWN = 10
STEPS_TOLD = 6
NOTEWORTHY = re.compile(
    r'event="(lease lost|heartbeat failed|step put off|database not reachable[^"]*|broker not reachable[^"]*'
    r'|hand does not move[^"]*|loss not noted|node could not report|fetch failed)"'
)


@dataclass(frozen=True)
class Outcome:
    """What came of one drill. Durations in seconds; `recovery` is None where nothing had to recover."""

    name: str
    deeds: list[str]
    fleet: list[str]
    recovery: float | None
    polls: int
    polls_refused: int
    poll_p99: float
    seconds: float
    faults: list[str]

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, nothing came twice, and the fleet did what it should."""
        return not self.faults


def conclude(trial: Trial, *, audit_too: bool = True) -> Outcome:
    """Wait until the trial's submission has ended, and verify it; then everything, by the audit."""
    report = trial.wait_for_end()
    trial.poller.stop()
    lasted = time.monotonic() - trial.began
    faults = [*trial.faults, *islice(_faults(trial, report), SHOWN), *(audited(trial.rig) if audit_too else [])]
    recovery = _recovery(trial)
    if trial.strike is not None and recovery is None:
        faults.append("nothing shows that the work went on after the fault")
    return Outcome(
        name=trial.name,
        deeds=trial.deeds,
        fleet=[*_timeline(trial), *_log_counts(trial)],
        recovery=recovery,
        polls=len(trial.poller.latencies),
        polls_refused=trial.poller.refusals,
        poll_p99=trial.poller.percentile(0.99),
        seconds=lasted,
        faults=faults,
    )


def failed(trial: Trial, error: BaseException) -> Outcome:
    """The outcome of a drill that did not come to its end."""
    trial.poller.stop()
    poller = trial.poller
    return Outcome(
        name=trial.name,
        deeds=trial.deeds,
        fleet=[*_timeline(trial), *_log_counts(trial)],
        recovery=None,
        polls=len(poller.latencies),
        polls_refused=poller.refusals,
        poll_p99=poller.percentile(0.99),
        seconds=time.monotonic() - trial.began,
        faults=[*trial.faults, f"{type(error).__name__}: {error}"],
    )


def audited(rig: Rig) -> list[str]:
    """What the audit finds wrong in everything that the database and the artifact store hold."""
    results = audit(rig.stack.settings)
    return [f"audit, {result.name}: {offender}" for result in results for offender in result.offenders]


def _faults(trial: Trial, report: Report) -> Iterator[str]:
    files = trial.rig.samples.files
    lines = sum(file.lines for file in files)
    [[status]] = trial.rig.rows("SELECT status FROM manifests WHERE tenant_id = %s", trial.tenant_id)
    if status != "completed":
        yield f"the manifest is {status}"
    [[batches, batch_lines]] = trial.rig.rows(
        "SELECT count(DISTINCT (file_id, first_line)) - count(*), coalesce(sum(line_count), 0)"
        " FROM ingest_batches WHERE tenant_id = %s",
        trial.tenant_id,
    )
    if batches != 0 or batch_lines != lines:
        yield f"committed batches cover {batch_lines:,} lines, not {lines:,}"
    [[versions]] = trial.rig.rows("SELECT count(*) FROM resource_versions WHERE key BETWEEN %s AND %s", *trial.keys())
    if versions != lines:
        yield f"the store holds {versions:,} versions, not {lines:,}"
    expected = expected_store(trial.rig.samples.directory, [file.name for file in files])
    yield from differences(trial.rig.stack.settings.database_url, expected, tenant=trial.tenant)
    receipts = trial.client.download(report, trial.rig.directory / trial.tenant, kinds=("output", "outcome", "ledger"))
    yield from _receipt_faults(trial, receipts)


def _receipt_faults(trial: Trial, receipts: list[Path]) -> Iterator[str]:
    files = trial.rig.samples.files
    served = {(file.name, line) for file in files for line in range(1, file.lines + 1)}
    places: Counter[tuple[str, int]] = Counter()
    actions: Counter[str] = Counter()
    written = errors = 0
    for path in receipts:
        with path.open() as lines:
            for line in lines:
                entry = json.loads(line)
                if path.name.startswith("ledger"):
                    places[entry["file"].rpartition("/")[2], entry["line"]] += 1
                    actions[entry["action"]] += 1
                elif path.name.startswith("output"):
                    written += 1
                else:
                    errors += sum(issue["severity"] in ("error", "fatal") for issue in entry["issue"])
    yield from (f"{file} line {line} has no entry in the ledger" for file, line in sorted(served - places.keys()))
    yield from (f"{file} line {line} is in the ledger and was not served" for file, line in places.keys() - served)
    yield from (f"{file} line {line} is in the ledger {n} times" for (file, line), n in places.items() if n > 1)
    if actions != {"created": len(served)}:
        yield f"the ledger says {dict(actions)}, not that {len(served):,} lines were created"
    if written != len(served):
        yield f"the output receipts have {written:,} entries, not {len(served):,}"
    if errors:
        yield f"{errors} errors in the outcome receipts of {MANIFEST}"


def _recovery(trial: Trial) -> float | None:
    """Seconds from the fault to the step's next claim or, unless only that counts, its next commit."""
    strike = trial.strike
    if strike is None:
        return None
    holder = strike.holder
    query = """
        SELECT min(extract(epoch FROM at)) FROM lease_events
        WHERE tenant_id = %(tenant)s AND event = 'claimed' AND at > to_timestamp(%(at)s)
          AND (%(step)s::bigint IS NULL OR (step_id = %(step)s AND fencing_token > %(token)s))
        UNION ALL
        SELECT min(extract(epoch FROM committed_at)) FROM ingest_batches
        WHERE tenant_id = %(tenant)s AND committed_at > to_timestamp(%(at)s) AND NOT %(claims)s
          AND (%(file)s::bigint IS NULL OR file_id = %(file)s)
    """
    values = {
        "tenant": trial.tenant_id,
        "at": strike.at,
        "step": holder and holder.step_id,
        "file": holder and holder.file_id,
        "token": holder and holder.token,
        "claims": strike.by_claim,
    }
    times = [float(at) for (at,) in trial.rig.named_rows(query, values) if at is not None]
    return min(times) - strike.at if times else None


def _timeline(trial: Trial) -> list[str]:
    """The steps that changed hands: what happened to which holder, with its token."""
    query = """
        SELECT e.step_id, s.kind, coalesce(substring(f.url FROM '[^/]*$'), ''), e.event, e.fencing_token,
               split_part(e.worker_id, '@', 1)
        FROM lease_events e
        JOIN steps s ON s.tenant_id = e.tenant_id AND s.id = e.step_id
        LEFT JOIN manifest_files f ON f.tenant_id = s.tenant_id AND f.id = s.file_id
        WHERE e.tenant_id = %s AND s.fencing_token > 1
        ORDER BY e.step_id, e.id
    """
    told = []
    for (_, kind, file), events in groupby(trial.rig.rows(query, trial.tenant_id), key=lambda row: row[:3]):
        story = " · ".join(f"{event} ({worker}, {token})" for *_, event, token, worker in events)
        told.append(f"{kind} {file}: {story}".replace(" :", ":"))
    if len(told) > STEPS_TOLD:
        told[STEPS_TOLD:] = [f"and {len(told) - STEPS_TOLD} more steps that changed hands"]
    return told


def _log_counts(trial: Trial) -> list[str]:
    counts = Counter(found[1] for line in trial.log_lines() if (found := NOTEWORTHY.search(line)))
    return [", ".join(f"{event}: {count}" for event, count in counts.most_common())] if counts else []
