"""Clusters that cannot be used as they are, that ask for a token, or that die; each is told by its error."""

from __future__ import annotations

import os
import shutil
import ssl
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

import kfpytorch_ray
from kfpytorch_ray import (
    AuthenticationError,
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
    """The error says so, and how to bring it there; nothing was staged."""
    (other_package / "kfpytorch_ray.py").write_text("raise ModuleNotFoundError(\"No module named 'kfpytorch_ray'\")")
    runtime_env = {"env_vars": {"PYTHONPATH": str(other_package)}}
    backend = RayBackend(address=head.address, storage=storage, working_dir="", runtime_env=runtime_env)
    with pytest.raises(VersionMismatchError, match="py_modules") as caught:
        launch(answer, elastic=Elastic(backend=backend))
    assert head.address in str(caught.value)
    assert runs_in(storage) == []


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


def test_token_and_certificate(
    package: dict[str, str],
    storage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Behind TLS with a certificate of one's own and with Ray's token a launch works; without either it says which."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def elastic(verify: bool | str) -> Elastic:
        backend = RayBackend(address=address, storage=storage, working_dir="", verify=verify)
        return Elastic(backend=backend)

    with HeadCluster(nodes=1, cpus=2, token=TOKEN, env=package) as head:
        at = urlsplit(head.address)
        with Relay(str(at.hostname), int(at.port or 0), tls=context) as relay:
            address = f"https://{relay.address}"
            with pytest.raises(ClusterUnreachableError, match="certificate"):
                launch(answer, elastic=elastic(verify=True))
            with pytest.raises(AuthenticationError, match="RAY_AUTH_TOKEN"):
                launch(answer, elastic=elastic(str(tmp_path / "ca.pem")))
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.token_file)
            run = launch(lambda: 42, elastic=elastic(str(tmp_path / "ca.pem")), wait=False)
            lines = list(run.logs(follow=True))
            assert run.result(keep=True)[0].return_value == 42
    written = [path.read_bytes() for path in Path(storage.removeprefix("file://")).rglob("*") if path.is_file()]
    printed = capfd.readouterr()
    assert TOKEN not in "".join([*lines, printed.out, printed.err, repr(run)])
    assert not any(TOKEN.encode() in content for content in written)


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
