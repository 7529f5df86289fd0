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
import secrets
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.cluster.environment import node_environment
from kfpytorch_ray.cluster.forkserver import ForkServer, end_resource_tracker
from kfpytorch_ray.cluster.guardian import kill_all, marked_processes, start_guardian
from kfpytorch_ray.cluster.log_archive import ARCHIVE_WAIT_S, LogArchive
from kfpytorch_ray.cluster.metrics_source import MetricsSource
from kfpytorch_ray.cluster.output import LOGS, SPOOL
from kfpytorch_ray.cluster.output_spool import Cursor, OutputChunk, OutputSource
from kfpytorch_ray.cluster.protocol import (
    AgentSetup,
    BeginLaunch,
    EndLaunch,
    Failed,
    Failing,
    NodePulse,
    NodeReport,
    OpenStore,
    PreloadRefusedError,
    Ready,
    RoundAssignment,
    Shutdown,
    StopRound,
    SupervisorLostError,
    SupervisorSetup,
)
from kfpytorch_ray.cluster.sampling import Sampler, find_gpus, node_facts
from kfpytorch_ray.cluster.server_modules import SERVER_MODULES, users_modules
from kfpytorch_ray.cluster.stacks import Hanging, find_py_spy, record_flamegraph, take_stacks
from kfpytorch_ray.cluster.zygote import Offer
from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, HeartbeatPage
from kfpytorch_ray.metric_page import METRICS_NAME, MetricPage
from kfpytorch_ray.report.data import NodeFacts

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.spool import Spooled

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - results pass through memory, in a folder of mode 0700
_EVERY_ROUND = 2**31
_LOST_WAIT_S = 10.0
_LAST_FILES_S = 2 * ARCHIVE_WAIT_S
"""Longest time for the last copies of logs and for the driver to take the last lines; without workers."""
_TRACKER_WAIT_S = 5.0
"""Longest wait for multiprocessing's tracker; what a worker left in another session may hold its pipe."""
_LOAD_S = 900.0
"""Longest time for the call to arrive and the fork server to be warm."""


