"""The sample Data Provider over real sockets: files, ranges, gzip, and each fault as a client meets it."""

from __future__ import annotations

import gzip
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from devstack.provider import Fault, Faults, Request, SampleProvider
from devstack.stack import wait_until

NAME = "patients.ndjson"
BODY = b"".join(b'{"resourceType":"Patient","id":"%d"}\n' % number for number in range(2000))
SIZE = len(BODY)


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[SampleProvider]:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / NAME).write_bytes(BODY)
    (directory / "manifest.json").write_text("{}")
    with SampleProvider(directory) as provider:
        yield provider


def get(provider: SampleProvider, path: str = NAME, **headers: str) -> requests.Response:
    sent = {"Accept-Encoding": "identity", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return requests.get(f"{provider.url}/{path}", headers=sent, allow_redirects=False, timeout=10)


def received(provider: SampleProvider, path: str = NAME) -> tuple[bytes, type[Exception] | None]:
    """The body as far as it came, and how the connection ended if not in order."""
    connection = http.client.HTTPConnection(urlsplit(provider.url).netloc, timeout=10)
    connection.request("GET", f"/{path}")
    response = connection.getresponse()
    body = bytearray()
    try:
        while chunk := response.read1(1 << 16):
            body += chunk
    except Exception as error:  # noqa: BLE001 - handed to the test
        return bytes(body), type(error)
    finally:
        connection.close()
    return bytes(body), None


def test_a_file_is_served_with_type_length_and_a_strong_validator(provider: SampleProvider) -> None:
    response = get(provider)
    assert (response.status_code, response.content) == (200, BODY)
    assert response.headers["Content-Type"] == "application/fhir+ndjson"
    assert response.headers["Content-Length"] == str(SIZE)
    assert response.headers["ETag"].startswith('"')
    assert get(provider, "manifest.json").headers["Content-Type"] == "application/json"


def test_a_head_request_gets_the_same_headers_and_no_body(provider: SampleProvider) -> None:
    head = requests.head(f"{provider.url}/{NAME}", headers={"Accept-Encoding": "identity"}, timeout=10)
    whole = get(provider)
    assert head.content == b""
    assert {**head.headers, "Date": ""} == {**whole.headers, "Date": ""}


@pytest.mark.parametrize("path", ["absent", "", "../outside", "%2e%2e/outside", "/etc/passwd", "a/../../outside"])
def test_what_does_not_lie_in_the_directory_is_not_found(provider: SampleProvider, path: str) -> None:
    (provider.directory.parent / "outside").write_text("secret")
    connection = http.client.HTTPConnection(urlsplit(provider.url).netloc, timeout=10)
    connection.request("GET", f"/{path}")
    assert connection.getresponse().status == 404
    connection.close()


def test_a_connection_serves_one_request_after_another(provider: SampleProvider) -> None:
    connection = http.client.HTTPConnection(urlsplit(provider.url).netloc, timeout=10)
    connection.connect()
    socket = connection.sock
    for path in (NAME, "absent", NAME):
        connection.request("GET", f"/{path}")
        connection.getresponse().read()
        assert connection.sock is socket
    connection.close()


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-", 0, SIZE),
        ("bytes=100-", 100, SIZE),
        ("bytes=100-199", 100, 200),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=100-999999999", 100, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        ("bytes=-999999999", 0, SIZE),
    ],
)
def test_a_range_gives_its_bytes_and_says_which(provider: SampleProvider, wanted: str, start: int, end: int) -> None:
    response = get(provider, Range=wanted)
    assert (response.status_code, response.content) == (206, BODY[start:end])
    assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_a_range_past_the_end_cannot_be_satisfied(provider: SampleProvider, wanted: str) -> None:
    response = get(provider, Range=wanted)
    assert (response.status_code, response.content) == (416, b"")
    assert response.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize("wanted", ["bytes=200-100", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "nonsense"])
def test_a_range_that_is_not_understood_is_ignored(provider: SampleProvider, wanted: str) -> None:
    response = get(provider, Range=wanted)
    assert (response.status_code, response.content) == (200, BODY)


def test_a_range_of_another_body_gives_the_whole_of_this_one(provider: SampleProvider) -> None:
    etag = get(provider).headers["ETag"]
    assert get(provider, Range="bytes=100-", If_Range=etag).status_code == 206
    assert get(provider, Range="bytes=100-", If_Range='"another"').content == BODY
    (provider.directory / NAME).write_bytes(BODY + b"{}\n")
    changed = get(provider, Range="bytes=100-", If_Range=etag)
    assert (changed.status_code, changed.content) == (200, BODY + b"{}\n")


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip", True), ("identity, gzip;q=0.5", True), ("gzip;q=0", False), ("gzip;q=0.0", False), ("br", False)],
)
def test_gzip_is_sent_to_whom_takes_it(provider: SampleProvider, accepted: str, packed: bool) -> None:
    (provider.directory / f"{NAME}.gz").write_bytes(gzip.compress(BODY))
    response = get(provider, Accept_Encoding=accepted)
    assert response.content == BODY
    assert response.headers.get("Content-Encoding") == ("gzip" if packed else None)
    assert response.headers["Vary"] == "Accept-Encoding"
    assert ("ETag" in response.headers) == (not packed)


