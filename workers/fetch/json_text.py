"""JSON that somebody else sent: whether it is UTF-8, and what is wrong with it, in words that a submitter may read."""

from __future__ import annotations

import codecs
import re

from settings import MEBIBYTE

_TRUNCATED = "Input data was truncated"
_HALF_OF_A_PAIR = re.compile(r"(?:surrogate pair|end of hex escape)(?P<place> \(byte \d+\))?$")
_HALF_AT_THE_END = re.compile(rb"\\(?<!\\\\)(?:\\\\)*+u[dD][89abAB][0-9a-fA-F]{2}(?!\\u|\\?\Z).{0,5}\Z", re.DOTALL)


def utf8_fault(data: bytes | bytearray | memoryview) -> int | None:
    """The offset of the first byte that is not UTF-8, or None. No more than a part of the text is held."""
    view = memoryview(data)
    position = 0
    while position < len(view):
        end = position + MEBIBYTE
        try:
            position += codecs.utf_8_decode(view[position:end], "strict", end >= len(view))[1]
        except UnicodeDecodeError as error:
            return position + error.start
    return None


def json_fault(error: Exception, data: bytes | bytearray | memoryview) -> str:
    """What is wrong with the JSON text `data`: `error` is what msgspec raised for it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {utf8_fault(data)}"
    text = str(error)
    if half := _HALF_OF_A_PAIR.search(text):
        return _half_of_a_pair(half["place"] or "")
    if text == _TRUNCATED:
        at_end = _HALF_AT_THE_END.search(data)
        return _half_of_a_pair(f" (byte {at_end.start()})") if at_end else "it ends too early"
    return text.removeprefix("JSON is malformed: ")


def _half_of_a_pair(place: str) -> str:
    return f"a \\u escape is half of a surrogate pair, the other half is missing{place}"
