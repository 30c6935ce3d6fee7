"""The Celery application: `celery -A submit_tasks.app`."""

from __future__ import annotations

from celery import Celery

app = Celery("submit_tasks", include=["submit_tasks.tasks", "submit_tasks.sweeps", "submit_tasks.node"])
app.config_from_object("celeryconfig")
