"""An order to leave, seen at once by every process of a worker node.

The byte lies in memory that is shared across fork, so the node's main process sets it (on SIGTERM) and the hands in its
pool see it between two batches.
"""

from __future__ import annotations

import mmap

_order = mmap.mmap(-1, 1)


def order_drain() -> None:
    """Ask the hands of this node to hand back what they hold and to take nothing more."""
    _order[0] = 1


def drain_ordered() -> bool:
    """Whether the node is on its way out."""
    return _order[0] == 1
