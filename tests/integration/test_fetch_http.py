"""Requests to a provider that fails in every way: what is tried again, what goes on, and what the submitter is told."""

from __future__ import annotations

import gzip
import json
import socket
import socketserver
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from devstack.provider import Fault, SampleProvider
from devstack.servers import free_port
from schema.leases import LeaseLost
from settings import MEBIBYTE, Settings
from workers.fetch.errors import (
    BadManifest,
    BrokenStream,
    FetchError,
    NotRetrieved,
    Refused,
    TooLarge,
    Unreachable,
)
from workers.fetch.http import CHUNK, Fetcher, Stream

NAME = "patients.ndjson"
BODY = b"".join(b'{"resourceType":"Patient","id":"%d"}\n' % number for number in range(5000))
SETTINGS = Settings(
    fetch_retries=2,
    fetch_backoff_seconds=0.01,
    retry_after_cap_seconds=0.3,
    connect_timeout_seconds=2,
    read_timeout_seconds=0.3,
)
Headers = Sequence[tuple[str, str]]


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[SampleProvider]:
    (tmp_path / NAME).write_bytes(BODY)
    with SampleProvider(tmp_path) as provider:
        yield provider


def still_alive() -> None:
    """The lease is held."""


def fetcher(headers: Headers = (), *, alive: Callable[[], None] = still_alive, **settings: Any) -> Fetcher:
    return Fetcher(headers, SETTINGS.model_copy(update=settings), alive)


def fetch(url: str, headers: Headers = (), **settings: Any) -> bytes:
    """The whole body, decoded."""
    with fetcher(headers, **settings) as opened, opened.open(url, accept="*/*") as stream:
        return b"".join(stream)


def failure(url: str, headers: Headers = (), **settings: Any) -> FetchError:
    """Why the body cannot be had."""
    with pytest.raises(FetchError) as failed:
        fetch(url, headers, **settings)
    assert failed.value.reason == str(failed.value)
    return failed.value


def as_far_as_it_comes(stream: Stream) -> bytes:
    """The bytes before the stream breaks."""
    received: list[bytes] = []
    with pytest.raises(BrokenStream), stream:
        received.extend(stream)
    return b"".join(received)


class Script:
    """A server that answers its requests, in order, with these bytes, and then with the last of them again.

    Closes the connection after each. For answers that no proper server gives.
    """

    def __init__(self, *answers: bytes | Sequence[bytes]) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []
        self.sent = 0

    def __enter__(self) -> Self:
        script = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                request = b""
                while (line := self.rfile.readline()).strip():
                    request += line
                answer = script._answers[min(len(script.requests), len(script._answers) - 1)]
                script.requests.append(request)
                try:
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        self.request.sendall(part)
                        script.sent += len(part)
                except OSError:
                    return

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/{NAME}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}"]
    lines += [
        f"{name.replace('_', '-')}: {value}" for name, value in {"Content_Length": str(len(body)), **headers}.items()
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def test_a_body_comes_as_it_is_with_its_validator_and_length(provider: SampleProvider) -> None:
    with fetcher() as opened, opened.open(f"{provider.url}/{NAME}", accept="application/fhir+ndjson") as stream:
        assert b"".join(stream) == BODY
        assert (stream.resumed_at, stream.content_length, stream.bytes_received) == (0, len(BODY), len(BODY))
        assert stream.identity
        etag = stream.etag
    assert etag == requests.head(f"{provider.url}/{NAME}", timeout=5).headers["ETag"]
    assert provider.requests[0].headers["Accept"] == "application/fhir+ndjson"


def test_an_empty_body_is_no_error(provider: SampleProvider) -> None:
    (provider.directory / "empty.ndjson").touch()
    assert fetch(f"{provider.url}/empty.ndjson") == b""


def test_a_weak_validator_does_not_count() -> None:
    with Script(answer("200 OK", BODY, ETag='W/"1"')) as server, fetcher() as opened:
        assert opened.open(server.url, accept="*/*").etag is None


# What is tried again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(provider: SampleProvider, status: int) -> None:
    provider.add(Fault(status=status, times=2))
    assert fetch(f"{provider.url}/{NAME}") == BODY
    assert [request.status for request in provider.requests] == [status, status, 200]


def test_tries_end_and_another_attempt_is_left_to_the_step(provider: SampleProvider) -> None:
    provider.add(Fault(status=503))
    error = failure(f"{provider.url}/{NAME}?sig=secret")
    assert isinstance(error, NotRetrieved)
    assert (error.http_status, error.code, error.retryable) == (503, "transient", True)
    assert error.reason == f"{provider.url}/{NAME} answered 503"
    assert len(provider.requests) == 3


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "processing"),
        (401, "login"),
        (403, "forbidden"),
        (404, "not-found"),
        (405, "processing"),
        (410, "not-found"),
        (501, "transient"),
    ],
)
def test_any_other_status_is_final_at_once(provider: SampleProvider, status: int, code: str) -> None:
    provider.add(Fault(status=status))
    error = failure(f"{provider.url}/{NAME}")
    assert (error.http_status, error.code, error.retryable) == (status, code, False)
    assert f"answered {status}" in error.reason
    assert len(provider.requests) == 1


