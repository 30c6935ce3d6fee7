"""`python -m cli`: the same as `bulk-submit`."""

from __future__ import annotations

from cli.main import app

app()
