"""The rights that docs/operations.md asks for, beside the requests that the code makes of an API server.

The server is a double: it knows no resource and takes everything, so that each method gets as far as its request. What
real RBAC says of such a Role is asked in tests/kubernetes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from blocks import rules

from kfpytorch_ray.adapters.kuberay import KubeRayAdapter
from kfpytorch_ray.cluster.kube.client import Namespace
from kfpytorch_ray.cluster.kube.existing import may_grow
from kfpytorch_ray.cluster.kube.kinds import PYTORCH_JOB, RAY_JOB
from kfpytorch_ray.cluster.kube.kuberay_job import KubeRayJob
from kfpytorch_ray.cluster.kube.preflight import check_pytorch_job, check_ray_job
from kfpytorch_ray.cluster.kube.pytorch_job import PyTorchJob
from kfpytorch_ray.config import Elastic, KubeRayBackend
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.task_arguments import TaskArguments
from kfpytorch_ray.testing import wait_until

Right = tuple[str, str, str]
"""Group of an API, resource, verb."""

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v1(?:/namespaces/training)?/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+)(?P<below>/[a-z]+)?)?"
)

RUN = "kfr-run"
"""Name of each job."""


class Recorder(ThreadingHTTPServer):
    """Notes what is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: set[Right] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        match = PATH.fullmatch(url.path)
        assert match, self.path
        resource = match["resource"] + (match["below"] or "")
        watched = "watch" in parse_qs(url.query)
        verb = {"POST": "create", "DELETE": "delete"}.get(self.command) or (
            "watch" if watched else "get" if match["name"] else "list"
        )
        self.server.asked.add((match["group"] or "", resource, verb))
        body = b"" if watched or match["below"] else json.dumps(self._told(resource, match["name"])).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - http.server's names

    def _told(self, resource: str, name: str | None) -> dict[str, Any]:
        metadata = {"name": name or RUN, "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
        if resource == "customresourcedefinitions":
            schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            return {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
        if resource == "pods":
            running = {"phase": "Running", "containerStatuses": [_container()]}
            pod = {"metadata": metadata, "spec": {"containers": []}, "status": running}
            return {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": [pod]}
        if name is None:
            return {"metadata": {"resourceVersion": "1"}, "items": []}
        return {"metadata": metadata, "spec": {}, "status": {"rayClusterName": "c", "jobDeploymentStatus": "Running"}}

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


def _container() -> dict[str, Any]:
    return {
        "name": "ray-job-submitter",
        "image": "i",
        "imageID": "i",
        "ready": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
    }


@pytest.fixture
def server() -> Iterator[Recorder]:
    """An API server that says yes."""
    with Recorder() as recorder:
        thread = Thread(target=recorder.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield recorder
        recorder.shutdown()
        thread.join()


@pytest.fixture
def namespace(server: Recorder, tmp_path: Path) -> Namespace:
    """The namespace of the Role, there."""
    named = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [named],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    return Namespace("training", kubeconfig=str(tmp_path / "kubeconfig"))


def rights(kind: str) -> set[Right]:
    """What the manifest of this kind in operations.md allows."""
    return {(group, resource, verb) for group, resource, verbs in rules(kind) for verb in verbs}


def test_the_role_allows_what_the_code_asks_for_and_no_more(
    server: Recorder, namespace: Namespace, tmp_path: Path
) -> None:
    """From the checks before a launch to its end, on both operators."""
    use_all(server, namespace, Storage(str(tmp_path / "run")))
    assert server.asked == rights("Role") | rights("ClusterRole")


def use_all(server: Recorder, namespace: Namespace, folder: Storage) -> None:
    """What adapters do with a namespace."""
    options = KubeRayBackend(cluster="shared")
    (draft,) = KubeRayAdapter(options).kubernetes_manifests(Elastic(), TaskArguments())
    check_ray_job(options, draft, namespace)
    check_pytorch_job({"metadata": {"name": RUN}}, namespace)
    may_grow(namespace, "shared")
    jobs = (KubeRayJob(namespace, RUN, 60.0), PyTorchJob(namespace, RUN, "train", folder, 60.0))
    for kind, job in zip((RAY_JOB, PYTORCH_JOB), jobs, strict=True):
        namespace.create(kind, {"metadata": {"name": RUN}})
        job.look()
        job.log()
        with job.followed():
            job.look()
            wait_until(
                lambda kind=kind: {(kind.group, kind.plural, "watch"), ("", "pods", "watch")} <= server.asked, "watches"
            )
        with contextlib.suppress(TimeoutError):
            # It never goes away here.
            job.stop(0.2)
        job.forget()
    namespace.warnings_of({RUN})


def test_there_is_nothing_else_that_asks() -> None:
    """Every method of a namespace is used above: by its name there, or by the jobs and checks that are."""
    asks = {name for name, _ in inspect.getmembers(Namespace, inspect.isfunction) if not name.startswith("_")}
    used = "changes create definition delete get log log_stream named pods pods_of warnings_of"
    assert asks == set(used.split())