class ElasticAgent:
    """One per node. Methods may be called from several threads; one request runs at a time, and may be stopped.

    An agent may serve several launches, one after the other: ``load`` begins each, and ``rest`` ends all but the last.

    Args:
        setup: What holds for all rounds of the first launch, and what of it holds for all launches.
        address: The address that Ray knows for this node.
        zygote: Of the driver, where it is on this machine.
    """

    def __init__(self, setup: AgentSetup, address: str, zygote: Offer | None = None) -> None:
        _become(node_environment(os.environ, setup.environment))
        self._setup = setup
        name = f"kfpytorch_ray-{secrets.token_hex(8)}"
        self._folder = Path(tempfile.gettempdir(), name)
        # Under the folder as well: shared memory may be too small for a result, or absent.
        self._result_folders = (
            *((f"{SHARED_MEMORY}/{name}",) if os.access(SHARED_MEMORY, os.W_OK) else ()),
            str(self._folder / "results"),
        )
        self._results: dict[int, str] = {}
        self._failing: dict[int, threading.Event] = defaultdict(threading.Event)
        self._failed: set[int] = set()
        self._asking = threading.Lock()
        self._sending = threading.Lock()
        self._turning = threading.Lock()
        self._round: int | None = None
        self._ready: Ready | None = None
        self._answered_at = 0.0

        value = os.pathsep.join((str(os.getpid()), *self._folders))
        self._mark = f"{MARK_VARIABLE}={value}"
        # Before there is anything to clean up: an agent may be killed at any time.
        start_guardian(self._mark)
        for folder in self._folders:
            os.mkdir(folder, 0o700)
        self._page = HeartbeatPage.create(self._folder / PAGE_NAME, setup.nproc_per_node)
        self._metrics = MetricsSource(MetricPage.create(self._folder / METRICS_NAME))
        self._sampler = Sampler(self._page)
        self._facts: NodeFacts | None = None
        self._begin_output(setup)

        # Unmarked: it cleans up after processes that are killed by their mark.
        resource_tracker.ensure_running()
        os.environ[MARK_VARIABLE] = value
        os.environ.update(users_modules(setup))
        fork_server = ForkServer(SERVER_MODULES, str(self._folder), zygote)
        given = SupervisorSetup(
            nproc_per_node=setup.nproc_per_node,
            address=address,
            folder=str(self._folder),
            payload=str(self._payload),
            result_folders=self._result_folders,
            preload=SERVER_MODULES,
        )
        # By name: importing it here would load torch into the actor, too.
        self._connection, self._supervisor = fork_server.start_connected(
            "kfpytorch_ray.cluster.supervisor", "main", given
        )

        # Ray may lose the kill of an actor that it is just creating: nobody would ever call this one.
        self._page.extend_lease(_now() + setup.silence_timeout_s)

    def expect_load(self) -> None:
        """Know that the call is on its way, which may be large, and that the fork server is waited for."""
        with self._turning:
            # Calls may overtake each other: what the call's arrival has said must stand.
            if not self._answered_at:
                self._page.extend_lease(_now() + _LOAD_S)

    def load(self, setup: AgentSetup, payload: bytes) -> NodeFacts:
        """Begin a launch: take the pickled call, once for all rounds, and wait until the fork server is warm.

        From now on this agent has to hear from its controller, which counts on it from when it has this answer.
        """
        if hashlib.sha256(payload).hexdigest() != setup.payload_sha256:
            msg = "the payload differs from the one that the driver sent"
            raise ValueError(msg)
        self._payload.write_bytes(payload)
        if self._facts is None:
            # While the fork server imports.
            self._sampler.gpus = find_gpus(os.environ)
            self._facts = node_facts(self._sampler.gpus)
        self._sampler.take()
        if setup.launch_id != self._setup.launch_id:
            self._begin_output(setup)
        with self._turning:
            # An order that was about the launch before does not count from now on.
            self._setup = setup
        self._ask(BeginLaunch(setup, str(self._folder_of(setup.launch_id))))
        with self._turning:
            self._failing = defaultdict(threading.Event)
            self._failed = set()
            self._answered_at = _now()
            # No later than this: it may have been longer so far.
            self._page.extend_lease(self._answered_at + self._setup.silence_timeout_s)
        return self._facts

    def open_store(self) -> int:
        """Open the store of a round whose rank 0 is here, and say its port."""
        port: int = self._ask(OpenStore())
        return port

    def run_round(self, assignment: RoundAssignment) -> NodeReport:
        """Run one round to its end, by itself or by ``stop_round``."""
        self._drop_results()
        index = assignment.round_index
        if assignment.node_rank == 0:
            self._metrics.begin(index)
        with self._turning:
            self._round = index
        try:
            with self._sampler.during(index):
                finished = self._ask(assignment, meanwhile=lambda: self._note_failure(index))
        finally:
            with self._turning:
                self._round = None
                self._failing[index].set()
        self._results = dict(finished.results)
        report: NodeReport = finished.report
        return replace(report, samples=self._sampler.take(), points=self._metrics.end())

    def wait_for_failure(self, launch_id: str, round_index: int) -> bool:
        """Return when a rank of this node fails in this round, or the round ends here; whether one failed.

        ``run_round`` returns only when all ranks have been stopped, which may take the whole grace. Other nodes are
        not to wait for that.
        """
        with self._turning:
            if self._setup.launch_id != launch_id:
                return False
            failing, failed = self._failing[round_index], self._failed
        failing.wait()
        return round_index in failed

    def stop_round(self, launch_id: str, round_index: int, hung: bool = False) -> None:
        """End a round if it still runs, or will start; returns at once, ``run_round`` returns when it is over.

        Args:
            launch_id: Of the launch; nothing happens if it is over.
            round_index: The round, and any before it.
            hung: Whether its ranks have hung: then their stacks are taken first, and kept in their records.
        """
        with self._turning:
            if self._setup.launch_id == launch_id:
                self._order_stop(round_index, hung)

    def request_stop(self, launch_id: str, round_index: int) -> bool:
        """Have ``kfpytorch_ray.stop_requested()`` answer True to the workers of a round, if it runs here.

        Returns:
            Whether one of them listens: it has asked in this round.
        """
        # A round may end meanwhile, but no other begins.
        with self._turning:
            if self._setup.launch_id != launch_id or not self._round == self._page.round_index == round_index:
                return False
            self._page.request_stop()
            return self._listening()

    def pulse(self) -> NodePulse:
        """Answer the controller that this agent is there, at once whatever it does.

        A pulse is sent when the answer to the one before, or to ``load``, has arrived. So this one tells that the
        controller knew of this agent at the time of that answer, and for how much longer it will count on it; after
        that, the agent ends.
        """
        self._extend_lease(self._answered_at + self._setup.silence_timeout_s)
        round_index = self._page.round_index
        pulse = NodePulse(
            round_index=round_index,
            idle_s=self._page.idle_s(),
            listening=round_index is not None and self._listening(),
            alive=sum(beat.pid is not None and not beat.ended for beat in self._page.read()),
            samples=self._sampler.take(),
            points=self._metrics.next(),
        )
        self._answered_at = _now()
        return pulse

    def collect(self) -> tuple[bool | Spooled | None, ...]:
        """True, and after it the results of the last round by local rank; None for a worker that left without one.

        Each is handed out once: the file is removed, its memory lives until Ray has taken it. The first element is
        there so that the caller can ask for the failure of this call without fetching a result.
        """
        from kfpytorch_ray.cluster.spool import map_spooled

        paths = [self._results.get(rank) for rank in range(self._setup.nproc_per_node)]
        results = [None if path is None else map_spooled(Path(path)) for path in paths]
        self._drop_results()
        return (True, *results)

    def rest(self, lease_s: float) -> None:
        """End a launch whose rounds are over, and stay warm for another; keep the logs where they are to be kept.

        What is left of the output can still be read, until ``remove_launch()``.

        Args:
            lease_s: Seconds after which this agent ends if no launch begins. No pulse is taken meanwhile.
        """
        try:
            self._ask(EndLaunch())
        finally:
            self._output.end()
        # No pulse may come any more, and there are no workers.
        self._extend_lease(_now() + _LAST_FILES_S)
        self._archive.finish()
        self._drop_results()
        self._payload.unlink(missing_ok=True)
        # It may be less than what the files were given.
        self._page.extend_lease(_now() + max(lease_s, self._setup.silence_timeout_s))

    def remove_launch(self, launch_id: str) -> None:
        """Remove the files of a launch that is over."""
        shutil.rmtree(self._folder_of(launch_id), ignore_errors=True)

    def known_as(self) -> str:
        """The run that this agent serves now, as people know it."""
        return self._setup.known_as or self._setup.run_id

    def stacks(self, rank: int | None) -> dict[int, str]:
        """The stacks of workers that run here, by rank; of one rank, or with None of all.

        Takes some 2 s, and 5 s more where py-spy is installed.
        """
        return take_stacks(self._processes(rank), find_py_spy())

    def flamegraph(self, rank: int, duration_s: int) -> tuple[str, str] | None:
        """Where a worker spends its time, as an SVG, and what was in the way; None where it is not here."""
        found = self._processes(rank).get(rank)
        if found is None:
            return None
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            return record_flamegraph(found.pid, duration_s, Path(folder, "flamegraph.svg"), find_py_spy())

    def _processes(self, rank: int | None) -> dict[int, Hanging]:
        folder = self._folder_of(self._setup.launch_id) / f"round-{self._page.round_index}"
        return {
            beat.rank: Hanging(beat.pid, folder / f"stacks-{local_rank}")
            for local_rank, beat in enumerate(self._page.read())
            if beat.pid is not None and beat.rank is not None and not beat.ended and rank in (None, beat.rank)
        }

    def read_output(self, cursor: Cursor, wait_s: float) -> OutputChunk:
        """Lines for the driver, as soon as there are some, or after ``wait_s``."""
        return self._output.read(cursor, wait_s)

    def shutdown(self) -> None:
        """End a running round, wait until its workers are gone, and keep the logs where they are to be kept.

        What is left of the output can still be read; ``remove_files()`` is the end.
        """
        # No pulse may come any more, and the workers have their grace.
        self._extend_lease(_now() + self._setup.stop_grace_s + self._setup.silence_timeout_s)
        self._order_stop(_EVERY_ROUND)
        # What a supervisor leaves that has died was killed when that was noticed.
        try:
            with contextlib.suppress(SupervisorLostError):
                self._ask(Shutdown())
                self._supervisor.join()
        finally:
            self._output.end()
        self._extend_lease(_now() + _LAST_FILES_S)
        self._archive.finish()

    def remove_files(self) -> None:
        """Remove all files, and what workers left in shared memory."""
        end_resource_tracker(_TRACKER_WAIT_S)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _folders(self) -> tuple[str, ...]:
        return (str(self._folder), *self._result_folders)

    @property
    def _payload(self) -> Path:
        return self._folder / "payload"

    def _begin_output(self, setup: AgentSetup) -> None:
        folder = self._folder_of(setup.launch_id)
        for name in (LOGS, SPOOL):
            os.makedirs(folder / name)
        self._output = OutputSource(folder / SPOOL)
        self._archive = LogArchive(folder / LOGS, setup.log_archive)

    def _folder_of(self, launch_id: str) -> Path:
        return self._folder / f"launch-{launch_id}"

    def _order_stop(self, round_index: int, hung: bool = False) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(StopRound(round_index, hung))

    def _note_failure(self, round_index: int) -> None:
        with self._turning:
            self._failed.add(round_index)
            self._failing[round_index].set()

    def _listening(self) -> bool:
        return any(beat.listens for beat in self._page.read())

    def _extend_lease(self, until: float) -> None:
        self._page.extend_lease(max(until, self._page.lease_until))

    def _ask(self, request: object, meanwhile: Callable[[], None] | None = None) -> Any:
        """Send a request and wait for its answer; ``meanwhile`` is called when a rank fails before that."""
        with self._asking:
            self._await_ready()
            try:
                with self._sending:
                    self._connection.send(request)
            except OSError as error:
                raise self._supervisor_lost() from error
            answer = self._answer()
            if isinstance(answer, Failing):
                if meanwhile is not None:
                    meanwhile()
                answer = self._answer()
            return answer

    def _await_ready(self) -> None:
        """The supervisor's first word, which comes unasked; whoever asks first takes it."""
        if self._ready is None:
            ready: Ready = self._answer()
            self._ready = ready
            if ready.refused:
                raise PreloadRefusedError(ready.refused)
            for name, error in ready.missing.items():
                logger.warning("The fork server could not preload %s (%s); each worker imports it itself.", name, error)

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._supervisor_lost() from error
        if isinstance(answer, Failed):
            raise RuntimeError(answer.traceback)
        return answer

    def _supervisor_lost(self) -> SupervisorLostError:
        """Workers do not end with their supervisor, and nobody would stop them: that is done here."""
        kill_all(lambda: marked_processes(self._mark), _LOST_WAIT_S)
        return SupervisorLostError()

    def _drop_results(self) -> None:
        while self._results:
            Path(self._results.popitem()[1]).unlink(missing_ok=True)


def _become(environment: Mapping[str, str]) -> None:
    """Make this process's environment another, with as few changes as possible: Ray's threads may be reading it."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def _now() -> float:
    """The clock of leases, which goes on while this machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
