"""A node with its kubelet and the scheduler, for an API server that has none: Pods run as processes of this machine.

Instead of DNS, Pods have the names of headless Services in their hosts files. What is not here: images (every container
sees this machine's files), limits, probes, volumes other than the simple ones, and other Services.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from kubernetes import client

from doubles.api import Api, Document, now
from doubles.container import Container
from doubles.kubelet import PodRun
from doubles.kubelet_server import HOST, log_server
from doubles.sandbox import Sandbox, kill
from doubles.scheduling import amounts, what_hinders
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, janitor
from kfpytorch_ray.testing.namespaces import Network
from kfpytorch_ray.testing.processes import in_network

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]
CAPACITY = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "110", "nvidia.com/gpu": "8"}
_TICK_S = 0.2
_GATEWAY = 254
_FIRST_HOST = 2
_ENDED = ("Succeeded", "Failed")


@final
class Node:
    """The only node of a cluster, for as long as a ``with`` block runs. Needs root, iproute2 and util-linux.

    This process reaches every Pod at its ``status.podIP``, and Pods each other. At the end everything that runs in
    them is killed, and they are deleted.

    Args:
        connection: To the API server.
        capacity: What it says it has; no such device has to be there.
        labels: What a nodeSelector may ask for.
        longest_grace_s: A terminationGracePeriodSeconds that is longer is cut to this.
        shared: Folders under /tmp that Pods see although their /tmp is their own.
        env: Laid over the environment that all containers start with.

    Attributes:
        cordoned: Whether no more Pods are scheduled here, as after `kubectl cordon`.
    """

    def __init__(
        self,
        connection: client.ApiClient,
        *,
        name: str = "node-1",
        capacity: Mapping[str, str] = CAPACITY,
        labels: Mapping[str, str] | None = None,
        longest_grace_s: float = 5.0,
        shared: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.capacity = dict(capacity)
        self.cordoned = False
        self.labels = {"kubernetes.io/hostname": name, **(labels or {})}
        self._api = Api(connection)
        self._longest_grace_s = longest_grace_s
        self._shared = tuple(shared)
        self._env = dict(env or {})
        self._network = Network()
        self._hosts = itertools.count(_FIRST_HOST)
        self._runs: dict[str, PodRun] = {}
        self._complaints: dict[str, str] = {}
        self._over = threading.Event()
        self._undo = contextlib.ExitStack()
        self._folder = Path()

    def __enter__(self) -> Node:
        with contextlib.ExitStack() as undo:
            self._folder = Path(tempfile.mkdtemp(prefix="kfr-", dir="/tmp"))
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            undo.enter_context(janitor(str(self._folder), self._network.name))
            self._network.create(undo)
            self._network.join(_GATEWAY)
            port = undo.enter_context(log_server(self._container, self._over))
            self._register(port)
            undo.callback(self._api.delete, "nodes", "", self.name)
            undo.callback(self._end_pods)
            thread = threading.Thread(target=self._loop, name="node", daemon=True)
            thread.start()
            undo.callback(thread.join)
            undo.callback(self._over.set)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def running(self) -> set[int]:
        """All that runs in Pods, with this machine's process ids."""
        return set().union(*(in_network(run.sandbox.network) for run in list(self._runs.values())))

    def processes(self, namespace: str, pod: str) -> set[int]:
        """What runs in a Pod, with this machine's process ids."""
        return in_network(self._run(namespace, pod).sandbox.network)

    def kill_container(self, namespace: str, pod: str, container: str = "") -> None:
        """SIGKILL to all of a container, the first one of the Pod unless it is named."""
        run = self._run(namespace, pod)
        found = run.container(container or run.pod["spec"]["containers"][0]["name"])
        if found is not None and found.process is not None:
            kill(found.process)

    def cut(self, namespace: str, pod: str) -> None:
        """Cut a Pod off from all others and from here; nobody is told."""
        self._network.cut(self._host(namespace, pod))

    def heal(self, namespace: str, pod: str) -> None:
        """Undo ``cut``."""
        self._network.heal(self._host(namespace, pod))

    def _host(self, namespace: str, pod: str) -> int:
        return int(self._run(namespace, pod).sandbox.network.rpartition("-")[2])

    def _run(self, namespace: str, pod: str) -> PodRun:
        wanted = {"namespace": namespace, "name": pod}
        return next(run for run in list(self._runs.values()) if wanted.items() <= run.pod["metadata"].items())

    def _container(self, namespace: str, pod: str, name: str) -> Container | None:
        try:
            return self._run(namespace, pod).container(name)
        except StopIteration:
            return None

    def _register(self, port: int) -> None:
        self._api.create(
            "nodes",
            "",
            {
                "metadata": {"name": self.name, "labels": self.labels},
                "spec": {"podCIDR": f"{self._network.address(0)}/24"},
            },
        )
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
        status = {
            "addresses": [{"type": "InternalIP", "address": HOST}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "capacity": self.capacity,
            "allocatable": self.capacity,
            "conditions": [ready],
        }
        self._api.patch("nodes", "", f"{self.name}/status", {"status": status})

    def _loop(self) -> None:
        while not self._over.is_set():
            try:
                self._tick()
            except Exception:
                logger.exception("The node goes on after an error")
            self._over.wait(_TICK_S)

    def _tick(self) -> None:
        pods = self._api.find("pods")
        mine = [pod for pod in pods if pod["spec"].get("nodeName") == self.name]
        for pod in pods:
            if not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]:
                self._schedule(pod, mine)
        for pod in mine:
            self._look_after(pod)
        self._tell_names(pods)
        there = {pod["metadata"]["uid"] for pod in mine}
        for uid in self._runs.keys() - there:
            self._runs[uid].delete(0)
            if not self._runs[uid].is_alive():
                del self._runs[uid]

    def _schedule(self, pod: Document, mine: list[Document]) -> None:
        meta = pod["metadata"]
        active = [one for one in mine if one.get("status", {}).get("phase") not in _ENDED]
        hindrance = (
            "0/1 nodes are available: 1 node(s) were unschedulable."
            if self.cordoned
            else what_hinders(pod, self.labels, amounts(self.capacity), active)
        )
        if not hindrance:
            body = {"metadata": {"name": meta["name"]}, "target": {"kind": "Node", "name": self.name}}
            self._api.create("pods", meta["namespace"], body, f"{meta['name']}/binding")
            mine.append({**pod, "spec": {**pod["spec"], "nodeName": self.name}})
        elif self._complaints.get(meta["uid"]) != hindrance:
            self._complaints[meta["uid"]] = hindrance
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": hindrance}
            patch = {"status": {"conditions": [{**condition, "lastTransitionTime": now()}]}}
            self._api.patch("pods", meta["namespace"], f"{meta['name']}/status", patch)
            self._api.event(pod, "Pod", "FailedScheduling", hindrance, "default-scheduler")

    def _look_after(self, pod: Document) -> None:
        meta = pod["metadata"]
        run = self._runs.get(meta["uid"])
        if run is None:
            run = self._runs[meta["uid"]] = self._admit(pod)
            run.start()
        if "deletionTimestamp" in meta:
            run.delete(min(meta.get("deletionGracePeriodSeconds", 0), self._longest_grace_s))

    def _tell_names(self, pods: list[Document]) -> None:
        """Tell Pods whom the headless Services of their namespace lead to: the ready ones, as DNS does."""
        if not self._runs:
            return
        names: dict[str, list[tuple[str, str]]] = {}
        for service in self._api.find("services"):
            meta, selector = service["metadata"], service["spec"].get("selector") or {}
            if service["spec"].get("clusterIP") == "None" and selector:
                addresses = [pod["status"]["podIP"] for pod in pods if _is_selected(pod, meta["namespace"], selector)]
                names.setdefault(meta["namespace"], []).extend((address, meta["name"]) for address in addresses)
        for run in self._runs.values():
            # Its folder may have gone just now.
            with contextlib.suppress(FileNotFoundError):
                run.sandbox.know(names.get(run.pod["metadata"]["namespace"], ()))

    def _admit(self, pod: Document) -> PodRun:
        host = next(self._hosts)
        self._network.add(host)
        folder = self._folder / str(host)
        folder.mkdir()
        sandbox = Sandbox(
            self._network.namespace(host),
            self._network.address(host),
            pod["spec"].get("hostname") or pod["metadata"]["name"][:63],
            folder,
            self._environment,
            self._shared,
        )
        sandbox.know()
        return PodRun(self._api, pod, sandbox, lambda: shutil.rmtree(folder, ignore_errors=True))

    @property
    def _environment(self) -> dict[str, str]:
        path = [
            str(Path(sys.executable).parent),
            os.defpath,
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        return {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
            # Settings of Ray that an image would have no need of: no calls home, and time for a machine that is busy.
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(256 * 1024**2),
            **self._env,
            MARK_VARIABLE: str(self._folder),
        }

    def _end_pods(self) -> None:
        for run in self._runs.values():
            run.delete(0)
        for run in self._runs.values():
            run.join()


def _is_selected(pod: Document, namespace: str, selector: Mapping[str, str]) -> bool:
    """Whether a Service of that namespace leads to a Pod."""
    meta = pod["metadata"]
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
    return ready and meta["namespace"] == namespace and selector.items() <= meta.get("labels", {}).items()
