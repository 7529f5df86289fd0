"""A run's driver as the entrypoint of a RayJob: where it stands by KubeRay's status, its pods and their events.

Follows KubeRay's state machine (rayjob_controller.go and rayjob_types.go, v1.7.0): a job is over when its deployment is
Complete, Failed or, since 1.5, ValidationFailed. Why a cluster does not come up stands nowhere in a RayJob's status, so
pods and events are asked, as a person would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import CLUSTER_LABEL, RAY_JOB, SUBMITTER_CONTAINER
from kfpytorch_ray.cluster.kube.pod_log import PodLogTail, driver_part
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.errors import ClusterError, KfpytorchRayError, PlacementTimeoutError, explain
from kfpytorch_ray.run import RunStatus

HEAD_SELECTOR = f"{CLUSTER_LABEL}={{}},ray.io/node-type=head"

_WAITING = ("", "New", "Initializing", "Waiting", "Suspending", "Suspended", "Retrying")
_HOPELESS = ("InvalidImageName", "CreateContainerConfigError")
"""Reasons for which a container waits that do not go away by themselves."""
_HOPELESS_SOON = ("ErrImagePull", "ImagePullBackOff", "CrashLoopBackOff")
"""Likewise, but a registry, or what a container needs, may be away for a moment."""
_PATIENCE_S = 120.0


class KubeRayJob:
    """One RayJob. See ``ClusterJob`` for what its methods promise.

    Args:
        namespace: Where it is.
        name: Its name, which is the run's id.
        ready_timeout_s: Seconds within which its driver has to start.
    """

    def __init__(self, namespace: Namespace, name: str, ready_timeout_s: float) -> None:
        self._namespace = namespace
        self._name = name
        self._ready_timeout_s = ready_timeout_s
        self._troubled_since: float | None = None

    @property
    def place(self) -> str:
        """Where people find it."""
        return f"kubectl -n {self._namespace.name} describe rayjob {self._name}"

    def look(self) -> JobState | None:
        """Where it stands."""
        job = self._namespace.get(RAY_JOB, self._name)
        return None if job is None else self._state(job)

    def _state(self, job: Manifest) -> JobState:
        status: Manifest = job.get("status") or {}
        deployment = status.get("jobDeploymentStatus", "")
        if deployment in _WAITING:
            return self._waiting(job, deployment)
        if deployment == "Running":
            return JobState(RunStatus.RUNNING)
        said = ": ".join(filter(None, (status.get("reason"), status.get("message")))) or "it says no more"
        if deployment == "ValidationFailed":
            return JobState(RunStatus.LOST, said, self._refused(said))
        if deployment == "Complete" and status.get("jobStatus") == "STOPPED":
            return JobState(RunStatus.STOPPED, said)
        return JobState(RunStatus.LOST, f"Its RayJob is {deployment}, its Ray job {status.get('jobStatus')}: {said}")

    def _waiting(self, job: Manifest, deployment: str) -> JobState:
        """What it waits for, and whether that is in vain."""
        if deployment in ("Suspending", "Suspended"):
            self._troubled_since = None
            return JobState(RunStatus.PENDING, "is suspended: a queue has not admitted it yet, or somebody has.")
        cluster = (job.get("status") or {}).get("rayClusterName") or self._selected(job)
        pods = self._namespace.pods(f"{CLUSTER_LABEL}={cluster}") if cluster else []
        troubles = [trouble for pod in pods if (trouble := _trouble_of(pod)) is not None]
        names = {self._name, cluster, *(pod.metadata.name for pod in pods)}
        events = [] if troubles else self._namespace.warnings_of(names - {None})
        ready = sum(pod.status.phase == "Running" for pod in pods)
        why = "; ".join([text for _, text in troubles[:3]] or events[-2:]) or (
            "the others start" if pods else "they are being made"
        )
        message = f"waits for its Ray cluster: {ready} of {len(pods)} pods run; {why}."
        hopeless = any(reason in _HOPELESS for reason, _ in troubles)
        if not any(reason in _HOPELESS_SOON for reason, _ in troubles):
            self._troubled_since = None
        elif self._troubled_since is None:
            self._troubled_since = time.monotonic()
        else:
            hopeless = hopeless or time.monotonic() - self._troubled_since > _PATIENCE_S
        error: KfpytorchRayError | None = None
        if hopeless:
            error = ClusterError(
                explain(f"The Ray cluster of the run {self._name} cannot come up.", why, f"Mend that. {self._hint()}")
            )
        elif _age_s(job) > self._ready_timeout_s:
            error = PlacementTimeoutError(
                explain(
                    f"The driver of the run {self._name} has not started within {self._ready_timeout_s:g} s.",
                    message,
                    "Ask for less, wait for longer (KubeRayBackend(ready_timeout_s=...)), or see what the pods wait "
                    f"for. {self._hint()}",
                )
            )
        return JobState(RunStatus.PENDING if error is None else RunStatus.LOST, message, error)

    def _selected(self, job: Manifest) -> str | None:
        """The cluster that is there already, where the job has chosen one."""
        found: str | None = ((job.get("spec") or {}).get("clusterSelector") or {}).get(CLUSTER_LABEL)
        return found

    def _refused(self, said: str) -> ClusterError:
        return ClusterError(
            explain(
                f"KubeRay refuses the RayJob of the run {self._name}.",
                said,
                "Change what the message names in KubeRayBackend(spec=...), its pod templates or labels.",
            )
        )

    def _hint(self) -> str:
        return f"Look: {self.place}"

    def log(self) -> str:
        """What its driver has printed, as the submitting container shows it."""
        pod = self._submitter()
        return "" if pod is None else driver_part(self._namespace.log(pod, SUBMITTER_CONTAINER), self._name)

    def tail(self) -> PodLogTail:
        """Follow its log."""
        return PodLogTail(self._namespace, self._submitter, SUBMITTER_CONTAINER, self._name)

    def _submitter(self) -> str | None:
        """The pod whose container shows the driver's log; None where there is none, or not yet."""
        pods = self._namespace.pods(f"job-name={self._name}")
        if not pods:
            job = self._namespace.get(RAY_JOB, self._name)
            cluster = ((job or {}).get("status") or {}).get("rayClusterName")
            heads = self._namespace.pods(HEAD_SELECTOR.format(cluster)) if cluster else []
            pods = [pod for pod in heads if any(one.name == SUBMITTER_CONTAINER for one in pod.spec.containers)]
        newest = max(pods, key=lambda pod: pod.metadata.creation_timestamp, default=None)
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


def _trouble_of(pod: Any) -> tuple[str, str] | None:
    """Why a pod does not run: the reason in Kubernetes's word, and for people."""
    for container in _containers_of(pod):
        waiting = container.state.waiting if container.state else None
        if waiting is not None and waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
            said = f": {waiting.message}" if waiting.message else ""
            return waiting.reason, f"{pod.metadata.name}/{container.name} {waiting.reason}{said}"
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.reason or "", f"{pod.metadata.name} {condition.reason}: {condition.message}"
    return None


def _containers_of(pod: Any) -> Iterator[Any]:
    yield from pod.status.init_container_statuses or ()
    yield from pod.status.container_statuses or ()


def _age_s(job: Manifest) -> float:
    """By the API server's clock and ours: good to what clocks differ by."""
    created = datetime.fromisoformat(job["metadata"]["creationTimestamp"].replace("Z", "+00:00"))
    return (datetime.now(timezone.utc) - created).total_seconds()
