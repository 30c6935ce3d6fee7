"""Every drill of `bulk-submit drill`; the quick ones in every test run, the others by `make chaos`."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet

from devstack.drills.catalogue import DRILLS, Drill, run
from devstack.drills.rig import Rig


def _marked(drill: Drill) -> ParameterSet:
    return pytest.param(drill, id=drill.name, marks=[] if drill.quick else [pytest.mark.chaos])


@pytest.mark.parametrize("drill", [_marked(drill) for drill in DRILLS])
def test_drill(rig: Rig, drill: Drill) -> None:
    outcome = run(rig, drill)
    assert outcome.faults == [], "\n".join([*outcome.deeds, *outcome.fleet])
    assert outcome.deeds
    assert outcome.recovery is not None
    assert outcome.polls > outcome.polls_refused
