"""Flyte's torch elastic tasks with a choice of backend: Kubeflow PyTorchJob, or Ray.

Everything a user imports. ``kfpytorch_ray.task`` mirrors ``flytekitplugins.kfpytorch.task``. A name is imported when it
is first asked for (PEP 562), because the processes on a cluster's nodes import this package, too: flytekit alone, which
an agent does not need, would cost each of them most of a second. Neither ray nor torch nor kubernetes is imported until
a task needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfpytorch_ray.config import (
        CleanPodPolicy,
        Elastic,
        KubeflowBackend,
        KubeRayBackend,
        Master,
        PyTorch,
        RayBackend,
        RestartPolicy,
        RunPolicy,
        Worker,
    )
    from kfpytorch_ray.errors import (
        TORCH_IMPORT_ERROR_MESSAGE,
        AuthenticationError,
        BackendUnavailableError,
        ClusterError,
        ClusterUnreachableError,
        ConfigError,
        DeadlineExceededError,
        InfeasibleError,
        IntegrityError,
        KfpytorchRayError,
        LaunchError,
        LaunchInterruptedError,
        NodeLostError,
        PayloadError,
        PlacementError,
        PlacementTimeoutError,
        RecoverableWorkerError,
        ResultCollectedError,
        ResultError,
        RunError,
        RunLostError,
        RunPendingError,
        RunStoppedError,
        StorageError,
        UnknownRunError,
        VersionMismatchError,
        WorkerFailedError,
        WorkerHungError,
        WorkingDirError,
    )
    from kfpytorch_ray.flyte_worker import spawn_helper
    from kfpytorch_ray.heartbeat import progress, stop_requested
    from kfpytorch_ray.inspection import flamegraph, stacks
    from kfpytorch_ray.plain_call import launch
    from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
    from kfpytorch_ray.routing import route_upstream
    from kfpytorch_ray.run import Run, RunStatus, attach
    from kfpytorch_ray.task_classes import PytorchElasticFunctionTask, PyTorchFunctionTask

__all__ = [
    "TORCH_IMPORT_ERROR_MESSAGE",
    "AuthenticationError",
    "BackendUnavailableError",
    "CleanPodPolicy",
    "ClusterError",
    "ClusterUnreachableError",
    "ConfigError",
    "DeadlineExceededError",
    "Elastic",
    "ElasticResult",
    "ElasticWorkerResult",
    "InfeasibleError",
    "IntegrityError",
    "KfpytorchRayError",
    "KubeRayBackend",
    "KubeflowBackend",
    "LaunchError",
    "LaunchInterruptedError",
    "Master",
    "NodeLostError",
    "PayloadError",
    "PlacementError",
    "PlacementTimeoutError",
    "PyTorch",
    "PyTorchFunctionTask",
    "PytorchElasticFunctionTask",
    "RayBackend",
    "RecoverableWorkerError",
    "RestartPolicy",
    "ResultCollectedError",
    "ResultError",
    "Run",
    "RunError",
    "RunLostError",
    "RunPendingError",
    "RunPolicy",
    "RunStatus",
    "RunStoppedError",
    "StorageError",
    "UnknownRunError",
    "VersionMismatchError",
    "Worker",
    "WorkerFailedError",
    "WorkerHungError",
    "WorkingDirError",
    "attach",
    "flamegraph",
    "launch",
    "progress",
    "route_upstream",
    "spawn_helper",
    "stacks",
    "stop_requested",
]

_NAMES = {
    "config": (
        "CleanPodPolicy",
        "Elastic",
        "KubeflowBackend",
        "KubeRayBackend",
        "Master",
        "PyTorch",
        "RayBackend",
        "RestartPolicy",
        "RunPolicy",
        "Worker",
    ),
    "errors": (
        "TORCH_IMPORT_ERROR_MESSAGE",
        "AuthenticationError",
        "BackendUnavailableError",
        "ClusterError",
        "ClusterUnreachableError",
        "ConfigError",
        "DeadlineExceededError",
        "InfeasibleError",
        "IntegrityError",
        "KfpytorchRayError",
        "LaunchError",
        "LaunchInterruptedError",
        "NodeLostError",
        "PayloadError",
        "PlacementError",
        "PlacementTimeoutError",
        "RecoverableWorkerError",
        "ResultCollectedError",
        "ResultError",
        "RunError",
        "RunLostError",
        "RunPendingError",
        "RunStoppedError",
        "StorageError",
        "UnknownRunError",
        "VersionMismatchError",
        "WorkerFailedError",
        "WorkerHungError",
        "WorkingDirError",
    ),
    "flyte_worker": ("spawn_helper",),
    "heartbeat": ("progress", "stop_requested"),
    "inspection": ("flamegraph", "stacks"),
    "plain_call": ("launch",),
    "results": ("ElasticResult", "ElasticWorkerResult"),
    "routing": ("route_upstream",),
    "run": ("Run", "RunStatus", "attach"),
    "task_classes": ("PyTorchFunctionTask", "PytorchElasticFunctionTask"),
}
"""Where the names live that are imported above for type checkers only."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:
    # Hidden from type checkers, for which it would make any name an attribute of this package.

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        # A module of ours, such as kfpytorch_ray.errors, needs no import of its own.
        if name.startswith("_") or not name.isidentifier() or not importlib.util.find_spec(f"{__name__}.{name}"):
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        return importlib.import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
