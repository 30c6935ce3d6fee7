"""The `bulk-submit` command: the fleet's processes, submitting and watching, and the stack for trying it out."""

from __future__ import annotations

import typer

from cli import drills, fleet, processes, reliability, stack, submitting

app = typer.Typer(
    name="bulk-submit", help="A FHIR Bulk Submit Data Consumer.", no_args_is_help=True, pretty_exceptions_enable=False
)

app.command()(stack.demo)
app.command()(stack.up)
app.command()(stack.sample)
app.command()(stack.bench)
app.command()(drills.drill)
app.command()(processes.api)
app.command()(processes.worker)
app.command()(processes.beat)
app.command()(processes.flower)
app.command()(processes.migrate)
app.command()(fleet.drain)
app.command()(fleet.leases)
app.command()(submitting.submit)
app.command()(submitting.watch)
app.command()(submitting.status)
app.command()(submitting.ledger)
app.command()(reliability.audit)
app.add_typer(submitting.submitters, name="submitter")
