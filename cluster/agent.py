"""The agent of one node, as the controller sees it: the actor that owns the node's processes and files.

It decides nothing and trains nothing. Its environment and fork server are those of the launch; torch elastic's agent
runs in a fork of that server (kfpytorch_ray.cluster.supervisor), and this class passes orders on and results out. The
controller makes it a Ray actor; nothing here imports ray or torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.cluster.environment import node_environment
from kfpytorch_ray.cluster.forkserver import ForkServer
from kfpytorch_ray.cluster.protocol import (
    MARK_VARIABLE,
    AgentSetup,
    Failed,
    Failing,
    NodeReport,
    OpenStore,
    Ready,
    RoundAssignment,
    Shutdown,
    StopRound,
    SupervisorLostError,
    SupervisorSetup,
)

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.spool import Spooled

logger = logging.getLogger(__name__)

PRELOAD = (
    "kfpytorch_ray.cluster.guardian",
    "numpy",
    "torch",
    "torch.distributed",
    "flytekit.bin.entrypoint",
    "kfpytorch_ray.cluster.supervisor",
)
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - results pass through memory, in a folder of mode 0700
_EVERY_ROUND = 2**31


class ElasticAgent:
    """One per node. Methods may be called from several threads; one request runs at a time, and may be stopped.

    Args:
        setup: What holds for all rounds.
        address: The address that Ray knows for this node.
    """

    def __init__(self, setup: AgentSetup, address: str) -> None:
        _become(node_environment(os.environ, setup.environment))
        self._setup = setup
        self._folder = Path(tempfile.mkdtemp(prefix="kfpytorch_ray-"))
        # Under the folder as well: shared memory may be too small for a result, or absent.
        self._result_folders = tuple(
            tempfile.mkdtemp(prefix="kfpytorch_ray-", dir=parent)
            for parent in (SHARED_MEMORY, self._folder)
            if os.access(parent, os.W_OK)
        )
        self._results: dict[int, str] = {}
        self._failing: dict[int, threading.Event] = defaultdict(threading.Event)
        self._failed: set[int] = set()
        self._asking = threading.Lock()
        self._sending = threading.Lock()

        preload = (*PRELOAD, *setup.preload)
        os.environ[MARK_VARIABLE] = os.pathsep.join((str(os.getpid()), *self._folders))
        fork_server = ForkServer(preload)
        given = SupervisorSetup(
            setup=setup,
            address=address,
            folder=str(self._folder),
            payload=str(self._payload),
            result_folders=self._result_folders,
            preload=preload,
        )
        # By name: importing it here would load torch into the actor, too.
        self._connection, self._supervisor = fork_server.start_connected(
            "kfpytorch_ray.cluster.supervisor", "main", given
        )

    def load(self, payload: bytes) -> None:
        """Take the pickled call, once for all rounds, and wait until the fork server is warm."""
        if hashlib.sha256(payload).hexdigest() != self._setup.payload_sha256:
            msg = "the payload differs from the one that the driver sent"
            raise ValueError(msg)
        self._payload.write_bytes(payload)
        with self._asking:
            ready: Ready = self._answer()
        if ready.missing:
            logger.warning("The fork server could not preload %s; each worker imports them itself.", ready.missing)

    def open_store(self) -> int:
        """Open the store of a round whose rank 0 is here, and say its port."""
        port: int = self._ask(OpenStore())
        return port

    def run_round(self, assignment: RoundAssignment) -> NodeReport:
        """Run one round to its end, by itself or by ``stop_round``."""
        self._drop_results()
        index = assignment.round_index
        try:
            finished = self._ask(assignment, meanwhile=lambda: self._note_failure(index))
        finally:
            self._failing[index].set()
        self._results = dict(finished.results)
        report: NodeReport = finished.report
        return report

    def wait_for_failure(self, round_index: int) -> bool:
        """Return when a rank of this node fails in this round, or the round ends here; whether one failed.

        ``run_round`` returns only when all ranks have been stopped, which may take the whole grace. Other nodes are
        not to wait for that.
        """
        self._failing[round_index].wait()
        return round_index in self._failed

    def stop_round(self, round_index: int) -> None:
        """End a round if it still runs, or will start; returns at once, ``run_round`` returns when it is over."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(StopRound(round_index))

    def collect(self) -> tuple[Spooled | None, ...] | Spooled | None:
        """The results of the last round by local rank; None for a worker that left without one.

        Each is handed out once: the file is removed, its memory lives until Ray has taken it. A single result comes
        bare, because Ray makes one object of whatever a method with one return value returns.
        """
        from kfpytorch_ray.cluster.spool import map_spooled

        collected: list[Spooled | None] = []
        for rank in range(self._setup.nproc_per_node):
            path = self._results.get(rank)
            collected.append(None if path is None else map_spooled(Path(path)))
        self._drop_results()
        return collected[0] if len(collected) == 1 else tuple(collected)

    def shutdown(self) -> None:
        """End a running round, wait until its workers are gone, pass on the last log lines and remove all files."""
        self.stop_round(_EVERY_ROUND)
        # After a supervisor that has died, its guardian cleans up.
        with contextlib.suppress(SupervisorLostError):
            self._ask(Shutdown())
            self._supervisor.join()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _folders(self) -> tuple[str, ...]:
        return (str(self._folder), *self._result_folders)

    @property
    def _payload(self) -> Path:
        return self._folder / "payload"

    def _note_failure(self, round_index: int) -> None:
        self._failed.add(round_index)
        self._failing[round_index].set()

    def _ask(self, request: object, meanwhile: Callable[[], None] | None = None) -> Any:
        """Send a request and wait for its answer; ``meanwhile`` is called when a rank fails before that."""
        with self._asking:
            try:
                with self._sending:
                    self._connection.send(request)
            except OSError as error:
                raise SupervisorLostError from error
            answer = self._answer()
            if isinstance(answer, Failing):
                if meanwhile is not None:
                    meanwhile()
                answer = self._answer()
            return answer

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SupervisorLostError from error
        if isinstance(answer, Failed):
            raise RuntimeError(answer.traceback)
        return answer

    def _drop_results(self) -> None:
        while self._results:
            Path(self._results.popitem()[1]).unlink(missing_ok=True)


def _become(environment: Mapping[str, str]) -> None:
    """Make this process's environment another, with as few changes as possible: Ray's threads may be reading it."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
