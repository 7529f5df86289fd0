"""Bringing a rank's result from the object store into the driver."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import ObjectLostError

from kfpytorch_ray.cluster.pickling import load_parts
from kfpytorch_ray.cluster.spool import parts_of
from kfpytorch_ray.errors import NodeLostError, explain
from kfpytorch_ray.results import ElasticWorkerResult


def fetch(ref: Any) -> ElasticWorkerResult:
    """The result behind a reference; a worker that left without one returned None.

    Raises:
        NodeLostError: The node that stored it is gone.
    """
    try:
        spooled = ray.get(ref)
    except ObjectLostError as error:
        raise NodeLostError(
            explain(
                "A rank's result is lost.",
                f"The node that stored it, or this process's Ray, is gone: {error}",
                "Ask for the results that you need before Ray is shut down, or return them from rank 0.",
            )
        ) from error
    if spooled is None:
        return ElasticWorkerResult(None, [], None)
    result: ElasticWorkerResult = load_parts(parts_of(spooled))
    return result
