"""Signs of life from workers to their agent, and the request to stop the other way: one mapped file for each agent.

A user's function calls ``progress()`` and ``stop_requested()``, in processes that may have no agent at all: then both
do nothing. The agent and the processes beside it hold a ``HeartbeatPage``. A store to memory is all that either costs,
so a function may call them in every step, and an agent may look at a worker that is stuck in C code. Standard library
only.

The file is rows of eight fields of eight bytes, aligned, so that a field is never seen half written. The first row is
the page's, the others are one local rank's each. A field has one writer: workers write their step, the time of it and
whether they listen and were told; the agent's side writes the rest, and clears all of it before a round.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import operator
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from kfpytorch_ray.metric_page import MetricPage

logger = logging.getLogger(__name__)

MARK_VARIABLE = "KFPYTORCH_RAY_AGENT"
"""In the environment of every process under an agent: the agent's process id, then its folders."""

PAGE_NAME = "heartbeat"
"""The file's name, in the agent's first folder."""

PAGE_VARIABLE = "KFPYTORCH_RAY_HEARTBEAT"
"""In a worker's environment: ``<path of the page>:<local rank>``."""

_FIELDS = 8
_ROW_BYTES = 8 * _FIELDS
_SEAL = int.from_bytes(b"KFPRAY\x00\x01", "big")

# Fields of the page. A round is stored as its index + 1, so that 0 is none.
_PAGE_SEAL, _PAGE_RANKS, _PAGE_ROUND, _PAGE_STARTED_AT, _PAGE_STOP, _PAGE_LEASE = range(6)
# Fields of a local rank. A rank is stored as rank + 1, so that 0 is none.
_PID, _RANK, _STEP, _PROGRESSED_AT, _LISTENS, _TOLD, _ENDED = range(7)

_NO_STEP = -(2**63)
_MOST_STEPS = 2**63 - 1


def progress(step: int, *, total: int | None = None, **metrics: float) -> None:
    """Tell that training goes on, how far it is and how well it does.

    ``RayBackend(hang_timeout_s=...)`` counts from the last call by any rank. What rank 0 tells is shown while it runs,
    as a bar with speed, remaining time and metrics, and kept as curves: ``result.rounds[...].metrics``.

    Call it in every step, or as often as you like: it costs a few microseconds and talks to nobody. Writing a
    checkpoint with ``flytekit.current_context().checkpoint`` counts as progress as well. Where there is no agent to
    tell (the kubeflow backend, torchrun, a notebook), it does nothing.

    Args:
        step: Of the training, as you count it: a step, an epoch. Shown where a rank is said to hang or to have failed.
        total: Steps in all. Without it there is no bar and no remaining time.
        **metrics: Numbers by name, such as ``loss=0.3``: 16 names at most; longer ones than 48 bytes are cut, and
            numbered where they would become equal. A tensor on a GPU is waited for: give ``loss.item()`` every few
            steps where that matters.

    Raises:
        TypeError: ``step`` or ``total`` is not an integer, or a metric is not a number.
    """
    number, most = _whole("step", step), None if total is None else _whole("total", total)
    values = {name: _number(name, value) for name, value in metrics.items()}
    slot = _own_slot()
    if slot is not None:
        slot.progress(number, most, values)


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        msg = (
            f"progress() was called with {value!r}, a {type(value).__name__}, as {name}.\n"
            "Why: steps are counted in whole numbers, and shown when a rank is said to hang.\n"
            f"Fix: pass the number of the step or of the epoch, such as int({name})."
        )
        raise TypeError(msg) from None


def _number(name: str, value: float) -> float:
    if not isinstance(value, str | bytes):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    msg = (
        f"progress() was called with {name}={value!r}, a {type(value).__name__}.\n"
        "Why: metrics are numbers, which are shown and drawn as curves.\n"
        f"Fix: pass a number, such as {name}=float(...), or leave it out."
    )
    raise TypeError(msg)


def stop_requested() -> bool:
    """Whether this launch asks its workers to write a checkpoint and leave; cheap enough to ask in every step.

    It does so when a node is drained (pre-emption), when more nodes have arrived and a larger round is to begin, and
    when the round is being ended for another reason. After ``RayBackend(checkpoint_grace_s=...)`` the workers are
    stopped whatever they do; workers that never ask get no grace. What a function returns then is not used: the next
    round calls it again.

    Ranks may see the request a step apart. Where all have to leave at the same step (a collective would wait for the
    others), agree on it::

        stop = torch.tensor(int(kfpytorch_ray.stop_requested()))
        dist.all_reduce(stop)
        if stop:
            save_checkpoint()
            break

    Returns:
        Always False where there is no agent to ask: on the kubeflow backend, under torchrun, in a notebook.
    """
    slot = _own_slot()
    return slot is not None and slot.stop_requested()


