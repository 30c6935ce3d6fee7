"""The benchmark: ingest from HTTP to commit, beside raw binary COPY of the same rows into the same Postgres.

Ingest is timed by the database's clock, from the kickoff's commit to the commit of the last batch; "to receipts" ends
with the manifest. The reference is COPY of rows that lie prepared in memory, over one connection, measured right before
each run of the fleet: once into a heap, once into a table with the store's primary key. Peak memory is VmHWM, the
largest of the workers' processes.
"""

from __future__ import annotations

import platform
import statistics
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from bulk_submit_client import SubmitClient, Submitter
from rich.console import Console

from devstack.generator import SampleSet, expected_store, generate
from devstack.servers import OwnedDirectory
from devstack.stack import Child, Stack
from schema import submissions
from schema.database import create_engine
from schema.resources import key_prefix, resource_key
from workers.ingest.lines import line_hash

SUBMITTER = Submitter("urn:bulk-submit:benchmark", "benchmark")
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_END = struct.pack(">h", -1)
ROWS_AT_ONCE = 2000
OTHER_TENANT = 2**31 - 1
TABLE = """
    CREATE TABLE copy_reference (key uuid, seq bigint, version bigint, batch_id bigint, line bigint, op smallint,
                                 content_hash uuid, resource_id text, body text)
"""
PRIMARY_KEY = "ALTER TABLE copy_reference ADD PRIMARY KEY (key, seq)"


@dataclass(frozen=True)
class Run:
    """One submission's figures; seconds and resources per second."""

    workers: int
    what: str
    seconds: float
    rate: float
    receipts_seconds: float
    heap_rate: float
    keyed_rate: float
    peak_mebibytes: float


def run(console: Console, *, resources: int, workers: list[int], lines_per_file: int, repeat: int) -> None:
    """Measure, and print a Markdown table."""
    with OwnedDirectory("bench") as directory, Stack() as stack:
        served = directory / "served"
        served.mkdir()
        console.print(f"Making {resources:,} resources ...")
        samples = generate(served, resources, lines_per_file=lines_per_file)
        rows = list(_copy_stream(expected_store(served, [file.name for file in samples.files])))
        stack.launch_api()()
        stack.launch_sweeps()
        command = [sys.executable, "-m", "devstack.provider", str(served)]
        provider = Child("provider", command, stack.directory / "provider.log", {}, output=-1)
        manifest_url = f"{provider.output.readline().decode().strip()}/manifest.json"
        runs: list[Run] = []
        try:
            for count in sorted(workers):
                for number in range(_running(stack), count):
                    stack.launch_worker(f"worker{number + 1}")()
                for attempt in range(repeat):
                    tenant = f"bench-{count}-{attempt}"
                    for what in ("created", "unchanged"):
                        console.print(f"{count} workers, {what} ...")
                        runs.append(_measure(stack, rows, resources, count, tenant, what, manifest_url))
        finally:
            provider.stop()
        console.print()
        for line in _report(stack, samples, runs):
            console.print(line, markup=False, soft_wrap=True)


def _measure(
    stack: Stack, rows: list[bytes], resources: int, workers: int, tenant: str, what: str, manifest_url: str
) -> Run:
    heap = resources / _copy(stack.settings.database_url, rows, keyed=False)
    keyed = resources / _copy(stack.settings.database_url, rows, keyed=True)
    _register(stack, tenant)
    client = SubmitClient(f"{stack.settings.public_url}/{tenant}/fhir", submitter=SUBMITTER)
    client.submit(what, manifest_url, fhir_base_url="http://ehr.example.org/fhir", status="completed")
    client.wait(what)
    ingest, receipts, lines = _times(stack.settings.database_url, tenant, what)
    if lines != resources:
        raise RuntimeError(f"{lines} lines were {what}, not {resources}")
    peak = max(_peak_mebibytes(child) for child in stack.children if child.name.startswith("worker"))
    return Run(workers, what, ingest, resources / ingest, receipts, heap, keyed, peak)


def _register(stack: Stack, tenant: str) -> None:
    engine = create_engine(stack.settings, application="bulk-submit bench", pooled=False)
    with engine.begin() as connection:
        tenant_id = submissions.add_tenant(connection, tenant)
        submissions.add_submitter(connection, tenant_id, SUBMITTER.system, SUBMITTER.value, ignore_meta=False)
    engine.dispose()


