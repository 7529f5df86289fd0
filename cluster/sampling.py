"""What the ranks of a node use while they run: CPU, memory and GPU, looked at every few seconds from the agent.

Nothing here is asked of the workers. A thread of the agent's looks at their processes, and at what these have started;
psutil and NVIDIA's library are loaded by it, so that starting an agent waits for neither.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.heartbeat import HeartbeatPage
from kfpytorch_ray.report.data import NodeFacts, Sample

if TYPE_CHECKING:
    from psutil import Process

logger = logging.getLogger(__name__)

PACKAGES = ("kfpytorch_ray", "torch", "ray", "flytekit")
"""Whose versions a report names."""

_FIRST_S = 0.1
_INTERVAL_S = 2.0
_MOST_UNSENT = 4096
_END_WAIT_S = 2.0

RankSample = tuple[int, Sample]
"""Global rank, and what it used."""


class Gpus:
    """The GPUs of a node that its agent may use, in the order in which workers see them.

    Args:
        nvml: NVIDIA's library, initialised: the module ``pynvml``.
        visible: CUDA_VISIBLE_DEVICES; None for all.
    """

    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        self._handles = []
        names = map(str, range(nvml.nvmlDeviceGetCount())) if visible is None else visible.split(",")
        for name in names:
            if name := name.strip():
                by_index = name.isdigit()
                self._handles.append(
                    nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name)
                )

    def names(self) -> tuple[str, ...]:
        """Of each, such as ``NVIDIA H100 80GB HBM3``."""
        return tuple(_text(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles)

    def use(self, local_rank: int) -> tuple[float | None, int | None]:
        """How busy the GPU of a local rank is, in per cent, and what of its memory is in use.

        By convention of torchrun a worker takes the GPU with the number of its local rank; processes cannot be told
        apart from within a container.
        """
        if local_rank >= len(self._handles):
            return None, None
        handle = self._handles[local_rank]
        busy = memory = None
        # A slice of a GPU (MIG) does not say how busy it is.
        with contextlib.suppress(self._nvml.NVMLError):
            busy = float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(self._nvml.NVMLError):
            memory = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return busy, memory


def find_gpus(environment: Mapping[str, str]) -> Gpus | None:
    """The GPUs of this node; None without any, or without nvidia-ml-py (``kfpytorch_ray[gpu]``)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Gpus(pynvml, environment.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        logger.debug("No GPUs are looked at: %s", error)
        return None


def node_facts(gpus: Gpus | None) -> NodeFacts:
    """What this node says of itself."""
    import psutil

    devices: tuple[str, ...] = ()
    if gpus is not None:
        # The library's errors are classes of a package that need not be there.
        with contextlib.suppress(Exception):
            devices = gpus.names()
    return NodeFacts(
        hostname=socket.gethostname(),
        processor=_processor(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        devices=devices,
        versions=installed_versions(),
    )


@functools.cache  # 16 ms
def installed_versions() -> tuple[tuple[str, str], ...]:
    """Package and version of what a training depends on, as installed here."""
    found = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append((package, version(package)))
    return (*found, ("python", platform.python_version()))


class Sampler:
    """Looks at the ranks of one node while a round runs.

    Args:
        page: The node's heartbeat page, which says who they are.
    """

    def __init__(self, page: HeartbeatPage) -> None:
        self._page = page
        self.gpus: Gpus | None = None
        self._unsent: deque[RankSample] = deque(maxlen=_MOST_UNSENT)

    @contextlib.contextmanager
    def during(self, round_index: int) -> Iterator[None]:
        """Look for the time of a round."""
        over = threading.Event()
        looking = threading.Thread(target=self._look, args=(round_index, over), name="sampling", daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join(_END_WAIT_S)

    def take(self) -> tuple[RankSample, ...]:
        """What was seen since the last call."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._unsent.popleft())
        return tuple(found)

    def _look(self, round_index: int, over: threading.Event) -> None:
        workers: dict[int, _Worker] = {}
        pause_s = _FIRST_S
        try:
            while not over.wait(pause_s):
                if self._page.round_index == round_index and self._sample(round_index, workers):
                    pause_s = min(2 * pause_s, _INTERVAL_S)
        except Exception:
            logger.warning("What the ranks use is not looked at any more.", exc_info=True)

    def _sample(self, round_index: int, workers: dict[int, _Worker]) -> bool:
        """Look once; whether there was anybody."""
        import psutil

        beats = [beat for beat in self._page.read() if beat.pid is not None and beat.rank is not None]
        if not beats:
            return False
        # One pass over the machine's processes for all ranks.
        children: dict[int, list[Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                children.setdefault(process.ppid(), []).append(process)
        for local_rank, beat in enumerate(self._page.read()):
            if beat.pid is None or beat.rank is None:
                continue
            with contextlib.suppress(psutil.Error):
                worker = workers.get(local_rank)
                if worker is None:
                    worker = workers[local_rank] = _Worker(psutil.Process(beat.pid))
                if (used := worker.use(children)) is not None:
                    gpu = (None, None) if self.gpus is None else self.gpus.use(local_rank)
                    self._unsent.append((beat.rank, Sample(round_index, *used, *gpu)))
        return True


@dataclass
class _Worker:
    """A worker and its children, as they were when they were last looked at.

    Attributes:
        process: The worker.
        spent: CPU seconds of each process.
        looked_at: Seconds since the epoch.
    """

    process: Process
    spent: dict[Process, float] = field(default_factory=dict)
    looked_at: float | None = None

    def use(self, children: Mapping[int, list[Process]]) -> tuple[float, float, int] | None:
        """When, CPU in per cent of a core since the last look, and resident memory; None where the worker has ended."""
        import psutil

        if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
            return None
        # Before all that is read: a worker may end meanwhile, and what is told of it lies before its end.
        now = time.time()
        since = self.process.create_time() if self.looked_at is None else self.looked_at
        spent: dict[Process, float] = {}
        resident = 0
        family = [self.process]
        for member in family:
            with contextlib.suppress(psutil.Error), member.oneshot():
                times = member.cpu_times()
                spent[member] = times.user + times.system
                resident += member.memory_info().rss
            family += children.get(member.pid, [])
        if not resident:
            # It has given its memory back, and is about to end.
            return None
        seconds = sum(max(0.0, total - self.spent.get(member, 0.0)) for member, total in spent.items())
        self.spent, self.looked_at = spent, now
        return now, round(100 * seconds / max(now - since, 0.01), 1), resident


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
