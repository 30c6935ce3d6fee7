"""Commands for those who send: submit, watch, status, ledger; and registering who may."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from bulk_submit_client import Progress, Report, SubmitClient, SubmitError, Submitter
from rich.console import Console
from rich.table import Table

from cli.display import ProgressDisplay
from schema import submissions
from schema.database import create_engine
from settings import settings

console = Console()

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
            console.print(f"accepted {url}")
        if not leave_open:
            client.complete(submission_id)
    except SubmitError as error:
        _fail(error)


def watch(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Follow a submission until it has ended, then show what became of it."""
    client = _client(base, system, value)
    try:
        with ProgressDisplay(console, submission_id) as display:
            report = client.wait(submission_id, on_progress=display.update)
        show_report(report)
    except SubmitError as error:
        _fail(error)


def status(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Say how far a submission is."""
    try:
        handle = _client(base, system, value).status(submission_id)
        answer = handle.poll()
        handle.delete()
    except SubmitError as error:
        _fail(error)
    if isinstance(answer, Progress):
        console.print(answer.text)
    else:
        show_report(answer)


def ledger(submission_id: SubmissionId, base: Base, system: System, value: Value) -> None:
    """Print what became of every input line, as NDJSON, once the submission has ended."""
    client = _client(base, system, value)
    try:
        answer = client.status(submission_id).poll()
        if isinstance(answer, Progress):
            _fail(f"the submission is not finished yet: {answer.text}")
        with tempfile.TemporaryDirectory() as directory:
            for path in client.download(answer, Path(directory), kinds=("ledger",)):
                with path.open() as lines:
                    sys.stdout.writelines(lines)
    except SubmitError as error:
        _fail(error)


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
    engine = create_engine(settings(), application="bulk-submit submitter", pooled=False)
    with engine.begin() as connection:
        tenant_id = submissions.add_tenant(connection, tenant)
        submissions.add_submitter(connection, tenant_id, system, value, ignore_meta=ignore_meta)
    engine.dispose()
    console.print(f"{system}|{value} may submit to tenant {tenant}")


def show_report(report: Report) -> None:
    """The status manifest as tables."""
    table = Table("receipt", "type", "lines", "bytes", "severities")
    for kind in ("output", "deleted", "outcome"):
        for item in report.manifest.get(kind, []):
            severities = ", ".join(f"{entry['count']} {entry['code']}" for entry in item.get("countSeverity", []))
            table.add_row(
                kind, item.get("type", ""), f"{item.get('count', 0):,}", f"{item.get('fileSize', 0):,}", severities
            )
    console.print(table)


def _client(base: str, system: str, value: str) -> SubmitClient:
    return SubmitClient(base, submitter=Submitter(system, value))


def _fail(error: object) -> NoReturn:
    console.print(f"[red]{error}[/red]")
    raise typer.Exit(1)
