"""Clusters that cannot be used as they are, that ask for a token, or that die; each is told by its error."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from flytekit import task
from flytekit.exceptions.user import FlyteRecoverableException

import kfpytorch_ray
from kfpytorch_ray import (
    AuthenticationError,
    ClusterUnreachableError,
    ConfigError,
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
from kfpytorch_ray.testing import HeadCluster, Relay, meanwhile, wait_until

TOKEN = "a-token-that-nobody-should-see-0123456789"
WRONG_TOKEN = "another-token-that-nobody-should-see-0123"


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


def test_our_package_is_missing_there(head: HeadCluster, new_storage: str, other_package: Path) -> None:
    """The error says so, and how to bring it there; nothing was staged. Who follows its advice has a result."""
    (other_package / "kfpytorch_ray.py").write_text("raise ModuleNotFoundError(\"No module named 'kfpytorch_ray'\")")
    runtime_env = {"env_vars": {"PYTHONPATH": str(other_package)}}
    backend = RayBackend(address=head.address, storage=new_storage, working_dir="", runtime_env=runtime_env)
    with pytest.raises(VersionMismatchError, match="py_modules") as caught:
        launch(answer, elastic=Elastic(backend=backend))
    assert head.address in str(caught.value)
    assert runs_in(new_storage) == []
    fix = re.search(r"send it: (RayBackend\(.*?\))[,.]", str(caught.value))
    assert fix is not None
    advised = eval(fix[1]).runtime_env  # what a reader would type
    backend = dataclasses.replace(backend, runtime_env={**runtime_env, **advised})
    assert launch(lambda: 42, elastic=Elastic(backend=backend))[0].return_value == 42


def test_another_protocol_is_spoken_there(head: HeadCluster, new_storage: str, other_package: Path) -> None:
    """Both sides are named; what the cluster answered is asked again after it was mended, in the same session."""
    package = Path(kfpytorch_ray.__file__).parent
    shutil.copytree(package, other_package / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    module = other_package / package.name / "cluster" / "remote" / "versions.py"
    ours = module.read_text()
    module.write_text(ours.replace(f"PROTOCOL = {versions.PROTOCOL}", "PROTOCOL = 999"))
    runtime_env = {"env_vars": {"PYTHONPATH": str(other_package)}}
    backend = RayBackend(address=head.address, storage=new_storage, working_dir="", runtime_env=runtime_env)
    with pytest.raises(VersionMismatchError, match="999"):
        launch(answer, elastic=Elastic(backend=backend))
    assert runs_in(new_storage) == []
    module.write_text(ours)
    assert launch(lambda: 42, elastic=Elastic(backend=backend))[0].return_value == 42


def test_storage_that_the_cluster_does_not_reach(head: HeadCluster) -> None:
    """A storage in the memory of this process is written here and not readable there."""
    backend = RayBackend(address=head.address, storage="memory://runs", working_dir="")
    with pytest.raises(StorageError, match="cluster cannot use the storage"):
        launch(answer, elastic=Elastic(backend=backend))


def test_a_working_directory_that_cannot_be_sent(head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """Too large, or with broken links: refused before the cluster is asked, with what to leave out."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "weights.bin").write_bytes(os.urandom(200_000))
    backend = RayBackend(
        address=head.address, storage=new_storage, working_dir=str(project), max_working_dir_bytes=100_000
    )
    with pytest.raises(WorkingDirError, match=r"weights\.bin"):
        launch(answer, elastic=Elastic(backend=backend))
    (project / "weights.bin").unlink()
    (project / "data").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WorkingDirError, match="data"):
        launch(answer, elastic=Elastic(backend=backend))
    assert runs_in(new_storage) == []