def beat() -> None:
    """Tell that training goes on, without a step: a checkpoint was written."""
    slot = _own_slot()
    if slot is not None:
        slot.beat()


def agent_folder() -> Path | None:
    """A folder that is removed with the agent, however this worker ends; None where there is no agent."""
    value = os.environ.get(PAGE_VARIABLE)
    folder = Path(value.rpartition(":")[0]).parent if value else None
    return folder if folder is not None and folder.is_dir() else None


@dataclass(frozen=True, slots=True)
class Beat:
    """What the page shows of one local rank in the round that runs.

    Attributes:
        pid: Of the worker; None before there is one.
        rank: Of the worker.
        step: The last one that it told; None if it told none.
        progressed_at: ``time.monotonic()`` of its last sign of progress.
        listens: Whether it has called ``stop_requested()``.
        told: Whether a call of ``stop_requested()`` has answered True.
        ended: Whether its process has.
    """

    pid: int | None
    rank: int | None
    step: int | None
    progressed_at: float | None
    listens: bool
    told: bool
    ended: bool = False


class HeartbeatPage:
    """The page as the agent's side holds it: agent, supervisor, guardian, and tests that look for a worker.

    Made by ``create()`` or ``open()``. Also a context manager, which closes it.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        # Native formats: they are copied in one piece, as those with a byte order are not.
        self._integers = memoryview(mapping).cast("q")
        self._floats = memoryview(mapping).cast("d")

    @classmethod
    def create(cls, path: str | os.PathLike[str], ranks: int) -> HeartbeatPage:
        """Make the file for this many local ranks, readable and writable by this user only.

        Raises:
            OSError: It exists, or there is no room for it.
        """
        size_bytes = _ROW_BYTES * (1 + ranks)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserved, because a store to a hole in the file kills the process where the disk is full.
            os.posix_fallocate(descriptor, 0, size_bytes)
            page = cls(mmap.mmap(descriptor, size_bytes))
        finally:
            os.close(descriptor)
        page._integers[_PAGE_RANKS] = ranks
        page._clear_rows()
        page._integers[_PAGE_SEAL] = _SEAL
        return page

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> HeartbeatPage:
        """Map a page that another process has made.

        Raises:
            OSError: There is no such file.
            ValueError: It is not a page.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(descriptor).st_size
            page = cls(mmap.mmap(descriptor, size_bytes)) if size_bytes and size_bytes % _ROW_BYTES == 0 else None
        finally:
            os.close(descriptor)
        if page is None or page._integers[_PAGE_SEAL] != _SEAL:
            msg = f"{os.fspath(path)} is not a heartbeat page of this version of kfpytorch_ray"
            raise ValueError(msg)
        return page

    def close(self) -> None:
        """Let go of the mapping; the file stays."""
        self._integers.release()
        self._floats.release()
        self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def start_round(self, round_index: int) -> None:
        """Begin a round: whatever an earlier one left, the request to stop included, is forgotten."""
        self._integers[_PAGE_ROUND] = 0
        self._integers[_PAGE_STOP] = 0
        self._clear_rows()
        self._floats[_PAGE_STARTED_AT] = time.monotonic()
        self._integers[_PAGE_ROUND] = round_index + 1

    def end_round(self) -> None:
        """No round runs any more; what the workers told stays readable until the next one begins."""
        self._integers[_PAGE_ROUND] = 0

    @property
    def round_index(self) -> int | None:
        """Of the round that runs; None between rounds."""
        return self._integers[_PAGE_ROUND] - 1 if self._integers[_PAGE_ROUND] else None

    def join(self, local_rank: int, rank: int, pid: int) -> None:
        """Say which process is this local rank."""
        row = _row(local_rank)
        self._integers[row + _RANK] = rank + 1
        self._integers[row + _PID] = pid

    def leave(self, local_rank: int) -> None:
        """Say that the process of this local rank has ended."""
        self._integers[_row(local_rank) + _ENDED] = 1

    def request_stop(self) -> None:
        """Ask the workers of the round that runs to write a checkpoint and leave; nothing happens between rounds."""
        # The round that is meant is named, so that a request which comes too late does not stop the next one.
        self._integers[_PAGE_STOP] = self._integers[_PAGE_ROUND]

    def read(self) -> tuple[Beat, ...]:
        """What is known of each local rank, in their order."""
        return tuple(self._read(local_rank) for local_rank in range(self._integers[_PAGE_RANKS]))

    def idle_s(self) -> float:
        """Seconds since a local rank last made progress, or since the round began; 0 between rounds."""
        if self.round_index is None:
            return 0.0
        rows = range(_row(0), _row(self._integers[_PAGE_RANKS]), _FIELDS)
        newest = max((self._floats[row + _PROGRESSED_AT] for row in rows), default=0.0)
        return time.monotonic() - max(newest, self._floats[_PAGE_STARTED_AT])

    def extend_lease(self, until: float) -> None:
        """Say how long this agent may live without another word of its controller, by ``CLOCK_BOOTTIME``."""
        self._floats[_PAGE_LEASE] = until

    @property
    def lease_until(self) -> float:
        """``time.clock_gettime(time.CLOCK_BOOTTIME)`` at which the lease ends; 0.0 before there is one."""
        return self._floats[_PAGE_LEASE]

    def _read(self, local_rank: int) -> Beat:
        row = _row(local_rank)
        pid, rank, step, _, listens, told, ended = self._integers[row : row + 7]
        return Beat(
            pid=pid or None,
            rank=rank - 1 if rank else None,
            step=None if step == _NO_STEP else step,
            progressed_at=self._floats[row + _PROGRESSED_AT] or None,
            listens=bool(listens),
            told=bool(told),
            ended=bool(ended),
        )

    def _clear_rows(self) -> None:
        for row in range(_row(0), _row(self._integers[_PAGE_RANKS]), _FIELDS):
            for field in (_PID, _RANK, _LISTENS, _TOLD, _ENDED):
                self._integers[row + field] = 0
            self._integers[row + _STEP] = _NO_STEP
            self._floats[row + _PROGRESSED_AT] = 0.0


