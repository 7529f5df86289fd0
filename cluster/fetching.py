"""Bringing results from the object store into the driver, when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from kfpytorch_ray.cluster.connect import job_of_now
from kfpytorch_ray.cluster.pickling import rebuilt_result
from kfpytorch_ray.cluster.protocol import SupervisorLostError
from kfpytorch_ray.errors import NodeLostError, explain
from kfpytorch_ray.results import ElasticWorkerResult

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.spool import Spooled


class Fetcher:
    """Fetches the results of one launch from the Ray that it ran on.

    Args:
        refs: A reference to every rank's spooled result, by rank.
    """

    def __init__(self, refs: Sequence[Any]) -> None:
        self._refs = refs
        self._job = job_of_now()
        self._address = ray.get_runtime_context().gcs_address

    def __call__(self, rank: int) -> ElasticWorkerResult:
        """The result of a rank; a worker that left without one returned None.

        Raises:
            NodeLostError: The node that stored it, or the whole Ray, is gone.
            ResultError: It cannot be unpickled in this process.
        """
        # Asked in another job, or in none, ray.get would wait for ever, or start a Ray.
        if job_of_now() != self._job:
            raise _lost(rank, f"This process has left the Ray at {self._address}, and results go with its job there.")
        spooled = stored(self._refs[rank], rank)
        return ElasticWorkerResult(None, [], None) if spooled is None else rebuilt_result(spooled, rank)


def stored(ref: Any, rank: int) -> Spooled | None:
    """What a rank has left in the object store; None where it left nothing.

    Raises:
        NodeLostError: The node that stored it is gone.
    """
    try:
        spooled: Spooled | None = ray.get(ref)
    except (ObjectLostError, RayActorError, SupervisorLostError) as error:
        raise _lost(rank, str(error)) from error
    return spooled


def _lost(rank: int, why: str) -> NodeLostError:
    return NodeLostError(
        explain(
            f"The result of rank {rank} is lost.",
            why,
            "Ask for the results that you need while Ray is up, or return them from rank 0.",
        )
    )
