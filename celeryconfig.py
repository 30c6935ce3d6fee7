"""Celery's configuration.

Messages are hints that carry ids; Postgres decides. So: acknowledge early, keep no results, prefetch nothing, no ETA,
no chords. What a broker loses, the sweeps send again. A kickoff that comes as a message is the exception: it is the
only record of itself until its commit, and is acknowledged after that.
"""

from __future__ import annotations

from datetime import timedelta

from kombu import Queue

from settings import settings

_settings = settings()

MANIFESTS = "manifests"
KICKOFFS = "kickoffs"
SWEEPS = "sweeps"

broker_url = _settings.broker_url
broker_connection_retry_on_startup = True
broker_transport_options = {
    "socket_connect_timeout": 3,
    "socket_timeout": 10,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "visibility_timeout": 3600,
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0.1,
}

task_serializer = "json"
accept_content = ["json"]
task_ignore_result = True
task_acks_late = False
task_track_started = False
task_send_sent_event = True
worker_send_task_events = True
worker_prefetch_multiplier = 1
worker_enable_remote_control = True
worker_soft_shutdown_timeout = 5.0
worker_hijack_root_logger = False
task_publish_retry = False

task_queues = [Queue(name, routing_key=name) for name in (MANIFESTS, KICKOFFS, SWEEPS)]
task_default_queue = MANIFESTS
task_routes = {
    "submit_tasks.process_manifest": {"queue": MANIFESTS},
    "submit_tasks.kickoff": {"queue": KICKOFFS},
    "submit_tasks.report_status": {"queue": KICKOFFS},
    "submit_tasks.sweep_*": {"queue": SWEEPS},
}

_PERIODS = {
    "leases": _settings.sweep_seconds,
    "fleet": 60.0,
    "expired": _settings.retention_sweep_seconds,
    "idle": _settings.retention_sweep_seconds,
    "orphans": _settings.retention_sweep_seconds,
    "logs": _settings.retention_sweep_seconds,
}
# Without an expiry, which Celery would compare with the wall clock of the sweeper's host: Postgres alone is trusted.
beat_schedule = {
    f"sweep-{name}": {
        "task": f"submit_tasks.sweep_{name}",
        "schedule": timedelta(seconds=seconds),
        "options": {"queue": SWEEPS},
    }
    for name, seconds in _PERIODS.items()
}
timezone = "UTC"
