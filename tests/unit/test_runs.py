"""What runs leave in the storage, without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray import ConfigError, StorageError, UnknownRunError
from kfpytorch_ray.runs import (
    COLLECTED,
    DRIVER_LOG,
    INPUTS,
    MANIFEST,
    OLD_RECORD,
    OUTCOME,
    RECORDS,
    REQUEST,
    RESULTS,
    STORAGE_VARIABLE,
    Manifest,
    Outcome,
    collect,
    collected,
    expired_runs,
    list_runs,
    new_run_id,
    read_manifest,
    read_outcome,
    remove_run,
    run_folder,
    storage_of,
)
from kfpytorch_ray.storage import Storage

DAY_S = 24 * 3600.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def manifest(run_id: str, **fields: object) -> Manifest:
    plain = Manifest(
        run_id=run_id,
        name="train",
        backend="ray",
        storage="s3://bucket",
        address="http://head:8265",
        created_at=1_000_000.0,
        created_by="ada@laptop",
        nodes="1:4",
        nproc_per_node=8,
        retention_s=7 * DAY_S,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def outcome(**fields: object) -> Outcome:
    plain = Outcome("succeeded", 1_000_100.0, "", "", ("00", 3), (("aa", 1), ("bb", 2)))
    return replace(plain, **fields)  # type: ignore[arg-type]


def add(storage: Storage, run: Manifest, ended: Outcome | None = None) -> Storage:
    folder = run_folder(storage, run.run_id)
    folder.write(MANIFEST, run.to_json())
    folder.write(REQUEST, b"request")
    folder.write(f"{INPUTS}/file", b"input")
    if ended is not None:
        folder.write(f"{RESULTS}/rank-0", b"value")
        folder.write(f"{RECORDS}/00.pkl", b"record")
        folder.write(OLD_RECORD, b"record of another version")
        folder.write(DRIVER_LOG, b"log")
        folder.write(OUTCOME, ended.to_json())
    return folder


def test_a_run_is_read_as_it_was_written(storage: Storage) -> None:
    """Manifest and outcome come back equal, with digests to check by; the storage is the one that was looked in."""
    folder = add(storage, manifest("kfr-one", lease_s=30.0), outcome())
    assert read_manifest(storage, "kfr-one") == manifest("kfr-one", lease_s=30.0, storage=storage.uri)
    read = read_outcome(folder)
    assert read is not None
    assert (read.record_digest.sha256, read.result_digest(1).size_bytes) == ("00", 2)


def test_what_another_version_has_added_is_passed_over(storage: Storage) -> None:
    """A field that this version does not know does no harm; a field that is missing does."""
    folder = add(storage, manifest("kfr-one"))
    written = json.loads(manifest("kfr-one").to_json())
    folder.write(MANIFEST, json.dumps({**written, "colour": "red"}).encode())
    assert read_manifest(storage, "kfr-one") == manifest("kfr-one", storage=storage.uri)
    del written["address"]
    folder.write(MANIFEST, json.dumps(written).encode())
    with pytest.raises(StorageError, match="address"):
        read_manifest(storage, "kfr-one")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{"])
def test_what_is_no_manifest(storage: Storage, content: bytes) -> None:
    """A file that somebody else left there is an error of ours that names it."""
    run_folder(storage, "kfr-one").write(MANIFEST, content)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        read_manifest(storage, "kfr-one")


@pytest.mark.parametrize("run_id", ["kfr-two", "", "../kfr-one", "kfr-one/..", "KFR", "a b", "-x", "kfr-one\n"])
def test_unknown_runs(storage: Storage, run_id: str) -> None:
    """Neither a name that nobody has used nor one that leads out of the storage finds anything."""
    add(storage, manifest("kfr-one"))
    with pytest.raises(UnknownRunError, match="Fix:"):
        read_manifest(storage, run_id)


@given(st.text(max_size=60))
def test_run_ids_are_names_that_every_part_takes(name: str) -> None:
    """Whatever a function is called: short, of small letters, digits and dashes, and never the same twice."""
    run_id = new_run_id(name)
    assert run_id != new_run_id(name)
    assert len(run_id) <= 47
    assert run_folder(Storage("memory://runs"), run_id).uri.endswith(run_id)


def test_collecting_keeps_what_is_small(storage: Storage) -> None:
    """Status and log stay for people; the request, the values and the record go; who took it is known."""
    folder = add(storage, manifest("kfr-one"), outcome())
    assert collected(folder) is None
    collect(folder)
    assert folder.names() == sorted([COLLECTED, DRIVER_LOG, MANIFEST, OUTCOME])
    assert "took it at" in (collected(folder) or "")
    (run,) = list_runs(storage)
    assert run.collected
    assert run.outcome is not None


def test_runs_are_listed_newest_first(storage: Storage) -> None:
    """Folders that hold no manifest (yet), or one that cannot be read, are passed over."""
    add(storage, manifest("kfr-old", created_at=1.0), outcome())
    add(storage, manifest("kfr-new", created_at=2.0))
    run_folder(storage, "kfr-half").write(REQUEST, b"")
    run_folder(storage, "kfr-spoilt").write(MANIFEST, b"{")
    storage.write("runs/Not_a_run/manifest.json", b"")
    assert [(run.manifest.run_id, run.outcome is not None) for run in list_runs(storage)] == [
        ("kfr-new", False),
        ("kfr-old", True),
    ]


def test_runs_expire_after_their_retention(storage: Storage) -> None:
    """It counts from the end where that is known, else from the beginning; a clean-up may set another time."""
    add(storage, manifest("kfr-ended", created_at=0.0), outcome(ended_at=3 * DAY_S))
    add(storage, manifest("kfr-open", created_at=0.0))
    add(storage, manifest("kfr-short", created_at=0.0, retention_s=DAY_S), outcome(ended_at=1.0))

    def expired(now: float, older_than_s: float | None = None) -> set[str]:
        return {run.manifest.run_id for run in expired_runs(storage, older_than_s, now)}

    assert expired(2 * DAY_S) == {"kfr-short"}
    assert expired(8 * DAY_S) == {"kfr-short", "kfr-open"}
    assert expired(10 * DAY_S) == {"kfr-short", "kfr-open", "kfr-ended"}
    assert expired(4 * DAY_S, older_than_s=DAY_S) == {"kfr-short", "kfr-open", "kfr-ended"}


def test_removing_a_run_leaves_nothing_of_it(storage: Storage) -> None:
    """And nothing else is touched, such as what its function has written."""
    storage.write("outputs/kfr-one/model", b"")
    add(storage, manifest("kfr-one"), outcome())
    add(storage, manifest("kfr-two"))
    remove_run(storage, "kfr-one")
    assert storage.folder("runs").names() == ["kfr-two"]
    assert storage.names() == ["outputs", "runs"]


def test_the_storage_is_the_option_else_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative folder is made absolute, because it would be another one on another machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(STORAGE_VARIABLE, "memory://variable")
    assert storage_of("memory://option").uri == "memory://option"
    assert storage_of(None).uri == "memory://variable"
    assert storage_of("here").uri == f"{tmp_path}/here"
    monkeypatch.delenv(STORAGE_VARIABLE)
    with pytest.raises(ConfigError, match=STORAGE_VARIABLE):
        storage_of(None)
    with pytest.raises(ConfigError, match="credentials"):
        storage_of("s3://key:secret@bucket")