def _times(database_url: str, tenant: str, submission_id: str) -> tuple[float, float, int]:
    """Seconds to the last batch and to the receipts, and how many lines became what the run is about."""
    column = "created" if submission_id == "created" else "unchanged + b.affirmed"
    query = f"""
        SELECT extract(epoch FROM max(b.committed_at) - m.created_at), extract(epoch FROM m.finished_at - m.created_at),
               sum(b.{column})
        FROM manifests m
        JOIN submissions s ON s.tenant_id = m.tenant_id AND s.id = m.submission_id
        JOIN tenants t ON t.id = m.tenant_id
        JOIN ingest_batches b ON b.tenant_id = m.tenant_id AND b.manifest_id = m.id
        WHERE t.name = %s AND s.submission_id = %s
        GROUP BY m.tenant_id, m.id
    """  # noqa: S608 - column is one of two constants
    with psycopg.connect(database_url) as connection:
        row = connection.execute(query, (tenant, submission_id)).fetchone()
    assert row is not None
    return float(row[0]), float(row[1]), int(row[2])


def _copy_stream(resources: Iterable[tuple[str, str, bytes]]) -> Iterator[bytes]:
    """The rows in COPY's binary format, in pieces. Source: PostgreSQL documentation, COPY, "Binary Format"."""
    fixed = struct.Struct(">hi16siqiqiqiqihi16s")
    prefixes: dict[str, bytes] = {}
    piece = [COPY_HEADER]
    for line, (kind, resource_id, body) in enumerate(resources, 1):
        prefix = prefixes.get(kind) or prefixes.setdefault(kind, key_prefix(OTHER_TENANT, kind))
        key, name = resource_key(prefix, resource_id), resource_id.encode()
        piece.append(fixed.pack(9, 16, key, 8, 1, 8, 1, 8, 1, 8, line, 2, 1, 16, line_hash(body)))
        piece += [struct.pack(">i", len(name)), name, struct.pack(">i", len(body)), body]
        if line % ROWS_AT_ONCE == 0:
            yield b"".join(piece)
            piece = []
    piece.append(COPY_END)
    yield b"".join(piece)


def _copy(database_url: str, rows: list[bytes], *, keyed: bool) -> float:
    """Seconds for COPY and its commit."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS copy_reference")
        connection.execute(TABLE)
        if keyed:
            connection.execute(PRIMARY_KEY)
        begun = time.perf_counter()
        with connection.cursor().copy("COPY copy_reference FROM STDIN (FORMAT binary)") as copy:
            for piece in rows:
                copy.write(piece)
        seconds = time.perf_counter() - begun
        connection.execute("DROP TABLE copy_reference")
    return seconds


def _running(stack: Stack) -> int:
    return sum(1 for child in stack.children if child.name.startswith("worker"))


def _peak_mebibytes(child: Child) -> float:
    """The largest peak of resident memory among the processes of the child's group."""
    peaks = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            group = int(status.with_name("stat").read_text().rpartition(")")[2].split()[2])
            if group == child.process.pid:
                peaks += [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return max(peaks) / 1024


def _report(stack: Stack, samples: SampleSet, runs: list[Run]) -> Iterator[str]:
    size = sum(file.size for file in samples.files)
    lines = sum(file.lines for file in samples.files)
    with psycopg.connect(stack.settings.database_url) as connection:
        version = connection.info.server_version // 10000
    yield f"{lines:,} resources, {size / 1e6:,.0f} MB in {len(samples.files)} files, mean {size // lines:,} bytes"
    yield f"{_cpu()}; Postgres {version}, fsync and synchronous_commit on, on the same machine as everything else"
    yield ""
    columns = ["workers", "lines are", "resources/s", "MB/s", "COPY, heap", "ratio", "COPY, primary key", "ratio"]
    columns += ["to receipts", "peak memory"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for workers, what in dict.fromkeys((run.workers, run.what) for run in runs):
        same = [run for run in runs if (run.workers, run.what) == (workers, what)]
        rate, heap, keyed = (
            statistics.median(values)
            for values in zip(*((run.rate, run.heap_rate, run.keyed_rate) for run in same), strict=True)
        )
        yield (
            f"| {workers} | {what} | {rate:,.0f} | {rate * size / lines / 1e6:,.0f} "
            f"| {heap:,.0f}/s | {rate / heap:.2f} "
            f"| {keyed:,.0f}/s | {rate / keyed:.2f} | {statistics.median(run.receipts_seconds for run in same):.1f} s "
            f"| {max(run.peak_mebibytes for run in same):.0f} MiB |"
        )


def _cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} × {names[0]}" if names else platform.machine()
