"""What runs leave in the storage: one folder each, which tells what the run is, how it ended and what it brought.

    <storage>/runs/<run id>/
        manifest.json     what it is and where; written first, by whoever launches. No secrets
        inputs/...        copies of this machine's files among the inputs
        code.zip          the user's modules, where no job API takes them
        request.pkl       what its driver is to do
        lease             changes as long as whoever launched it lives, where it has a lease
        driver            where its driver has begun, on KubeRay
        driver.log        what its driver has printed; written at its end
        pods/NAME/...     how a pod of a PyTorchJob ended and what it has printed; together they make the outcome
        results/rank-N    the value of each rank
        records/*.pkl     what became of every rank, and the error; several who give a run up leave one each
        outcome.json      how it ended, and which record tells it; written last
        collected.json    that the result was taken; results, records and what was staged are gone then

Here is what both ends, the command line and the clean-up share. Nothing here unpickles, and nothing asks a cluster.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import re
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from typing_extensions import Self

from kfpytorch_ray.errors import ConfigError, StorageError, UnknownRunError, explain
from kfpytorch_ray.storage import Digest, Storage, problem_of_uri

logger = logging.getLogger(__name__)

STORAGE_VARIABLE = "KFPYTORCH_RAY_STORAGE"
"""Names the storage where no option does."""

MANIFEST = "manifest.json"
INPUTS = "inputs"
CODE = "code.zip"
REQUEST = "request.pkl"
LEASE = "lease"
DRIVER = "driver"
DRIVER_LOG = "driver.log"
PODS = "pods"
RESULTS = "results"
RECORDS = "records"
OLD_RECORD = "outcome.pkl"
"""Where versions that did not name it kept the record."""
OUTCOME = "outcome.json"
COLLECTED = "collected.json"

CLUSTERS = "clusters"
"""Beside the runs: what clusters have answered before a launch, and what they are being asked."""

STALE_S = 24 * 3600.0
"""After a day a cluster is asked again: rights on a storage change. What is older and nobody's is left over."""

_RUNS = "runs"
_RUN_ID = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


J = TypeVar("J", bound="Json")


class Json:
    """Plain data as JSON; fields that another version has written and this one does not know are passed over."""

    __slots__ = ()

    def to_json(self) -> bytes:
        """As it is written."""
        return json.dumps(asdict(self), indent=1).encode()  # type: ignore[call-overload] # subclasses are dataclasses

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """As it was written.

        Raises:
            ValueError: It is no such file.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        try:
            return cls(**{name: value for name, value in json.loads(data).items() if name in known})
        except (TypeError, AttributeError) as error:
            msg = f"no {cls.__name__}: {error}"
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True)
class Manifest(Json):
    """What a run is.

    Attributes:
        run_id: Name of its folder and of its job.
        name: Of the task or function.
        backend: By which it runs.
        storage: URI of the storage, as whoever reads it reaches it.
        address: Of its cluster.
        created_at: Seconds since the epoch.
        created_by: User and host.
        nodes: As the user asked for them.
        nproc_per_node: Workers on each node.
        retention_s: Seconds after which what it left may be removed.
        lease_s: Seconds without a sign of life after which it stops itself; None without a lease.
        logs: Whose lines its driver prints.
        log_archive: URI of the folder where the files with every rank's lines are kept; empty: nowhere.
        versions: Of Python and the packages of whoever launched it, for people.
    """

    run_id: str
    name: str
    backend: str
    storage: str
    address: str
    created_at: float
    created_by: str
    nodes: str
    nproc_per_node: int
    retention_s: float
    lease_s: float | None = None
    logs: str = "all"
    log_archive: str = ""
    versions: str = ""


@dataclass(frozen=True, slots=True)
class Outcome(Json):
    """How a run ended, as far as it can be told without unpickling.

    Attributes:
        state: A ``RunStatus``'s value.
        ended_at: Seconds since the epoch.
        message: The error; empty without one.
        error: Class of the error; empty without one.
        record: SHA-256 and size of the record.
        results: SHA-256 and size of each rank's result, by rank.
        record_name: Of the record, in the run's folder.
    """

    state: str
    ended_at: float
    message: str
    error: str
    record: tuple[str, int]
    results: tuple[tuple[str, int], ...] = ()
    record_name: str = OLD_RECORD

    @property
    def record_digest(self) -> Digest:
        """Of the record."""
        return Digest(*self.record)

    def result_digest(self, rank: int) -> Digest:
        """Of a rank's result."""
        return Digest(*self.results[rank])


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as the storage knows it.

    Attributes:
        manifest: What it is.
        outcome: How it ended; None where it has not, or nobody could tell.
        collected: Whether its result was taken.
    """

    manifest: Manifest
    outcome: Outcome | None
    collected: bool


def storage_of(uri: str | None) -> Storage:
    """The storage that an option or the environment names.

    Raises:
        ConfigError: Neither does, or the URI is none.
        StorageError: There is no file system for it.
    """
    named = uri or os.environ.get(STORAGE_VARIABLE)
    if not named:
        raise ConfigError(
            "storage",
            (
                explain(
                    "no storage is named.",
                    "By it the call gets to a cluster that is elsewhere, and its result comes back.",
                    f"Give storage='s3://bucket/prefix' (any fsspec URI of both), or set {STORAGE_VARIABLE}.",
                ),
            ),
        )
    if problem := problem_of_uri(named):
        raise ConfigError("storage", (problem,))
    # A relative path means another folder on the other machine.
    return Storage(named if "://" in named else os.path.abspath(named))


def new_run_id(name: str) -> str:
    """A name for a run: part of the function's, for people, and enough chance never to meet another's."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.rsplit(".", 1)[-1].lower()).strip("-")[:24].strip("-")
    return "-".join(filter(None, ("kfr", slug, uuid.uuid4().hex[:12])))


