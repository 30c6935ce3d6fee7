"""Processes of the stack as the nodes that pytest-celery's fixtures drive: no container engine is needed."""

from __future__ import annotations

import os
from signal import Signals
from typing import Any

import celery
from pytest_celery import CeleryWorkerContainer, RedisContainer

from devstack.servers import EmbeddedRedis
from devstack.stack import Stack


class ProcessNode:
    """Stands where a container of the Docker library would: one worker of the stack, with its children."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self.name = name
        self.id = name

    @property
    def status(self) -> str:
        return "running" if self._stack.child(self.name).running else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        return {
            "Config": {"Hostname": "127.0.0.1", "Env": []},
            "NetworkSettings": {"Networks": {"host": {"IPAddress": "127.0.0.1"}}, "Ports": {}},
            "HostConfig": {"PortBindings": {}},
        }

    def logs(self, **_: Any) -> bytes:
        return self._stack.child(self.name).log.read_bytes()

    def reload(self) -> None:
        """A process has no state to fetch."""

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Signal the process and its children, as freezing or killing a container does."""
        number = Signals[signal] if isinstance(signal, str) else Signals(signal)
        child = self._stack.child(self.name)
        if number == Signals.SIGKILL:
            child.kill()
        elif number in (Signals.SIGSTOP, Signals.SIGCONT):
            child.signal(number)
        else:
            os.kill(child.process.pid, number)

    def stop(self, timeout: float = 10) -> None:
        self._stack.child(self.name).stop()

    def restart(self, timeout: float = 10) -> None:
        self.stop(timeout)
        self._stack.launch_worker(self.name)()


class WorkerContainer(CeleryWorkerContainer):
    """A worker node of the stack."""

    @classmethod
    def version(cls) -> str:
        return str(celery.__version__)

    @classmethod
    def worker_queue(cls) -> str:
        return "manifests"


class BrokerNode(ProcessNode):
    """The stack's Redis."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self._server = server
        self.name = self.id = "redis"

    @property
    def status(self) -> str:
        return "running" if self._server.running else "exited"

    def logs(self, **_: Any) -> bytes:
        return (self._server.directory / "log").read_bytes()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        self._server.kill()

    def stop(self, timeout: float = 10) -> None:
        self._server.stop()

    def restart(self, timeout: float = 10) -> None:
        self._server.restart()


class BrokerContainer(RedisContainer):
    """The stack's Redis, as the plugin asks for it."""

    _container: BrokerNode

    @property
    def hostname(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self._container._server.port

    @property
    def ready_prompt(self) -> str | None:
        return None
