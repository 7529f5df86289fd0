"""KubeRay's controller of RayClusters: Pods for head and workers, and a status that tells whether they run.

Follows KubeRay 1.7.0, ray-operator/controllers/ray/raycluster_controller.go. Left out: rolling upgrades, suspension of
single groups, GCS fault tolerance, batch schedulers, and scaling down.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import final

from doubles import dashboard
from doubles.api import Api, Document, now
from doubles.rendering import GCS_PORT, HEAD_GROUP, head_pod, head_service, head_service_name, worker_pod

logger = logging.getLogger(__name__)

SOURCE = "raycluster-controller"
_ENDED = ("Succeeded", "Failed")


@final
class RayClusters:
    """Brings one RayCluster after the other nearer to its specification.

    Args:
        api: The API server.
        problems: By a RayCluster's name, or the start of it: what is wrong with it. It gets an Event and nothing else.
    """

    def __init__(self, api: Api, problems: Mapping[str, str]) -> None:
        self._api = api
        self._problems = problems
        self._told: set[str] = set()

    def reconcile(self, cluster: Document) -> None:
        """One step."""
        meta = cluster["metadata"]
        if "deletionTimestamp" in meta:
            return
        problem = next((text for name, text in self._problems.items() if meta["name"].startswith(name)), "")
        if problem:
            if meta["uid"] not in self._told:
                self._told.add(meta["uid"])
                message = f"The RayCluster spec is invalid {meta['namespace']}/{meta['name']}: {problem}"
                self._api.event(cluster, "RayCluster", "InvalidRayClusterSpec", message, SOURCE)
            return
        pods = self._pods(cluster)
        if cluster["spec"].get("suspend"):
            for pod in pods:
                self._delete(pod)
            self._write(cluster, [], suspended=not pods)
            return
        pods = [pod for pod in pods if not self._replaced(pod)]
        head = next((pod for pod in pods if _group(pod) == HEAD_GROUP), None)
        if head is None:
            self._create_head(cluster)
        elif head_ip := head["status"].get("podIP"):
            for group in cluster["spec"].get("workerGroupSpecs", []):
                self._scale(cluster, group, [pod for pod in pods if _group(pod) == group["groupName"]], head_ip)
            self._autoscale(cluster, pods, head_ip)
        self._write(cluster, pods)

    def _pods(self, cluster: Document) -> list[Document]:
        meta = cluster["metadata"]
        found = self._api.find("pods", meta["namespace"], f"ray.io/cluster={meta['name']}")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def _delete(self, pod: Document) -> None:
        self._api.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _replaced(self, pod: Document) -> bool:
        """Whether a Pod has ended, and was deleted so that another one takes its place."""
        if pod["status"].get("phase") not in _ENDED:
            return False
        self._delete(pod)
        return True

    def _create_head(self, cluster: Document) -> None:
        namespace = cluster["metadata"]["namespace"]
        if self._api.get("services", namespace, head_service_name(cluster)) is None:
            self._api.create("services", namespace, head_service(cluster))
        made = self._api.create("pods", namespace, head_pod(cluster))
        self._tell(cluster, "CreatedHeadPod", f"Created head Pod {namespace}/{made['metadata']['name']}")

    def _scale(self, cluster: Document, group: Document, pods: list[Document], head_ip: str) -> None:
        namespace = cluster["metadata"]["namespace"]
        desired = replicas(group)
        for _ in range(desired - len(pods)):
            made = self._api.create("pods", namespace, worker_pod(cluster, group, head_ip))
            self._tell(cluster, "CreatedWorkerPod", f"Created worker Pod {namespace}/{made['metadata']['name']}")
        for pod in pods[desired:] if len(pods) > desired else []:
            self._delete(pod)

    def _autoscale(self, cluster: Document, pods: list[Document], head_ip: str) -> None:
        """One more worker of the first group that may have one, if all there are have started and work waits."""
        if not cluster["spec"].get("enableInTreeAutoscaling") or not pods or not all(map(_is_ready, pods)):
            return
        groups = cluster["spec"].get("workerGroupSpecs", [])
        larger = next((group for group in groups if replicas(group) < group["maxReplicas"]), None)
        if larger is None or sum(map(replicas, groups)) + 1 != len(pods):
            return
        try:
            if not dashboard.has_demand(f"{head_ip}:{GCS_PORT}"):
                return
        except Exception:
            logger.info("The head does not tell its demand yet", exc_info=True)
            return
        larger["replicas"] = replicas(larger) + 1
        meta = cluster["metadata"]
        self._api.patch("rayclusters", meta["namespace"], meta["name"], {"spec": {"workerGroupSpecs": groups}})

    def _write(self, cluster: Document, pods: list[Document], *, suspended: bool = False) -> None:
        meta, before = cluster["metadata"], cluster.get("status", {})
        groups = cluster["spec"].get("workerGroupSpecs", [])
        workers = [pod for pod in pods if _group(pod) != HEAD_GROUP]
        head = next((pod for pod in pods if _group(pod) == HEAD_GROUP), None)
        desired = sum(map(replicas, groups))
        ready = sum(map(_is_ready, workers))
        head_ready = head is not None and _is_ready(head)
        status = {
            **before,
            "desiredWorkerReplicas": desired,
            "minWorkerReplicas": sum(group.get("minReplicas", 0) for group in groups),
            "maxWorkerReplicas": sum(group["maxReplicas"] for group in groups),
            "availableWorkerReplicas": len([pod for pod in workers if pod["status"].get("phase") == "Running"]),
            "readyWorkerReplicas": ready,
            "observedGeneration": meta["generation"],
        }
        if head is not None and (address := head["status"].get("podIP")):
            names = {"podName": head["metadata"]["name"], "serviceName": head_service_name(cluster)}
            # The Service is headless: it has the Pod's address.
            status["head"] = {"podIP": address, "serviceIP": address, **names}
        if suspended:
            status["state"] = "suspended"
        elif head_ready and ready >= desired:
            # Not taken back when a worker is lost.
            status["state"] = "ready"
        provisioned = status.get("state") == "ready" or _holds(before, "RayClusterProvisioned")
        conditions = {
            "HeadPodReady": (head_ready, "HeadPodRunningAndReady" if head_ready else "HeadPodNotFound"),
            "RayClusterProvisioned": (
                provisioned,
                "AllPodRunningAndReadyFirstTime" if provisioned else "RayClusterPodsProvisioning",
            ),
        }
        status["conditions"] = [
            {
                "type": name,
                "status": str(holds),
                "reason": why,
                "message": why,
                "lastTransitionTime": _since(before, name, holds),
            }
            for name, (holds, why) in conditions.items()
        ]
        if status != before:
            status["lastUpdateTime"] = now()
            self._api.patch("rayclusters", meta["namespace"], f"{meta['name']}/status", {"status": status})

    def _tell(self, cluster: Document, reason: str, message: str) -> None:
        self._api.event(cluster, "RayCluster", reason, message, SOURCE, "Normal")


def replicas(group: Document) -> int:
    """How many workers a group shall have."""
    wanted: int = min(max(group.get("replicas") or 0, group.get("minReplicas") or 0), group["maxReplicas"])
    return wanted


def _group(pod: Document) -> str:
    found: str = pod["metadata"]["labels"]["ray.io/group"]
    return found


def _is_ready(pod: Document) -> bool:
    return _holds(pod["status"], "Ready")


def _holds(status: Document, name: str) -> bool:
    return any(one["type"] == name and one["status"] == "True" for one in status.get("conditions", []))


def _since(before: Document, name: str, holds: bool) -> str:
    found = (one for one in before.get("conditions", []) if one["type"] == name and one["status"] == str(holds))
    return next((one["lastTransitionTime"] for one in found), now())
