"""Every drill of `bulk-submit drill`; the quick ones in every test run, the others by `make chaos`."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet

from devstack.drills.catalogue import DRILLS, Drill, run
from devstack.drills.rig import Rig

FAILING = {"clock-skew": "a sweeper whose clock is ahead drops every sweep: beat's messages expire by wall clock"}


def _marked(drill: Drill) -> ParameterSet:
    marks = [] if drill.quick else [pytest.mark.chaos]
    if drill.name in FAILING:
        marks.append(pytest.mark.xfail(reason=FAILING[drill.name], strict=True))
    return pytest.param(drill, id=drill.name, marks=marks)


@pytest.mark.parametrize("drill", [_marked(drill) for drill in DRILLS])
def test_drill(rig: Rig, drill: Drill) -> None:
    outcome = run(rig, drill)
    assert outcome.faults == [], "\n".join([*outcome.deeds, *outcome.fleet])
    assert outcome.deeds
    assert outcome.recovery is not None
    assert outcome.polls > outcome.polls_refused
