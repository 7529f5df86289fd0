"""A folder that two machines reach, by fsspec: how a launch gets to a cluster that is elsewhere, and its results back.

Files are named relative to the folder. Large ones are streamed in chunks and hashed on their way; local ones appear
whole or not at all, as an object store's do. What the file systems raise becomes a StorageError. Reached through
flytekit's file access, so that the credentials configured there serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from kfpytorch_ray.errors import IntegrityError, KfpytorchRayError, StorageError, explain, text_of

CHUNK_BYTES = 8 * 2**20
"""Read and written at a time: large enough for an object store's requests, small beside any result."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file holds, known without reading it.

    Attributes:
        sha256: In hexadecimal.
        size_bytes: Of the file.
    """

    sha256: str
    size_bytes: int


def _file_system(uri: str) -> Any:
    # Imported here, because agents import this module, and few of them use it.
    from fsspec.utils import get_protocol

    if get_protocol(uri) == "file":
        from fsspec.implementations.local import LocalFileSystem

        # What flytekit would take, without its import.
        return LocalFileSystem(auto_mkdir=True)
    from flytekit.core.context_manager import FlyteContextManager

    return FlyteContextManager.current_context().file_access.get_filesystem_for_path(uri)


def digest_of(data: bytes) -> Digest:
    """Of data in memory."""
    return Digest(hashlib.sha256(data).hexdigest(), len(data))


class Storage:
    """One folder.

    Args:
        uri: Of the folder, as fsspec reads it: ``"s3://bucket/prefix"``, ``"file:///shared/folder"`` or a local path.

    Raises:
        StorageError: There is no file system for such a URI.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or "/"
        with self._told("opened"):
            self._files = _file_system(self.uri)
            self._root = str(self._files._strip_protocol(self.uri)).rstrip("/")
        protocols = (self._files.protocol,) if isinstance(self._files.protocol, str) else self._files.protocol
        self._local = "file" in protocols

    @property
    def prefix(self) -> str:
        """The URI, or where it is a local folder its plain path, which functions can open."""
        return os.path.abspath(self._root) if self._local else self.uri

    def folder(self, name: str) -> Storage:
        """A folder within this one; it need not exist."""
        return Storage(f"{self.uri}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, in place of one of this name.

        Raises:
            StorageError: It cannot be written.
        """
        self.upload(name, [data])

    def upload(self, name: str, chunks: Iterable[bytes | memoryview]) -> Digest:
        """Write a file chunk by chunk, in place of one of this name.

        Raises:
            StorageError: It cannot be written; nothing of it is left then.
        """
        sha256, size_bytes = hashlib.sha256(), 0
        with self._told("written", name), self._opened_for_writing(name) as file:
            for chunk in chunks:
                for part in _split(chunk):
                    file.write(part)
                    sha256.update(part)
                    size_bytes += len(part)
        return Digest(sha256.hexdigest(), size_bytes)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is no such file.

        Raises:
            StorageError: It cannot be read.
        """
        with self._told("read", name):
            try:
                self._files.invalidate_cache()
                content: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

    def read_checked(self, name: str, digest: Digest) -> bytes:
        """A file's content, once its SHA-256 is the expected one.

        Raises:
            StorageError: It cannot be read, or is not there.
            IntegrityError: It is another.
        """
        content = self.read(name)
        if content is None:
            raise self._missing(name)
        if digest_of(content) != digest:
            raise self._altered(name)
        return content

    def download(self, name: str, to: Path, digest: Digest) -> None:
        """Copy a file here chunk by chunk.

        Raises:
            StorageError: It cannot be read, or there is no room for it here; ``to`` is not left then.
            IntegrityError: It is another than was expected.
        """
        sha256 = hashlib.sha256()
        try:
            with self._told("read", name), self._files.open(self._path(name), "rb") as source, to.open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    sha256.update(chunk)
                    target.write(chunk)
        except BaseException:
            to.unlink(missing_ok=True)
            raise
        if sha256.hexdigest() != digest.sha256:
            to.unlink()
            raise self._altered(name)

    def names(self) -> list[str]:
        """Names of the files and folders in this folder; none where it does not exist.

        Raises:
            StorageError: It cannot be read.
        """
        with self._told("listed"):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return sorted({Path(path).name for path in found if path.rstrip("/") != self._root})

    def files(self) -> list[str]:
        """Names of all files below this folder, relative to it; none where it does not exist.

        Raises:
            StorageError: It cannot be read.
        """
        with self._told("listed"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root)
            except FileNotFoundError:
                return []
            root = str(self._files._strip_protocol(self._root)).rstrip("/")
            return sorted(str(path).removeprefix(f"{root}/") for path in found)

    def changed_at(self, name: str) -> float | None:
        """When a file, or the newest file in a folder, was written, in seconds since the epoch; None if nobody knows.

        Raises:
            StorageError: It cannot be read.
        """
        with self._told("read", name), contextlib.suppress(FileNotFoundError, NotImplementedError):
            self._files.invalidate_cache()
            path = self._path(name)
            return max(float(self._files.modified(each).timestamp()) for each in self._files.find(path) or [path])
        return None

    def remove(self, name: str = "") -> None:
        """Remove a file or a folder with all that is in it; the folder itself without a name. May be gone already.

        Raises:
            StorageError: It is there and cannot be removed.
        """
        with self._told("removed", name), contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache()
            self._files.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def _opened_for_writing(self, name: str) -> Iterator[BinaryIO]:
        path = self._path(name)
        if not self._local:
            # Closing an object is what makes it appear; one that failed half-way must not.
            file = self._files.open(path, "wb")
            try:
                yield file
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                # Or it would be completed when it is forgotten.
                file.closed = True
                raise
            file.close()
            return
        target = Path(path)
        _make_private(target.parent)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("wb") as local:
                yield local
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _told(self, verb: str, name: str = "") -> Iterator[None]:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            yield
        except KfpytorchRayError:
            raise
        except Exception as error:
            raise StorageError(
                explain(
                    f"{where} cannot be {verb}.",
                    text_of(error),
                    "Check that the folder exists or may be made, that there is room, and that this machine has the "
                    "rights and the package for it (s3fs for s3://, gcsfs for gs://, adlfs for abfs://).",
                )
            ) from error

    def _missing(self, name: str) -> StorageError:
        return StorageError(
            explain(
                f"{self.uri}/{name} is not there.",
                "It has been removed, or was never written.",
                "Look whether both sides name the same storage, and whether its contents expire.",
            )
        )

    def _altered(self, name: str) -> IntegrityError:
        return IntegrityError(
            explain(
                f"{self.uri}/{name} is not what was written there.",
                "Its SHA-256 differs from the one that was announced, so it was not unpickled.",
                "Launch again. If it happens again, find out who else can write to this storage.",
            )
        )


def problem_of_uri(uri: str) -> str | None:
    """What is wrong with a storage URI; None if nothing is."""
    parts = urlsplit(uri)
    if parts.username or parts.password:
        return "has credentials in it, which would be shown: give them to fsspec by the environment or a config file"
    if "#" in uri or "?" in uri or any(not character.isprintable() or character.isspace() for character in uri):
        return f"{uri!r} has characters that no storage path should have: spaces, '#' or '?'"
    return None


def _split(chunk: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _make_private(folder: Path) -> None:
    """Make a folder and those above it, for this user alone."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(mode=0o700, exist_ok=True)
