"""Writing a batch: look up what stands, decide, COPY, results, fence. One transaction, all of it or nothing.

What is decided for an entry, by the newest row of its key:

    none stands, or a deletion                     create
    other content                                  update
    same content, written by this manifest         unchanged: nothing is written
    same content, written by another manifest      affirm: a row without a body, this manifest vouches for it too
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from schema import leases, resources, results
from schema.fhir_types import type_name
from schema.leases import Lease, Progress
from schema.resources import Op, Standing
from schema.results import Action, Issue
from workers.ingest.batch import Batch

OUR_OWN = 0
"""Stands for the batch being written, where a batch id is asked for."""


class Origins:
    """Which manifest wrote a batch, remembered: a file that changes little asks for the same few again and again."""

    LIMIT = 10_000

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._manifests: dict[int, int] = {}

    def learn(self, connection: sa.Connection, batches: set[int]) -> None:
        """Look up those not known yet."""
        unknown = batches - self._manifests.keys()
        if not unknown:
            return
        if len(self._manifests) > self.LIMIT:
            self._manifests.clear()
            unknown = batches
        self._manifests.update(resources.manifests_of_batches(connection, self._lease.tenant_id, unknown))

    def ours(self, batch_id: int) -> bool:
        """Whether this manifest wrote the batch."""
        return batch_id == OUR_OWN or self._manifests[batch_id] == self._lease.manifest_id


def write_batch(
    connection: sa.Connection, lease: Lease, batch: Batch, origins: Origins, *, by_key: bool, lease_seconds: float
) -> Progress:
    """Write and commit the batch. `by_key` writes rows in the order of their keys, so that writers of the same keys
    cannot deadlock.

    Raises `LeaseLost`; or a database error, for which see `schema.database.is_conflict` and `is_disconnect`.
    """
    with connection.begin():
        leases.enter(connection, lease)
        batch_id = results.next_batch_id(connection)
        standing = _look_up(connection, batch, origins)
        rows, line_results, issues = _decide(batch, standing, origins, batch_id)
        if rows:
            resources.append(connection, sorted(rows, key=_key_and_seq) if by_key else rows)
        actions = line_results.actions
        progress = Progress(
            first_byte=batch.first_byte,
            end_byte=batch.end_byte,
            end_line=batch.end_line,
            created=actions.count(Action.CREATED),
            updated=actions.count(Action.UPDATED),
            unchanged=actions.count(Action.UNCHANGED),
            affirmed=actions.count(Action.AFFIRMED),
            failed=actions.count(Action.FAILED),
            skipped=batch.skipped,
        )
        results.record_batch(
            connection,
            lease,
            batch_id,
            progress,
            first_line=batch.first_line,
            line_count=batch.line_count,
            digest=batch.digest(),
            results=line_results,
            issues=issues,
        )
        leases.hold_manifest(connection, lease)
        leases.fence(connection, lease, progress, lease_seconds)
    return progress


def _key_and_seq(row: resources.VersionRow) -> tuple[bytes, int]:
    return row[0], row[1]


def _look_up(connection: sa.Connection, batch: Batch, origins: Origins) -> dict[bytes, Standing]:
    keys = list(dict.fromkeys(batch.keys))
    if not keys:
        return {}
    standing = {keys[row.place - 1]: row for row in resources.newest(connection, keys)}
    origins.learn(connection, {row.batch_id for row in standing.values()})
    return standing


def _decide(
    batch: Batch, standing: dict[bytes, Standing], origins: Origins, batch_id: int
) -> tuple[Sequence[resources.VersionRow], results.LineResults, list[Issue]]:
    """The rows to append and what to say of each line. `standing` follows the batch: a key may come twice in it."""
    rows: list[resources.VersionRow] = []
    actions = bytearray(batch.results.actions)
    line_results = results.LineResults(actions, batch.results.lengths)
    issues = list(batch.issues)
    add_row = rows.append
    first_line = batch.first_line
    entries = zip(batch.places, batch.types, batch.ids, batch.keys, batch.content_hashes, batch.bodies, strict=True)
    for place, number, resource_id, key, content, body in entries:
        now = standing.get(key)
        stored_body: bytes | None = body
        if now is None:
            seq = version = 1
            op, action = Op.CREATE, Action.CREATED
        elif now.resource_id != resource_id:
            actions[place] = Action.FAILED
            issues.append(_collision(batch, place, number, resource_id))
            continue
        elif now.op == Op.DELETE:
            seq, version = now.seq + 1, now.version + 1
            op, action = Op.CREATE, Action.CREATED
        elif now.content_hash != content:
            seq, version = now.seq + 1, now.version + 1
            op, action = Op.UPDATE, Action.UPDATED
        elif origins.ours(now.batch_id):
            seq, version = now.seq, now.version
            action = Action.UNCHANGED
        else:
            seq, version = now.seq + 1, now.version
            op, action, stored_body = Op.AFFIRM, Action.AFFIRMED, None
        if action is not Action.UNCHANGED:
            add_row(
                resources.VersionRow(
                    key, seq, version, batch_id, first_line + place, op, content, resource_id, stored_body
                )
            )
            standing[key] = Standing(0, seq, version, op, content, OUR_OWN, resource_id)
        actions[place] = action
        line_results.types.append(number)
        line_results.ids.append(resource_id)
        line_results.versions.append(version)
        line_results.seqs.append(seq)
    issues.sort(key=lambda issue: issue.line)
    return rows, line_results, issues


def _collision(batch: Batch, place: int, number: int, resource_id: str) -> Issue:
    return Issue(
        line=batch.first_line + place,
        byte_offset=batch.first_byte + sum(batch.results.lengths[:place]),
        code="duplicate",
        diagnostics="the id cannot be told from another one in the store; send the resource under another id",
        outcome="processing-error",
        resource_type=type_name(number),
        resource_id=resource_id,
    )
