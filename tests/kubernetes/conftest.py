"""A real Kubernetes API server, and doubles of what it lacks: a node, KubeRay's operator and Kubeflow's.

    make test-kubernetes                        starts one by the scripts in $KFPYTORCH_RAY_KUBE (make: KUBE=FOLDER)
    make test-kubernetes KUBECONFIG=FILE        takes the current context of FILE: kind's, or a live cluster's
    KFPYTORCH_RAY_TEST_KUBECONFIG=FILE pytest tests/kubernetes      the same

The scripts are ``up DIR``, which prints a kubeconfig's path, and ``down DIR``. A shell's KUBECONFIG alone is not taken:
it may lead to a cluster that nobody wants tests in. The tests need the CRDs of both operators there and may create
namespaces, which they delete. On a cluster with nodes, or with an operator, they are skipped that bring doubles of
these.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from doubles.api import Api
from doubles.front import Front
from doubles.node import ROOT, Node
from doubles.operator import KubeRayOperator
from doubles.training_operator import TrainingOperator
from kubernetes import client, config

from kfpytorch_ray import KubeRayBackend
from kfpytorch_ray.testing import unavailable, wait_until

KUBECONFIG_VARIABLE = "KFPYTORCH_RAY_TEST_KUBECONFIG"
_START_TIMEOUT_S = 1200.0  # the first time, it is built
_MOST_STARTS = 3
_OPERATORS = "app.kubernetes.io/name=kuberay-operator"
_TRAINING_OPERATORS = "control-plane=kubeflow-training-operator"
_OLD_KUBERAY = "1.3.2"
STRANGER = "kfpytorch-ray-stranger"
_PREFIX = f"kfr-test-{os.getpid()}-"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Path of the kubeconfig whose current context is the administrator of an API server for tests."""
    if named := os.environ.get(KUBECONFIG_VARIABLE):
        yield Path(named)
        return
    with control_plane_of(tmp_path_factory.mktemp("control-plane")) as kubeconfig:
        yield kubeconfig


@contextlib.contextmanager
def control_plane_of(place: Path, *definitions: str) -> Iterator[Path]:
    """A control plane of one's own; its kubeconfig.

    Args:
        place: Where its files are.
        *definitions: Of which KubeRay it has, as in ``kuberay-v1.3.2``; the scripts' own choice without.
    """
    scripts = Path(os.environ.get("KFPYTORCH_RAY_KUBE") or ROOT.parent / "shared" / "kube")
    if not (scripts / "up").is_file():
        pytest.skip(f"no control plane: {scripts} has no up; set KFPYTORCH_RAY_KUBE or {KUBECONFIG_VARIABLE}")
    output = place / "up.log"
    with contextlib.ExitStack() as undo:
        for number in range(_MOST_STARTS):
            folder = place / str(number)
            undo.callback(subprocess.run, [scripts / "down", folder], check=False, stderr=subprocess.DEVNULL)
            with open(output, "ab") as log:
                command = [scripts / "up", folder, *definitions]
                started = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=log, timeout=_START_TIMEOUT_S, check=False
                )
            if not started.returncode and _runs(folder):
                break
        else:
            pytest.fail(output.read_text(errors="replace"))
        yield Path(started.stdout.decode().split()[-1])


def _runs(folder: Path) -> bool:
    """Whether a control plane is whole: its scripts choose ports, which somebody else may take before they are used."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    return all(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.fixture(scope="module")
def old_control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The kubeconfig of an API server that has the definitions of an old KubeRay, and the version of that."""
    if os.environ.get(KUBECONFIG_VARIABLE):
        pytest.skip("it needs a control plane of its own")
    with control_plane_of(tmp_path_factory.mktemp("old"), f"kuberay-v{_OLD_KUBERAY}") as kubeconfig:
        yield kubeconfig, _OLD_KUBERAY


@pytest.fixture(scope="session")
def connection(control_plane: Path) -> Iterator[client.ApiClient]:
    """The official client, as the administrator."""
    with config.new_client_from_config(str(control_plane)) as made:
        yield made


@pytest.fixture(scope="session")
def api(connection: client.ApiClient) -> Iterator[Api]:
    """Objects in plain dicts. At the end the tests' namespaces are gone."""
    api = Api(connection)
    yield api
    if os.environ.get(KUBECONFIG_VARIABLE):
        # An API server of our own goes with all that is there; a namespace takes seconds to.
        wait_until(
            lambda: not [one for one in api.find("namespaces") if one["metadata"]["name"].startswith(_PREFIX)],
            "the tests' namespaces to go",
        )


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """A namespace of the test's own, which is deleted with all that is in it when the test ends."""
    with new_namespace(api) as name:
        yield name


