"""The whole system on one machine: embedded servers, and every process of the fleet as a child.

For `bulk-submit up`, `demo` and `bench`, and for the acceptance tests. Every child ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import psycopg
import requests
from cryptography.fernet import Fernet
from jwcrypto.jwk import JWK, JWKSet

from devstack.servers import EmbeddedPostgres, EmbeddedRedis, OwnedDirectory, end_with_parent, free_port
from schema import submissions
from schema.database import create_engine
from schema.upgrade import upgrade
from settings import Settings

START_SECONDS = 60.0
STOP_SECONDS = 20.0


class NotReady(RuntimeError):  # noqa: N818
    """A process ended or did not get ready in time; the message ends with what it logged."""


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = START_SECONDS) -> None:
    """Wait for a condition to hold; raises `NotReady` when it takes longer."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise NotReady(f"waited {seconds:g} seconds in vain: {what}")
        time.sleep(0.05)


class Child:
    """A process of the stack, in a group of its own, that logs to a file."""

    def __init__(
        self, name: str, command: list[str], log: Path, environment: Mapping[str, str], *, output: int | None = None
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file if output is None else output,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def output(self) -> IO[bytes]:
        """What it prints, where `output` asked for a pipe."""
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process.poll() is None

    def signal(self, how: signal.Signals) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)

    def kill(self) -> None:
        """End the process and its children at once, as a power cut would."""
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """End it in order; kill what does not end."""
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.signal(signal.SIGKILL)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]


class Stack:
    """Servers, API, workers, sweeper, beat and Flower. Use as a context; `settings` is what its processes see.

    Ports not given are free ones.
    """

    def __init__(
        self,
        *,
        overrides: Mapping[str, str] | None = None,
        api_port: int | None = None,
        flower_port: int | None = None,
    ) -> None:
        self._exits = contextlib.ExitStack()
        self._overrides = dict(overrides or {})
        self._ports = api_port, flower_port
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as exits:
            self.postgres = exits.enter_context(EmbeddedPostgres())
            self.redis = exits.enter_context(EmbeddedRedis())
            self.directory = exits.enter_context(OwnedDirectory("stack"))
            (self.directory / "tmp").mkdir()
            exits.callback(self._stop_children)
            self.api_port, self.flower_port = (port or free_port() for port in self._ports)
            keys = JWKSet()
            keys.add(JWK.generate(kty="EC", crv="P-256", use="enc", kid="stack-enc"))
            self.environment = {
                "BULK_SUBMIT_DATABASE_URL": self.postgres.url,
                "BULK_SUBMIT_BROKER_URL": self.redis.url,
                "BULK_SUBMIT_ARTIFACT_STORE_URL": f"file://{self.directory}/artifacts",
                "BULK_SUBMIT_PUBLIC_URL": f"http://127.0.0.1:{self.api_port}",
                "BULK_SUBMIT_SEALING_KEYS": Fernet.generate_key().decode(),
                "BULK_SUBMIT_PRIVATE_JWKS": keys.export(private_keys=True),
                "TMPDIR": str(self.directory / "tmp"),
                **self._overrides,
            }
            self.settings = Settings(
                **{name.removeprefix("BULK_SUBMIT_").lower(): value for name, value in self.environment.items()}
            )
            upgrade(self.settings.database_url)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @property
    def base_url(self) -> str:
        """The FHIR base of the default tenant."""
        return f"{self.settings.public_url}/default/fhir"

    @property
    def flower_url(self) -> str:
        """Where Flower shows the fleet."""
        return f"http://127.0.0.1:{self.flower_port}"

    def register_submitter(self, system: str, value: str) -> None:
        """Let a submitter in."""
        engine = create_engine(self.settings, application="bulk-submit stack", pooled=False)
        with engine.begin() as connection:
            tenant_id = submissions.add_tenant(connection, "default")
            submissions.add_submitter(connection, tenant_id, system, value, ignore_meta=False)
        engine.dispose()

    def run(
        self, name: str, *arguments: str, environment: Mapping[str, str] | None = None, module: Sequence[str] = ("cli",)
    ) -> Child:
        """Start a `bulk-submit` command as a process of the stack.

        `environment` adds to the stack's own. `module` is what Python runs, with arguments of its own before the
        command: the command line, or a module that runs it.
        """
        command = [sys.executable, "-m", *module, *arguments]
        child = Child(name, command, self.directory / f"{name}.log", {**self.environment, **(environment or {})})
        self.children.append(child)
        return child

    def launch_api(self) -> Callable[[], None]:
        """Start the API; the function returned waits until it answers."""
        child = self.run("api", "api", "--port", str(self.api_port))
        return lambda: self._wait_for(child, lambda: _answers(f"{self.settings.public_url}/healthz"))

    def launch_worker(
        self,
        name: str,
        *,
        slots: int = 1,
        environment: Mapping[str, str] | None = None,
        module: Sequence[str] = ("cli",),
    ) -> Callable[[], None]:
        """Start a worker node (see `run`); the function returned waits until the fleet knows it."""
        arguments = ("worker", "--name", name, "--slots", str(slots))
        child = self.run(name, *arguments, environment=environment, module=module)
        return lambda: self._wait_for(child, lambda: self._knows(child))

    def launch_flower(self) -> Callable[[], None]:
        """Start Flower; the function returned waits until it answers."""
        child = self.run("flower", "flower", "--port", str(self.flower_port))
        return lambda: self._wait_for(child, lambda: _answers(f"{self.flower_url}/healthcheck"))

    def launch_sweeps(self) -> None:
        """Start beat, and the small worker that takes nothing but sweeps."""
        self.run("sweeper", "worker", "--name", "sweeper", "--slots", "2", "--queues", "sweeps")
        self.run("beat", "beat")

    def start(self, *, workers: int = 2, flower: bool = True) -> None:
        """Start everything, side by side, and wait until all of it is ready."""
        ready = [self.launch_api(), *(self.launch_worker(f"worker{number}") for number in range(1, workers + 1))]
        self.launch_sweeps()
        if flower:
            ready.append(self.launch_flower())
        for wait in ready:
            wait()

    def child(self, name: str) -> Child:
        """The process started last under that name."""
        return [child for child in self.children if child.name == name][-1]

    def _wait_for(self, child: Child, condition: Callable[[], object]) -> None:
        ends = time.monotonic() + START_SECONDS
        while not condition():
            if not child.running or time.monotonic() > ends:
                raise NotReady(f"{child.name} did not get ready:\n{child.tail()}")
            time.sleep(0.05)

    def _knows(self, child: Child) -> bool:
        with psycopg.connect(self.settings.database_url) as connection:
            query = "SELECT 1 FROM fleet_workers WHERE name LIKE %s AND pid = %s"
            return connection.execute(query, (f"{child.name}@%", child.process.pid)).fetchone() is not None

    def _stop_children(self) -> None:
        for child in self.children:
            if child.running:
                child.process.terminate()
        for child in self.children:
            if child.running:
                child.process.terminate()
        for child in reversed(self.children):
            child.stop()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False
