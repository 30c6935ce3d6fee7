"""The command that breaks things on purpose, by the extra `embedded`: a fault under load, then the proof."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from devstack.drills.verdict import Outcome

RANDOM = "random"
CLEAN, NOT_CLEAN, NO_SUCH_DRILL = 0, 1, 2

console = Console()


def drill(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Drills, or what their names begin with; `all`; `random`."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the drills.")] = False,
    resources: Annotated[
        int | None, typer.Option(help="Resources in one submission; 20,000, of `random` 1,000,000 unless given.")
    ] = None,
    events: Annotated[int, typer.Option(help="Of `random`: how many faults.")] = 200,
    minutes: Annotated[float, typer.Option(help="Of `random`: over how long they are spread.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of `random`: which faults, of whom and when.")] = 1,
) -> None:
    """Break one thing under load, and prove that nothing is lost and nothing twice. Exits 0 only if all are clean."""
    from devstack.drills import catalogue, random_faults
    from devstack.drills.rig import Rig

    if show or not names:
        for entry in catalogue.DRILLS:
            console.print(f"{entry.name:22}{entry.summary}", soft_wrap=True)
        console.print(f"{RANDOM:22}{random_faults.SUMMARY}", soft_wrap=True, markup=False)
        return
    chosen = [entry for name in names if name != RANDOM for entry in catalogue.matching(name)]
    unknown = [name for name in names if name != RANDOM and not catalogue.matching(name)]
    if unknown:
        console.print(f"There is no drill {', '.join(unknown)}; --list shows them all.", markup=False)
        raise typer.Exit(NO_SUCH_DRILL)
    outcomes = []
    if chosen:
        console.print("Starting Postgres, Redis, API, workers, sweeper and beat ...")
        with Rig(resources=resources or 20_000) as rig:
            for entry in dict.fromkeys(chosen):
                console.print(f"\n[bold]{entry.name}[/bold]: {entry.summary}")
                outcome = catalogue.run(rig, entry)
                outcomes.append(replace(outcome, faults=[*outcome.faults, *entry.figures_missed(outcome)]))
                _tell(outcomes[-1])
    if RANDOM in names:
        console.print(f"\n[bold]{RANDOM}[/bold]: {events} faults over {minutes:g} minutes, seed {seed}")
        outcomes.append(
            random_faults.run(
                resources=resources or 1_000_000, events=events, seconds=minutes * 60, seed=seed, say=console.print
            )
        )
        _tell(outcomes[-1])
    console.print(_table(outcomes))
    raise typer.Exit(CLEAN if all(outcome.clean for outcome in outcomes) else NOT_CLEAN)


def _tell(outcome: Outcome) -> None:
    for deed in outcome.deeds:
        console.print(f"  did    {escape(deed)}")
    for line in outcome.fleet:
        console.print(f"  fleet  {escape(line)}")
    for fault in outcome.faults:
        console.print(f"  [red]fault  {escape(fault)}[/red]")


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("drill", title="Drills")
    for figure in ("recovery, s", "polls", "refused", "poll p99, ms", "whole run, s"):
        table.add_column(figure, justify="right")
    table.add_column("verdict")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            "" if outcome.recovery is None else f"{outcome.recovery:.2f}",
            f"{outcome.polls:,}",
            f"{outcome.polls_refused:,}",
            f"{outcome.poll_p99 * 1000:.0f}",
            f"{outcome.seconds:.1f}",
            "[green]clean[/green]" if outcome.clean else f"[red]{len(outcome.faults)} faults[/red]",
        )
    return table
