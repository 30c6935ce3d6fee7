"""Faults at random, for a minute: workers killed, frozen and sent away under load."""

from __future__ import annotations

import pytest

from devstack.drills.random_faults import run

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.mark.parametrize("seed", [1, 2])
def test_random_faults(seed: int) -> None:
    outcome = run(resources=60_000, events=30, seconds=60, seed=seed)
    assert outcome.faults == [], "\n".join([*outcome.deeds, *outcome.fleet])
    assert outcome.polls > 100
