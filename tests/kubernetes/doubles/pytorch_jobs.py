"""The training operator's controller of PyTorchJobs: a Pod and a Service for each replica, and what comes of them.

Follows kubeflow/training-operator 1.9.0: pkg/controller.v1/common/job.go (ReconcileJobs) and pod.go,
pkg/controller.v1/pytorch/pytorchjob_controller.go (UpdateJobStatus), pkg/core/job.go and pkg/util/status.go.
Left out: gang scheduling, the autoscaler of elastic jobs, managedBy, the webhook, and retries after errors of its own,
which count towards backoffLimit.
"""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from typing import final

from doubles.api import Api, Document, now
from doubles.pytorch_pods import CONTAINER, INDEX_LABEL, JOB_LABEL, TYPE_LABEL, defaulted, name_of, pod, service

SOURCE = "pytorchjob-controller"
_KILLED = 128
"""Exit codes from here on tell of a signal, after which ExitCode has a Pod made again."""


@final
class PyTorchJobs:
    """Brings one PyTorchJob after the other a step further.

    Args:
        api: The API server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._told: set[tuple[str, str]] = set()

    def reconcile(self, document: Document) -> None:
        """One step."""
        if "deletionTimestamp" in document["metadata"]:
            return
        job = defaulted(document)
        status: Document = copy.deepcopy(document.get("status") or {})
        if not status.get("conditions"):
            _set(status, "Created", True, f"PyTorchJob {job['metadata']['name']} is created.")
        pods = self._pods(job)
        if _holds(status, "Succeeded") or _holds(status, "Failed"):
            self._clean_up(job, status, pods)
        elif job["spec"]["runPolicy"].get("suspend"):
            self._suspend(job, status, pods)
        else:
            self._resume(job, status)
            self._advance(job, status, pods)
        self._write(document, status)

    def _pods(self, job: Document) -> list[Document]:
        meta = job["metadata"]
        return self._api.find("pods", meta["namespace"], f"{JOB_LABEL}={meta['name']}")

    def _clean_up(self, job: Document, status: Document, pods: list[Document]) -> None:
        """What becomes of a job that is over."""
        policy = job["spec"]["runPolicy"]
        for one in pods:
            active = one["status"].get("phase", "Pending") in ("Pending", "Running")
            if policy["cleanPodPolicy"] == "All" or (policy["cleanPodPolicy"] == "Running" and active):
                self._delete(one)
        ttl_s = policy.get("ttlSecondsAfterFinished")
        if ttl_s is not None and _since(status["completionTime"]) > ttl_s:
            self._api.delete("pytorchjobs", job["metadata"]["namespace"], job["metadata"]["name"])
        if _holds(status, "Succeeded"):
            for counts in status["replicaStatuses"].values():
                counts["succeeded"] = counts.get("succeeded", 0) + counts.pop("active", 0)

    def _suspend(self, job: Document, status: Document, pods: list[Document]) -> None:
        for one in pods:
            self._delete(one)
        for counts in status.get("replicaStatuses", {}).values():
            counts.pop("active", None)
        message = f"PyTorchJob {job['metadata']['name']} is suspended."
        if _holds(status, "Running"):
            _set(status, "Running", False, message, "Suspended")
        if not _holds(status, "Suspended"):
            _set(status, "Suspended", True, message)
            self._tell(job, "Suspended", message)

    def _resume(self, job: Document, status: Document) -> None:
        if _holds(status, "Suspended"):
            message = f"PyTorchJob {job['metadata']['name']} is resumed."
            _set(status, "Suspended", False, message, "Resumed")
            status["startTime"] = now()
            self._tell(job, "Resumed", message)

    def _advance(self, job: Document, status: Document, pods: list[Document]) -> None:
        if reason := _limit_exceeded(job, status, pods):
            message = f"Job {job['metadata']['name']} has failed because it {reason}"
            status.setdefault("completionTime", now())
            for one in pods:
                self._delete(one)
            self._tell(job, "Failed", message)
            _set(status, "Failed", True, message)
            return
        replicas = job["spec"]["pytorchReplicaSpecs"]
        for kind in replicas:
            self._replicas(job, status, kind, [one for one in pods if _label(one, TYPE_LABEL) == kind.lower()])
        status.setdefault("startTime", now())
        self._conclude(job, status)

    def _replicas(self, job: Document, status: Document, kind: str, pods: list[Document]) -> None:
        """Each replica's Pod and Service, and how many of them there are of which state."""
        namespace, replica = job["metadata"]["namespace"], job["spec"]["pytorchReplicaSpecs"][kind]
        counts: Document = {}
        status.setdefault("replicaStatuses", {})[kind] = counts
        there = {int(_label(one, INDEX_LABEL)): one for one in pods}
        for index, one in there.items():
            if index >= replica["replicas"]:
                self._delete(one)
        for index in range(replica["replicas"]):
            if index not in there:
                self._api.create("pods", namespace, pod(job, kind, index))
                self._event(job, "SuccessfulCreatePod", f"Created pod: {name_of(job, kind, index)}", "Normal")
            else:
                self._look_at(job, status, kind, there[index])
                if state := _state_of(there[index]):
                    counts[state] = counts.get(state, 0) + 1
            if self._api.get("services", namespace, name_of(job, kind, index)) is None:
                self._api.create("services", namespace, service(job, kind, index))

    def _look_at(self, job: Document, status: Document, kind: str, one: Document) -> None:
        """Whether a Pod that has failed is made again, or its job fails with it."""
        if one["status"].get("phase") != "Failed":
            return
        code = _exit_code(one)
        if code is not None:
            self._event(job, "ExitedWithCode", f"Pod: {_full_name(one)} exited with code {code}", "Normal")
        policy = job["spec"]["pytorchReplicaSpecs"][kind]["restartPolicy"]
        name = job["metadata"]["name"]
        if policy in ("OnFailure", "Always") or (policy == "ExitCode" and (code or 0) >= _KILLED):
            self._api.delete("pods", one["metadata"]["namespace"], one["metadata"]["name"])
            message = f"job {name} is restarting because {kind} replica(s) failed."
            self._tell(job, "Restarting", message, "Warning")
            _set(status, "Restarting", True, message)
        elif policy == "ExitCode":
            message = f'job "{name}" is failing because "{kind}" replica(s) failed.'
            self._tell(job, "Failed", message, "Warning")
            status.setdefault("completionTime", now())
            _set(status, "Failed", True, message)

    def _conclude(self, job: Document, status: Document) -> None:
        """The conditions that follow from the replicas' states."""
        name, replicas = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]
        leading = "Master" if "Master" in replicas else "Worker"
        for kind, replica in replicas.items():
            counts = status["replicaStatuses"][kind]
            active, succeeded, failed = (counts.get(state, 0) for state in ("active", "succeeded", "failed"))
            if kind == leading:
                enough = 1 if "elasticPolicy" in job["spec"] else replica["replicas"]
                if succeeded >= enough:
                    self._succeed(job, status)
                    return
                if active:
                    _set(status, "Running", True, f"PyTorchJob {name} is running.")
            if failed and replica["replicas"] > succeeded + active and replica["restartPolicy"] == "Never":
                message = f"PyTorchJob {name} is failed because {failed} {kind} replica(s) failed."
                self._tell(job, "Failed", message)
                status.setdefault("completionTime", now())
                _set(status, "Failed", True, message)

    def _succeed(self, job: Document, status: Document) -> None:
        message = f"PyTorchJob {job['metadata']['name']} is successfully completed."
        self._tell(job, "Succeeded", message)
        status.setdefault("completionTime", now())
        _set(status, "Succeeded", True, message)

    def _delete(self, one: Document) -> None:
        """A Pod, and the Service that has its name."""
        for resource in ("pods", "services"):
            self._api.delete(resource, one["metadata"]["namespace"], one["metadata"]["name"])

    def _write(self, job: Document, status: Document) -> None:
        if status != (job.get("status") or {}):
            meta = job["metadata"]
            body = {**job, "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "status": status}
            self._api.replace("pytorchjobs", meta["namespace"], f"{meta['name']}/status", body)

    def _tell(self, job: Document, state: str, message: str, level: str = "Normal") -> None:
        self._event(job, f"PyTorchJob{state}", message, level)

    def _event(self, job: Document, reason: str, message: str, level: str) -> None:
        """Once: the operator's recorder counts those that are alike."""
        if (job["metadata"]["uid"], message) not in self._told:
            self._told.add((job["metadata"]["uid"], message))
            self._api.event(job, "PyTorchJob", reason, message, SOURCE, level)


def _limit_exceeded(job: Document, status: Document, pods: list[Document]) -> str:
    """Why a job is ended before its Pods are; empty if it is not."""
    policy, replicas = job["spec"]["runPolicy"], job["spec"]["pytorchReplicaSpecs"]
    limit = policy.get("backoffLimit")
    if limit is not None:
        before = sum(counts.get("failed", 0) for counts in status.get("replicaStatuses", {}).values())
        failed = sum(one["status"].get("phase") == "Failed" for one in pods)
        active = sum(one["status"].get("phase", "Pending") in ("Pending", "Running") for one in pods)
        all_there = active == sum(replica["replicas"] for replica in replicas.values())
        restarts = sum(_restarts(one) for one in pods if one["status"].get("phase") == "Running")
        if (failed > before and not all_there and limit < 1) or restarts >= max(limit, 1):
            return "has reached the specified backoff limit"
    deadline_s = policy.get("activeDeadlineSeconds")
    if deadline_s is not None and "startTime" in status and _since(status["startTime"]) >= deadline_s:
        return "was active longer than specified deadline"
    return ""


def _restarts(one: Document) -> int:
    """Of a Pod's containers where they are made again; of others there are none."""
    containers = [*one["status"].get("initContainerStatuses", []), *one["status"].get("containerStatuses", [])]
    return sum(container["restartCount"] for container in containers)


def _state_of(one: Document) -> str:
    """As what a Pod counts; one that is being deleted while it runs counts as failed."""
    phase = one["status"].get("phase")
    if phase == "Running":
        return "failed" if "deletionTimestamp" in one["metadata"] else "active"
    return {"Succeeded": "succeeded", "Failed": "failed"}.get(phase, "")


def _exit_code(one: Document) -> int | None:
    for container in one["status"].get("containerStatuses", []):
        if container["name"] == CONTAINER and "terminated" in container["state"]:
            code: int = container["state"]["terminated"]["exitCode"]
            return code
    return None


def _holds(status: Document, kind: str) -> bool:
    return any(one["type"] == kind and one["status"] == "True" for one in status.get("conditions", []))


def _set(status: Document, kind: str, value: bool, message: str, state: str = "") -> None:
    """Make a condition the last one; what it rules out goes, and after Failed nothing comes."""
    before: list[Document] = status.get("conditions", [])
    reason = f"PyTorchJob{state or kind}"
    same = next((one for one in before if one["type"] == kind), None)
    if _holds(status, "Failed") or (same and (same["status"], same["reason"]) == (str(value), reason)):
        return
    gone = {"Running": ("Running", "Restarting"), "Restarting": ("Running", "Restarting")}.get(kind, (kind,))
    kept = [copy.copy(one) for one in before if one["type"] not in gone]
    for one in kept:
        if kind in ("Failed", "Succeeded") and one["type"] == "Running":
            one["status"] = "False"
    at = now()
    condition = {"type": kind, "status": str(value), "reason": reason, "message": message}
    status["conditions"] = [*kept, {**condition, "lastUpdateTime": at, "lastTransitionTime": at}]


def _since(moment: str) -> float:
    """Seconds."""
    then = datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return (datetime.now(timezone.utc) - then).total_seconds()


def _label(one: Document, name: str) -> str:
    found: str = one["metadata"]["labels"][name]
    return found


def _full_name(one: Document) -> str:
    return f"{one['metadata']['namespace']}.{one['metadata']['name']}"
