"""The user's modules on their way to a cluster that is reached by Kubernetes: a zip in the run's folder.

Ray's job API would take the working directory; KubeRay's resources do not. What is sent is what Ray would send.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from kfpytorch_ray.cluster.remote.packing import Fate, entries_of
from kfpytorch_ray.cluster.remote.working_dir import WorkingDir
from kfpytorch_ray.runs import CODE
from kfpytorch_ray.storage import CHUNK_BYTES, Digest, Storage


def send(working_dir: WorkingDir, excludes: tuple[str, ...], folder: Storage) -> Digest:
    """Pack a working directory into a run's folder.

    Args:
        working_dir: As it was found fit.
        excludes: gitignore patterns.
        folder: Of the run.

    Raises:
        StorageError: It cannot be written.
    """
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for entry in entries_of(working_dir.folder, excludes):
                if entry.fate is Fate.SENT:
                    archive.write(working_dir.folder / entry.name, entry.name)
        file.seek(0)
        return folder.upload(CODE, iter(lambda: file.read(CHUNK_BYTES), b""))


def receive(folder: Storage, digest: Digest, into: Path) -> None:
    """Unpack what was sent.

    Args:
        folder: Of the run.
        digest: Of what was sent.
        into: An empty folder.

    Raises:
        StorageError: It cannot be read.
        IntegrityError: It is not what was sent.
    """
    archive = into.with_suffix(".zip")
    folder.download(CODE, archive, digest)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(into)
    archive.unlink()
