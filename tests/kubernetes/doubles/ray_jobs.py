"""KubeRay's controller of RayJobs: a RayCluster, the entrypoint's submission, and what comes of it.

Follows the state machine of KubeRay 1.7.0, ray-operator/controllers/ray/rayjob_controller.go, lines 112-448:

    "" -> Initializing -> Running -> Complete | Failed;  Suspending -> Suspended -> "";  Retrying -> ""

Left out: InteractiveMode, SidecarMode, deletion strategies, preRunningDeadlineSeconds and the grace periods of 300 s.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import string
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, final

from kubernetes import client

from doubles import dashboard
from doubles.api import Api, Document, now
from doubles.rendering import DASHBOARD_PORT, ray_cluster, submitter_job

logger = logging.getLogger(__name__)

FINALIZER = "ray.io/rayjob-finalizer"
SOURCE = "rayjob-controller"
_JOB_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_NOT_RETRIED = ("DeadlineExceeded",)

Step = Document | Callable[[], bool]
"""Of a script: a status, or what has to hold before the next one is written."""


@final
class RayJobs:
    """Brings one RayJob after the other a step further.

    Args:
        api: The API server.
        problems: By a RayJob's name: what is wrong with it.
        scripts: By a RayJob's name: what its status becomes, instead of what it would; steps are taken off the list.
    """

    def __init__(self, api: Api, problems: Mapping[str, str], scripts: Mapping[str, list[Step]]) -> None:
        self._api = api
        self._problems = problems
        self._scripts = scripts

    def reconcile(self, job: Document) -> None:
        """One step."""
        meta = job["metadata"]
        status: Document = dict(job.get("status") or {})
        if "deletionTimestamp" in meta:
            self._release(job, status)
        elif meta["name"] in self._scripts:
            self._play(job, self._scripts[meta["name"]])
        elif problem := self._problems.get(meta["name"]):
            message = f"The RayJob spec is invalid {meta['namespace']}/{meta['name']}: {problem}"
            changed = {
                **status,
                "jobDeploymentStatus": "ValidationFailed",
                "reason": "ValidationFailed",
                "message": message,
            }
            if changed != status:
                self._api.event(job, "RayJob", "InvalidRayJobSpec", message, SOURCE)
                self._write(job, changed)
        elif FINALIZER not in meta.get("finalizers", []):
            finalizers = [*meta.get("finalizers", []), FINALIZER]
            self._api.patch("rayjobs", meta["namespace"], meta["name"], {"metadata": {"finalizers": finalizers}})
        else:
            step: Callable[[Document, Document], Document] = getattr(
                self, f"_when_{(status.get('jobDeploymentStatus') or 'new').lower()}"
            )
            self._write(job, self._retried(job, step(job, status)))

    def _release(self, job: Document, status: Document) -> None:
        meta = job["metadata"]
        if FINALIZER not in meta.get("finalizers", []):
            return
        if status.get("jobStatus") not in _JOB_ENDED and status.get("dashboardURL"):
            with contextlib.suppress(OSError):
                dashboard.stop(status["dashboardURL"], status["jobId"])
        left = [one for one in meta["finalizers"] if one != FINALIZER]
        self._api.patch("rayjobs", meta["namespace"], meta["name"], {"metadata": {"finalizers": left}})

    def _play(self, job: Document, script: list[Step]) -> None:
        if script and callable(script[0]):
            if not script[0]():
                return
            script.pop(0)
        if script and not callable(script[0]):
            self._write(job, dict(script.pop(0)))

    def _write(self, job: Document, status: Document) -> None:
        meta = job["metadata"]
        # As in Go, whose fields are left out where they are empty.
        status = {name: value for name, value in status.items() if value != ""}
        if status == (job.get("status") or {}):
            return
        # The generation counts changes of the specification.
        body = {
            **job,
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "status": {**status, "observedGeneration": meta["generation"]},
        }
        try:
            self._api.replace("rayjobs", meta["namespace"], f"{meta['name']}/status", body)
        except client.ApiException as error:
            # Changed or deleted meanwhile: the next step sees it.
            if error.status not in {404, 409}:
                raise

    def _retried(self, job: Document, status: Document) -> Document:
        """A failure that may be tried again is never written as one."""
        if status.get("jobDeploymentStatus") not in {"Complete", "Failed"} or "endTime" in status:
            return status
        outcome = "failed" if status["jobDeploymentStatus"] == "Failed" else "succeeded"
        status = {**status, outcome: status.get(outcome, 0) + 1, "endTime": now()}
        limit = job["spec"].get("backoffLimit") or 0
        if outcome == "failed" and status["failed"] <= limit and status.get("reason") not in _NOT_RETRIED:
            return {**status, "jobDeploymentStatus": "Retrying"}
        return status

    def _when_new(self, job: Document, status: Document) -> Document:
        if job["spec"].get("suspend"):
            return {**status, "jobDeploymentStatus": "Suspending"}
        name = job["metadata"]["name"]
        selected = job["spec"].get("clusterSelector", {}).get("ray.io/cluster")
        return {
            **status,
            "jobDeploymentStatus": "Initializing",
            "jobId": job["spec"].get("jobId") or f"{name}-{_suffix()}",
            "rayClusterName": selected or f"{name}-{_suffix()}",
            "startTime": now(),
        }

    def _when_initializing(self, job: Document, status: Document) -> Document:
        if changed := self._interrupted(job, status):
            return changed
        cluster = self._cluster(job, status)
        if cluster is None or cluster.get("status", {}).get("state") != "ready":
            return {**status, **_cluster_status(cluster)}
        status = {**status, "dashboardURL": f"{cluster['status']['head']['podIP']}:{DASHBOARD_PORT}"}
        if _has_submitter(job) and self._submitter(job) is None:
            body = submitter_job({**job, "status": status}, cluster)
            self._api.create("jobs", job["metadata"]["namespace"], body)
        return {**status, "jobDeploymentStatus": "Running", **_cluster_status(cluster)}

    def _when_running(self, job: Document, status: Document) -> Document:
        if changed := self._interrupted(job, status):
            return changed
        submitter = self._submitter(job) if _has_submitter(job) else None
        conditions = _conditions(submitter)
        if "Failed" in conditions:
            reason = "AppFailed" if status.get("jobStatus") == "FAILED" else "SubmissionFailed"
            changed = {**status, "jobDeploymentStatus": "Failed", "reason": reason}
            if reason == "SubmissionFailed":
                changed["message"] = f"Job submission has failed. {conditions['Failed']}"
            return changed
        cluster = self._cluster(job, status)
        try:
            info = dashboard.job_info(status["dashboardURL"], status["jobId"])
            if info is None:
                if not _has_submitter(job):
                    dashboard.submit(status["dashboardURL"], job)
                return {**status, **_cluster_status(cluster)}
        except OSError as error:
            logger.info("No answer from %s: %s", status["dashboardURL"], error)
            return {**status, **_cluster_status(cluster)}
        ended = info["status"] in _JOB_ENDED and (not _has_submitter(job) or "Complete" in conditions)
        status = {
            **status,
            "jobStatus": info["status"],
            "message": info.get("message") or "",
            **_cluster_status(cluster),
        }
        if times := {name: _time(info[key]) for name, key in _TIMES.items() if info.get(key)}:
            status["rayJobInfo"] = times
        if not ended:
            return status
        if info["status"] == "FAILED":
            return {**status, "jobDeploymentStatus": "Failed", "reason": "AppFailed"}
        return {**status, "jobDeploymentStatus": "Complete"}

    def _when_retrying(self, job: Document, status: Document) -> Document:
        return self._reset(job, status, "")

    def _when_suspending(self, job: Document, status: Document) -> Document:
        return self._reset(job, status, "Suspended")

    def _when_suspended(self, job: Document, status: Document) -> Document:
        return status if job["spec"].get("suspend") else {**status, "jobDeploymentStatus": ""}

    def _when_validationfailed(self, job: Document, status: Document) -> Document:
        return status

    def _when_complete(self, job: Document, status: Document) -> Document:
        spec = job["spec"]
        if spec.get("shutdownAfterJobFinishes") and not spec.get("clusterSelector"):
            ended = datetime.strptime(status["endTime"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
            if (datetime.now(timezone.utc) - ended).total_seconds() >= spec.get("ttlSecondsAfterFinished", 0):
                self._api.delete("rayclusters", job["metadata"]["namespace"], status["rayClusterName"])
        return status

    _when_failed = _when_complete

    def _interrupted(self, job: Document, status: Document) -> Document:
        """The status of a RayJob that is suspended or has run for too long; empty for others."""
        if job["spec"].get("suspend"):
            return {**status, "jobDeploymentStatus": "Suspending"}
        deadline = job["spec"].get("activeDeadlineSeconds")
        started = datetime.strptime(status["startTime"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        if not deadline or (datetime.now(timezone.utc) - started).total_seconds() < deadline:
            return {}
        message = f"The RayJob has passed the activeDeadlineSeconds. StartTime: {status['startTime']}"
        return {**status, "jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": message}

    def _reset(self, job: Document, status: Document, state: str) -> Document:
        """Remove what was made, and when it is gone forget it."""
        namespace = job["metadata"]["namespace"]
        left = []
        if name := status.get("rayClusterName"):
            if not job["spec"].get("clusterSelector"):
                left.append(self._api.delete("rayclusters", namespace, name))
            left.append(self._api.delete("jobs", namespace, job["metadata"]["name"], propagationPolicy="Background"))
        if any(left):
            return status
        kept = {name: status[name] for name in ("failed", "succeeded") if name in status}
        return {**kept, "jobDeploymentStatus": state}

    def _cluster(self, job: Document, status: Document) -> Document | None:
        namespace, name = job["metadata"]["namespace"], status["rayClusterName"]
        found = self._api.get("rayclusters", namespace, name)
        if found is None and not job["spec"].get("clusterSelector"):
            return self._api.create("rayclusters", namespace, ray_cluster(job, name))
        return found

    def _submitter(self, job: Document) -> Document | None:
        return self._api.get("jobs", job["metadata"]["namespace"], job["metadata"]["name"])


_TIMES = {"startTime": "start_time", "endTime": "end_time"}


def _time(milliseconds: float) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _has_submitter(job: Document) -> bool:
    return bool(job["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode")


def _conditions(submitter: Document | None) -> dict[str, str]:
    found: Iterable[dict[str, Any]] = (submitter or {}).get("status", {}).get("conditions", [])
    return {one["type"]: f"{one.get('reason')}: {one.get('message')}" for one in found if one["status"] == "True"}


def _cluster_status(cluster: Document | None) -> Document:
    status = (cluster or {}).get("status")
    return {"rayClusterStatus": status} if status else {}


def _suffix() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(5))
