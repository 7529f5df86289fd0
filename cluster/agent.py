"""The agent: the actor that supervises the workers of one node and does what the controller says.

Turns rounds into reports: it runs torch elastic's agent (kfpytorch_ray.cluster.elastic) for one round at a time and
says of every rank how it ended. It decides nothing. The controller makes it a Ray actor; nothing here imports ray, so
that it can be driven without a cluster.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kfpytorch_ray.cluster.environment import node_environment
from kfpytorch_ray.cluster.forkserver import ForkServer
from kfpytorch_ray.cluster.protocol import AgentSetup, NodeReport, RoundAssignment, WorkerFailure, WorkerSpec
from kfpytorch_ray.results import Outcome, RankRecord, Stage

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from kfpytorch_ray.cluster.elastic import RoundAgent
    from kfpytorch_ray.cluster.processes import Ended
    from kfpytorch_ray.cluster.spool import Spooled

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - results pass through memory, in a folder of mode 0700


class Agent:
    """One per node. Methods may be called from several threads, but only one round runs at a time.

    Args:
        setup: What holds for all rounds.
        address: The address that Ray knows for this node.
    """

    def __init__(self, setup: AgentSetup, address: str) -> None:
        self._setup = setup
        self._address = address
        environment = node_environment(os.environ, setup.environment)
        os.environ.clear()
        os.environ.update(environment)

        self._folder = Path(tempfile.mkdtemp(prefix="kfpytorch_ray-"))
        self._result_folders = tuple(
            tempfile.mkdtemp(prefix="kfpytorch_ray-", dir=parent)
            for parent in (SHARED_MEMORY, self._folder)
            if os.access(parent, os.W_OK)
        )
        self._fork_server = ForkServer(setup.preload, (str(self._folder), *self._result_folders))
        # While the server imports torch, so does this process: 2 s that would otherwise fall into the first round.
        from kfpytorch_ray.cluster import elastic

        self._elastic = elastic
        self._payload_sha256 = ""
        self._store: TCPStore | None = None
        self._lock = threading.Lock()
        self._running: tuple[int, RoundAgent] | None = None
        self._stopped_round = -1
        self._results: dict[int, Path] = {}

    def load(self, payload: bytes) -> None:
        """Take the pickled call, once for all rounds, and wait until the fork server is warm."""
        self._payload_path.write_bytes(payload)
        self._payload_sha256 = hashlib.sha256(payload).hexdigest()
        self._fork_server.wait_until_warm()

    def open_store(self) -> int:
        """Open the store of a round whose rank 0 is here, and say its port."""
        self._store = self._elastic.open_store(self._address)
        return self._store.port

    def run_round(self, assignment: RoundAssignment) -> NodeReport:
        """Run one round to its end, by itself or by ``stop_round``."""
        self._drop_results()
        folder = self._folder / f"round-{assignment.round_index}"
        folder.mkdir()
        stems = {rank: f"{assignment.round_index}-{rank}" for rank in range(self._setup.nproc_per_node)}
        failures = {rank: folder / f"failure-{rank}" for rank in stems}

        def make_spec(rank: int, environment: Mapping[str, str], stdout: str, stderr: str, _error: str) -> WorkerSpec:
            return WorkerSpec(
                environment=environment,
                sys_path=self._setup.sys_path,
                working_directory=self._setup.working_directory,
                payload=str(self._payload_path),
                payload_sha256=self._payload_sha256,
                stdout=stdout,
                stderr=stderr,
                failure=str(failures[rank]),
                result=stems[rank],
                result_directories=self._result_folders,
                flyte=self._setup.flyte,
            )

        store = self._store if assignment.node_rank == 0 else None
        agent = self._elastic.RoundAgent(self._setup, assignment, store, self._fork_server, str(folder), make_spec)
        with self._lock:
            if self._stopped_round >= assignment.round_index:
                agent.stop()
            self._running = (assignment.round_index, agent)
        try:
            agent.run()
        finally:
            with self._lock:
                self._running = None
                agent.release()
            self._store = None

        self._results = {
            rank: path
            for rank, stem in stems.items()
            for path in (Path(parent) / stem for parent in self._result_folders)
            if path.exists()
        }
        return NodeReport(
            assignment.node_rank,
            tuple(self._record(agent, assignment, rank, failures[rank]) for rank in stems),
        )

    def stop_round(self, round_index: int) -> None:
        """End a round if it still runs, or will start; returns at once, ``run_round`` returns when it is over."""
        with self._lock:
            self._stopped_round = max(self._stopped_round, round_index)
            if self._running is not None and self._running[0] <= round_index:
                self._running[1].stop()

    def collect(self) -> tuple[Spooled | None, ...]:
        """The results of the last round by local rank; None for a worker that left without one.

        Each is handed out once: the file is removed, its memory lives until Ray has taken it.
        """
        from kfpytorch_ray.cluster.spool import map_spooled

        collected: list[Spooled | None] = []
        for rank in range(self._setup.nproc_per_node):
            path = self._results.pop(rank, None)
            collected.append(None if path is None else map_spooled(path))
            if path is not None:
                path.unlink()
        return tuple(collected)

    def shutdown(self) -> None:
        """End a running round, pass on the last log lines and remove all files."""
        self.stop_round(2**31)
        for thread in threading.enumerate():
            if thread.name == "log-drain":
                thread.join()
        for folder in (self._folder, *self._result_folders):
            shutil.rmtree(folder, ignore_errors=True)

    def _drop_results(self) -> None:
        while self._results:
            self._results.popitem()[1].unlink(missing_ok=True)

    @property
    def _payload_path(self) -> Path:
        return self._folder / "payload"

    def _record(self, agent: RoundAgent, assignment: RoundAssignment, local_rank: int, failure: Path) -> RankRecord:
        ended = agent.ended().get(local_rank)
        written: WorkerFailure | None = pickle.loads(failure.read_bytes()) if failure.exists() else None
        outcome, message = _outcome(ended, written)
        return RankRecord(
            rank=assignment.node_rank * self._setup.nproc_per_node + local_rank,
            local_rank=local_rank,
            node_rank=assignment.node_rank,
            node=self._address,
            outcome=outcome,
            exit_code=None if ended is None else ended.exit_code,
            timestamp=written.timestamp if written else (ended.at if ended else time.time()),
            message=message,
            traceback=written.traceback if written else "",
            stage=written.stage if written else Stage.CALL,
            recoverable=bool(written and written.recoverable),
            exception=written.exception if written else None,
            log_tail=() if outcome is Outcome.SUCCEEDED else _log_tail(agent, local_rank, written),
        )


def _outcome(ended: Ended | None, failure: WorkerFailure | None) -> tuple[Outcome, str]:
    """How a worker ended, and one line that says it."""
    if ended is None:
        return Outcome.STOPPED, "stopped before it started"
    if failure is not None:
        return Outcome.RAISED, failure.message
    if ended.exit_code == 0:
        return Outcome.SUCCEEDED, ""
    if ended.stopped:
        return Outcome.STOPPED, "stopped with the round"
    if ended.exit_code < 0:
        return Outcome.KILLED, f"killed by {_signal_name(-ended.exit_code)}"
    return Outcome.EXITED, f"left with exit code {ended.exit_code} without an exception"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _log_tail(agent: RoundAgent, local_rank: int, failure: WorkerFailure | None) -> tuple[str, ...]:
    if agent.workers is None:
        return ()
    stdout = _last_lines(agent.workers.stdouts[local_rank], None)
    # Not the traceback, which the record has already.
    stderr = _last_lines(agent.workers.stderrs[local_rank], failure.stderr_size_bytes if failure else None)
    return (*stdout, *stderr)[-LOG_TAIL_LINES:]


def _last_lines(path: str, end: int | None) -> list[str]:
    """Up to LOG_TAIL_LINES lines before byte ``end`` of a file."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END) if end is None else end
            start = file.seek(max(0, end - _LOG_TAIL_BYTES))
            return file.read(end - start).decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except FileNotFoundError:
        return []
