"""Commands for those who send: submit, watch, status, ledger; and registering who may."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from bulk_submit_client import Progress, Report, SubmitClient, SubmitError, Submitter
from rich.table import Table
from rich.text import Text

from cli.display import ProgressDisplay, console, fail, reason, say
from schema import submissions
from schema.database import DATABASE_ERRORS, create_engine
from settings import settings

SHOWN = 5
ERRORS = ("fatal", "error")

Base = Annotated[str, typer.Option("--base", envvar="BULK_SUBMIT_BASE", help="FHIR base URL of the consumer.")]
System = Annotated[
    str, typer.Option("--system", envvar="BULK_SUBMIT_SYSTEM", help="System of the submitter's identifier.")
]
Value = Annotated[str, typer.Option("--value", envvar="BULK_SUBMIT_VALUE", help="Value of the submitter's identifier.")]
SubmissionId = Annotated[str, typer.Argument(help="The submission's id, as its submitter calls it.")]

submitters = typer.Typer(help="Who may submit.", no_args_is_help=True)


def submit(
    urls: Annotated[list[str], typer.Argument(help="URLs of Bulk Data manifests.")],
    base: Base,
    system: System,
    value: Value,
    submission_id: Annotated[str, typer.Option("--id", help="The submission's id.")],
    fhir_base_url: Annotated[str, typer.Option(help="Base of relative references in the resources.")],
    header: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, sent with every request for the manifest and its files.")
    ] = None,
    leave_open: Annotated[bool, typer.Option("--open", help="More manifests will follow: do not complete.")] = False,
) -> None:
    """Submit manifests, and complete the submission."""
    client = _client(base, system, value)
    headers = [(name, text) for name, _, text in (item.partition("=") for item in header or [])]
    try:
        for url in urls:
            client.submit(submission_id, url, fhir_base_url=fhir_base_url, headers=headers)
            say(f"accepted {url}")
        if not leave_open:
            client.complete(submission_id)
    except SubmitError as error:
        fail(error)


def watch(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Follow a submission until it has ended, then show what became of it. Exits 1 if a manifest failed."""
    client = _client(base, system, value)
    try:
        with ProgressDisplay(console, submission_id) as display:
            report = client.wait(submission_id, on_progress=display.update)
        complete = show_report(client, report)
    except SubmitError as error:
        fail(error)
    raise typer.Exit(0 if complete else 1)


def status(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Say how far a submission is, or what became of it. Exits 1 if a manifest failed."""
    client = _client(base, system, value)
    complete = True
    try:
        handle = client.status(submission_id)
        answer = handle.poll()
        if isinstance(answer, Progress):
            say(answer.text)
        else:
            complete = show_report(client, answer)
        handle.delete()
    except SubmitError as error:
        fail(error)
    raise typer.Exit(0 if complete else 1)


def ledger(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Print what became of every input line, as NDJSON, once the submission has ended."""
    client = _client(base, system, value)
    try:
        answer = client.status(submission_id).poll()
        if isinstance(answer, Progress):
            fail(f"the submission is not finished yet: {answer.text}")
        with tempfile.TemporaryDirectory() as directory:
            for path in client.download(answer, Path(directory), kinds=("ledger",)):
                with path.open() as lines:
                    sys.stdout.writelines(lines)
    except SubmitError as error:
        fail(error)


@submitters.command("add")
def add_submitter(
    system: System,
    value: Value,
    tenant: Annotated[str, typer.Option(help="Tenant; made if there is none of that name.")] = "default",
    ignore_meta: Annotated[
        bool, typer.Option(help="Compare content without meta.versionId and meta.lastUpdated.")
    ] = False,
) -> None:
    """Register a submitter, or change its settings. Talks to the database."""
    try:
        engine = create_engine(settings(), application="bulk-submit submitter", pooled=False)
        with engine.begin() as connection:
            tenant_id = submissions.add_tenant(connection, tenant)
            submissions.add_submitter(connection, tenant_id, system, value, ignore_meta=ignore_meta)
    except DATABASE_ERRORS as error:
        fail(reason(error))
    engine.dispose()
    say(f"{system}|{value} may submit to tenant {tenant}")


def show_report(client: SubmitClient, report: Report) -> bool:
    """Print receipts, failures and the first errors; returns whether no manifest failed. Raises `SubmitError`."""
    table = Table("receipt", "type", "lines", "bytes", "severities")
    for kind, item in report.files(("output", "deleted", "outcome")):
        severities = ", ".join(f"{entry['count']} {entry['code']}" for entry in item.get("countSeverity", []))
        figures = (f"{item.get('count', 0):,}", f"{item.get('fileSize', 0):,}")
        table.add_row(*map(Text, (kind, item.get("type", ""), *figures, severities)))
    console.print(table)
    manifests = _reconciliations(client, report)
    failed = [manifest for manifest in manifests if manifest["status"] == "failed"]
    for manifest in failed:
        say(f"failed: {manifest['manifestUrl']}", style="red")
    if lines := sum(manifest["total"]["failed"] for manifest in manifests):
        say(f"{lines:,} {'line' if lines == 1 else 'lines'} failed", style="red")
    # Those of manifests and files first: in the receipts they may stand after any number of those of lines.
    problems = (problem["diagnostics"] for manifest in failed for problem in _problems(manifest))
    for text in dict.fromkeys([*islice(problems, SHOWN), *islice(_errors(client, report), SHOWN)]):
        say(f"  {text}")
    return not failed


def _reconciliations(client: SubmitClient, report: Report) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        paths = client.download(report, Path(directory), kinds=("reconciliation",))
        return [json.loads(path.read_text()) for path in paths]


def _problems(manifest: dict[str, Any]) -> Iterator[dict[str, str]]:
    for part in (manifest, *manifest["files"]):
        yield from (problem for problem in part["problems"] if problem["severity"] in ERRORS)


def _errors(client: SubmitClient, report: Report) -> Iterator[str]:
    for outcome in client.outcomes(report):
        yield from (issue["details"]["text"] for issue in outcome["issue"] if issue["severity"] in ERRORS)


def _client(base: str, system: str, value: str) -> SubmitClient:
    return SubmitClient(base, submitter=Submitter(system, value))
