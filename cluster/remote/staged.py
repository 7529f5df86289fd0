"""What a run is to do, as it was staged for it: read where the run is. Without ray."""

from __future__ import annotations

import pickle
from typing import Any

from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.errors import IntegrityError, StorageError, VersionMismatchError, explain, text_of
from kfpytorch_ray.runs import MANIFEST, REQUEST, Manifest
from kfpytorch_ray.storage import Storage, digest_of


def read_request(folder: Storage, sha256: str) -> tuple[Manifest, Any]:
    """What a run is, and what it is to do: unpickled only if it is what was staged.

    Args:
        folder: Of the run.
        sha256: Of the request, which has come on another way.

    Raises:
        StorageError: It is not there, or cannot be read.
        IntegrityError: It is another than was staged.
        VersionMismatchError: It cannot be unpickled by what is installed here.
    """
    described, data = folder.read(MANIFEST), folder.read(REQUEST)
    if described is None or data is None:
        raise StorageError(
            explain(
                f"{folder.uri} has no request.",
                "It was removed before its job began, or this machine sees another storage of that name.",
                "Launch again, with storage that both sides reach.",
            )
        )
    if digest_of(data).sha256 != sha256:
        raise IntegrityError(
            explain(
                f"The request in {folder.uri} is not the one that was submitted.",
                "Its SHA-256 differs from the one in the job's entrypoint, so it was not unpickled.",
                "Launch again. If it happens again, find out who else can write to this storage.",
            )
        )
    manifest = Manifest.from_json(described)
    try:
        return manifest, pickle.loads(data)
    except Exception as error:
        raise VersionMismatchError(
            explain(
                f"The request of the run {manifest.run_id} cannot be unpickled where it is to run.",
                f"{text_of(error)}. Where it was launched: {manifest.versions or 'versions unknown'}. "
                f"Where it is to run: {here()}.",
                "Have the same kfpytorch_ray, flytekit and Python in the image, or on the Ray, as where you launch.",
            )
        ) from error
