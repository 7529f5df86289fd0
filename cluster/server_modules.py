"""What the fork servers of a launch import, and how they are told of the user's modules."""

from __future__ import annotations

import json

from kfpytorch_ray.cluster.environment import PRELOAD_VARIABLE
from kfpytorch_ray.cluster.protocol import AgentSetup

SERVER_MODULES = (
    "kfpytorch_ray.cluster.uncollected",
    "numpy",
    "torch",
    "torch.distributed",
    "flytekit.bin.entrypoint",
    "kfpytorch_ray.cluster.supervisor",
    "kfpytorch_ray.cluster.preloaded",
)
"""Without garbage collection from the first on; the last imports what the user names."""


def users_modules(setup: AgentSetup) -> dict[str, str]:
    """The variable that tells a fork server of ``RayBackend(preload=...)``."""
    return {PRELOAD_VARIABLE: json.dumps({"modules": setup.preload, "sys_path": setup.sys_path})}
