"""Flyte's torch elastic tasks with a choice of backend: Kubeflow PyTorchJob, or Ray.

Everything a user imports. ``kfpytorch_ray.task`` mirrors ``flytekitplugins.kfpytorch.task``. Neither ray nor torch
nor kubernetes is imported until a task needs it.
"""

# First, because flytekit imports kfpytorch_ray.task by its entry point: begun from one of our modules, that would
# find the module half made.
import flytekit as _flytekit  # noqa: F401, I001

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
from kfpytorch_ray.launch import launch
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.routing import route_upstream
from kfpytorch_ray.run import Run, RunStatus, attach
from kfpytorch_ray.task import PyTorchFunctionTask, PytorchElasticFunctionTask

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
