"""Clusters that cannot be used as they are, that ask for a token, or that die; each is told by its error."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

import kfpytorch_ray
from kfpytorch_ray import (
    ClusterUnreachableError,
    Elastic,
    RayBackend,
    RunLostError,
    RunStatus,
    StorageError,
    VersionMismatchError,
    WorkingDirError,
    attach,
    launch,
)
from kfpytorch_ray.cluster.remote import versions
from kfpytorch_ray.testing import HeadCluster, Relay, wait_until

TOKEN = "a-token-that-nobody-should-see-0123456789"


def answer() -> int:
    """What is launched where it is to be refused."""
    return 42


def runs_in(storage: str) -> list[str]:
    """Folders of runs that something was staged in."""
    folder = Path(storage.removeprefix("file://")) / "runs"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def other_package(tmp_path: Path) -> Path:
    """A folder to put in front of a cluster's search path."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def test_our_package_is_missing_there(head: HeadCluster, storage: str, other_package: Path) -> None:
    """The error says so, and how to bring it there; nothing was staged. Who follows its advice has a result."""
    (other_package / "kfpytorch_ray.py").write_text("raise ModuleNotFoundError(\"No module named 'kfpytorch_ray'\")")
    runtime_env = {"env_vars": {"PYTHONPATH": str(other_package)}}
    backend = RayBackend(address=head.address, storage=storage, working_dir="", runtime_env=runtime_env)
    with pytest.raises(VersionMismatchError, match="py_modules") as caught:
        launch(answer, elastic=Elastic(backend=backend))
    assert head.address in str(caught.value)
    assert runs_in(storage) == []
    fix = re.search(r"send it: (RayBackend\(.*?\))[,.]", str(caught.value))
    assert fix is not None
    advised = eval(fix[1]).runtime_env  # what a reader would type
    backend = dataclasses.replace(backend, runtime_env={**runtime_env, **advised})
    assert launch(lambda: 42, elastic=Elastic(backend=backend))[0].return_value == 42


def test_another_protocol_is_spoken_there(head: HeadCluster, storage: str, other_package: Path) -> None:
    """Both sides are named; what the cluster answered is asked again after it was mended, in the same session."""
    package = Path(kfpytorch_ray.__file__).parent
    shutil.copytree(package, other_package / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    module = other_package / package.name / "cluster" / "remote" / "versions.py"
    ours = module.read_text()
    module.write_text(ours.replace(f"PROTOCOL = {versions.PROTOCOL}", "PROTOCOL = 999"))
    runtime_env = {"env_vars": {"PYTHONPATH": str(other_package)}}
    backend = RayBackend(address=head.address, storage=storage, working_dir="", runtime_env=runtime_env)
    with pytest.raises(VersionMismatchError, match="999"):
        launch(answer, elastic=Elastic(backend=backend))
    assert runs_in(storage) == []
    module.write_text(ours)
    assert launch(lambda: 42, elastic=Elastic(backend=backend))[0].return_value == 42


def test_storage_that_the_cluster_does_not_reach(head: HeadCluster) -> None:
    """A storage in the memory of this process is written here and not readable there."""
    backend = RayBackend(address=head.address, storage="memory://runs", working_dir="")
    with pytest.raises(StorageError, match="cluster cannot use the storage"):
        launch(answer, elastic=Elastic(backend=backend))


def test_a_working_directory_that_cannot_be_sent(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """Too large, or with broken links: refused before the cluster is asked, with what to leave out."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "weights.bin").write_bytes(os.urandom(200_000))
    backend = RayBackend(address=head.address, storage=storage, working_dir=str(project), max_working_dir_bytes=100_000)
    with pytest.raises(WorkingDirError, match=r"weights\.bin"):
        launch(answer, elastic=Elastic(backend=backend))
    (project / "weights.bin").unlink()
    (project / "data").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WorkingDirError, match="data"):
        launch(answer, elastic=Elastic(backend=backend))
    assert runs_in(storage) == []


WITH_A_TOKEN = """
import sys
from kfpytorch_ray import Elastic, KfpytorchRayError, RayBackend, launch

address, storage, verify = sys.argv[1:]
backend = RayBackend(address=address, storage=storage, working_dir="", verify=verify or True)
try:
    run = launch(lambda: 42, elastic=Elastic(backend=backend), wait=False)
    print(*run.logs(follow=True), sep="\\n")
    print("returned", run.result(keep=True)[0].return_value, repr(run))
except KfpytorchRayError as error:
    print(type(error).__name__, error)
"""


def test_token_and_certificate(package: dict[str, str], storage: str, tmp_path: Path) -> None:
    """Behind TLS with a certificate of one's own and with Ray's token a launch works; without either it says which."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    with HeadCluster(nodes=1, cpus=2, token=TOKEN, env=package) as head:
        at = urlsplit(head.address)
        with Relay(str(at.hostname), int(at.port or 0), tls=context) as relay:

            def said(verify: str, **variables: str) -> str:
                command = [sys.executable, "-c", WITH_A_TOKEN, relay.url, storage, verify]
                environment = {**os.environ, **variables}
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=240, check=False
                )
                return done.stdout + done.stderr

            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_file}
            outputs = [said("", **token), said(str(trusted)), said(str(trusted), **token)]
    assert "certificate was not accepted" in outputs[0]
    assert "AuthenticationError" in outputs[1]
    assert "RAY_AUTH_TOKEN" in outputs[1]
    assert "returned 42" in outputs[2]
    written = [path.read_bytes() for path in Path(storage.removeprefix("file://")).rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, "".join(outputs).encode()])


def test_a_cluster_that_dies(package: dict[str, str], storage: str) -> None:
    """What has ended can be taken when the head is gone; what was running is an error that may be retried."""

    def work() -> None:
        threading.Event().wait()

    with HeadCluster(nodes=1, cpus=2, env=package) as head:
        backend = RayBackend(address=head.address, storage=storage, working_dir="", reconnect_timeout_s=3)
        ended = launch(lambda: "value", elastic=Elastic(backend=backend), wait=False)
        assert ended.result(keep=True)[0].return_value == "value"
        running = launch(work, elastic=Elastic(backend=backend), wait=False)
        wait_until(lambda: running.status() is RunStatus.RUNNING, "the run to begin")
        head.kill()
        with pytest.raises((ClusterUnreachableError, RunLostError)) as caught:
            running.result()
        assert caught.value.retryable
        with pytest.raises(ClusterUnreachableError):
            running.status()
        with pytest.raises(ClusterUnreachableError):
            launch(answer, elastic=Elastic(backend=backend))
    found = attach(ended.run_id, storage=storage)
    assert found.status() is RunStatus.SUCCEEDED
    assert list(found.logs())
    assert found.result()[0].return_value == "value"
