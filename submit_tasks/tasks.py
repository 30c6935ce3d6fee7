"""The tasks: ids in, nothing out; requests of services that share the broker, answered in Redis."""

from __future__ import annotations

import os
import secrets
import threading
from typing import Any

from celery import Task

from settings import settings
from submit_tasks.app import app
from submit_tasks.broker_requests import answer_kickoff, answer_status
from submit_tasks.messages import ring
from workers.hands import Hand

_local = threading.local()


def _hand(node: str) -> Hand:
    """This process's hand (this thread's, where the pool is one of threads), made after the fork."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid = os.getpid()
        _local.hand = Hand(settings(), f"{node}/{os.getpid()}-{secrets.token_hex(3)}", ring)
    hand: Hand = _local.hand
    return hand


@app.task(name="submit_tasks.process_manifest", bind=True)
def process_manifest(self: Task, manifest_id: int) -> None:
    """Do what is due, that manifest's steps among equals."""
    _hand(self.request.hostname or "local").work(manifest_id)


# Until its transaction commits, the message is all there is of the request: it is acknowledged after that.
@app.task(name="submit_tasks.kickoff", acks_late=True)
def kickoff(tenant: str, request_id: str, parameters: Any, secrets: str | None = None) -> None:
    """A $bulk-submit: its FHIR Parameters; header values and keys as a compact JWE to our key of use `enc`."""
    answer_kickoff(settings(), tenant, request_id, parameters, secrets)


@app.task(name="submit_tasks.report_status")
def report_status(tenant: str, request_id: str, system: str, value: str, submission_id: str) -> None:
    """A $bulk-submit-status and its poll in one."""
    answer_status(settings(), tenant, request_id, system, value, submission_id)
