"""The folder between here and a cluster: a local one, and an object store over real HTTP."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from kfpytorch_ray import IntegrityError, StorageError
from kfpytorch_ray.storage import CHUNK_BYTES, Digest, Storage, digest_of, problem_of_uri
from kfpytorch_ray.testing.network import unavailable


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        Storage("s3://bucket")._files.mkdir("bucket")
        yield "s3://bucket"
    # The buckets of one process are those of all its servers.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()
    S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty one of each kind."""
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('object_store')}/{tmp_path.name}")
    return Storage(f"{tmp_path}/a" if request.param == "folder" else f"file://{tmp_path}/a")


def test_what_is_written_is_read(storage: Storage) -> None:
    """A file comes back, replaces one of its name, and is seen by who opens the folder anew."""
    storage.write("runs/one/manifest", b"first")
    storage.write("runs/one/manifest", b"second")
    assert Storage(storage.uri).folder("runs/one").read("manifest") == b"second"


def test_what_is_not_there(storage: Storage) -> None:
    """Nothing is None to read, and an empty list to list; removing it is no error."""
    assert storage.read("nothing") is None
    assert storage.names() == []
    assert storage.folder("nowhere").names() == []
    storage.remove("nothing")
    storage.folder("nowhere").remove()


def test_files_and_folders_are_listed_by_name(storage: Storage) -> None:
    """One level only, nothing of what is being written."""
    storage.write("b", b"")
    storage.write("folder/inner", b"x")
    assert storage.names() == ["b", "folder"]
    storage.remove("folder")
    assert storage.names() == ["b"]


def test_when_it_was_written(storage: Storage) -> None:
    """Of a file, and of the newest file in a folder; nobody knows of what is not there."""
    before = time.time() - 2
    storage.write("folder/old", b"x")
    storage.write("folder/deep/new", b"x")
    newest = storage.changed_at("folder/deep/new")
    assert newest is not None
    assert before <= newest <= time.time() + 2
    assert storage.changed_at("folder") == newest
    assert storage.changed_at("nothing") is None


def test_large_files_are_streamed_and_hashed(storage: Storage, tmp_path: Path) -> None:
    """More than a chunk arrives whole in a local file, of the size and SHA-256 that the upload told."""
    content = bytes(range(256)) * (CHUNK_BYTES // 256) + b"rest"
    digest = storage.upload("large", [memoryview(content)[:100], content[100:]])
    assert digest == digest_of(content)
    storage.download("large", tmp_path / "here", digest)
    assert (tmp_path / "here").read_bytes() == content
    assert storage.read_checked("large", digest) == content


@pytest.mark.parametrize("content", [b"altered", b""])
def test_what_was_altered_is_not_handed_out(storage: Storage, tmp_path: Path, content: bytes) -> None:
    """Neither to memory nor to a file, which is not left."""
    digest = storage.upload("value", [b"genuine"])
    storage.write("value", content)
    with pytest.raises(IntegrityError, match="SHA-256"):
        storage.read_checked("value", digest)
    with pytest.raises(IntegrityError, match="SHA-256"):
        storage.download("value", tmp_path / "here", digest)
    assert not (tmp_path / "here").exists()


def test_what_has_vanished_is_said(storage: Storage, tmp_path: Path) -> None:
    """A file that was announced and is gone is an error of ours that names it."""
    with pytest.raises(StorageError, match="value"):
        storage.read_checked("value", Digest("", 0))
    with pytest.raises(StorageError, match="value"):
        storage.download("value", tmp_path / "here", Digest("", 0))


def test_a_write_that_fails_leaves_nothing(storage: Storage) -> None:
    """Who reads sees the former content, never a part of the new one."""
    storage.write("value", b"former")

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ValueError("the source broke")

    with pytest.raises(StorageError, match="the source broke"):
        storage.upload("value", chunks())
    assert storage.read("value") == b"former"
    assert storage.names() == ["value"]


def test_folders_that_are_made_are_private(tmp_path: Path) -> None:
    """On a shared disk nobody else reads what is staged."""
    Storage(str(tmp_path / "deep" / "er")).write("runs/one/request", b"secret")
    made = ["deep", "deep/er", "deep/er/runs", "deep/er/runs/one"]
    assert {(tmp_path / folder).stat().st_mode & 0o777 for folder in made} == {0o700}


@pytest.mark.skipif(bool(unavailable()), reason=f"mounting needs what network namespaces need: {unavailable()}")
def test_a_full_disk(tmp_path: Path) -> None:
    """The error says that there is no room, and nothing is left of the file."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
    try:
        storage = Storage(str(tmp_path))
        with pytest.raises(StorageError, match="No space left"):
            storage.upload("value", [bytes(2**20)] * 2)
        assert storage.names() == []
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("uri", ["nosuch://bucket/prefix", "/dev/null/under/a/file"])
def test_storage_that_cannot_be(uri: str) -> None:
    """An unknown protocol and an impossible folder are errors of ours, with their cause."""
    with pytest.raises(StorageError, match="Fix:") as caught:
        Storage(uri).write("value", b"")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("s3://bucket/prefix", None),
        ("/shared/folder", None),
        ("file:///shared/with-dash_and.dot", None),
        ("s3://key:secret@bucket/prefix", "credentials"),
        ("s3://key@bucket/prefix", "credentials"),
        ("/shared/with space", "characters"),
        ("/shared/a#b", "characters"),
        ("s3://bucket/prefix?versionId=3", "characters"),
        ("/shared/a\nb", "characters"),
    ],
)
def test_uris(uri: str, problem: str | None) -> None:
    """What would show a secret, or be torn apart on a command line, is refused; the message repeats no secret."""
    said = problem_of_uri(uri)
    assert (said is None) == (problem is None)
    assert problem is None or (problem in (said or "") and "secret" not in (said or ""))


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_digests_do_not_depend_on_how_a_file_is_cut(chunks: list[bytes]) -> None:
    """The same bytes in other chunks have the same digest."""
    storage = Storage("memory://cuts")
    assert storage.upload("value", chunks) == digest_of(b"".join(chunks))
