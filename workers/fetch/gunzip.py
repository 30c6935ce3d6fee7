"""gzip, decoded as it comes and in bounded memory (RFC 1952), several members included."""

from __future__ import annotations

from collections.abc import Iterator

from isal import igzip_lib

MAGIC = b"\x1f\x8b"


def gunzip(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """The decoded bytes, at most `limit` at a time however much a chunk expands to.

    Raises `EOFError` where the data ends inside a member and `OSError` where it is no gzip data.
    """
    decoder = _decoder()
    begun = False
    for received in chunks:
        data = received
        while data or not decoder.needs_input:
            if decoder.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                decoder, begun = _decoder(), False
            begun = True
            try:
                decoded = decoder.decompress(data, limit)
            except igzip_lib.error as error:  # type: ignore[misc]
                raise OSError("not gzip data") from error
            data = decoder.unused_data if decoder.eof else b""
            if decoded:
                yield decoded
    if begun and not decoder.eof:
        raise EOFError


def _decoder() -> igzip_lib.IgzipDecompressor:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