def test_addresses_of_another_kind(head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """The job API's port without a scheme, the GCS's with one, Ray Client, https and http swapped, and nobody."""
    job_port, (_, context) = head.address.removeprefix("http://"), certificates(tmp_path)

    def refused(address: str, error: type[Exception], words: str) -> None:
        backend = RayBackend(address=address, storage=new_storage, working_dir="")
        with pytest.raises(error, match=words):
            launch(answer, elastic=Elastic(backend=backend))

    refused(job_port, ConfigError, rf"HTTP is spoken there.*give address='http://{job_port}'")
    refused(f"http://{head.gcs_address}", ClusterUnreachableError, r"(?s)does not speak HTTP.*GCS.*Fix: .*8265")
    refused("ray://127.0.0.1:10001", ConfigError, "reached by its job API, 'http://HOST:8265'")
    refused("127.0.0.1:1", ClusterUnreachableError, r"(?s)Nobody listens there.*Fix: .*http://HOST:8265")
    refused(f"https://{job_port}", ClusterUnreachableError, "https:// was asked where http:// is served")
    with served_by_tls(head, context) as relay:
        refused(f"http://{relay.address}", ClusterUnreachableError, r"(?s)where https:// is served.*Fix: .*https://")
    assert not Path(new_storage.removeprefix("file://")).exists()


def certificates(folder: Path) -> tuple[str, ssl.SSLContext]:
    """A file with an authority that nobody knows, and what a server with a certificate of it needs."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return str(folder / "ca.pem"), context


def served_by_tls(head: HeadCluster, context: ssl.SSLContext) -> Relay:
    at = urlsplit(head.address)
    return Relay(str(at.hostname), int(at.port or 0), tls=context)


WITH_A_TOKEN = """
import sys
from kfpytorch_ray import Elastic, KfpytorchRayError, RayBackend, attach, launch

address, storage, working_dir, verify, run_id = sys.argv[1:]
backend = RayBackend(
    address=address, storage=storage, working_dir=working_dir, verify=False if verify == "False" else verify or True
)
try:
    if not run_id:
        from helper import work

        run = launch(work, elastic=Elastic(backend=backend), wait=False)
    else:
        run = attach(run_id, backend=backend)
    print(*run.logs(follow=True), sep="\\n")
    print("status", run._job.look().message)
    print("returned", run.result(keep=True)[0].return_value, "by", run.run_id, repr(run), repr(backend))
except KfpytorchRayError as error:
    print(type(error).__name__, error)
"""


def test_token_and_certificate(package: dict[str, str], new_storage: str, tmp_path: Path) -> None:
    """Behind TLS with a certificate of one's own and with Ray's token a launch works; without either it says which.

    The working directory and the log go the same way. Nowhere is a token shown, be it the right one or a wrong one.
    """
    project = tmp_path / "project"
    project.mkdir()
    (project / "helper.py").write_text("def work():\n    print('working')\n    return 42\n")
    trusted, context = certificates(tmp_path)
    with (
        HeadCluster(nodes=1, cpus=2, token=TOKEN, env=package) as head,
        served_by_tls(head, context) as relay,
    ):

        def said(verify: str, run_id: str = "", **variables: str) -> str:
            command = [sys.executable, "-c", WITH_A_TOKEN, relay.url, new_storage, str(project), verify, run_id]
            environment = {**os.environ, **variables}
            done = subprocess.run(
                command, env=environment, cwd=project, capture_output=True, text=True, timeout=240, check=False
            )
            return done.stdout + done.stderr

        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_file}
        outputs = [
            said("", **token),
            said(trusted),
            said(trusted, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=WRONG_TOKEN),
            said(trusted, **token),
        ]
        (run,) = runs_in(new_storage)
        outputs.append(said("False", run, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN))
        outputs.append(json.dumps(head.jobs()))
        kept = [path for path in Path(head.temp_dir).parent.rglob("session_*/logs/**/*") if path.is_file()]
        logs = [path.read_bytes() for path in kept]
    assert "certificate was not accepted" in outputs[0]
    for output in outputs[1:3]:
        assert "AuthenticationError" in output
        assert "RAY_AUTH_TOKEN" in output
    for output in outputs[3:5]:
        assert "[rank 0 | node 0] working" in output
        assert f"returned 42 by {run}" in output
    assert run in outputs[5]
    written = [path.read_bytes() for path in Path(new_storage.removeprefix("file://")).rglob("*") if path.is_file()]
    assert written
    assert any(run.encode() in log for log in logs)
    shown = [*written, *logs, "".join(outputs).encode()]
    assert not any(secret.encode() in content for content in shown for secret in (TOKEN, WRONG_TOKEN))


class Gate(socketserver.ThreadingTCPServer):
    """A proxy that lets nobody pass who does not send the header ``X-Gate: open``.

    Args:
        server: ``http://HOST:PORT`` behind it.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        self.behind = (str(urlsplit(server).hostname), int(urlsplit(server).port or 0))
        super().__init__(("127.0.0.1", 0), Visit)


class Visit(socketserver.BaseRequestHandler):
    """One connection; what follows its first request has passed with that."""

    def handle(self) -> None:
        request = b""
        while b"\r\n\r\n" not in request and (more := self.request.recv(65536)):
            request += more
        if b"\r\nx-gate: open\r\n" not in request.lower():
            self.request.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        assert isinstance(self.server, Gate)
        with socket.create_connection(self.server.behind) as behind, selectors.DefaultSelector() as ready:
            behind.sendall(request)
            for source, sink in ((self.request, behind), (behind, self.request)):
                ready.register(source, selectors.EVENT_READ, sink)
            while True:
                for key, _ in ready.select():
                    if not (data := key.fileobj.recv(65536)):  # type: ignore[union-attr]
                        return
                    key.data.sendall(data)


def test_a_proxy_that_asks_for_a_header(
    head: HeadCluster, new_storage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With it the whole way is open: working directory, job, log. Without it the error tells where it is given."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.txt").write_text("42")

    def work() -> int:
        print("working")
        return int(Path("data.txt").read_text())

    with Gate(head.address) as gate:
        threading.Thread(target=gate.serve_forever, args=(0.05,)).start()
        try:
            address = f"http://127.0.0.1:{gate.server_address[1]}"
            backend = RayBackend(address=address, storage=new_storage, working_dir=str(tmp_path / "project"))
            with pytest.raises(AuthenticationError, match=r"(?s)refuses this \(403\).*headers="):
                launch(answer, elastic=Elastic(backend=backend))
            backend = dataclasses.replace(backend, headers={"X-Gate": "open"})
            assert launch(work, elastic=Elastic(backend=backend))[0].return_value == 42
        finally:
            gate.shutdown()
    assert "[rank 0 | node 0] working" in capfd.readouterr().out


def test_a_cluster_that_dies(package: dict[str, str], new_storage: str, tmp_path: Path) -> None:
    """What has ended can be taken when the head is gone; what was running is an error that may be retried.

    In a task it is one that Flyte retries.
    """

    def work() -> None:
        threading.Event().wait()

    with HeadCluster(nodes=1, cpus=2, env=package) as head:
        backend = RayBackend(address=head.address, storage=new_storage, working_dir="", reconnect_timeout_s=3)
        ended = launch(lambda: "value", elastic=Elastic(backend=backend), wait=False)
        assert ended.result(keep=True)[0].return_value == "value"
        running = launch(work, elastic=Elastic(backend=backend), wait=False)
        note = tmp_path / "note"

        @task(task_config=Elastic(backend=backend))
        def train(note: str) -> None:
            Path(note).touch()
            threading.Event().wait()

        def die() -> None:
            wait_until(lambda: note.exists() and running.status() is RunStatus.RUNNING, "both runs to begin")
            head.kill()

        with meanwhile(die), pytest.raises(FlyteRecoverableException, match=r"cannot be reached|is over"):
            train(note=str(note))
        with pytest.raises((ClusterUnreachableError, RunLostError)) as caught:
            running.result()
        assert caught.value.retryable
        with pytest.raises(ClusterUnreachableError):
            running.status()
        with pytest.raises(ClusterUnreachableError):
            launch(answer, elastic=Elastic(backend=backend))
    found = attach(ended.run_id, storage=new_storage)
    assert found.status() is RunStatus.SUCCEEDED
    assert list(found.logs())
    assert found.result()[0].return_value == "value"
