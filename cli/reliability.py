"""Commands for those who want proof: the audit."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from schema.database import DATABASE_ERRORS
from settings import settings
from workers.artifact_store import ArtifactStoreError
from workers.audit import OFFENDERS_NAMED, CheckResult
from workers.audit import audit as checks

CLEAN, OFFENDERS, NOT_RUN = 0, 1, 2

console = Console()


def audit(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the checks that read every row of the store: versions, written.")
    ] = False,
) -> None:
    """Prove the guarantees over everything stored. Exits 0 when clean, 1 with offenders, 2 when it could not run."""
    table = Table("check", "proves", title="Audit")
    for figure in ("examined", "skipped", "offenders", "seconds"):
        table.add_column(figure, justify="right")
    found: list[CheckResult] = []
    failure = ""
    try:
        with Live(table, console=console):
            for result in checks(settings(), quick=quick):
                found.append(result)
                table.add_row(
                    result.name,
                    result.proves,
                    f"{result.examined:,}",
                    f"{result.skipped:,}",
                    f"[red]{_how_many(result)}[/red]" if result.offenders else "0",
                    f"{result.seconds:.1f}",
                )
    except (*DATABASE_ERRORS, ArtifactStoreError) as error:
        failure = _reason(error)
    offending = [result for result in found if result.offenders]
    for result in offending:
        for offender in result.offenders:
            console.print(f"{result.name}: {offender}", markup=False, soft_wrap=True)
    if failure:
        console.print(f"The audit could not run: {failure}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(NOT_RUN)
    if not offending:
        console.print("Nothing offends.")
    raise typer.Exit(OFFENDERS if offending else CLEAN)


def _how_many(result: CheckResult) -> str:
    named = len(result.offenders)
    return f"more than {OFFENDERS_NAMED}" if named > OFFENDERS_NAMED else str(named)


def _reason(error: BaseException) -> str:
    """What to tell of the error: no statement, and no more than a line."""
    original = getattr(error, "orig", None) or error
    return str(original).partition("\n")[0] or type(original).__name__
