"""Calling for hands, after the commit that gave them something to do."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import RedisError

from celeryconfig import MANIFESTS
from submit_tasks.app import app

log = structlog.get_logger(__name__)

BROKER_ERRORS = (KombuError, OperationalError, RedisError, OSError)


def ring(manifest_ids: Sequence[int]) -> None:
    """Send one `process_manifest` for each id. Never raises: what a broker that is down loses, the sweep sends."""
    try:
        for manifest_id in manifest_ids:
            app.send_task("submit_tasks.process_manifest", args=[manifest_id], queue=MANIFESTS, retry=False)
    except BROKER_ERRORS as error:
        log.warning("broker not reachable; the sweep will send again", error=type(error).__name__)


def queue_length() -> int:
    """Messages that wait for a hand. Raises one of `BROKER_ERRORS`."""
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.llen(MANIFESTS))
