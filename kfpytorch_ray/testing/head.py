"""A Ray head with its job server, started as an administrator would start it, for as long as a ``with`` block runs.

This process does not join the cluster: it is reached over HTTP, as a cluster elsewhere is. For a driver in this process
there is kfpytorch_ray.testing.LaptopCluster.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, end_cluster, janitor
from kfpytorch_ray.testing.node import Node, raylet_among, raylet_option
from kfpytorch_ray.testing.processes import descendants
from kfpytorch_ray.testing.running import running_agents
from kfpytorch_ray.testing.starting import TRIES
from kfpytorch_ray.testing.waiting import FaultError, wait_until

_START_TIMEOUT_S = 240.0
_REQUEST_TIMEOUT_S = 30.0
_HEAD = "0"
"""Name of its folder."""
_STARTED = "Ray runtime started"
_SERVER = re.compile(r"RAY_API_SERVER_ADDRESS='([^']+)'")
_NOT_PASSED_ON = ("RAY_", "KFPYTORCH_RAY_", "PYTHONPATH")


@final
class HeadCluster:
    """A Ray cluster on this machine that is reached by its job server alone: a head, and nodes that do the work.

    Every node is a ``ray start --block`` of its own, with free ports, in an environment that has nothing of Ray's or
    ours. The nodes share this machine's address and cores, whatever number Ray is told.

        with HeadCluster(nodes=2, cpus=4) as head:
            launch(train, elastic=Elastic(nnodes=2, backend=RayBackend(address=head.address, storage="file:///...")))

    Args:
        nodes: How many there are at first, the head not counted.
        cpus: Ray's CPUs of each.
        head_cpus: Ray's CPUs of the head; with 0, as on KubeRay, nothing but drivers is placed on it.
        token: Have Ray ask every request for it. It is kept in a file, whose path ``token_file`` tells.
        env: Variables for all processes of the cluster, laid over a clean environment.
        host: Address that the job server listens on; every node has it if it is not of the loopback interface.

    Raises:
        FaultError: The cluster does not start.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 4,
        *,
        head_cpus: int = 0,
        token: str | None = None,
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._first_nodes = nodes
        self._cpus = cpus
        self._head_cpus = head_cpus
        self._token = token
        self._env = dict(env or {})
        self._host = host
        self._folder = ""
        self._address = ""
        self._gcs_address = ""
        self._starts: list[_RayStart] = []
        self._nodes: list[Node] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> HeadCluster:
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def _start(self, undo: contextlib.ExitStack) -> None:
        # Sockets lie in it, whose paths must not be longer than 107 bytes.
        self._folder = tempfile.mkdtemp(prefix="kfr-", dir="/tmp")
        undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
        Path(self.temp_dir).mkdir()
        if self._token is not None:
            with open(self.token_file, "w", encoding="utf-8", opener=_private) as file:
                file.write(self._token)
        undo.enter_context(janitor(self._folder))
        undo.callback(self.kill)
        head = self._start_head()
        wait_until(lambda: head.has_started() or self._gcs_port(), "the head's GCS to listen", _START_TIMEOUT_S)
        # They start while the head's dashboard does.
        nodes = [self._start_node() for _ in range(self._first_nodes)]
        for started in (head, *nodes):
            wait_until(started.has_started, "the head and all nodes to start", _START_TIMEOUT_S)
        wait_until(lambda: _SERVER.search(head.output()), "the address of the job server", _START_TIMEOUT_S)
        (self._address,) = _SERVER.findall(head.output())
        self._gcs_address = raylet_option(head.raylet(), "gcs-address")
        self._nodes = [Node.of_raylet(node.raylet()) for node in nodes]
        wait_until(self._takes_jobs, "the job server to answer", _START_TIMEOUT_S)

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """``http://HOST:PORT`` of the job server."""
        return self._address

    @property
    def gcs_address(self) -> str:
        """``HOST:PORT`` of the GCS."""
        return self._gcs_address

    @property
    def temp_dir(self) -> str:
        """The temporary folder of all nodes, for ``nothing_left()``. Ray's own files are beside it."""
        return os.path.join(self._folder, "t")

    @property
    def token_file(self) -> str:
        """Path of the file that holds the token, for ``RAY_AUTH_TOKEN_PATH``."""
        return os.path.join(self._folder, "token")

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that live, oldest first, the head not counted."""
        return tuple(node for node in self._nodes if node.alive)

    def add_node(self) -> Node:
        """Start one more node and wait until it has joined."""
        started = self._start_node()
        wait_until(started.has_started, "a node to join", _START_TIMEOUT_S)
        node = Node.of_raylet(started.raylet())
        self._nodes.append(node)
        return node

    def kill(self) -> None:
        """SIGKILL to all of it at once, jobs included; the files of its agents go with it. Its own files stay."""
        agents = running_agents(self.gcs_address) if self.gcs_address else ()
        end_cluster(self._folder)
        for started in self._starts:
            started.process.kill()
            started.process.wait()
        for folder in (folder for agent in agents for folder in agent.folders):
            shutil.rmtree(folder, ignore_errors=True)

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the job server knows, as its REST API tells them: ``submission_id``, ``status`` and others.

        Raises:
            OSError: It does not answer, or refuses.
        """
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=_REQUEST_TIMEOUT_S)
        with contextlib.closing(connection):
            headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
            connection.request("GET", "/api/jobs/", headers=headers)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                msg = f"GET /api/jobs/: {answer.status} {answer.reason}"
                raise OSError(msg)
            found: list[dict[str, Any]] = json.load(answer)
            return found

    def _takes_jobs(self) -> bool:
        # What starts the jobs is there when the head has started; the server may need longer to load its modules.
        try:
            self.jobs()
        except OSError:
            return False
        return True

    def _gcs_port(self) -> str:
        # Not what is still being written.
        ports = Path(self._folder).glob(f"{_HEAD}/session_latest/gcs_server_port_*[!p]")
        return next((port for file in ports if (port := file.read_text(encoding="utf-8").strip())), "")

    def _start_head(self) -> _RayStart:
        ports = ("--port=0", "--dashboard-port=0", *_client_server())
        options = ("--head", "--include-dashboard=true", f"--dashboard-host={self._host}", *ports)
        # Nodes that know its address may be starting: it is not tried again.
        return self._ray_start(*options, f"--num-cpus={self._head_cpus}", tries=1)

    def _start_node(self) -> _RayStart:
        return self._ray_start(f"--address={self._host}:{self._gcs_port()}", f"--num-cpus={self._cpus}")

    def _ray_start(self, *options: str, tries: int = TRIES) -> _RayStart:
        # Nodes that start in the same folder at the same time take the same name for their sockets, and one fails.
        folder = os.path.join(self._folder, str(len(self._starts)))
        os.mkdir(folder)
        common = ["--block", "--disable-usage-stats", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0"]
        # Any port, where the default is a range that all nodes of a machine would share.
        common += ["--min-worker-port=0", "--max-worker-port=0"]
        if not self._host.startswith("127."):
            common.append(f"--node-ip-address={self._host}")
        started = _RayStart([*common, *options], self._environment, folder, tries)
        self._starts.append(started)
        return started

    @property
    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.token_file}
        return {
            **clean,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
            "TMPDIR": self.temp_dir,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{_START_TIMEOUT_S:.0f}",
            **({"RAY_AUTH_MODE": "disabled"} if self._token is None else token),
            **self._env,
            MARK_VARIABLE: self._folder,
        }