class _Slot:
    """The page as one worker holds it: its own row, and the request to stop."""

    __slots__ = ("_floats", "_integers", "_metrics", "_row")

    def __init__(self, page: HeartbeatPage, local_rank: int, metrics: MetricPage | None) -> None:
        self._metrics = metrics
        # They keep the mapping; a child that is forked shares it.
        self._integers = page._integers
        self._floats = page._floats
        self._row = _row(local_rank)
        # Said at once where the page has no such row, and not in the middle of training.
        self._floats[self._row + _FIELDS - 1]

    def progress(self, step: int, total: int | None, values: Mapping[str, float]) -> None:
        step = min(max(step, _NO_STEP + 1), _MOST_STEPS)
        self._integers[self._row + _STEP] = step
        self._floats[self._row + _PROGRESSED_AT] = time.monotonic()
        if self._metrics is not None:
            self._metrics.append(step, total, values)

    def beat(self) -> None:
        self._floats[self._row + _PROGRESSED_AT] = time.monotonic()

    def stop_requested(self) -> bool:
        integers = self._integers
        integers[self._row + _LISTENS] = 1
        stop = integers[_PAGE_STOP]
        if not stop or stop != integers[_PAGE_ROUND]:
            return False
        integers[self._row + _TOLD] = 1
        return True


def _row(local_rank: int) -> int:
    return _FIELDS * (1 + local_rank)


@functools.cache
def _own_slot() -> _Slot | None:
    """This worker's row; None where nobody listens. Looked up once in a process."""
    value = os.environ.get(PAGE_VARIABLE)
    if not value:
        return None
    path, _, local_rank = value.rpartition(":")
    try:
        # Rank 0 is the first worker of its node.
        metrics = _metrics_beside(Path(path)) if local_rank == "0" else None
        return _Slot(HeartbeatPage.open(Path(path)), int(local_rank), metrics)
    except (OSError, ValueError, IndexError) as error:
        # As in a process that outlives its agent, or a container without the agent's folder: no reason to fail.
        logger.warning("Nobody is told of the progress of this process: %s=%s: %s", PAGE_VARIABLE, value, error)
        return None


def _metrics_beside(path: Path) -> MetricPage | None:
    # Not above: the guardian loads this module by its file.
    from kfpytorch_ray.metric_page import METRICS_NAME, MetricPage

    metrics = path.with_name(METRICS_NAME)
    return MetricPage.open(metrics) if metrics.exists() else None


# A worker is a fork of a server that is no worker, and whose environment says so.
os.register_at_fork(after_in_child=_own_slot.cache_clear)
