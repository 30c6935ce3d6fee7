"""One stack for all drills, smaller than the command's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devstack.drills.rig import Rig


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """The stack, its provider and the proxy before its Postgres; drills leave it calm."""
    with Rig(resources=10_000, lines_per_file=2_000) as running:
        yield running
