"""One Pod on a node, as its kubelet runs it: init containers, containers, status, and the end when it is deleted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import final

from doubles.api import Api, Document, now
from doubles.container import Container
from doubles.sandbox import Sandbox
from doubles.variables import MissingReferenceError, environment
from doubles.volumes import mounts
from kfpytorch_ray.testing.processes import in_network, kill_all

logger = logging.getLogger(__name__)

MISSING_IMAGE = "missing"
"""An image with this in its name cannot be pulled."""
_POLL_S = 0.05
_SOURCE = "kubelet"


@final
class PodRun(threading.Thread):
    """Runs a Pod that is bound to the node, until it is deleted.

    Args:
        api: The API server.
        pod: The Pod.
        sandbox: Where it runs.
        leave: Called at the end, when nothing of it runs any more.
    """

    def __init__(self, api: Api, pod: Document, sandbox: Sandbox, leave: Callable[[], None]) -> None:
        super().__init__(name=f"pod {pod['metadata']['name']}", daemon=True)
        self.pod = pod
        self.sandbox = sandbox
        policy = pod["spec"].get("restartPolicy", "Always")
        first_policy = "Never" if policy == "Never" else "OnFailure"
        self._first = [Container(spec, sandbox, first_policy) for spec in pod["spec"].get("initContainers", [])]
        self._main = [Container(spec, sandbox, policy) for spec in pod["spec"]["containers"]]
        self._api = api
        self._leave = leave
        self._deleted = threading.Event()
        self._grace_s = 0.0
        self._started_at = now()
        self._published: Document = {}
        self._told: set[str] = set()

    def container(self, name: str) -> Container | None:
        """A container by its name."""
        return next((one for one in (*self._first, *self._main) if one.name == name), None)

    def delete(self, grace_s: float) -> None:
        """Have it end: SIGTERM, so many seconds to end by itself, SIGKILL."""
        if not self._deleted.is_set():
            self._grace_s = grace_s
            self._deleted.set()

    def run(self) -> None:
        """The Pod's life."""
        try:
            self._publish()
            self._live()
        except Exception as error:
            logger.exception("The Pod %s is given up", self.pod["metadata"]["name"])
            self._patch({"phase": "Failed", "reason": "DoubleFailed", "message": repr(error)})
        self._deleted.wait()
        try:
            self._end()
        finally:
            self._leave()
            meta = self.pod["metadata"]
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
            self._api.delete("pods", meta["namespace"], meta["name"], **options)

    def _live(self) -> None:
        for container in self._main:
            container.waits("PodInitializing" if self._first else "ContainerCreating")
        for container in self._first:
            if not self._begin(container) or not self._until_ended([container]) or container.exit_code:
                return
        for container in self._main:
            if not self._begin(container):
                return
            self._publish()
        self._until_ended(self._main)

    def _begin(self, container: Container) -> bool:
        """Start a container, or say why not until the Pod is deleted."""
        image = container.spec.get("image", "")
        if MISSING_IMAGE in image:
            container.waits("ErrImagePull", f'failed to pull image "{image}": not found')
            self._publish()
            self._tell("Failed", f'Failed to pull image "{image}": not found')
            container.waits("ImagePullBackOff", f'Back-off pulling image "{image}"')
            self._publish()
            self._tell("BackOff", f'Back-off pulling image "{image}"')
            return False
        while not self._has_begun(container):
            if self._deleted.wait(_POLL_S * 10):
                return False
        return True

    def _has_begun(self, container: Container) -> bool:
        try:
            env = environment(container.spec, self.pod, self.sandbox.address, self._read)
            container.start(env, mounts(container.spec, self.pod, self.sandbox.folder, self._read))
        except MissingReferenceError as error:
            container.waits("CreateContainerConfigError", str(error))
            self._publish()
            self._tell("Failed", f"Error: {error}")
            return False
        return True

    def _until_ended(self, containers: list[Container]) -> bool:
        while not self._deleted.is_set():
            for container in containers:
                if message := container.look():
                    self._tell("BackOff", message)
            self._publish()
            if all(container.ended for container in containers):
                return True
            self._deleted.wait(_POLL_S)
        return False

    def _end(self) -> None:
        deadline = time.monotonic() + self._grace_s
        running = [one for one in (*self._first, *self._main) if one.running]
        if self._grace_s:
            for container in running:
                container.ask_to_end(self._grace_s)
            for container in running:
                container.wait(deadline - time.monotonic())
        for container in (*self._first, *self._main):
            container.stop()
        while left := in_network(self.sandbox.network):
            kill_all(left)
        self._publish()

    def _read(self, resource: str, name: str) -> Document | None:
        return self._api.get(resource, self.pod["metadata"]["namespace"], name)

    def _tell(self, reason: str, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._api.event(self.pod, "Pod", reason, message, _SOURCE)

    def _publish(self) -> None:
        status = self._status()
        if status != self._published:
            self._patch(status)
            self._published = status

    def _patch(self, status: Document) -> None:
        meta = self.pod["metadata"]
        self._api.patch("pods", meta["namespace"], f"{meta['name']}/status", {"status": status})

    def _phase(self) -> str:
        if any(one.ended and one.exit_code for one in self._first):
            return "Failed"
        if self._main and all(one.ended for one in self._main):
            return "Failed" if any(one.exit_code != 0 for one in self._main) else "Succeeded"
        return "Running" if any(one.process is not None for one in self._main) else "Pending"

    def _status(self) -> Document:
        phase = self._phase()
        ready = all(one.status()["ready"] for one in self._main) and phase == "Running"
        initialized = all(one.ended and one.exit_code == 0 for one in self._first)
        conditions = {"Initialized": initialized, "Ready": ready, "ContainersReady": ready, "PodScheduled": True}
        return {
            "phase": phase,
            "hostIP": "127.0.0.1",
            "podIP": self.sandbox.address,
            "podIPs": [{"ip": self.sandbox.address}],
            "startTime": self._started_at,
            "conditions": [
                {"type": name, "status": str(holds), "lastTransitionTime": self._since(name, holds)}
                for name, holds in conditions.items()
            ],
            "initContainerStatuses": [one.status() for one in self._first],
            "containerStatuses": [one.status() for one in self._main],
        }

    def _since(self, name: str, holds: bool) -> str:
        before = (one for one in self._published.get("conditions", []) if one["type"] == name)
        return next((one["lastTransitionTime"] for one in before if one["status"] == str(holds)), now())
