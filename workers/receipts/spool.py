"""Directories on the local disk for receipts in the making, and what is left of those whose process was killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from tempfile import TemporaryDirectory

from settings import Settings


def spool(settings: Settings) -> TemporaryDirectory[str]:
    """A directory for one manifest's receipts, gone with the context. Its name tells host and process."""
    return TemporaryDirectory(prefix=f"{_host_prefix()}{os.getpid()}-", dir=_place(settings))


def remove_leftovers(settings: Settings) -> list[Path]:
    """Remove the directories of this host's processes that are gone; returns what they were.

    For a process that has made none yet: one under its own id is another's, who had that id before. Raises `OSError`
    where the spool cannot be read.
    """
    name = re.compile(re.escape(_host_prefix()) + "([0-9]+)-[^-]+")
    removed = []
    for directory in sorted(_place(settings).iterdir()):
        match = name.fullmatch(directory.name)
        if match is None or (int(match[1]) != os.getpid() and _lives(int(match[1]))):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            removed.append(directory)
    return removed


def _host_prefix() -> str:
    return f"receipts-{socket.gethostname()}-"


def _place(settings: Settings) -> Path:
    return Path(settings.spool_directory or tempfile.gettempdir())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