def test_a_status_of_success_without_the_body_is_not_the_body() -> None:
    with Script(answer("206 Partial Content", BODY[5:], Content_Range=f"bytes 5-9/{len(BODY)}")) as server:
        assert failure(server.url).http_status == 206
    with Script(answer("204 No Content")) as server:
        assert failure(server.url).http_status == 204


def test_a_connection_that_is_reset_before_the_answer_is_tried_again() -> None:
    with Script(b"", b"HTT", answer("200 OK", BODY)) as server:
        assert fetch(server.url) == BODY
        assert len(server.requests) == 3


def test_nobody_listening_is_told_after_the_retries() -> None:
    error = failure(f"http://127.0.0.1:{free_port()}/{NAME}?sig=secret")
    assert isinstance(error, Unreachable)
    assert (error.code, error.retryable) == ("transient", True)
    assert error.reason.endswith(f"/{NAME} could not be reached")


def test_a_host_that_does_not_exist_is_told_without_the_resolver_s_words() -> None:
    assert failure(f"http://provider.invalid/{NAME}").reason == f"http://provider.invalid/{NAME} could not be reached"


def test_a_server_that_accepts_and_says_nothing_is_told_after_the_retries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}"
        error = failure(url, fetch_retries=1, read_timeout_seconds=0.1)
    assert isinstance(error, Unreachable)
    assert error.reason == f"{url} did not answer in time"


def test_the_pause_doubles() -> None:
    with Script(answer("500 Oops")) as server:
        began = time.monotonic()
        failure(server.url, fetch_backoff_seconds=0.1)
        assert 0.75 * 0.3 <= time.monotonic() - began < 1.25 * 0.3 + 0.5


def seconds_to_retry(retry_after: str, **settings: Any) -> float:
    with Script(answer("429 Slow down", Retry_After=retry_after), answer("200 OK", BODY)) as server:
        began = time.monotonic()
        assert fetch(server.url, **settings) == BODY
        return time.monotonic() - began


def test_retry_after_is_waited_for() -> None:
    assert 1 <= seconds_to_retry("1", retry_after_cap_seconds=5) < 2


@pytest.mark.parametrize(
    "value", ["1893456000", "86400", "9" * 5000, "Wed, 21 Oct 2099 07:28:00 GMT", "Wed, 21 Oct 2099 07:28:00"]
)
def test_retry_after_is_believed_up_to_the_cap_only(value: str) -> None:
    assert 0.3 <= seconds_to_retry(value) < 1


def test_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    assert 0.5 < seconds_to_retry(soon, retry_after_cap_seconds=5) < 3