def whoami() -> str:
    """User and host, for people who share a storage."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container's user id need not have a name.
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def run_folder(storage: Storage, run_id: str) -> Storage:
    """The folder of a run.

    Raises:
        UnknownRunError: No run can be called this.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise _unknown(storage, run_id)
    return storage.folder(f"{_RUNS}/{run_id}")


def read_manifest(storage: Storage, run_id: str) -> Manifest:
    """What a run is.

    Raises:
        UnknownRunError: There is none with this id.
        StorageError: The storage cannot be read.
    """
    data = run_folder(storage, run_id).read(MANIFEST)
    if data is None:
        raise _unknown(storage, run_id)
    return _manifest(storage, data, run_id)


def read_outcome(folder: Storage) -> Outcome | None:
    """How a run ended; None as long as it has not said so.

    Raises:
        StorageError: The storage cannot be read.
    """
    data = folder.read(OUTCOME)
    return None if data is None else _parsed(Outcome, data, f"{folder.uri}/{OUTCOME}")


def collect(folder: Storage) -> None:
    """Remove what is large of a run whose result was taken, and note that it was."""
    note = {"collected_at": time.time(), "collected_by": whoami()}
    folder.write(COLLECTED, json.dumps(note).encode())
    discard(folder)
    for name in (RECORDS, OLD_RECORD):
        folder.remove(name)


def discard(folder: Storage) -> None:
    """Remove what is large of a run that has ended; why it failed can still be told."""
    for name in (INPUTS, CODE, REQUEST, RESULTS, LEASE):
        folder.remove(name)


def collected(folder: Storage) -> str | None:
    """Who took a run's result, and when, for people; None if nobody has.

    Raises:
        StorageError: The storage cannot be read.
    """
    data = folder.read(COLLECTED)
    if data is None:
        return None
    note: dict[str, Any] = json.loads(data)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(note["collected_at"]))
    return f"{note['collected_by']} took it at {when}"


def list_runs(storage: Storage) -> list[RunSummary]:
    """The runs in a storage, newest first. Folders that are none, or not yet, are passed over.

    Raises:
        StorageError: The storage cannot be read.
    """
    found = []
    for run_id in storage.folder(_RUNS).names():
        if not _RUN_ID.fullmatch(run_id):
            continue
        folder = run_folder(storage, run_id)
        data = folder.read(MANIFEST)
        if data is None:
            continue
        try:
            run = RunSummary(_manifest(storage, data, run_id), read_outcome(folder), folder.read(COLLECTED) is not None)
        except StorageError as error:
            # One that somebody has spoilt must not hide the others.
            logger.warning("%s", error)
        else:
            found.append(run)
    return sorted(found, key=lambda run: run.manifest.created_at, reverse=True)


def expired_runs(storage: Storage, older_than_s: float | None = None, now: float | None = None) -> list[RunSummary]:
    """The runs whose time in the storage is over. A run that has no outcome may still be at work: who removes it asks.

    Args:
        storage: The storage.
        older_than_s: Seconds since the run ended (since it was made, without an outcome). None: its retention.
        now: Seconds since the epoch. None: now.
    """
    at = time.time() if now is None else now
    return [
        run
        for run in list_runs(storage)
        if at - (run.outcome.ended_at if run.outcome else run.manifest.created_at)
        >= (run.manifest.retention_s if older_than_s is None else older_than_s)
    ]


def remove_run(storage: Storage, run_id: str) -> None:
    """Remove all that a run has left, but for the outputs and checkpoints that its function wrote.

    Raises:
        StorageError: It cannot be removed.
    """
    folder = run_folder(storage, run_id)
    # Last, so that a clean-up that was cut short can be done again.
    for name in folder.names():
        if name != MANIFEST:
            folder.remove(name)
    folder.remove()


def stale_files(storage: Storage, now: float | None = None) -> list[str]:
    """Names of files and folders that nobody will come back to: old answers of clusters, launches cut short.

    Args:
        storage: The storage.
        now: Seconds since the epoch. None: now.

    Raises:
        StorageError: The storage cannot be read.
    """
    before = (time.time() if now is None else now) - STALE_S
    names = [f"{CLUSTERS}/{name}" for name in storage.folder(CLUSTERS).names()]
    names += [
        f"{_RUNS}/{run_id}"
        for run_id in storage.folder(_RUNS).names()
        # A manifest is what a launch writes first.
        if _RUN_ID.fullmatch(run_id) and MANIFEST not in run_folder(storage, run_id).names()
    ]
    return [name for name in names if (changed := storage.changed_at(name)) is not None and changed < before]


def _manifest(storage: Storage, data: bytes, run_id: str) -> Manifest:
    """A manifest, whose storage is the one that it was found in: another machine may reach it by another path."""
    return replace(_parsed(Manifest, data, f"{storage.uri}/{_RUNS}/{run_id}/{MANIFEST}"), storage=storage.uri)


def _parsed(kind: type[J], data: bytes, where: str) -> J:
    try:
        return kind.from_json(data)
    except ValueError as error:
        raise StorageError(
            explain(f"{where} cannot be read.", str(error), "It was not written by kfpytorch_ray: remove it.")
        ) from error


def _unknown(storage: Storage, run_id: str) -> UnknownRunError:
    return UnknownRunError(
        explain(
            f"There is no run {run_id!r} in {storage.uri}.",
            "No launch has written a manifest of that name there, or its retention is over.",
            f"Look which runs there are: kfpytorch-ray list --storage {storage.uri}",
        )
    )
