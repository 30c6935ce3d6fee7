"""The embedded servers: what outlives a restart, and that nothing outlives whoever started them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from devstack.servers import EmbeddedPostgres, EmbeddedRedis, OwnedDirectory, ServerNotStarted, free_port, is_free
from devstack.stack import wait_until

BOTH = """
import json, sys
from devstack.servers import EmbeddedPostgres, EmbeddedRedis

with EmbeddedPostgres() as postgres, EmbeddedRedis() as redis:
    servers = [(server.pid, server.port, str(server.directory)) for server in (postgres, redis)]
    print(json.dumps(servers), flush=True)
    sys.stdin.read()
"""

ONE = """
import sys
from devstack.servers import OwnedDirectory

with OwnedDirectory("test") as directory:
    (directory / "file").touch()
    print(directory, flush=True)
    sys.stdin.read()
"""


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def lives(pid: int) -> bool:
    """Whether the process runs; one that ended and waits for whoever asks after it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A server that these tests may stop."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_postgres_keeps_its_port_and_what_was_committed(own_postgres: EmbeddedPostgres, end: str) -> None:
    url, pid = own_postgres.create_database(f"kept_by_{end}"), own_postgres.pid
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
    idle = psycopg.connect(url)
    getattr(own_postgres, end)()
    assert not own_postgres.running
    assert not answers(own_postgres.port)
    with pytest.raises(psycopg.OperationalError):
        idle.execute("SELECT 1")
    own_postgres.start()
    assert own_postgres.pid != pid
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(1,)]


def test_postgres_is_durable_and_lets_many_sessions_in(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.url) as connection:
        names = ("fsync", "synchronous_commit", "full_page_writes", "listen_addresses", "max_connections")
        shown = [connection.execute(f"SHOW {name}").fetchall()[0][0] for name in names]
    assert shown == ["on", "on", "on", "127.0.0.1", "200"]


def test_a_database_is_copied_from_its_template(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.create_database("template_one")) as connection:
        connection.execute("CREATE TABLE copied AS SELECT 1 AS number")
    copy = own_postgres.create_database("copy_of_one", template="template_one")
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT number FROM copied").fetchall() == [(1,)]


def test_redis_keeps_its_port_over_a_restart_and_nothing_else() -> None:
    with EmbeddedRedis() as server:
        client = redis.Redis.from_url(server.url)
        client.set("name", "value")
        port = server.port
        server.restart()
        assert (server.port, client.get("name")) == (port, None)
        client.set("name", "value")
        server.flush()
        assert client.keys() == []


def test_servers_and_their_directories_are_gone_after_use() -> None:
    with EmbeddedRedis() as server:
        pid, directory = server.pid, server.directory
        assert lives(pid)
        assert directory.is_dir()
    assert not lives(pid)
    assert not directory.exists()


def test_servers_of_a_process_that_was_killed_end_and_their_directories_go_at_the_next_start() -> None:
    process = subprocess.Popen([sys.executable, "-c", BOTH], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        servers = json.loads(process.stdout.readline())
        assert all(lives(pid) and answers(port) for pid, port, _ in servers)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    wait_until(lambda: not any(lives(pid) or answers(port) for pid, port, _ in servers), "both ended", seconds=20)
    with EmbeddedRedis() as another:
        assert not any(Path(directory).exists() for _, _, directory in servers)
        assert another.directory.is_dir()


def test_servers_of_a_process_that_ends_in_order_leave_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", BOTH], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    output, _ = process.communicate(b"", timeout=60)
    assert process.returncode == 0
    for pid, port, directory in json.loads(output):
        assert not lives(pid)
        assert not answers(port)
        assert not Path(directory).exists()


def test_a_server_that_cannot_start_says_why_and_leaves_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULK_SUBMIT_REDIS_SERVER", "/bin/false")
    server = EmbeddedRedis()
    with pytest.raises(ServerNotStarted, match="/bin/false did not start"), server:
        pass
    assert not server.directory.exists()


def owner() -> tuple[subprocess.Popen[bytes], Path]:
    """A process that keeps a directory until its input ends, and that directory."""
    process = subprocess.Popen([sys.executable, "-c", ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().decode().strip())


def test_a_directory_goes_with_its_context() -> None:
    with OwnedDirectory("test") as directory:
        assert directory.name.startswith(f"bulk-submit-test-{os.getpid()}-")
        (directory / "file").touch()
    assert not directory.exists()


def test_a_directory_of_a_process_that_was_killed_goes_when_the_next_is_made() -> None:
    process, directory = owner()
    with process:
        process.kill()
    assert (directory / "file").exists()
    with OwnedDirectory("test"):
        assert not directory.exists()


def test_a_directory_in_use_is_kept_though_no_process_has_the_id_in_its_name() -> None:
    process, directory = owner()
    with process:
        elsewhere = directory.rename(directory.with_name("bulk-submit-test-999999999-abc"))
        with OwnedDirectory("test"):
            assert (elsewhere / "file").exists()
    with OwnedDirectory("test"):
        assert not elsewhere.exists()


def test_a_directory_of_a_server_that_still_runs_is_kept_when_its_starter_was_killed() -> None:
    with EmbeddedRedis() as server:
        server._owned._lock.close()
        with OwnedDirectory("test"):
            assert server.directory.is_dir()


def test_a_port_is_free_until_somebody_listens_on_it() -> None:
    port = free_port()
    assert is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
