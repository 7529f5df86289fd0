"""KubeRay's operator for an API server that has none: a thread that looks at all RayJobs and RayClusters in turn.

The names, states and reasons are KubeRay 1.7.0's. The controllers are in ray_jobs.py and ray_clusters.py, which name
the files that they follow.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Sequence
from typing import final

from kubernetes import client

from doubles.api import Api
from doubles.ray_clusters import RayClusters
from doubles.ray_jobs import RayJobs, Step

logger = logging.getLogger(__name__)

_TICK_S = 0.2


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
        self._api = Api(connection)
        self._jobs = RayJobs(self._api, self.problems, self._scripts)
        self._clusters = RayClusters(self._api, self.cluster_problems)
        self._logged: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="operator", daemon=True)

    def __enter__(self) -> KubeRayOperator:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def script(self, name: str, steps: Sequence[Step]) -> None:
        """Have a RayJob go through given states, and do nothing else for it. To be called before it is created.

        Args:
            name: The RayJob's.
            steps: Statuses as whole documents, one after the other; a function between them is asked until it says
                that the next one may come. The last one stays.
        """
        self._scripts[name] = list(steps)

    def _loop(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(client.ApiException, OSError):
                for job in self._api.find("rayjobs"):
                    self._try(self._jobs, job)
                for cluster in self._api.find("rayclusters"):
                    self._try(self._clusters, cluster)
            self._over.wait(_TICK_S)

    def _try(self, controller: RayJobs | RayClusters, document: dict[str, object]) -> None:
        try:
            controller.reconcile(document)
        except client.ApiException as error:
            # Deleted or changed meanwhile; a namespace that is being deleted takes nothing new.
            level = logging.INFO if error.status in {403, 404, 409} else logging.ERROR
            self._log(level, f"The API server refuses: {error.body}")
        except Exception:
            self._log(logging.ERROR, traceback.format_exc())

    def _log(self, level: int, message: str) -> None:
        """Once: it is tried again and again."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, "%s", message)
