"""The process in which torch elastic's agent runs: a fork of the warm server, so that torch is loaded once per node.

It serves its actor (kfpytorch_ray.cluster.agent) over a pipe, one request after the other; while a round runs, the
only thing it listens for is the order to stop. When the actor is gone, so is the pipe, and this process ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from kfpytorch_ray.cluster.elastic import RoundAgent, open_store
from kfpytorch_ray.cluster.forkserver import share_parents_server
from kfpytorch_ray.cluster.processes import Ended
from kfpytorch_ray.cluster.protocol import (
    Failed,
    Failing,
    Finished,
    NodeReport,
    OpenStore,
    Ready,
    RoundAssignment,
    Shutdown,
    StopRound,
    SupervisorSetup,
    WorkerFailure,
    WorkerSpec,
)
from kfpytorch_ray.results import Outcome, RankRecord, Stage

LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024


def main(connection: Connection, given: SupervisorSetup) -> None:
    """Serve until told to shut down, or until the actor is gone."""
    os.setsid()
    share_parents_server()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    missing = tuple(name for name in given.preload if name not in sys.modules)
    connection.send(Ready(missing))
    supervisor = _Supervisor(connection, given)
    with contextlib.suppress(EOFError):
        while not isinstance(request := connection.recv(), Shutdown):
            if isinstance(request, StopRound):
                supervisor.stopped_round = max(supervisor.stopped_round, request.round_index)
                continue
            try:
                answer: Any = supervisor.answer(request)
            except EOFError:
                raise
            except Exception:  # noqa: BLE001 - the actor raises it where somebody can read it
                answer = Failed(traceback.format_exc())
            connection.send(answer)
        _drain_logs()
        connection.send(None)


@dataclass
class _Supervisor:
    connection: Connection
    given: SupervisorSetup
    store: TCPStore | None = None
    stopped_round: int = -1

    def answer(self, request: OpenStore | RoundAssignment) -> int | Finished:
        if isinstance(request, OpenStore):
            self.store = open_store(self.given.address)
            return self.store.port
        return self._run_round(request)

    def _run_round(self, assignment: RoundAssignment) -> Finished:
        given = self.given
        setup = given.setup
        folder = Path(given.folder, f"round-{assignment.round_index}")
        folder.mkdir()
        stems = {rank: f"{assignment.round_index}-{rank}" for rank in range(setup.nproc_per_node)}
        failures = {rank: folder / f"failure-{rank}" for rank in stems}

        def make_spec(rank: int, environment: Mapping[str, str], stdout: str, stderr: str) -> WorkerSpec:
            return WorkerSpec(
                environment=environment,
                sys_path=setup.sys_path,
                working_directory=setup.working_directory,
                payload=given.payload,
                payload_sha256=setup.payload_sha256,
                stdout=stdout,
                stderr=stderr,
                failure=str(failures[rank]),
                result=stems[rank],
                result_directories=given.result_folders,
                flyte=setup.flyte,
                upload_files=setup.upload_files and environment["RANK"] == "0",
            )

        agent = RoundAgent(
            setup,
            assignment,
            store=self.store if assignment.node_rank == 0 else None,
            log_folder=str(folder),
            make_spec=make_spec,
            orders=self.connection,
            stop_ordered=lambda: self._stop_ordered(assignment.round_index),
            failing=lambda: self.connection.send(Failing()),
        )
        # The store stays open: other nodes may still train when this one's workers have returned.
        agent.run()
        results = {
            rank: str(path)
            for rank, stem in stems.items()
            for path in (Path(parent) / stem for parent in given.result_folders)
            if path.exists()
        }
        records = tuple(self._record(agent, assignment, rank, failures[rank]) for rank in stems)
        return Finished(NodeReport(assignment.node_rank, records), results)

    def _stop_ordered(self, round_index: int) -> bool:
        """Take the orders that have come; whether one of them ends this round."""
        while self.connection.poll():
            order = self.connection.recv()
            self.stopped_round = max(self.stopped_round, order.round_index)
        return self.stopped_round >= round_index

    def _record(self, agent: RoundAgent, assignment: RoundAssignment, local_rank: int, failure: Path) -> RankRecord:
        ended = agent.ended().get(local_rank)
        written: WorkerFailure | None = pickle.loads(failure.read_bytes()) if failure.exists() else None
        outcome, message = _outcome(ended, written)
        return RankRecord(
            rank=assignment.node_rank * self.given.setup.nproc_per_node + local_rank,
            local_rank=local_rank,
            node_rank=assignment.node_rank,
            node=self.given.address,
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
    # What a worker raises once it was told to stop, from a handler of SIGTERM for example, is our doing.
    if failure is not None and (ended.stopped_at is None or failure.timestamp < ended.stopped_at):
        return Outcome.RAISED, failure.message
    if ended.exit_code == 0:
        return Outcome.SUCCEEDED, ""
    if ended.stopped_at is not None:
        return Outcome.STOPPED, "stopped with the round"
    if ended.exit_code < 0:
        return Outcome.KILLED, f"killed by {_signal_name(-ended.exit_code)}"
    return Outcome.EXITED, f"left with exit code {ended.exit_code} and left no record of an exception"


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


def _drain_logs() -> None:
    """Wait until all lines of ended workers are passed on (kfpytorch_ray.cluster.processes)."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=1.0)
