"""What is wrong with a job config, whatever the backend: one sentence for each problem.

Pure functions without torch or a cluster. They read configs by attribute, so that upstream's classes pass through
them too. The task classes and ``launch()`` gather the sentences into one ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfpytorch_ray.backends import JobConfig

START_METHODS = ("spawn", "fork", "forkserver")

_RUN_POLICY_NUMBERS = ("ttl_seconds_after_finished", "active_deadline_seconds", "backoff_limit")


def deadline_s(config: JobConfig) -> int | None:
    """Seconds that a job may run; None: no limit. 0 is none, too: Flyte's messages cannot tell it from not given."""
    policy = config.run_policy
    return (policy.active_deadline_seconds or None) if policy else None


def is_elastic(config: JobConfig) -> bool:
    """Whether a config describes a torch elastic job, ours or upstream's; if not, it is a ``PyTorch`` job."""
    return hasattr(config, "nnodes")


def parse_nnodes(value: int | str) -> tuple[int, int]:
    """Fewest and most nodes, from ``4``, ``"4"`` or ``"2:4"`` (torchrun's notation).

    Raises:
        ValueError: Not such a value, or not ``1 <= MIN <= MAX``.
    """
    problem = f"nnodes={value!r}: expected a number of nodes >= 1, or a range 'MIN:MAX' with 1 <= MIN <= MAX"
    # bool is an int, but True is no number of nodes: its text is not decimal either.
    parts = str(value).split(":") if isinstance(value, int | str) else []
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(problem)
    low, high = int(parts[0]), int(parts[-1])
    if not 1 <= low <= high:
        raise ValueError(problem)
    return low, high


def worker_count(config: Any) -> int:
    """Workers of a ``PyTorch`` job beside its master, by either spelling."""
    count: int = config.num_workers or config.worker.replicas or 0
    return count


def problems_of(config: JobConfig) -> tuple[str, ...]:
    """Every problem of an ``Elastic`` or ``PyTorch`` config."""
    own = _elastic_problems(config) if is_elastic(config) else _pytorch_problems(config)
    return (*own, *_run_policy_problems(config.run_policy))


def _elastic_problems(config: Any) -> list[str]:
    problems = []
    try:
        parse_nnodes(config.nnodes)
    except ValueError as error:
        problems.append(str(error))
    if not _is_whole(config.nproc_per_node, 1):
        problems.append(f"nproc_per_node={config.nproc_per_node!r}: expected a number of workers >= 1")
    if config.start_method not in START_METHODS:
        problems.append(f"start_method={config.start_method!r}: Bad start method, expected {one_of(START_METHODS)}")
    if not _is_whole(config.max_restarts, 0):
        problems.append(f"max_restarts={config.max_restarts!r}: expected a number of restarts >= 0")
    if not _is_number(config.monitor_interval) or not config.monitor_interval > 0:
        problems.append(f"monitor_interval={config.monitor_interval!r}: expected a number of seconds > 0")
    if not isinstance(config.rdzv_configs, dict):
        problems.append(f"rdzv_configs={config.rdzv_configs!r}: expected a dict of settings")
    else:
        problems.extend(_timeout_problems(config.rdzv_configs))
    return problems


def _timeout_problems(rdzv_configs: Mapping[str, Any]) -> list[str]:
    return [
        f"rdzv_configs[{key!r}]={rdzv_configs[key]!r}: expected a number of seconds > 0"
        for key in ("join_timeout", "timeout", "last_call_timeout")
        if key in rdzv_configs and not _is_seconds(rdzv_configs[key])
    ]


def _pytorch_problems(config: Any) -> list[str]:
    replicas = config.worker.replicas
    if config.num_workers and replicas:
        return [f"num_workers={config.num_workers!r} and worker.replicas={replicas!r}: give worker.replicas only"]
    if config.num_workers is None and replicas is None:
        return ["worker.replicas is missing: give the number of workers beside the master"]
    return [
        f"{name}={value!r}: expected a number of workers >= 0"
        for name, value in (("num_workers", config.num_workers), ("worker.replicas", replicas))
        if value is not None and not _is_whole(value, 0)
    ]


def _run_policy_problems(run_policy: Any) -> list[str]:
    if run_policy is None:
        return []
    return [
        f"run_policy.{name}={value!r}: expected a whole number >= 0"
        for name in _RUN_POLICY_NUMBERS
        if (value := getattr(run_policy, name)) is not None and not _is_whole(value, 0)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_seconds(value: Any) -> bool:
    """Whether torch elastic, which reads its settings with ``float()`` or ``int()``, takes this as a time-out."""
    try:
        return not isinstance(value, bool) and float(value) > 0
    except (TypeError, ValueError):
        return False


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def one_of(names: tuple[str, ...]) -> str:
    """The values that an argument may have, for a message."""
    return "one of " + ", ".join(repr(name) for name in names)