class _RayStart:
    """A ``ray start --block`` and what it has started."""

    def __init__(self, options: Sequence[str], env: Mapping[str, str], folder: str, tries: int) -> None:
        self._options = options
        self._env = env
        self._folder = folder
        self._tries_left = tries
        self._launch()

    def _launch(self) -> None:
        self._tries_left -= 1
        descriptor, self._output = tempfile.mkstemp(prefix="start-", suffix=".log", dir=self._folder)
        with open(descriptor, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *self._options],
                env=self._env,
                # Jobs begin where the head was started, and find what lies there.
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has said."""
        return Path(self._output).read_text(encoding="utf-8", errors="replace")

    def has_started(self) -> bool:
        """Whether the cluster has it; one that failed is started again.

        Raises:
            FaultError: It failed for the last time.
        """
        if self.process.poll() is not None:
            if not self._tries_left:
                raise FaultError(
                    explain(
                        "A Ray node does not start.",
                        f"ray start ended with exit code {self.process.returncode}: {self.output()[-2000:].strip()}",
                        "Look for what is missing or in the way; on a machine that is very busy, try again.",
                    )
                )
            self._launch()
        return _STARTED in self.output()

    def raylet(self) -> int:
        """Process id of the raylet that it has started."""
        return raylet_among(descendants(self.process.pid))


def _client_server() -> list[str]:
    """A free port for what serves ``ray://``, which is started where its dependencies are and else has the same one."""
    from ray._private.utils import get_ray_client_dependency_error

    if get_ray_client_dependency_error() is not None:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return [f"--ray-client-server-port={probe.getsockname()[1]}"]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
