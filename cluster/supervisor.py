"""The process in which torch elastic's agent runs: a fork of the warm server, so that torch is loaded once per node.

It serves its actor (kfpytorch_ray.cluster.agent) over a pipe, one request after the other; while a round runs, the
only thing it listens for is the order to stop. When the actor is gone, so is the pipe, and this process ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from kfpytorch_ray import rank_decks
from kfpytorch_ray.cluster import preloaded
from kfpytorch_ray.cluster.elastic import RoundAgent, open_store
from kfpytorch_ray.cluster.forkserver import die_with_server, use_this_server
from kfpytorch_ray.cluster.guardian import kill_all, strays
from kfpytorch_ray.cluster.output import LOGS, SPOOL, RoundOutput
from kfpytorch_ray.cluster.output_spool import OutputSpool
from kfpytorch_ray.cluster.processes import ForkedWorkers
from kfpytorch_ray.cluster.protocol import (
    BeginLaunch,
    EndLaunch,
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
    WorkerSpec,
)
from kfpytorch_ray.cluster.records import Traces, record_of
from kfpytorch_ray.cluster.worker_failure import read_failure
from kfpytorch_ray.flyte_worker import CALLED_MARKER, marked_at
from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, PAGE_VARIABLE, Beat, HeartbeatPage
from kfpytorch_ray.metric_page import METRICS_NAME, MetricPage

_STRAYS_WAIT_S = 5.0
_OUTPUT_WAIT_S = 5.0
"""Longest wait for the last lines of a round to be passed on."""


def main(connection: Connection, given: SupervisorSetup) -> None:
    """Serve until told to shut down, or until the actor is gone."""
    os.setsid()
    die_with_server()
    use_this_server()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    missing = {name: "it cannot be imported" for name in given.preload if name not in sys.modules}
    connection.send(Ready({**missing, **preloaded.MISSING}, preloaded.REFUSED))
    supervisor = _Supervisor(connection, given)
    with contextlib.suppress(EOFError):
        while not isinstance(request := connection.recv(), Shutdown):
            if isinstance(request, StopRound):
                supervisor.take(request)
                continue
            try:
                answer: Any = supervisor.answer(request)
            except EOFError:
                raise
            except Exception:  # noqa: BLE001 - the actor raises it where somebody can read it
                answer = Failed(traceback.format_exc())
            connection.send(answer)
        supervisor.finish_output()
        connection.send(True)


class _Supervisor:
    def __init__(self, connection: Connection, given: SupervisorSetup) -> None:
        self.connection = connection
        self.given = given
        self.page_path = Path(given.folder, PAGE_NAME)
        self.page = HeartbeatPage.open(self.page_path)
        self.metrics = MetricPage.open(self.page_path.with_name(METRICS_NAME))
        self.launch: _Launch | None = None

    def answer(self, request: BeginLaunch | EndLaunch | OpenStore | RoundAssignment) -> Any:
        if isinstance(request, BeginLaunch):
            self.launch = _Launch(request)
            return None
        assert self.launch is not None
        if isinstance(request, EndLaunch):
            self.launch.finish_output()
            self.launch = None
            return None
        if isinstance(request, OpenStore):
            self.launch.store = open_store(self.given.address)
            return self.launch.store.port
        return self._run_round(self.launch, request)

    def _run_round(self, launch: _Launch, assignment: RoundAssignment) -> Finished:
        given = self.given
        setup = launch.setup
        folder = launch.folder / f"round-{assignment.round_index}"
        folder.mkdir()
        stems = {rank: f"{assignment.round_index}-{rank}" for rank in range(setup.nproc_per_node)}
        failures = {rank: folder / f"failure-{rank}" for rank in stems}
        first = assignment.node_rank * setup.nproc_per_node
        decks = {rank: rank_decks.file_of(folder, setup.decks, first + rank, rank) for rank in stems}

        def make_spec(rank: int, environment: Mapping[str, str], stdout: str, stderr: str) -> WorkerSpec:
            return WorkerSpec(
                environment={**environment, PAGE_VARIABLE: f"{self.page_path}:{rank}"},
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
                upload_files=given.address != setup.driver_address and environment["RANK"] == "0",
                stacks=str(folder / f"stacks-{rank}"),
                decks=decks[rank],
                all_decks=setup.decks == rank_decks.ALL,
            )

        agent = RoundAgent(
            setup,
            assignment,
            store=launch.store if assignment.node_rank == 0 else None,
            log_folder=str(folder),
            make_spec=make_spec,
            orders=self.connection,
            stop_ordered=lambda: self._stop_ordered(assignment.round_index),
            failing=lambda: self.connection.send(Failing()),
            page=self.page,
            output=RoundOutput(
                folder=launch.folder / LOGS,
                round_index=assignment.round_index,
                node_rank=assignment.node_rank,
                logs=setup.logs,
                limit_bytes=setup.max_log_bytes,
                spool=launch.spool,
            ),
        )
        started_at = time.time()
        self.metrics.start_round(assignment.round_index)
        self.page.start_round(assignment.round_index)
        try:
            # The store stays open: other nodes may still train when this one's workers have returned.
            agent.run()
        finally:
            self.page.end_round()
            _end_strays()
            launch.workers = agent.workers
            launch.finish_output()
        beats = self.page.read()
        records = tuple(
            record_of(
                self._traces(agent, rank, failures[rank], beats[rank], started_at),
                rank=first + rank,
                local_rank=rank,
                node_rank=assignment.node_rank,
                node=given.address,
            )
            for rank in stems
        )
        results = {
            rank: str(path)
            for rank, stem in stems.items()
            for path in (Path(parent) / stem for parent in given.result_folders)
            if path.exists()
        }
        left = tuple(deck for path in decks.values() for deck in rank_decks.read(path))
        return Finished(NodeReport(assignment.node_rank, records, left), results)

    def _traces(self, agent: RoundAgent, rank: int, failure: Path, beat: Beat, started_at: float) -> Traces:
        workers = agent.workers
        return Traces(
            ended=agent.ended().get(rank),
            failure=read_failure(failure),
            beat=beat,
            last_sign=_last_sign(beat, started_at),
            stdout=None if workers is None else workers.stdouts[rank],
            stderr=None if workers is None else workers.stderrs[rank],
            started_at=None if workers is None else workers.started_at.get(rank),
            called_at=None if workers is None else marked_at(workers.error_files[rank], CALLED_MARKER),
        )

    def finish_output(self) -> None:
        """Pass on the last lines of a launch."""
        if self.launch is not None:
            self.launch.finish_output()

    def take(self, order: StopRound) -> None:
        """Remember an order; the round that it is about may not have come yet."""
        if self.launch is not None:
            self.launch.take(order)

    def _stop_ordered(self, round_index: int) -> StopRound | None:
        """Take the orders that have come; what they say about this round."""
        while self.connection.poll():
            self.take(self.connection.recv())
        return None if self.launch is None else self.launch.order_for(round_index)


class _Launch:
    """What the supervisor has of one launch; nothing of it reaches the next."""

    def __init__(self, begin: BeginLaunch) -> None:
        self.setup = begin.setup
        self.folder = Path(begin.folder)
        self.spool = OutputSpool(self.folder / SPOOL)
        self.store: TCPStore | None = None
        self.workers: ForkedWorkers | None = None
        self._stopped_round = -1
        self._hung_round = -1

    def take(self, order: StopRound) -> None:
        self._stopped_round = max(self._stopped_round, order.round_index)
        if order.hung:
            self._hung_round = max(self._hung_round, order.round_index)

    def order_for(self, round_index: int) -> StopRound | None:
        if self._stopped_round < round_index:
            return None
        return StopRound(round_index, hung=self._hung_round == round_index)

    def finish_output(self) -> None:
        if self.workers is not None:
            self.workers.finish_output(_OUTPUT_WAIT_S)


def _end_strays() -> None:
    """Workers lead groups, which end with them; a child that made a group or session of its own does not."""
    value = os.environ[MARK_VARIABLE]
    agent, server = int(value.split(os.pathsep)[0]), os.getppid()
    kill_all(lambda: strays(f"{MARK_VARIABLE}={value}", {agent, server}), timeout_s=_STRAYS_WAIT_S)


def _last_sign(beat: Beat, round_started_at: float) -> float:
    if beat.progressed_at is None:
        return round_started_at
    return time.time() - (time.monotonic() - beat.progressed_at)