@pytest.fixture(scope="module")
def module_namespace(api: Api) -> Iterator[str]:
    """A namespace for all tests of a module."""
    with new_namespace(api) as name:
        yield name


@contextlib.contextmanager
def new_namespace(api: Api) -> Iterator[str]:
    """A namespace; what is in it at the end is deleted, whoever has left it."""
    name = f"{_PREFIX}{next(_numbers)}"
    api.create("namespaces", "", {"metadata": {"name": name}})
    yield name
    api.delete("namespaces", "", name)
    # The double of the operator gives no finalizer to what is being deleted, and may end before it takes them away.
    for job in api.find("rayjobs", name):
        api.delete("rayjobs", name, job["metadata"]["name"])
        api.patch("rayjobs", name, job["metadata"]["name"], {"metadata": {"finalizers": None}})
    # Nor does a node confirm any more that Pods have ended.
    for pod in api.find("pods", name):
        api.delete("pods", name, pod["metadata"]["name"], gracePeriodSeconds=0)


@pytest.fixture(scope="session")
def no_operator(api: Api) -> None:
    """Nobody acts on RayJobs: a test writes their status."""
    if api.find("pods", labels=_OPERATORS):
        pytest.skip("this cluster has KubeRay, which would write what the test writes")


@pytest.fixture(scope="session")
def no_training_operator(api: Api) -> None:
    """Nobody acts on PyTorchJobs."""
    if api.find("pods", labels=_TRAINING_OPERATORS):
        pytest.skip("this cluster has Kubeflow's training operator, which would act beside its double")


@pytest.fixture(scope="session")
def no_node(api: Api) -> None:
    """Nobody runs Pods."""
    if nodes := api.find("nodes"):
        pytest.skip(f"this cluster has nodes ({nodes[0]['metadata']['name']}, ...), so Pods do not run on this machine")


@pytest.fixture(scope="module")
def node(connection: client.ApiClient, no_node: None) -> Iterator[Node]:
    """A node that runs the Pods of a module's tests."""
    if reason := unavailable():
        pytest.skip(reason)
    with Node(connection) as started:
        yield started


@pytest.fixture(scope="module")
def operator(connection: client.ApiClient, no_operator: None, node: Node) -> Iterator[KubeRayOperator]:
    """KubeRay's operator, for a module's tests."""
    with KubeRayOperator(connection) as started:
        yield started


@pytest.fixture(scope="module")
def training_operator(
    connection: client.ApiClient, no_training_operator: None, node: Node
) -> Iterator[TrainingOperator]:
    """Kubeflow's training operator, for a module's tests."""
    with TrainingOperator(connection) as started:
        yield started


@pytest.fixture
def front(connection: client.ApiClient) -> Iterator[Front]:
    """Stands between a test's client and the API server."""
    with Front(connection) as started:
        yield started


@pytest.fixture
def stranger(connection: client.ApiClient, tmp_path: Path) -> Iterator[str]:
    """The kubeconfig of somebody who may nothing but what a test allows the user ``STRANGER``."""
    with Front(connection, STRANGER) as started:
        yield started.kubeconfig(tmp_path / "stranger.yaml")


@pytest.fixture
def allow(api: Api, namespace: str) -> Callable[..., None]:
    """Allow the stranger something in the test's namespace, by a Role."""

    def allow(*rules: tuple[str, str, list[str]]) -> None:
        role = [{"apiGroups": [group], "resources": [resource], "verbs": verbs} for group, resource, verbs in rules]
        api.create("roles", namespace, {"metadata": {"name": STRANGER}, "rules": role})
        binding = {
            "metadata": {"name": STRANGER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": STRANGER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": STRANGER}],
        }
        api.create("rolebindings", namespace, binding)

    return allow


@pytest.fixture(autouse=True)
def no_flyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on a user's machine."""
    for variable in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "FLYTE_INTERNAL_EXECUTION_ID", "KUBECONFIG", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def backend(control_plane: Path, namespace: str, tmp_path: Path) -> KubeRayBackend:
    """Where tests create RayJobs that nobody runs; no folder is sent."""
    return KubeRayBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=str(tmp_path / "storage"),
        working_dir="",
        reconnect_timeout_s=5.0,
    )


@pytest.fixture
def shared_folder() -> Iterator[str]:
    """A folder that this process and the Pods see: each of them has a /tmp of its own."""
    with tempfile.TemporaryDirectory(prefix="kfpytorch-ray-test-", dir="/var/tmp") as folder:
        yield folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is sent."""
    folder = tmp_path / "project"
    folder.mkdir()
    for module in Path(__file__).parent.glob("*_trainings.py"):
        shutil.copy(module, folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trainings(project: Path) -> Iterator[ModuleType]:
    """A user's module in it."""
    yield importlib.import_module("kuberay_trainings")
    del sys.modules["kuberay_trainings"]
