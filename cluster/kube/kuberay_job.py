"""A run's driver as the entrypoint of a RayJob: where it stands by KubeRay's status, its pods and their events.

Follows KubeRay's state machine (rayjob_controller.go and rayjob_types.go, v1.7.0): a job is over when its deployment is
Complete, Failed or, since 1.5, ValidationFailed. A head pod that is lost takes the driver with it, which KubeRay does
not always say: it makes another head, and before 1.7 waits for a job there for ever.
"""

from __future__ import annotations

import time
from typing import Any

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import CLUSTER_LABEL, RAY_JOB, SUBMITTER_CONTAINER
from kfpytorch_ray.cluster.kube.pod_log import PodLogTail, driver_part
from kfpytorch_ray.cluster.kube.waiting import Waiting
from kfpytorch_ray.cluster.kube.watching import Watcher
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.errors import ClusterError, RunLostError, explain
from kfpytorch_ray.run import RunStatus

_WAITING = ("", "New", "Initializing", "Waiting", "Suspending", "Suspended", "Retrying")


class KubeRayJob:
    """One RayJob. See ``ClusterJob`` for what its methods promise.

    Args:
        namespace: Where it is.
        name: Its name, which is the run's id.
        ready_timeout_s: Seconds within which its driver has to start.
    """

    def __init__(self, namespace: Namespace, name: str, ready_timeout_s: float) -> None:
        self._namespace = namespace
        self._seen = Watcher(namespace)
        self._name = name
        self._waiting = Waiting(namespace, name, self.place, ready_timeout_s, "KubeRayBackend")
        self._head: tuple[str, str, int] | None = None
        self._without_head: JobState | None = None

    @property
    def place(self) -> str:
        """Where people find it."""
        return f"kubectl -n {self._namespace.name} describe rayjob {self._name}"

    def followed(self) -> Watcher:
        """Watch it while this lasts."""
        return self._seen

    def look(self) -> JobState | None:
        """Where it stands."""
        job = self._seen.get(RAY_JOB, self._name)
        return None if job is None else self._state(job)

    def _state(self, job: Manifest) -> JobState:
        status: Manifest = job.get("status") or {}
        deployment = status.get("jobDeploymentStatus", "")
        if deployment in _WAITING:
            return self._waiting_state(job, deployment)
        if deployment == "Running":
            return self._running_state(job)
        said = ": ".join(filter(None, (status.get("reason"), status.get("message")))) or "it says no more"
        if deployment == "ValidationFailed":
            return JobState(RunStatus.LOST, said, self._refused(said))
        if deployment == "Complete" and status.get("jobStatus") == "STOPPED":
            return JobState(RunStatus.STOPPED, said)
        return JobState(RunStatus.LOST, f"Its RayJob is {deployment}, its Ray job {status.get('jobStatus')}: {said}")

    def _waiting_state(self, job: Manifest, deployment: str) -> JobState:
        if deployment in ("Suspending", "Suspended"):
            return self._waiting.suspended()
        cluster = _cluster_of(job)
        return self._waiting.state(job, self._pods_of(cluster), cluster)

    def _running_state(self, job: Manifest) -> JobState:
        if self._without_head is None and self._seen.active and self._head_is_lost(job):
            self._without_head = self._lost_head()
        return self._without_head or JobState(RunStatus.RUNNING)

    def _head_is_lost(self, job: Manifest) -> bool:
        """Whether the head on which the driver was first seen to run is there no more."""
        if (cluster := _cluster_of(job)) is None:
            return False
        heads = {(cluster, *_identity(pod)) for pod in self._pods_of(cluster) if _is_head(pod) and not _has_ended(pod)}
        # One that is made for another try has another head.
        if heads and (self._head is None or self._head[0] != cluster):
            (self._head, *_) = heads
        if self._head in heads:
            return False
        # The watches of job and pods are two: the job may be over, taken back by a queue, or tried again.
        now = self._namespace.get(RAY_JOB, self._name)
        return (
            now is not None
            and "deletionTimestamp" not in now["metadata"]
            and not (now.get("spec") or {}).get("suspend")
            and (now.get("status") or {}).get("jobDeploymentStatus") == "Running"
            and _cluster_of(now) == cluster
        )

    def _lost_head(self) -> JobState:
        what = f"The head pod of the run {self._name} is lost, and its driver with it."
        why = "It was evicted or killed, ran out of memory, or its node is gone."
        fix = f"Launch again; for more memory: KubeRayBackend(head_requests=...). Look: {self.place}"
        return JobState(RunStatus.LOST, what, RunLostError(explain(what, why, fix), time.time()))

    def _pods_of(self, cluster: str | None) -> list[Any]:
        return self._seen.pods(f"{CLUSTER_LABEL}={cluster}") if cluster else []

    def _refused(self, said: str) -> ClusterError:
        return ClusterError(
            explain(
                f"KubeRay refuses the RayJob of the run {self._name}.",
                said,
                "Change what the message names in KubeRayBackend(spec=...), its pod templates or labels.",
            )
        )

    def log(self) -> str:
        """What its driver has printed, as the submitting container shows it."""
        pod = self._submitter()
        return "" if pod is None else driver_part(self._namespace.log(pod, SUBMITTER_CONTAINER), self._name)

    def tail(self) -> PodLogTail:
        """Follow its log."""
        return PodLogTail(self._namespace, self._submitter, SUBMITTER_CONTAINER, self._name)

    def _submitter(self) -> str | None:
        """The pod whose container shows the driver's log; None where there is none, or not yet."""
        job = self._seen.get(RAY_JOB, self._name)
        if job is None or (job.get("status") or {}).get("jobDeploymentStatus", "") in _WAITING:
            return None
        pods = self._seen.pods(f"job-name={self._name}") or [
            pod for pod in self._pods_of(_cluster_of(job)) if _is_head(pod)
        ]
        begun = [pod for pod in pods if _has_begun(pod, SUBMITTER_CONTAINER)]
        newest = max(begun, key=lambda pod: pod.metadata.creation_timestamp, default=None)
        return None if newest is None else str(newest.metadata.name)

    def stop(self, timeout_s: float) -> None:
        """Delete it, and return when it is gone: KubeRay stops its driver before, which stops the workers in order."""
        job = self._namespace.get(RAY_JOB, self._name)
        self._namespace.delete(RAY_JOB, self._name)
        last: Manifest | None = job
        for last in self._namespace.changes(RAY_JOB, self._name, timeout_s=timeout_s):  # noqa: B007
            pass
        if last is not None:
            msg = f"The RayJob {self._name} is being deleted for {timeout_s:g} s: {last['metadata'].get('finalizers')}"
            raise TimeoutError(msg)

    def forget(self) -> None:
        """Delete it, and by that its cluster."""
        self._namespace.delete(RAY_JOB, self._name)


def _cluster_of(job: Manifest) -> str | None:
    """Its RayCluster: the one that KubeRay has made for it, or that it has chosen."""
    selected = ((job.get("spec") or {}).get("clusterSelector") or {}).get(CLUSTER_LABEL)
    found: str | None = (job.get("status") or {}).get("rayClusterName") or selected
    return found


def _is_head(pod: Any) -> bool:
    return bool((pod.metadata.labels or {}).get("ray.io/node-type") == "head")


def _has_ended(pod: Any) -> bool:
    return pod.status.phase in ("Succeeded", "Failed")


def _identity(pod: Any) -> tuple[str, int]:
    """Of the Ray in a pod: it is another one when its container was started again."""
    ray = pod.spec.containers[0].name
    return pod.metadata.uid, sum(one.restart_count for one in pod.status.container_statuses or () if one.name == ray)


def _has_begun(pod: Any, container: str) -> bool:
    states = (one.state for one in pod.status.container_statuses or () if one.name == container)
    return any(state is not None and (state.running or state.terminated) for state in states)
