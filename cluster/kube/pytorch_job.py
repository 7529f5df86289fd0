"""A run as a PyTorchJob: where it stands by the training operator's conditions, its pods, and what they have left.

Follows kubeflow/training-operator 1.8 and 1.9 (pytorchjob_controller.go, common_types.go): the last condition that is
true counts, and Succeeded and Failed are final. An elastic job runs with its first pod and succeeds with the first that
ends well, so what became of the run is told by the reports of its pods.
"""

from __future__ import annotations

import re
import time
from typing import Any

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import JOB_LABEL, PYTORCH_JOB
from kfpytorch_ray.cluster.kube.pod_reports import better_may_come, settle_failure
from kfpytorch_ray.cluster.kube.pods_log import PodsLog, PodsTail
from kfpytorch_ray.cluster.kube.waiting import Waiting
from kfpytorch_ray.cluster.kube.watching import Watcher
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.errors import DeadlineExceededError, KfpytorchRayError, explain
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.storage import Storage

_DEADLINE = re.compile("active longer than specified deadline")
"""In the message of a job that the operator ended for that; its reason is that of every failure."""


_LAST_WORDS_S = 30.0
"""How long a pod may say nothing that lost its peers: its agent looks after its ranks every monitor_interval."""


class PyTorchJob:
    """One PyTorchJob. See ``ClusterJob`` for what its methods promise.

    Args:
        namespace: Where it is.
        name: Its name, which is the run's id.
        title: Of the run, for people.
        folder: Of the run.
        ready_timeout_s: Seconds within which its first pod has to run.
    """

    def __init__(self, namespace: Namespace, name: str, title: str, folder: Storage, ready_timeout_s: float) -> None:
        self._namespace = namespace
        self._seen = Watcher(namespace)
        self._name = name
        self._title = title
        self._folder = folder
        self._waiting = Waiting(namespace, name, self.place, ready_timeout_s, "KubeflowBackend")
        self._failed_at: float | None = None
        self._log = PodsLog(namespace, f"{JOB_LABEL}={name}", folder, name)

    @property
    def place(self) -> str:
        """Where people find it."""
        return f"kubectl -n {self._namespace.name} describe pytorchjob {self._name}"

    def followed(self) -> Watcher:
        """Watch it while this lasts."""
        return self._seen

    def look(self) -> JobState | None:
        """Where it stands. Of one that is over without success, what its pods have said becomes the run's outcome."""
        job = self._seen.get(PYTORCH_JOB, self._name)
        if job is None:
            return JobState(RunStatus.LOST) if settle_failure(self._folder, self._title) else None
        condition = _condition(job)
        if condition["type"] == "Suspended":
            return self._waiting.suspended()
        if condition["type"] in ("Succeeded", "Failed"):
            return self._last_words(condition) or self._over(condition)
        begun = condition["type"] in ("Running", "Restarting")
        pods = self._pods()
        return self._waiting.state(job, pods, begun=begun, enough=begun and _enough(job, pods))

    def _last_words(self, condition: Manifest) -> JobState | None:
        """The state of a job that has failed as long as pods that still run may know better why; None after that."""
        if condition["type"] != "Failed" or _DEADLINE.search(condition.get("message") or ""):
            return None
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        active = any(pod.status.phase == "Running" for pod in self._pods())
        if not active or time.monotonic() - self._failed_at > _LAST_WORDS_S or not better_may_come(self._folder):
            return None
        return JobState(RunStatus.RUNNING, "has failed; its other pods are about to say why.")

    def _over(self, condition: Manifest) -> JobState:
        said = f"Its PyTorchJob is {condition['type']}: {condition.get('message') or condition.get('reason')}"
        error: KfpytorchRayError | None = None
        if _DEADLINE.search(said):
            error = DeadlineExceededError(
                explain(
                    f"{self._title} did not end within its deadline; the operator has ended its pods.",
                    f"{said} RunPolicy(active_deadline_seconds=...) bounds the job from its start on.",
                    "Raise the deadline, or make the work shorter.",
                ),
                time.time(),
            )
        elif not settle_failure(self._folder, self._title):
            ends = [end for pod in self._pods() if (end := _end_of(pod))]
            said = "; ".join([said.rstrip("."), *ends])
        return JobState(RunStatus.LOST, said, error)

    def _pods(self) -> list[Any]:
        return self._seen.pods(f"{JOB_LABEL}={self._name}")

    def log(self) -> str:
        """What its pods have printed, one after the other."""
        return self._log.text()

    def tail(self) -> PodsTail:
        """Follow their logs."""
        return PodsTail(self._log)

    def stop(self, timeout_s: float) -> None:
        """Delete it, and return when its pods are gone, too: each stops its ranks in order."""
        self._namespace.delete(PYTORCH_JOB, self._name, foreground=True)
        last: Manifest | None = None
        for last in self._namespace.changes(PYTORCH_JOB, self._name, timeout_s=timeout_s):  # noqa: B007
            pass
        if last is not None:
            msg = f"The PyTorchJob {self._name} is being deleted for {timeout_s:g} s: a pod of it does not end"
            raise TimeoutError(msg)

    def forget(self) -> None:
        """Delete it, and by that its pods."""
        self._namespace.delete(PYTORCH_JOB, self._name)


def _enough(job: Manifest, pods: list[Any]) -> bool:
    """Whether a range of nodes can be trained on with the pods that run."""
    least = (job["spec"].get("elasticPolicy") or {}).get("minReplicas")
    return least is not None and sum(pod.status.phase == "Running" for pod in pods) >= least


def _condition(job: Manifest) -> Manifest:
    """The one that is true now; the operator takes the others back, and writes them in the order in which they came."""
    conditions = (job.get("status") or {}).get("conditions") or []
    true: list[Manifest] = [one for one in conditions if one.get("status") == "True"]
    return true[-1] if true else {"type": "Created"}


def _end_of(pod: Any) -> str:
    """How a pod ended that has not said so itself."""
    for container in pod.status.container_statuses or ():
        ended = container.state.terminated if container.state else None
        if ended is not None and ended.exit_code:
            return f"{pod.metadata.name} left with exit code {ended.exit_code} ({ended.reason})"
    return f"{pod.metadata.name}: {pod.status.reason}" if pod.status.reason else ""