def test_a_status_fault_holds_as_often_as_it_says(provider: SampleProvider) -> None:
    fault = provider.add(Fault(NAME, times=2, status=503, retry_after="7"))
    answers = [get(provider) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert [answer.headers.get("Retry-After") for answer in answers] == ["7", "7", None]
    assert fault.applied == 2


def test_a_fault_holds_for_the_paths_that_it_names(provider: SampleProvider) -> None:
    provider.add(Fault("/*.ndjson", status=500))
    assert get(provider).status_code == 500
    assert get(provider, "manifest.json").status_code == 200


def test_faults_that_answer_come_one_after_another(provider: SampleProvider) -> None:
    provider.add(Fault(times=1, status=429))
    provider.add(Fault(times=1, status=503))
    assert [get(provider).status_code for _ in range(3)] == [429, 503, 200]


def test_clearing_removes_every_fault(provider: SampleProvider) -> None:
    provider.add(Fault(status=500))
    provider.clear()
    assert get(provider).status_code == 200


def test_a_redirect_names_its_target(provider: SampleProvider) -> None:
    provider.add(Fault(redirect_to="http://elsewhere.test/"))
    response = get(provider)
    assert (response.status_code, response.headers["Location"]) == (307, "http://elsewhere.test/")


def test_a_required_header_is_asked_for(provider: SampleProvider) -> None:
    provider.add(Fault(require_header=("X-Key", "abc")))
    assert get(provider).status_code == 401
    assert get(provider, X_Key="wrong").status_code == 401
    assert get(provider, x_key="abc").status_code == 200


def test_a_server_without_ranges_sends_everything_and_no_validator(provider: SampleProvider) -> None:
    provider.add(Fault(no_range=True))
    response = get(provider, Range="bytes=100-")
    assert (response.status_code, response.content) == (200, BODY)
    assert "ETag" not in response.headers
    assert "Accept-Ranges" not in response.headers


def test_a_validator_that_changes_makes_every_condition_fail(provider: SampleProvider) -> None:
    provider.add(Fault(change_etag=True))
    first = get(provider).headers["ETag"]
    again = get(provider, Range="bytes=100-", If_Range=first)
    assert again.status_code == 200
    assert again.headers["ETag"] != first


def test_a_cut_connection_is_reset_after_exactly_so_many_bytes(provider: SampleProvider) -> None:
    provider.add(Fault(cut_after=12_345))
    assert received(provider) == (BODY[:12_345], ConnectionResetError)


def test_a_truncated_body_ends_in_order_and_short_of_its_length(provider: SampleProvider) -> None:
    provider.add(Fault(truncate_to=12_345))
    assert received(provider) == (BODY[:12_345], None)


def test_a_cut_in_a_range_counts_from_where_the_range_begins(provider: SampleProvider) -> None:
    provider.add(Fault(truncate_to=10))
    response = requests.get(f"{provider.url}/{NAME}", headers={"Range": "bytes=100-"}, stream=True, timeout=10)
    assert response.headers["Content-Length"] == str(SIZE - 100)
    assert response.raw.read1(1000) == BODY[100:110]


def test_a_stalled_body_goes_on_when_it_is_released(provider: SampleProvider) -> None:
    provider.add(Fault(stall_after=100, times=1))
    response = requests.get(f"{provider.url}/{NAME}", stream=True, timeout=0.2)
    assert response.raw.read(100) == BODY[:100]
    with pytest.raises(Exception, match="timed out"):
        response.raw.read1(1)
    response.close()

    fault = provider.add(Fault(stall_after=100, times=1))
    ended: list[tuple[bytes, type[Exception] | None]] = []
    reader = threading.Thread(target=lambda: ended.append(received(provider)))
    reader.start()
    wait_until(lambda: fault.applied, "the fault applies", seconds=10)
    assert not ended
    fault.release.set()
    reader.join(10)
    assert ended == [(BODY, None)]


def test_a_slow_body_takes_its_time(provider: SampleProvider) -> None:
    provider.add(Fault(bytes_per_second=4 * SIZE))
    began = time.monotonic()
    assert received(provider) == (BODY, None)
    assert 0.2 <= time.monotonic() - began < 2


def test_requests_are_recorded_without_secrets(provider: SampleProvider) -> None:
    get(provider, Range="bytes=5-", Authorization="Bearer abc")
    get(provider, "absent?sig=1")
    first, second = provider.requests
    assert (first.method, first.path, first.status) == ("GET", f"/{NAME}", 206)
    assert (first.headers["range"], first.headers["authorization"]) == ("bytes=5-", "...")
    assert isinstance(second, Request)
    assert (second.path, second.status) == ("/absent?sig=1", 404)


def test_leaving_ends_connections_that_stall(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    ended: list[tuple[bytes, type[Exception] | None]] = []
    with SampleProvider(tmp_path, faults=Faults(fault := Fault(stall_after=100))) as provider:
        reader = threading.Thread(target=lambda: ended.append(received(provider)))
        reader.start()
        wait_until(lambda: fault.applied, "the fault applies", seconds=10)
    reader.join(10)
    assert ended


def test_the_command_prints_its_url_and_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    command = [sys.executable, "-m", "devstack.provider", os.fspath(tmp_path), "--require-header", "X-Key=abc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert requests.get(f"{url}/{NAME}", timeout=10).status_code == 401
        assert requests.get(f"{url}/{NAME}", headers={"X-Key": "abc"}, timeout=10).content == BODY
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
