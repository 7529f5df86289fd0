"""What a job waits for that has not begun, and whether it waits in vain: by its pods and their events.

Why a pod does not come up stands nowhere in an operator's status, so pods and events are asked, as a person would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.errors import ClusterError, KfpytorchRayError, PlacementTimeoutError, explain
from kfpytorch_ray.run import RunStatus

_HOPELESS = ("InvalidImageName", "CreateContainerConfigError")
"""Reasons for which a container waits that do not go away by themselves."""
_HOPELESS_SOON = ("ErrImagePull", "ImagePullBackOff", "CrashLoopBackOff")
"""Likewise, but a registry, or what a container needs, may be away for a moment."""
_PATIENCE_S = 120.0

_EVENTS_S = 10.0
"""How often events are listed, where nothing else says why: all of a namespace's."""


class Waiting:
    """Looks at the pods of one job until it begins.

    Args:
        namespace: Where it is.
        run_id: Of the run, which is the job's name.
        place: Where people find it.
        ready_timeout_s: Seconds within which it has to begin.
        options: Class of the backend's options, for a message.
    """

    def __init__(self, namespace: Namespace, run_id: str, place: str, ready_timeout_s: float, options: str) -> None:
        self._namespace = namespace
        self._run_id = run_id
        self._place = place
        self._ready_timeout_s = ready_timeout_s
        self._options = options
        self._troubled_since: float | None = None
        self._events: list[str] = []
        self._events_at = -math.inf

    def suspended(self) -> JobState:
        """The state of a job that somebody holds back; its pods are not there."""
        self._troubled_since = None
        return JobState(RunStatus.PENDING, "is suspended: a queue has not admitted it yet, or somebody has.")

    def state(
        self, job: Manifest, pods: list[Any], beside: str | None = None, *, begun: bool = False, enough: bool = False
    ) -> JobState:
        """The state of a job whose pods do not all run yet.

        Args:
            job: The custom resource.
            pods: Those of it that are there.
            beside: Name of another resource whose events are about it.
            begun: Whether it has begun with those that run.
            enough: Whether it trains with these, whatever becomes of the others.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        troubles = [trouble for pod in pods if (trouble := _trouble_of(pod)) is not None]
        late = not begun and _age_s(job) > self._ready_timeout_s
        names = {self._run_id, *filter(None, [beside]), *(pod.metadata.name for pod in pods)}
        ready = sum(pod.status.phase in ("Running", "Succeeded") for pod in pods)
        if begun and ready == len(pods):
            return JobState(RunStatus.RUNNING)
        events = [] if troubles else self._warnings(names, now=late)
        why = "; ".join([text for _, text in troubles[:3]] or events[-2:]) or (
            "the others start" if pods else "they are being made"
        )
        message = f"waits for its pods: {ready} of {len(pods)} run; {why}."
        error = self._in_vain([reason for reason, _ in troubles], why) or (self._too_late(message) if late else None)
        if error is not None and not enough:
            return JobState(RunStatus.LOST, message, error)
        return JobState(RunStatus.RUNNING if begun else RunStatus.PENDING, message)

    def _warnings(self, names: set[str], *, now: bool) -> list[str]:
        """What events warn of; as of a moment ago unless it has to be as of now."""
        if now or time.monotonic() - self._events_at > _EVENTS_S:
            self._events = self._namespace.warnings_of(names)
            self._events_at = time.monotonic()
        return self._events

    def _in_vain(self, reasons: list[str], why: str) -> KfpytorchRayError | None:
        hopeless = any(reason in _HOPELESS for reason in reasons)
        if not any(reason in _HOPELESS_SOON for reason in reasons):
            self._troubled_since = None
        elif self._troubled_since is None:
            self._troubled_since = time.monotonic()
        else:
            hopeless = hopeless or time.monotonic() - self._troubled_since > _PATIENCE_S
        if not hopeless:
            return None
        what = f"The pods of the run {self._run_id} cannot come up."
        return ClusterError(explain(what, why, f"Mend that. Look: {self._place}"))

    def _too_late(self, message: str) -> KfpytorchRayError:
        return PlacementTimeoutError(
            explain(
                f"The run {self._run_id} has not begun within {self._ready_timeout_s:g} s.",
                f"It {message}",
                f"Ask for less, wait for longer ({self._options}(ready_timeout_s=...)), or see what the pods wait for: "
                f"{self._place}",
            )
        )


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
    """Since it was made, or released by a queue. By the API server's clock and ours: good to what clocks differ by."""
    began = (job.get("status") or {}).get("startTime") or job["metadata"]["creationTimestamp"]
    return (datetime.now(timezone.utc) - datetime.fromisoformat(began.replace("Z", "+00:00"))).total_seconds()
