"""What ``flytekitplugins.kfpytorch.task`` offers, under the same names. flytekit imports this module by an entry point.

That registers the task classes (kfpytorch_ray.task_classes), at the end of flytekit's own import. Where one of our
modules is what imports flytekit, that module is half made, and what builds on it cannot be imported yet. Then the task
classes are imported when they are needed: by the first ``Elastic`` or ``PyTorch``, by who asks for one of them here, or
where upstream's types are routed, when flytekit looks for their class.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.config import CleanPodPolicy, Elastic, Master, PyTorch, RestartPolicy, RunPolicy, Worker
from kfpytorch_ray.errors import TORCH_IMPORT_ERROR_MESSAGE
from kfpytorch_ray.results import ElasticWorkerResult
from kfpytorch_ray.routing import route_if_switched_on

if TYPE_CHECKING:
    from kfpytorch_ray.flyte_worker import spawn_helper
    from kfpytorch_ray.task_classes import PytorchElasticFunctionTask, PyTorchFunctionTask

__all__ = [
    "TORCH_IMPORT_ERROR_MESSAGE",
    "CleanPodPolicy",
    "Elastic",
    "ElasticWorkerResult",
    "Master",
    "PyTorch",
    "PyTorchFunctionTask",
    "PytorchElasticFunctionTask",
    "RestartPolicy",
    "RunPolicy",
    "Worker",
    "spawn_helper",
]

_HOMES = {
    "PyTorchFunctionTask": "kfpytorch_ray.task_classes",
    "PytorchElasticFunctionTask": "kfpytorch_ray.task_classes",
    "spawn_helper": "kfpytorch_ray.flyte_worker",
}
"""Where the names live that are imported above for type checkers only."""

if not TYPE_CHECKING:
    # Hidden from type checkers, for which it would make any name an attribute of this module.

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        return getattr(importlib.import_module(_HOMES[name]), name)


def _a_module_is_half_made() -> bool:
    """Whether the import of a module of ours, other than this one, has begun and not ended."""
    return any(
        name.startswith("kfpytorch_ray.")
        and name != __name__
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in tuple(sys.modules.items())
    )


if _a_module_is_half_made():
    route_if_switched_on()
else:
    importlib.import_module("kfpytorch_ray.task_classes")
