"""Going on with a file that another lease began, when the server can only send it from its beginning.

The lines that committed batches cover are read again and their digests compared; what comes after is passed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from schema.results import BatchBorder
from workers.fetch.ndjson import Block, OverlongLine
from workers.ingest.batch import digest
from workers.ingest.lines import hash_as_read


class FileChanged(Exception):  # noqa: N818
    """The file is not the one that was begun: what it holds now differs from what was committed of it.

    The submitter sends a manifest that replaces this one, with a file that does not change while it is read.
    """


def after_committed(
    blocks: Iterable[Block | OverlongLine], borders: Iterable[BatchBorder]
) -> Iterator[Block | OverlongLine]:
    """The blocks that follow the last border; raises `FileChanged` where a batch's lines are not what they were."""
    pending = iter(borders)
    border = next(pending, None)
    hashes: list[bytes] = []
    lengths: list[int] = []
    for block in blocks:
        if border is None:
            yield block
            continue
        if isinstance(block, OverlongLine):
            lines, last_is_open = [], False
            hashes.append(block.digest[:16])
            lengths.append(block.length + block.terminated)
        else:
            lines = block.data.split(b"\n")
            last_is_open = bool(lines[-1])
            if not last_is_open:
                lines.pop()
        consumed = 0
        for index, raw in enumerate([*lines, None]):
            while border is not None and len(hashes) == border.line_count:
                if digest(hashes, lengths) != border.digest:
                    raise FileChanged
                hashes, lengths = [], []
                border = next(pending, None)
            if border is None:
                if raw is not None and isinstance(block, Block):
                    yield Block(block.data[consumed:], block.offset + consumed, block.line + index)
                break
            if raw is None:
                break
            length = len(raw) + (not (last_is_open and index == len(lines) - 1))
            hashes.append(hash_as_read(raw))
            lengths.append(length)
            consumed += length
    if border is not None:
        raise FileChanged
