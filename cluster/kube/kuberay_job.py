"""A run's driver as the entrypoint of a RayJob: where it stands by KubeRay's status, its pods and their events.

Follows KubeRay's state machine (rayjob_controller.go and rayjob_types.go, v1.7.0): a job is over when its deployment is
Complete, Failed or, since 1.5, ValidationFailed.
"""

from __future__ import annotations

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import CLUSTER_LABEL, RAY_JOB, SUBMITTER_CONTAINER
from kfpytorch_ray.cluster.kube.pod_log import PodLogTail, driver_part
from kfpytorch_ray.cluster.kube.waiting import Waiting
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.errors import ClusterError, explain
from kfpytorch_ray.run import RunStatus

HEAD_SELECTOR = f"{CLUSTER_LABEL}={{}},ray.io/node-type=head"

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
        self._name = name
        self._waiting = Waiting(namespace, name, self.place, ready_timeout_s, "KubeRayBackend")

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
            return self._waiting_state(job, deployment)
        if deployment == "Running":
            return JobState(RunStatus.RUNNING)
        said = ": ".join(filter(None, (status.get("reason"), status.get("message")))) or "it says no more"
        if deployment == "ValidationFailed":
            return JobState(RunStatus.LOST, said, self._refused(said))
        if deployment == "Complete" and status.get("jobStatus") == "STOPPED":
            return JobState(RunStatus.STOPPED, said)
        return JobState(RunStatus.LOST, f"Its RayJob is {deployment}, its Ray job {status.get('jobStatus')}: {said}")

    def _waiting_state(self, job: Manifest, deployment: str) -> JobState:
        if deployment in ("Suspending", "Suspended"):
            return self._waiting.suspended()
        cluster = (job.get("status") or {}).get("rayClusterName") or self._selected(job)
        pods = self._namespace.pods(f"{CLUSTER_LABEL}={cluster}") if cluster else []
        return self._waiting.state(job, pods, cluster)

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
