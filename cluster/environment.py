"""The environment of workers: what comes from the driver, and what the node gives. Pure functions over mappings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase

from kfpytorch_ray.config import CallOptions
from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_VARIABLE
from kfpytorch_ray.plan import LaunchPlan

logger = logging.getLogger(__name__)

PRELOAD_VARIABLE = "KFPYTORCH_RAY_PRELOAD"
"""Tells a fork server of the user's modules, in JSON: their names and where they are. Its forks do not have it."""

NEVER_CARRIED = (
    "PATH",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "HOSTNAME",
    "PWD",
    "TMPDIR",
    "VIRTUAL_ENV",
    "*_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH*",
    "CUDNN_PATH",
    "TORCH_HOME",
    "TORCH_EXTENSIONS_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "RAY_*",
    MARK_VARIABLE,
    PAGE_VARIABLE,
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_*",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PET_*",
    "TORCHELASTIC_*",
)
"""Patterns of variables that mean something else on another machine or in another rank; they win over the user's."""


def carried_environment(driver: Mapping[str, str], patterns: tuple[str, ...]) -> dict[str, str]:
    """The driver's variables that match one of the shell ``patterns``, less those that never travel."""
    return {
        name: value for name, value in driver.items() if _matches(name, patterns) and not _matches(name, NEVER_CARRIED)
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def launch_environment(driver: Mapping[str, str], plan: LaunchPlan, options: CallOptions) -> dict[str, str]:
    """What a launch lays over each node's environment; later sources win.

    The driver's carried variables, the names of the Flyte execution, the task's ``environment``, the backend's
    ``env``. As by torchrun, OMP_NUM_THREADS becomes 1 where several workers share a node and nobody set it.
    """
    environment = {
        **carried_environment(driver, options.carried_environment),
        **plan.flyte.execution_id,
        **plan.environment,
        **options.env,
    }
    return one_thread_each(environment, plan.nproc_per_node)


def one_thread_each(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """OMP_NUM_THREADS=1 where nobody set it and ``workers`` share a machine, so that they do not fight for cores."""
    if "OMP_NUM_THREADS" in environment or workers < 2:
        return dict(environment)
    logger.warning(
        "OMP_NUM_THREADS is not set: each of the %s workers on one machine gets 1 thread, as by torchrun. "
        "Set it in the task's environment to use more.",
        workers,
    )
    return {**environment, "OMP_NUM_THREADS": "1"}


def node_environment(node: Mapping[str, str], launch: Mapping[str, str]) -> dict[str, str]:
    """A node's own environment with that of the launch laid over it.

    Ray sets OMP_NUM_THREADS in its workers to their number of CPUs; torchrun does not, so the node's is dropped.
    """
    return {**{name: value for name, value in node.items() if name != "OMP_NUM_THREADS"}, **launch}
