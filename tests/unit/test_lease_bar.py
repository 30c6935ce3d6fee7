"""The bar that `bulk-submit leases` draws for a step."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cli.fleet import BAR_CELLS, _bar
from schema.timeline import LeaseEvent

BEGUN = datetime(2026, 1, 5, tzinfo=UTC)
WORKERS = {"a/1": "cyan", "b/1": "magenta"}


def _drawn(*events: tuple[float, str, str, int]) -> tuple[str, dict[str, int]]:
    """The bar of events at these seconds of ten, as text, and how many cells each worker's colour has."""
    lines = [
        LeaseEvent(BEGUN + timedelta(seconds=at), 7, "ingest", 0, event, worker, token, None)
        for at, event, worker, token in events
    ]
    bar = _bar(lines, BEGUN, 10.0, WORKERS)
    cells = {worker: sum(len(span) for span in _spans(bar, colour)) for worker, colour in WORKERS.items()}
    return bar.plain, cells


def _spans(bar: object, colour: str) -> list[range]:
    return [range(span.start, span.end) for span in bar.spans if span.style == colour]  # type: ignore[attr-defined]


def test_a_lease_is_drawn_from_its_claim_to_its_end() -> None:
    text, cells = _drawn((0, "claimed", "a/1", 1), (5, "finished", "a/1", 1))
    assert text == "━" * 30 + "✔" + "·" * 29
    assert cells == {"a/1": 30, "b/1": 0}


def test_a_takeover_ends_the_lease_before_it() -> None:
    text, cells = _drawn((0, "claimed", "a/1", 1), (5, "claimed", "b/1", 2), (9, "finished", "b/1", 2))
    assert text == "━" * 54 + "✔" + "·" * 5
    assert cells == {"a/1": 30, "b/1": 24}


def test_a_late_loss_of_the_former_holder_hides_nothing() -> None:
    before = _drawn((0, "claimed", "a/1", 1), (5, "claimed", "b/1", 2), (8, "finished", "b/1", 2))
    late = (9.0, "lost", "a/1", 1)
    assert _drawn((0, "claimed", "a/1", 1), (5, "claimed", "b/1", 2), (8, "finished", "b/1", 2), late) == before


def test_a_lease_still_held_reaches_to_the_end() -> None:
    text, cells = _drawn((5, "claimed", "a/1", 1))
    assert text == "·" * 30 + "━" * 30
    assert cells == {"a/1": BAR_CELLS // 2, "b/1": 0}
