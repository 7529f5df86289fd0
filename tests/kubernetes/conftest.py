"""A real Kubernetes API server, and doubles of what it lacks: a node, and KubeRay's operator.

The control plane comes from a folder with the scripts ``up DIR``, which prints a kubeconfig's path, and ``down DIR``.
$KFPYTORCH_RAY_KUBE names it; without one these tests are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.api import Api
from doubles.node import ROOT, Node
from doubles.operator import KubeRayOperator
from kubernetes import client, config

from kfpytorch_ray.testing import unavailable, wait_until

_START_TIMEOUT_S = 1200.0  # the first time, it is built
_numbers = itertools.count()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Path of the kubeconfig of an API server of these tests' own. Its contexts: admin, and nobody, who may nothing."""
    scripts = Path(os.environ.get("KFPYTORCH_RAY_KUBE") or ROOT.parent / "shared" / "kube")
    if not (scripts / "up").is_file():
        pytest.skip(f"no control plane: {scripts} has no up; set KFPYTORCH_RAY_KUBE")
    folder = tmp_path_factory.mktemp("control-plane") / "k"
    output = folder.parent / "up.log"
    with open(output, "wb") as log:
        started = subprocess.run(
            [scripts / "up", folder], stdout=subprocess.PIPE, stderr=log, timeout=_START_TIMEOUT_S, check=False
        )
    with contextlib.ExitStack() as undo:
        undo.callback(subprocess.run, [scripts / "down", folder], check=False, stderr=subprocess.DEVNULL)
        assert not started.returncode, output.read_text(errors="replace")
        yield Path(started.stdout.decode().split()[-1])


@pytest.fixture(scope="session")
def connection(control_plane: Path) -> Iterator[client.ApiClient]:
    """The official client, as the administrator."""
    with config.new_client_from_config(str(control_plane)) as made:
        yield made


@pytest.fixture
def api(connection: client.ApiClient) -> Api:
    """Objects in plain dicts."""
    return Api(connection)


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """A namespace of the test's own; it is gone, with all that is in it, when the test ends."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    api.create("namespaces", "", {"metadata": {"name": name}})
    yield name
    api.delete("namespaces", "", name)
    # The double of the operator, which would take its finalizers away, has ended.
    for job in api.find("rayjobs", name):
        api.patch("rayjobs", name, job["metadata"]["name"], {"metadata": {"finalizers": None}})
    # Nor does a node confirm any more that Pods have ended.
    for pod in api.find("pods", name):
        api.delete("pods", name, pod["metadata"]["name"], gracePeriodSeconds=0)
    wait_until(lambda: api.get("namespaces", "", name) is None, f"namespace {name} to go")


@pytest.fixture
def node(connection: client.ApiClient, namespace: str) -> Iterator[Node]:
    """A node that runs the Pods of the test."""
    if reason := unavailable():
        pytest.skip(reason)
    with Node(connection) as started:
        yield started


@pytest.fixture
def operator(connection: client.ApiClient, namespace: str, node: Node) -> Iterator[KubeRayOperator]:
    """KubeRay's operator."""
    with KubeRayOperator(connection) as started:
        yield started
