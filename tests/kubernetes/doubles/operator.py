"""KubeRay's operator for an API server that has none: a thread that looks at all RayJobs and RayClusters in turn.

The names, states and reasons are KubeRay 1.7.0's. The controllers are in ray_jobs.py and ray_clusters.py, which name
the files that they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from kubernetes import client

from doubles.api import Api
from doubles.loop import Loop
from doubles.ray_clusters import RayClusters
from doubles.ray_jobs import RayJobs, Step


@final
class KubeRayOperator:
    """Works for as long as a ``with`` block runs; it has to reach the Pods, to ask Ray's job server.

        with Node(connection), KubeRayOperator(connection) as operator:
            operator.problems["bad"] = "workerGroupSpecs: min above max"
            operator.script("stopped", [{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}])

    Args:
        connection: To the API server.

    Attributes:
        problems: By a RayJob's name: what is wrong with it, which makes it ValidationFailed.
        cluster_problems: By the start of a RayCluster's name: what is wrong with it, which only an Event tells.
    """

    def __init__(self, connection: client.ApiClient) -> None:
        self.problems: dict[str, str] = {}
        self.cluster_problems: dict[str, str] = {}
        self._scripts: dict[str, list[Step]] = {}
        api = Api(connection)
        jobs = RayJobs(api, self.problems, self._scripts)
        self._loop = Loop(api, {"rayjobs": jobs, "rayclusters": RayClusters(api, self.cluster_problems)})

    def __enter__(self) -> KubeRayOperator:
        self._loop.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.__exit__()

    def script(self, name: str, steps: Sequence[Step]) -> None:
        """Have a RayJob go through given states, and do nothing else for it. To be called before it is created.

        Args:
            name: The RayJob's.
            steps: Statuses as whole documents, one after the other; a function between them is asked until it says
                that the next one may come. The last one stays.
        """
        self._scripts[name] = list(steps)