@pytest.mark.parametrize(
    "value",
    ["0", "-5", "", "soon", "²", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2099 07:28:00 +9999999999999999"],
)
def test_a_retry_after_that_makes_no_sense_or_lies_behind_does_not_hold_anything_up(value: str) -> None:
    assert seconds_to_retry(value) < 0.25


def test_a_lease_that_is_lost_ends_the_pause() -> None:
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise LeaseLost

    began = time.monotonic()
    with Script(answer("503 Busy", Retry_After="30")) as server, pytest.raises(LeaseLost):
        fetch(server.url, alive=alive, retry_after_cap_seconds=30)
    assert time.monotonic() - began < 5


# Bodies that break off


def test_a_connection_that_is_cut_gives_what_came_and_says_so(provider: SampleProvider) -> None:
    provider.add(Fault(cut_after=100_000))
    with fetcher() as opened:
        assert as_far_as_it_comes(opened.open(f"{provider.url}/{NAME}", accept="*/*")) == BODY[:100_000]
    error = failure(f"{provider.url}/{NAME}?sig=secret")
    assert (error.code, error.retryable) == ("incomplete", True)
    assert error.reason == f"{provider.url}/{NAME}: the connection broke after 100,000 bytes"


def test_a_body_shorter_than_its_length_is_not_taken_for_the_whole(provider: SampleProvider) -> None:
    provider.add(Fault(truncate_to=100_000))
    error = failure(f"{provider.url}/{NAME}")
    assert isinstance(error, BrokenStream)
    assert error.retryable
    assert " after 100,000 " in error.reason


@pytest.mark.parametrize("ending", [b"", b"5\r\nab", b"5\r\nabcde\r\n", b"zz\r\n"])
def test_a_chunked_body_without_its_end_is_not_taken_for_the_whole(ending: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    with Script(head + ending) as server:
        assert isinstance(failure(server.url), BrokenStream)


def test_a_chunked_body_comes_whole() -> None:
    with Script(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") as server:
        assert fetch(server.url) == b"abcde"


def test_a_body_without_length_ends_with_its_connection() -> None:
    with Script(b"HTTP/1.0 200 OK\r\n\r\n" + BODY) as server:
        assert fetch(server.url) == BODY


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", "many", ""])
def test_a_content_length_that_is_none_is_passed_over(length: str) -> None:
    with Script(answer("200 OK", BODY, Content_Length=length)) as server:
        assert fetch(server.url) == BODY


def test_a_body_that_stands_still_is_given_up(provider: SampleProvider) -> None:
    provider.add(Fault(stall_after=100_000))
    with fetcher() as opened:
        assert as_far_as_it_comes(opened.open(f"{provider.url}/{NAME}", accept="*/*")) == BODY[:100_000]
    error = failure(f"{provider.url}/{NAME}")
    assert (error.code, error.retryable) == ("incomplete", True)
    assert error.reason == f"{provider.url}/{NAME}: nothing came for 0.3 seconds"


def test_a_slow_body_is_not_one_that_stands_still(provider: SampleProvider) -> None:
    provider.add(Fault(bytes_per_second=len(BODY) * 2))
    assert fetch(f"{provider.url}/{NAME}", read_timeout_seconds=0.4) == BODY


def test_a_lease_that_is_lost_ends_the_body(provider: SampleProvider) -> None:
    lost = False

    def alive() -> None:
        if lost:
            raise LeaseLost

    provider.add(Fault(stall_after=100_000))
    with fetcher(alive=alive, read_timeout_seconds=5) as opened:
        stream = iter(opened.open(f"{provider.url}/{NAME}", accept="*/*"))
        assert next(stream)
        lost = True
        provider.clear()
        with pytest.raises(LeaseLost):
            list(stream)


def test_an_answer_that_is_no_http_is_told_without_internals() -> None:
    with Script(b"SSH-2.0-OpenSSH_9.2\r\n") as server:
        error = failure(server.url)
    assert error.retryable
    assert error.reason == f"{server.url} could not be reached"


# Going on where it broke off


def test_a_body_goes_on_by_range_from_where_it_broke_off(provider: SampleProvider) -> None:
    provider.add(Fault(cut_after=100_000, times=1))
    url = f"{provider.url}/{NAME}"
    with fetcher() as opened:
        begun = opened.open(url, accept="*/*")
        validator = begun.etag
        head = as_far_as_it_comes(begun)
        with opened.open(url, accept="*/*", offset=len(head), validator=validator) as stream:
            assert stream.resumed_at == len(head)
            assert head + b"".join(stream) == BODY
            assert stream.bytes_received == len(BODY) - len(head)
    sent = provider.requests[-1].headers
    assert (sent["Range"], sent["If-Range"]) == ("bytes=100000-", validator)
    assert sent["Accept-Encoding"] == "identity"
    assert [request.status for request in provider.requests] == [200, 206]


def resumed(url: str, *, offset: int = 1000, validator: str | None = '"1"') -> tuple[int, bytes]:
    with fetcher() as opened, opened.open(url, accept="*/*", offset=offset, validator=validator) as stream:
        return stream.resumed_at, b"".join(stream)


def test_a_file_that_changed_comes_from_its_beginning(provider: SampleProvider) -> None:
    provider.add(Fault(change_etag=True))
    assert resumed(f"{provider.url}/{NAME}") == (0, BODY)
    assert len(provider.requests) == 1


def test_a_server_without_ranges_sends_the_file_from_its_beginning(provider: SampleProvider) -> None:
    provider.add(Fault(no_range=True))
    assert resumed(f"{provider.url}/{NAME}") == (0, BODY)


def test_without_a_validator_no_range_is_asked_for(provider: SampleProvider) -> None:
    assert resumed(f"{provider.url}/{NAME}", validator=None) == (0, BODY)
    assert "Range" not in provider.requests[0].headers


@pytest.mark.parametrize(
    "partial",
    [
        answer("206 Partial Content", BODY[1000:], ETag='"2"', Content_Range=f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"),
        answer("206 Partial Content", BODY[900:], ETag='"1"', Content_Range=f"bytes 900-{len(BODY) - 1}/{len(BODY)}"),
        answer("206 Partial Content", BODY[1000:], ETag='"1"'),
        answer("206 Partial Content", BODY[10000:], Content_Range=f"bytes 10000-{len(BODY) - 1}/{len(BODY)}"),
        answer("416 Range Not Satisfiable", Content_Range=f"bytes */{len(BODY)}"),
    ],
    ids=["of another body", "from another place", "from an unknown place", "from further on", "not to be satisfied"],
)
def test_a_range_that_is_not_the_one_asked_for_is_not_used(partial: bytes) -> None:
    with Script(partial, answer("200 OK", BODY, ETag='"1"')) as server:
        assert resumed(server.url) == (0, BODY)
        assert b"Range:" in server.requests[0]
        assert b"Range:" not in server.requests[1]


def test_a_range_without_a_validator_of_its_own_is_of_the_body_asked_for() -> None:
    with Script(answer("206 Partial Content", BODY[1000:], Content_Range=f"bytes 1000-{len(BODY) - 1}/*")) as server:
        assert resumed(server.url) == (1000, BODY[1000:])


# gzip and limits


def test_content_encoding_gzip_is_undone_and_offsets_are_not_those_on_the_wire(provider: SampleProvider) -> None:
    (provider.directory / f"{NAME}.gz").write_bytes(gzip.compress(BODY))
    with fetcher() as opened, opened.open(f"{provider.url}/{NAME}", accept="*/*") as stream:
        assert b"".join(stream) == BODY
        assert not stream.identity
        assert stream.bytes_received < len(BODY) / 4


def test_a_gzip_file_is_unpacked_whatever_it_is_called(provider: SampleProvider) -> None:
    (provider.directory / "packed").write_bytes(gzip.compress(BODY[:1000]) + gzip.compress(BODY[1000:]))
    with fetcher() as opened, opened.open(f"{provider.url}/packed", accept="*/*") as stream:
        assert b"".join(stream) == BODY
        assert not stream.identity


def test_a_gzip_file_that_comes_byte_by_byte_is_known_as_one() -> None:
    packed = gzip.compress(BODY[:100])
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Script([head, *(b"1\r\n%c\r\n" % byte for byte in packed), b"0\r\n\r\n"]) as server:
        assert fetch(server.url) == BODY[:100]


def test_a_file_of_one_byte_comes_as_it_is() -> None:
    with Script(answer("200 OK", b"\x1f")) as server:
        assert fetch(server.url) == b"\x1f"


@pytest.mark.parametrize("damaged", [gzip.compress(BODY)[:-20], gzip.compress(BODY) + b"garbage that is no member"])
@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_damaged_gzip_data_is_told(damaged: bytes, headers: dict[str, str]) -> None:
    with Script(answer("200 OK", damaged, **headers)) as server:
        error = failure(server.url)
    assert isinstance(error, BrokenStream)
    assert error.reason == f"{server.url}: the gzip data is damaged or ends early"


def test_a_content_encoding_that_was_not_asked_for_is_refused() -> None:
    with Script(answer("200 OK", BODY, Content_Encoding="br")) as server:
        error = failure(server.url)
    assert (error.code, error.retryable) == ("not-supported", False)
    assert "'br'" in error.reason


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_a_bomb_is_refused_before_it_fills_anything(headers: dict[str, str]) -> None:
    bomb = gzip.compress(bytes(200 * MEBIBYTE), 9)
    with Script(answer("200 OK", bomb, **headers)) as server, fetcher() as opened:
        stream = opened.open(server.url, accept="*/*")
        sizes: list[int] = []
        tracemalloc.start()
        try:
            with pytest.raises(TooLarge, match="expands more than 200-fold") as refused:
                sizes.extend(map(len, stream))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert not refused.value.retryable
    assert sum(sizes) <= max(16 * MEBIBYTE, 200 * len(bomb)) + CHUNK
    assert peak < 16 * MEBIBYTE


def test_a_small_file_may_expand_as_it_likes() -> None:
    with Script(answer("200 OK", gzip.compress(bytes(MEBIBYTE), 9))) as server:
        assert fetch(server.url, max_compression_ratio=2) == bytes(MEBIBYTE)


def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_is_not(provider: SampleProvider) -> None:
    error = failure(f"{provider.url}/{NAME}", max_file_bytes=len(BODY) - 1)
    assert isinstance(error, TooLarge)
    assert error.reason == f"{provider.url}/{NAME} has more than {len(BODY) - 1:,} bytes"
    assert fetch(f"{provider.url}/{NAME}", max_file_bytes=len(BODY)) == BODY


def test_the_limit_holds_for_the_whole_file_when_it_is_resumed(provider: SampleProvider) -> None:
    url = f"{provider.url}/{NAME}"
    etag = requests.head(url, timeout=5).headers["ETag"]
    with fetcher(max_file_bytes=len(BODY) - 1) as opened:
        stream = opened.open(url, accept="*/*", offset=len(BODY) - 10, validator=etag)
        with pytest.raises(TooLarge):
            list(stream)


# Redirects, headers, URLs


def test_a_redirect_is_not_followed_and_its_target_is_not_asked(provider: SampleProvider, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / NAME).write_bytes(b"stolen")
    with SampleProvider(elsewhere) as other:
        provider.add(Fault(redirect_to=f"{other.url}/{NAME}"))
        error = failure(f"{provider.url}/{NAME}", [("Authorization", "Bearer abc")])
        assert other.requests == []
    assert (error.http_status, error.code, error.retryable) == (307, "not-supported", False)
    assert error.reason == f"{provider.url}/{NAME} answered 307: redirects are not followed"
    assert len(provider.requests) == 1


@pytest.mark.parametrize("location", ["http://[", "//", "file:///etc/passwd", "\xff"])
def test_a_redirect_to_nonsense_is_a_redirect(location: str) -> None:
    with Script(answer("302 Found", Location=location)) as server:
        assert failure(server.url).reason == f"{server.url} answered 302: redirects are not followed"


@pytest.mark.parametrize("status", ["302 Found", "404 Not Found", "503 Busy"])
def test_the_body_of_an_answer_that_is_not_used_is_not_read(status: str) -> None:
    head = f"HTTP/1.1 {status}\r\nLocation: /elsewhere\r\n\r\n".encode()
    with Script([head, *[bytes(MEBIBYTE)] * 64]) as server:
        failure(server.url, fetch_retries=0)
        assert server.sent < 32 * MEBIBYTE


def test_the_submitter_s_headers_go_with_every_request(provider: SampleProvider) -> None:
    headers = [("X-Key", "abc"), ("accept", "application/x-own"), ("X-Name", "Zoë")]
    provider.add(Fault(status=503, times=1))
    with fetcher(headers) as opened:
        list(opened.open(f"{provider.url}/{NAME}", accept="*/*"))
        list(opened.open(f"{provider.url}/{NAME}", accept="*/*", offset=10, validator='"x"'))
    assert len(provider.requests) == 3
    for request in provider.requests:
        assert (request.headers["X-Key"], request.headers["Accept"]) == ("abc", "application/x-own")
        assert request.headers["X-Name"].encode("latin-1") == "Zoë".encode("latin-1")
    assert provider.requests[-1].headers["Range"] == "bytes=10-"


@pytest.mark.parametrize("name", ["Host", "Range", "If-Range", "Accept-Encoding", "Content-Length"])
def test_a_header_of_our_own_set_by_a_submitter_ends_the_request_before_it_is_made(
    provider: SampleProvider, name: str
) -> None:
    error = failure(f"{provider.url}/{NAME}", [("X-Key", "abc"), (name, "s3cr3t")])
    assert isinstance(error, Refused)
    assert "s3cr3t" not in error.reason
    assert provider.requests == []


def test_no_credentials_or_proxy_of_the_environment_are_used(
    provider: SampleProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login ours password ours\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert fetch(f"{provider.url}/{NAME}") == BODY
    assert "Authorization" not in provider.requests[0].headers


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://user:pw@127.0.0.1/a", "http://a..b/", "http://*.test/"]
)
def test_a_url_that_cannot_be_asked_for_is_refused_for_good(url: str) -> None:
    error = failure(url)
    assert isinstance(error, Refused)
    assert not error.retryable


# JSON documents


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b" \n"])
def test_a_json_document_is_decoded(prefix: bytes) -> None:
    with Script(answer("200 OK", prefix + '{"a":["ä"]}'.encode())) as server, fetcher() as opened:
        assert opened.get_json(server.url) == {"a": ["ä"]}


@pytest.mark.parametrize(
    "document", [b"", b"{", b"<html>", b'{"a":1}x', b'{"a":"\xff"}', b"\xff\xfe{\0}\0", b"[" * 100_000]
)
def test_what_is_not_json_is_told_by_its_url(document: bytes) -> None:
    with Script(answer("200 OK", document)) as server, fetcher() as opened, pytest.raises(BadManifest) as bad:
        opened.get_json(f"{server.url}?sig=secret")
    assert bad.value.reason.startswith(f"{server.url} is not JSON: ")
    assert not bad.value.retryable
    assert "msgspec" not in bad.value.reason


def test_a_document_over_the_limit_is_refused_before_it_is_read_whole() -> None:
    document = json.dumps(["x" * 1000] * 20_000).encode()
    script = Script([answer("200 OK", b"", Content_Length=str(len(document))), document])
    with script as server, fetcher(max_manifest_bytes=1000) as opened, pytest.raises(TooLarge, match="more than 1,000"):
        opened.get_json(server.url)
