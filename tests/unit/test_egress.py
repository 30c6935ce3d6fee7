"""What may be asked of whom: URLs and request headers, refused where they are not understood."""

from __future__ import annotations

import contextlib
import http.client
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st

from workers.fetch.egress import OUR_OWN_HEADERS, check_header, check_url, headers_for
from workers.fetch.errors import Refused

SECRET = "s3cr3t"
URL = "https://provider.test/files/1.ndjson"


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "http://provider.test",
        "HTTPS://Provider.Test:8443/a%20b?x=1&y=%2F#part",
        "http://127.0.0.1:8080/",
        "http://[::1]:8080/a",
        "https://müller.example/ä",
        "http://provider.test:/empty-port",
    ],
)
def test_a_plain_web_url_is_let_through_as_it_is(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "neither http nor https"),
        ("patients.ndjson", "neither http nor https"),
        ("//provider.test/a", "neither http nor https"),
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://provider.test/a", "neither http nor https"),
        ("gopher://provider.test:6379/_FLUSHALL", "neither http nor https"),
        ("data:application/json,{}", "neither http nor https"),
        ("https://", "no host"),
        ("https:///a", "no host"),
        ("https:provider.test/a", "no host"),
        ("https://:443/a", "no host"),
        ("https://?x=provider.test", "no host"),
        (f"https://user:{SECRET}@provider.test/a", "user name or a password"),
        (f"https://{SECRET}@provider.test/a", "user name or a password"),
        ("https://@provider.test/a", "user name or a password"),
        ("https://provider.test:0/a", "port 0"),
        ("https://provider.test:65536/a", "cannot be parsed"),
        ("https://provider.test:http/a", "cannot be parsed"),
        ("https://[::1/a", "cannot be parsed"),
        ("https://provider.test/a b", "a space, a control character or a backslash"),
        (" https://provider.test/a", "a space, a control character or a backslash"),
        ("https://provider.test/a\r\nX-Injected: 1", "a space, a control character or a backslash"),
        ("https://provider.test\\@elsewhere.test/a", "a space, a control character or a backslash"),
        ("https://provider.test/\x00", "a space, a control character or a backslash"),
        ("https://provider.test/\x7f", "a space, a control character or a backslash"),
    ],
)
def test_any_other_url_is_refused_with_a_reason_that_does_not_repeat_it(url: str, why: str) -> None:
    with pytest.raises(Refused, match=why) as refused:
        check_url(url)
    assert SECRET not in refused.value.reason
    assert refused.value.code == "security"
    assert not refused.value.retryable


@given(
    st.text() | st.builds("".join, st.lists(st.sampled_from(["http", "://", "@", "[", "]", ":", "/", "a.b", "1", "?"])))
)
def test_any_text_is_a_url_with_a_host_or_refused(url: str) -> None:
    with contextlib.suppress(Refused):
        parts = urlsplit(check_url(url))
        assert parts.scheme in ("http", "https")
        assert parts.hostname


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "Accept", "User-Agent", "Cookie", "X_1!#$%&'*+.^`|~-"])
def test_a_submitter_may_set_a_header_of_its_own(name: str) -> None:
    assert check_header(name, "Bearer abc, \x80\xff\t1") == (name, "Bearer abc, \x80\xff\t1")


@pytest.mark.parametrize(
    "name", [*sorted(OUR_OWN_HEADERS), "Host", "RANGE", "If-Range", "Proxy-Authorization", "proxy-x"]
)
def test_a_submitter_may_not_set_what_shapes_the_request(name: str) -> None:
    with pytest.raises(Refused, match=name) as refused:
        check_header(name, SECRET)
    assert SECRET not in refused.value.reason


@pytest.mark.parametrize("name", ["", " ", "X Y", "X:", "X\r\nY", "Grüße", "X\n", "(x)"])
def test_a_name_that_is_no_token_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="not an HTTP token"):
        check_header(name, "1")


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\n", "a\0", "a\x7f", "漢字", "a\x1b"])
def test_a_value_that_http_does_not_allow_is_refused_without_being_repeated(value: str) -> None:
    with pytest.raises(Refused, match="the request header X-Key holds characters") as refused:
        check_header("X-Key", SECRET + value)
    assert SECRET not in refused.value.reason


def test_blanks_around_a_value_are_no_part_of_it() -> None:
    assert check_header("X-Key", " \tone two \t") == ("X-Key", "one two")


@given(st.text(min_size=1, max_size=5), st.text(max_size=10))
@example("X", " leading")
@example("X", "\xa0")
@example("X", "\x85")
def test_a_header_that_is_let_through_can_be_sent(name: str, value: str) -> None:
    with contextlib.suppress(Refused):
        headers = dict(headers_for(URL, [(name, value)]))
        prepared = requests.Request("GET", URL, headers=headers).prepare()
        connection = http.client.HTTPConnection("provider.test")
        connection.putrequest("GET", "/")
        for each in prepared.headers.items():
            connection.putheader(*each)


def test_headers_are_built_anew_for_each_request() -> None:
    given_headers = [("X-Key", SECRET), ("X-Other", "2")]
    first, second = headers_for(URL, given_headers), headers_for(URL, given_headers)
    assert first == second == given_headers
    assert first is not second
    assert first is not given_headers


def test_no_headers_are_given_out_for_a_url_that_is_refused() -> None:
    with pytest.raises(Refused):
        headers_for("file:///etc/passwd", [("X-Key", SECRET)])


def test_one_bad_header_refuses_the_request() -> None:
    with pytest.raises(Refused):
        headers_for(URL, [("X-Key", SECRET), ("Host", "elsewhere.test")])
