"""Receipts: what a manifest's submitter is told about every file and every line, and the step that publishes them."""

from workers.receipts.publication import publish

__all__ = ["publish"]
