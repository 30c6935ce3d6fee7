"""Where receipts are kept as objects: a directory, or a bucket of S3, Google Cloud or Azure.

An object appears whole or not at all, and is never overwritten. Memory does not grow with an object's size. What to
write where is the business of rows (`schema/artifacts.py`), which name every object before it exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

_CHUNK_BYTES = 1024 * 1024
_ONE_REQUEST_BYTES = 8 * 1024 * 1024
_TRANSFER_TIMEOUT = timedelta(hours=1)  # a whole response, at the pace of whoever reads it


class ArtifactStoreError(Exception):
    """The artifact store did not do what it was asked.

    The operator checks BULK_SUBMIT_ARTIFACT_STORE_URL, the store's credentials, and that it is reachable and has room.
    Nothing is lost: a step that needed the store is taken again.
    """


class ArtifactMissingError(ArtifactStoreError):
    """There is no object of that name: it was deleted, or the store's URL was changed without moving the objects.

    A receipt past its time to live is gone on purpose; otherwise the operator brings the object back from a backup.
    """


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactMissingError(what) from error
    except (BaseError, OSError) as error:
        raise ArtifactStoreError(what) from error


class ArtifactStore:
    """The objects under one URL: file://, s3://, gs:// or az://. A local directory is made when it is missing.

    Paths are relative to the URL, with slashes. The store is opened when it is first used; from then on, not to be
    carried across a fork. Methods raise `ArtifactStoreError`.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _store(self) -> ObjectStore:
        with _store_errors("open the artifact store"):
            if self._url.startswith("file:"):
                return LocalStore.from_url(self._url, mkdir=True)
            return from_url(self._url, client_options={"timeout": _TRANSFER_TIMEOUT})

    def write(self, path: str, local_file: Path, alive: Callable[[], None]) -> None:
        """Store the file under `path`; raises `ArtifactStoreError` if there is an object already.

        `alive` is called as the bytes go; what it raises ends the transfer, and no object appears.
        """
        with local_file.open("rb") as source, _store_errors(f"write {path}"):
            if local_file.stat().st_size <= _ONE_REQUEST_BYTES:
                obstore.put(self._store, path, source.read(), mode="create")
                return
            # Stores cannot refuse to overwrite at the end of an upload in parts. Asking first is enough here: a row
            # keeps the path for one writer.
            if self.exists(path):
                raise ArtifactStoreError(f"write {path}: it exists")

            def chunks() -> Iterator[bytes]:
                while chunk := source.read(_CHUNK_BYTES):
                    alive()
                    yield chunk

            obstore.put(self._store, path, chunks(), max_concurrency=2)

    def read(self, path: str) -> Iterator[bytes]:
        """The object's bytes in chunks. Raises `ArtifactMissingError` before the first one."""
        with _store_errors(f"read {path}"):
            stream = obstore.get(self._store, path).stream(_CHUNK_BYTES)
        return self._chunks(path, stream)

    @staticmethod
    def _chunks(path: str, stream: Iterable[bytes]) -> Iterator[bytes]:
        with _store_errors(f"read {path}"):
            yield from stream

    def delete(self, paths: Iterable[str]) -> None:
        """Delete the objects; those that are gone already are no error."""
        for path in paths:
            with _store_errors(f"delete {path}"), suppress(FileNotFoundError):
                obstore.delete(self._store, path)

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(path)
        except ArtifactMissingError:
            return False
        return True

    def size(self, path: str) -> int:
        """The object's size in bytes. Raises `ArtifactMissingError`."""
        with _store_errors(f"look at {path}"):
            return obstore.head(self._store, path)["size"]
