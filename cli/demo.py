"""The demo: a provider serves sample data, the fleet takes it in, every figure is checked against what was served."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bulk_submit_client import Report, SubmitClient, Submitter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.display import ProgressDisplay
from devstack.generator import SampleSet, bad_lines, expected_store, generate
from devstack.servers import OwnedDirectory
from devstack.stack import Child, Stack
from devstack.verify import differences

SUBMITTER = Submitter("urn:bulk-submit:demo", "demo")
SUBMISSION = "demo-1"
BAD_FILE = "Patient-bad.ndjson"
MISSING_FILE = "Patient-missing.ndjson"
GOOD_LINES_IN_BAD_FILE = 93
SHOWN = 3
SETTINGS = {"BULK_SUBMIT_POLL_INTERVAL_SECONDS": "1", "BULK_SUBMIT_SWEEP_SECONDS": "2"}


class Demo:
    """One run of the demo."""

    def __init__(self, console: Console, *, resources: int, workers: int) -> None:
        self._console = console
        self._resources = resources
        self._workers = workers
        self._faults: list[str] = []

    def run(self) -> bool:
        """Whether every figure reconciled."""
        with OwnedDirectory("demo") as directory, Stack(overrides=SETTINGS) as stack:
            served = directory / "served"
            served.mkdir()
            self._console.print(f"Making {self._resources:,} resources ...")
            samples = generate(served, self._resources)
            bad = bad_lines(served, BAD_FILE, good=GOOD_LINES_IN_BAD_FILE, seed=2)
            _list_more(served / "manifest.json", BAD_FILE, MISSING_FILE)
            self._console.print(f"Starting Postgres, Redis, API, {self._workers} workers, sweeper, beat and Flower ...")
            stack.register_submitter(SUBMITTER.system, SUBMITTER.value)
            stack.start(workers=self._workers)
            self._console.print(f"Flower shows the fleet at {stack.flower_url} while this runs")
            provider = Child(
                "provider",
                [sys.executable, "-m", "devstack.provider", str(served)],
                stack.directory / "provider.log",
                {},
                output=-1,
            )
            try:
                url = provider.output.readline().decode().strip()
                report, receipts = self._submit(stack, url, directory / "receipts")
            finally:
                provider.stop()
            self._check(stack, samples, served, bad, report, receipts)
        for fault in self._faults:
            self._console.print(fault, style="red", markup=False, soft_wrap=True)
        self._console.print(
            "[red]The figures do not reconcile.[/red]" if self._faults else "[green]Every figure reconciles.[/green]"
        )
        return not self._faults

    def _submit(self, stack: Stack, provider_url: str, directory: Path) -> tuple[Report, list[Path]]:
        client = SubmitClient(stack.base_url, submitter=SUBMITTER)
        manifest_url = f"{provider_url}/manifest.json"
        client.submit(SUBMISSION, manifest_url, fhir_base_url=f"{provider_url}/fhir", status="completed")
        with ProgressDisplay(self._console, SUBMISSION) as display:
            report = client.wait(SUBMISSION, timeout=300, on_progress=display.update)
            display.finish("receipts are ready")
        return report, client.download(report, directory)

    def _check(
        self, stack: Stack, samples: SampleSet, served: Path, bad: dict[int, str], report: Report, receipts: list[Path]
    ) -> None:
        good = [file.name for file in samples.files]
        expected = list(expected_store(served, good))
        expected += _bad_file_store(served / BAD_FILE, bad)
        self._console.print("Comparing the store with what was served, line by line ...")
        for count, difference in enumerate(differences(stack.settings.database_url, expected)):
            if count < 10:
                self._faults.append(difference)
        lines = sum(file.lines for file in samples.files) + GOOD_LINES_IN_BAD_FILE + len(bad)
        [reconciliation] = [json.loads(path.read_text()) for path in receipts if path.name.startswith("reconciliation")]
        ledger = [path for path in receipts if path.name.startswith("ledger")]
        self._check_ledger(ledger, lines, len(expected), len(bad))
        self._show_reconciliation(reconciliation)
        declared = sum(file.lines for file in samples.files)
        totals = {"declaredCount": declared, "lines": lines, "stored": len(expected), "failed": len(bad)}
        for name, figure in totals.items():
            self._expect(f"{name} in the reconciliation", reconciliation["total"][name], figure)
        self._show_failures(receipts, bad)
        written = sum(item["count"] for item in report.manifest.get("output", []))
        self._expect("versions in the output receipts", written, len(expected))

    def _check_ledger(self, ledger: list[Path], lines: int, stored: int, failed: int) -> None:
        actions: Counter[str] = Counter()
        places: Counter[tuple[str, int]] = Counter()
        for path in ledger:
            with path.open() as entries:
                for text in entries:
                    entry = json.loads(text)
                    actions[entry["action"]] += 1
                    places[entry["file"], entry["line"]] += 1
        self._expect("lines in the ledger", sum(actions.values()), lines)
        self._expect("lines in the ledger more than once", sum(1 for count in places.values() if count > 1), 0)
        self._expect("lines created", actions["created"], stored)
        self._expect("lines failed", actions["failed"], failed)

    def _expect(self, what: str, found: int | None, expected: int) -> None:
        if found != expected:
            self._faults.append(f"{what}: {_figure(found) or 'none'}, not {expected:,}")

    def _show_reconciliation(self, document: dict[str, Any]) -> None:
        table = Table("file", "declared", "lines", "stored", "failed", "bytes", title="Reconciliation")
        for file in [*document["files"], {"file": "total", **document["total"]}]:
            table.add_row(
                Text(str(file["file"]).rsplit("/", 1)[-1]),
                *(_figure(file.get(name)) for name in ("declaredCount", "lines", "stored", "failed", "bytes")),
            )
        self._console.print(table)

    def _show_failures(self, receipts: list[Path], bad: dict[int, str]) -> None:
        errors = []
        for path in receipts:
            if path.name.startswith("outcome"):
                with path.open() as lines:
                    issues = (issue for line in lines for issue in json.loads(line)["issue"])
                    errors += [issue["details"]["text"] for issue in issues if issue["severity"] == "error"]
        self._console.print(f"{len(errors)} errors in the outcome receipts, among them:")
        missing = [text for text in errors if MISSING_FILE in text and "404" in text]
        for text in [text for text in errors if text not in missing][:SHOWN] + missing:
            self._console.print(f"  {text}", markup=False, soft_wrap=True)
        self._expect("errors in the outcome receipts", len(errors), len(bad) + 1)
        self._expect("errors that name the missing file", len(missing), 1)


def _figure(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _list_more(manifest: Path, *names: str) -> None:
    document = json.loads(manifest.read_text())
    document["output"] += [{"type": "Patient", "url": name} for name in names]
    manifest.write_text(json.dumps(document))


def _bad_file_store(path: Path, bad: dict[int, str]) -> list[tuple[str, str, bytes]]:
    lines = path.read_bytes().split(b"\n")
    good = [line for number, line in enumerate(lines, 1) if line and number not in bad]
    return [("Patient", json.loads(line)["id"], line) for line in good]
