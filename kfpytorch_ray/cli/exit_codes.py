"""What the exit code of a command says: one table from classes of errors, which ``--help`` and the README show.

A script can tell by it whether to correct something, to try again, to wait, or to look at the training itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from kfpytorch_ray.errors import (
    BackendUnavailableError,
    ClusterError,
    ConfigError,
    InfeasibleError,
    KfpytorchRayError,
    LaunchError,
    LaunchInterruptedError,
    NodeLostError,
    PayloadError,
    PlacementError,
    ResultCollectedError,
    RunLostError,
    RunPendingError,
    RunStoppedError,
    StorageError,
    UnknownRunError,
)


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1
    MISUSE = 2
    """click's own for wrong options."""
    NO_NODES = 3
    UNREACHABLE = 4
    RUNNING = 5
    STOPPED = 6
    INTERRUPTED = 130
    """A shell's for a process that SIGINT ended."""
    TERMINATED = 143
    """The same for SIGTERM."""


MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "the training failed, or a check of doctor",
    ExitCode.MISUSE: "wrong use: an option, a request that fits no node, no such run or result",
    ExitCode.NO_NODES: "nodes were not to be had, or were lost: try again",
    ExitCode.UNREACHABLE: "the cluster or the storage cannot be reached, or refuses",
    ExitCode.RUNNING: "the run has not ended yet (result --timeout)",
    ExitCode.STOPPED: "the run was stopped: cancelled, or its lease ran out",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.TERMINATED: "ended by SIGTERM, in order",
}
"""For people, in one line each."""

_CODES: Mapping[type[KfpytorchRayError], ExitCode] = {
    KfpytorchRayError: ExitCode.FAILED,
    ConfigError: ExitCode.MISUSE,
    BackendUnavailableError: ExitCode.MISUSE,
    PayloadError: ExitCode.MISUSE,
    PlacementError: ExitCode.NO_NODES,
    InfeasibleError: ExitCode.MISUSE,
    ClusterError: ExitCode.UNREACHABLE,
    StorageError: ExitCode.UNREACHABLE,
    UnknownRunError: ExitCode.MISUSE,
    ResultCollectedError: ExitCode.MISUSE,
    RunPendingError: ExitCode.RUNNING,
    RunStoppedError: ExitCode.STOPPED,
    LaunchError: ExitCode.FAILED,
    NodeLostError: ExitCode.NO_NODES,
    RunLostError: ExitCode.NO_NODES,
    LaunchInterruptedError: ExitCode.INTERRUPTED,
}
"""An error that is not listed has the code of the nearest class above it."""


def exit_code_of(error: KfpytorchRayError) -> ExitCode:
    """The exit code of a command that ended with this error."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def described() -> tuple[str, ...]:
    """All codes and what they say."""
    return tuple(f"{code.value:<3} {meaning}" for code, meaning in MEANINGS.items())
