"""The worker processes of one node in one round, as torch elastic's process context.

Workers are forks of the warm server; their ends are noticed through their handles, without polling. Stopping goes to
whole process groups and is bounded: SIGTERM, a grace, SIGKILL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsSpecs, PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from kfpytorch_ray.cluster import forkserver, worker
from kfpytorch_ray.cluster.memory import OutOfMemoryWatch
from kfpytorch_ray.cluster.output import RoundOutput
from kfpytorch_ray.cluster.protocol import WorkerSpec
from kfpytorch_ray.cluster.records import Ended
from kfpytorch_ray.cluster.stacks import Hanging, find_py_spy, take_stacks
from kfpytorch_ray.heartbeat import HeartbeatPage

logger = logging.getLogger(__name__)

_NOT_TOLD = 255
"""multiprocessing's exit code for a child whose fork server does not say any."""
_KILL_WAIT_S = 10.0
"""Longest wait for the kernel after SIGKILL; a process in uninterruptible sleep does not end at all."""


class ForkedWorkers(PContext):
    """The workers of one round on this node.

    Args:
        name: Of the role, for log lines.
        envs: Environment by local rank; torch adds TORCHELASTIC_ERROR_FILE.
        logs_specs: Where output and error files go.
        make_spec: Completes a worker's spec: (local rank, environment, stdout file, stderr file).
        stop_grace_s: Seconds between SIGTERM and SIGKILL.
        failing: Called when a worker has failed, before the others are stopped.
        page: Is told who the workers are, and tells them when they are to stop.
        output: Where their standard output and standard error go.
    """

    def __init__(
        self,
        name: str,
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        make_spec: Callable[[int, Mapping[str, str], str, str], WorkerSpec],
        stop_grace_s: float,
        failing: Callable[[], None],
        page: HeartbeatPage,
        output: RoundOutput,
    ) -> None:
        super().__init__(name, worker.main, dict.fromkeys(envs, ()), envs, logs_specs, None)
        ranks = {local_rank: int(environment["RANK"]) for local_rank, environment in envs.items()}
        self._output = output.tails(ranks, self.stdouts, self.stderrs)
        self._make_spec = make_spec
        self._stop_grace_s = stop_grace_s
        self._failing = failing
        self._page = page
        self._memory = OutOfMemoryWatch()
        self._processes: dict[int, ForkServerProcess] = {}
        self._pids: dict[int, int] = {}
        self._stacks_files: dict[int, Path] = {}
        self.started_at: dict[int, float] = {}
        self.ended: dict[int, Ended] = {}
        self._stopping: set[int] = set()
        self._stopped_at: float | None = None
        self._stacks: Mapping[int, str] = {}
        self._closed = False

    def start(self) -> None:
        """Start all workers. Unlike torch's, installs no signal handlers: the actor's process is Ray's."""
        self._start()
        self._output.start()

    def _start(self) -> None:
        for rank in range(self.nprocs):
            spec = self._make_spec(rank, self.envs[rank], self.stdouts[rank], self.stderrs[rank])
            self.started_at[rank] = time.time()
            process = forkserver.start(f"{self.name}{rank}", worker.main, (spec,))
            assert process.pid is not None
            self._processes[rank] = process
            self._pids[rank] = process.pid
            self._stacks_files[rank] = Path(spec.stacks)
            self._page.join(rank, int(spec.environment["RANK"]), process.pid)
            self._memory.add(process.pid)

    def wait_for_change(self, timeout_s: float, *others: Any) -> None:
        """Return when a worker ended, one of ``others`` (file descriptors) is readable, or after ``timeout_s``."""
        wait([*(process.sentinel for process in self._running().values()), *others], timeout_s)

    def _running(self) -> dict[int, ForkServerProcess]:
        return {rank: process for rank, process in self._processes.items() if rank not in self.ended}

    def _collect(self) -> None:
        running = self._running()
        ready = set(wait([process.sentinel for process in running.values()], 0))
        for rank, process in running.items():
            if process.sentinel in ready:
                process.join()
                assert process.exitcode is not None
                if process.exitcode == _NOT_TOLD and not _has_ended(self._pids[rank]):
                    # It is the server that has ended, and the kernel is about to end this process for it. A round that
                    # ended meanwhile would blame its ranks.
                    os.kill(os.getpid(), signal.SIGKILL)
                # At once: the process id may be somebody else's later. Its data loaders may be left.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._pids[rank], signal.SIGKILL)
                self._note_end(rank, process.exitcode)

    def _note_end(self, rank: int, exit_code: int | None) -> None:
        self._page.leave(rank)
        stopped = rank in self._stopping
        self.ended[rank] = Ended(
            exit_code,
            at=time.time(),
            stopped_at=self._stopped_at if stopped else None,
            out_of_memory=exit_code == -signal.SIGKILL and not stopped and self._memory.struck(self._pids[rank]),
            stacks=self._stacks.get(rank),
        )

    def _poll(self) -> RunProcsResult | None:
        self._collect()
        failures = {
            rank: ProcessFailure(
                local_rank=rank,
                pid=self._pids[rank],
                exitcode=ended.exit_code,
                error_file=self.error_files[rank],
            )
            for rank, ended in self.ended.items()
            if ended.exit_code
        }
        if not failures and len(self.ended) < self.nprocs:
            return None
        if failures and not self._closed:
            self._failing()
        self.close()
        return RunProcsResult(
            return_values={} if failures else dict.fromkeys(self.ended),
            failures=failures,
            stdouts=self.stdouts,
            stderrs=self.stderrs,
        )

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return dict(self._pids)

    def take_stacks(self) -> None:
        """Keep the stacks of the workers that still run; from now on, they count as hung. Takes 7 s at most."""
        self._begin_stop()
        hanging = {rank: Hanging(self._pids[rank], self._stacks_files[rank]) for rank in self._stopping}
        self._stacks = take_stacks(hanging, find_py_spy())

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Stop what still runs."""
        if self._closed:
            return
        self._closed = True
        self._close(death_sig or signal.SIGTERM, timeout)

    def finish_output(self, timeout_s: float) -> None:
        """When nobody writes any more: pass on the last lines; takes ``timeout_s`` at most."""
        self._output.finish(timeout_s)

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        """``timeout`` is torch's; the grace is this launch's own."""
        self._begin_stop()
        # Before the signal: a handler of it, or the loop that it interrupts, may ask.
        self._page.request_stop()
        for rank in self._stopping & self._running().keys():
            kill_group(self._pids[rank], death_sig)
            # One that is stopped takes the signal only once it goes on.
            kill_group(self._pids[rank], signal.SIGCONT)
        self._wait_all(self._stop_grace_s)
        for rank in self._running():
            kill_group(self._pids[rank], signal.SIGKILL)
        self._wait_all(_KILL_WAIT_S)
        if stuck := self._running():
            logger.error(
                "Workers %s do not end after SIGKILL; they hang in the kernel, most likely in a GPU or network driver.",
                [self._pids[rank] for rank in stuck],
            )
            for rank in stuck:
                self._note_end(rank, None)

    def _begin_stop(self) -> None:
        self._collect()
        if self._stopped_at is None:
            # The server's word of an end may still be on its way, and such an end is no doing of ours.
            self._stopping = {rank for rank in self._running() if not _has_ended(self._pids[rank])}
            self._stopped_at = time.time()

    def _wait_all(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (running := self._running()) and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in running.values()], left)
            self._collect()


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def kill_group(leader: int, signum: signal.Signals) -> None:
    """Signal the process group of a worker, or the worker alone if it has not made its group yet."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(leader, signum)
    except PermissionError:
        logger.warning("The worker %s has changed its user and cannot be signalled.", leader)
