"""What of a job config Ray cannot honour: said when the task is defined, never dropped in silence. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from flytekit import Secret
from flytekit.core.context_manager import SecretsManager

from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import is_elastic, one_of
from kfpytorch_ray.cluster.environment import carried_environment
from kfpytorch_ray.config import (
    LOGS,
    ON_INTERRUPT,
    CallOptions,
    RayBackend,
    RayRunOptions,
    RestartPolicy,
    StoredRunOptions,
)
from kfpytorch_ray.rank_decks import CHOICES
from kfpytorch_ray.storage import problem_of_uri
from kfpytorch_ray.task_arguments import TaskArguments

LEAST_LOG_BYTES = 4096
"""A bound below which no traceback would be whole."""

_HONOURED_RDZV_KEYS = frozenset({"join_timeout", "timeout", "last_call_timeout"})


def find(config: JobConfig, options: RayBackend) -> Findings:
    """Fields of ``config`` that change nothing on Ray, and fields that would change results if they were ignored."""
    problems = [
        *_amount_problems(options),
        *_seconds_problems(options, "keep_warm_s"),
        *run_option_problems(options),
        *stored_option_problems(options),
        *_remote_problems(options),
    ]
    found = job_findings(config)
    problems += found.problems
    if not is_elastic(config) and options.resources_per_node is not None and _own_resources(config):
        problems.append("RayBackend(resources_per_node) would override the resources of master and worker: give one")
    warnings = [*_run_policy_warnings(config.run_policy), *found.warnings]
    if options.keep_warm_s and (options.address or "").startswith(("http://", "https://")):
        warnings.append("RayBackend(keep_warm_s) has no effect on a remote cluster: a run's driver ends with the run")
    return Findings(tuple(problems), tuple(warnings))


def job_findings(config: JobConfig) -> Findings:
    """What no run on Ray can honour of an ``Elastic`` or a ``PyTorch``, however its cluster is had."""
    return Findings(warnings=tuple(_elastic_warnings(config))) if is_elastic(config) else _replica_findings(config)


def lost(config: JobConfig, options: RayBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive at the nodes of a Ray that is there already, or means something else."""
    found = [*find(config, options).warnings]
    if arguments.resources.requests.ephemeral_storage or arguments.resources.limits.ephemeral_storage:
        found.append("ephemeral_storage counts for the driver's pod only: Ray cannot reserve disk space")
    found += [
        f"{name} shapes the driver's pod only: Ray's nodes are there already"
        for name in ("accelerator", "pod_template", "pod_template_name", "shared_memory")
        if getattr(arguments, name)
    ]
    return (*found, *lost_secrets(options, arguments))


def lost_secrets(options: RayBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """The secrets of a task that workers on other machines than the driver's do not have."""
    if options.address == "local":
        return ()
    return tuple(
        f"secret_requests: {variable} is in the driver's pod only, not in workers on other machines. Have Flyte give "
        "it as a variable, Secret(mount_requirement=Secret.MountType.ENV_VAR), and carry it, "
        f"RayBackend(carried_environment=(*DEFAULT_CARRIED_ENVIRONMENT, {variable!r})): its value then travels with "
        "the call, and where the cluster is remote, lies in the storage"
        for secret in arguments.secrets
        if (variable := secret_variable(secret)) not in carried_environment({variable: ""}, options.carried_environment)
        or secret.mount_requirement is not Secret.MountType.ENV_VAR
    )


def secret_variable(secret: Secret) -> str:
    """The variable in which the function looks for a secret: of its own name, else flytekit's."""
    named: str | None = secret.env_var
    return named or str(SecretsManager().get_secrets_env_var(secret.group, secret.key, secret.group_version))


def _amount_problems(options: RayBackend) -> list[str]:
    amounts = options.resources_per_node
    if amounts is None:
        return []
    if not isinstance(amounts, dict):
        return [f"RayBackend(resources_per_node) must be a dict of amounts, not {amounts!r}"]
    return [
        f"RayBackend(resources_per_node): {name!r} must be a number that is not negative, not {amount!r}"
        for name, amount in amounts.items()
        if not is_amount(amount)
    ]


def call_option_problems(options: CallOptions) -> list[str]:
    """What is wrong with the options that every call in processes elsewhere has."""
    backend = type(options).__name__
    problems = _seconds_problems(options, "stop_grace_s")
    environment = options.env
    if not (
        isinstance(environment, dict) and all(isinstance(text, str) for pair in environment.items() for text in pair)
    ):
        problems.append(f"{backend}(env) must be a dict of strings")
    return problems + _tuple_problems(options, "carried_environment", "excludes")


def run_option_problems(options: RayRunOptions) -> list[str]:
    """What is wrong with the options that both Ray backends have."""
    backend = type(options).__name__
    problems = call_option_problems(options) + _seconds_problems(options, "checkpoint_grace_s", "grow_cooldown_s")
    problems += [
        f"{backend}({name}) must be a number of seconds greater than 0"
        for name, value in (
            ("silence_timeout_s", options.silence_timeout_s),
            ("hang_timeout_s", options.hang_timeout_s),
        )
        if not (is_amount(value) and value) and not (name != "silence_timeout_s" and value is None)
    ]
    if options.decks not in CHOICES:
        problems.append(f"{backend}(decks={options.decks!r}): expected {one_of(CHOICES)}")
    failures = options.max_node_failures
    if not isinstance(failures, int) or isinstance(failures, bool) or failures < 0:
        problems.append(f"{backend}(max_node_failures) must be a whole number that is not negative")
    problems += _tuple_problems(options, "preload")
    problems += _log_problems(options)
    runtime_env = options.runtime_env
    if runtime_env is not None and not isinstance(runtime_env, dict):
        problems.append(f"{backend}(runtime_env) must be a dict, not {runtime_env!r}")
    elif runtime_env is not None:
        problems += [
            f"{backend}(runtime_env): give {name!r} as {backend}({name}=...)"
            for name in ("working_dir", "excludes")
            if name in runtime_env
        ]
    return problems


def _log_problems(options: RayRunOptions) -> list[str]:
    backend = type(options).__name__
    problems = []
    if options.logs not in LOGS:
        problems.append(f"{backend}(logs={options.logs!r}): expected {one_of(LOGS)}")
    size = options.max_log_bytes
    if not isinstance(size, int) or isinstance(size, bool) or size < LEAST_LOG_BYTES:
        problems.append(f"{backend}(max_log_bytes) must be a whole number of bytes, at least {LEAST_LOG_BYTES}")
    folder = options.log_folder
    if folder and (problem := problem_of_uri(folder)):
        problems.append(f"{backend}(log_folder) {problem}")
    return problems


def _seconds_problems(options: CallOptions, *names: str) -> list[str]:
    return [
        f"{type(options).__name__}({name}) must be a number of seconds that is not negative"
        for name in names
        if not is_amount(getattr(options, name))
    ]


def _tuple_problems(options: CallOptions, *names: str) -> list[str]:
    # A string is a sequence of strings, too: "HF_*" would carry everything by its last letter.
    return [
        f"{type(options).__name__}({name}) must be a tuple of strings, not {value!r}"
        for name in names
        if isinstance(value := getattr(options, name), str) or not all(isinstance(item, str) for item in value)
    ]


def _remote_problems(options: RayBackend) -> list[str]:
    """Of the options of a cluster that is elsewhere. No message repeats a header: it may hold a token."""
    problems = []
    address = options.address
    if address is not None and "://" in address and not address.startswith(("http://", "https://")):
        problems.append(
            f"RayBackend(address={address!r}): a remote cluster is reached by its job API, 'http://HOST:8265' (Ray "
            "Client, ray://, cannot drive a training); one that this machine belongs to by 'auto' or 'HOST:PORT'"
        )
    if address is not None and (urlsplit(address).username or urlsplit(address).password):
        problems.append(
            "RayBackend(address) has credentials in it, which would be shown: give them as "
            "RayBackend(headers={'Authorization': ...})"
        )
    if not (
        isinstance(options.headers, dict)
        and all(isinstance(text, str) for pair in options.headers.items() for text in pair)
    ):
        problems.append("RayBackend(headers) must be a dict of strings")
    if not isinstance(options.verify, bool | str):
        problems.append(f"RayBackend(verify) must be True, False or a path, not {options.verify!r}")
    return problems


def stored_option_problems(options: StoredRunOptions) -> list[str]:
    """What is wrong with the options of a run whose cluster is elsewhere."""
    backend = type(options).__name__
    problems = []
    if options.storage is not None and (problem := problem_of_uri(options.storage)):
        problems.append(f"{backend}(storage) {problem}")
    if options.on_interrupt not in ON_INTERRUPT:
        problems.append(f"{backend}(on_interrupt={options.on_interrupt!r}): expected {one_of(ON_INTERRUPT)}")
    problems += _seconds_problems(options, "retention_s", "reconnect_timeout_s")
    if options.lease_s is not None and not (is_amount(options.lease_s) and options.lease_s):
        problems.append(f"{backend}(lease_s) must be a number of seconds greater than 0")
    size = options.max_working_dir_bytes
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        problems.append(f"{backend}(max_working_dir_bytes) must be a whole number of bytes greater than 0")
    return problems


def without_effect(options: RayBackend) -> list[str]:
    """Options of a cluster that is elsewhere which were given although this process is the driver."""
    plain = RayBackend()
    return [
        f"RayBackend({name}) has no effect: it is for a remote cluster (address='http://HOST:8265'), and this process "
        "is the driver"
        for name in ("storage", "headers", "verify", "on_interrupt", "lease_s", "retention_s", "reconnect_timeout_s")
        if getattr(options, name) != getattr(plain, name)
    ]


def is_amount(value: object) -> bool:
    """Whether a value is a finite number that is not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _run_policy_warnings(policy: Any) -> list[str]:
    if policy is None:
        return []
    warnings = []
    if policy.ttl_seconds_after_finished is not None:
        warnings.append("run_policy.ttl_seconds_after_finished has no effect on Ray: nothing stays behind")
    if policy.clean_pod_policy is not None:
        warnings.append("run_policy.clean_pod_policy has no effect on Ray: it has no pods of its own")
    return warnings


def _elastic_warnings(config: Any) -> list[str]:
    """Fields of an ``Elastic`` that change nothing on Ray."""
    warnings = []
    # What is no dict of strings is a problem that kfpytorch_ray.checks names.
    keys = config.rdzv_configs.keys() if isinstance(config.rdzv_configs, dict) else ()
    if ignored := sorted(str(key) for key in keys if key not in _HONOURED_RDZV_KEYS):
        warnings.append(f"rdzv_configs {', '.join(ignored)} have no effect on Ray: its controller needs no rendezvous")
    if config.run_policy is not None and config.run_policy.backoff_limit is not None:
        warnings.append("run_policy.backoff_limit has no effect on Ray: max_restarts counts restarts")
    if config.start_method == "fork":
        warnings.append("start_method='fork' is served by a fork server on Ray: workers inherit nothing of the driver")
    return warnings


def _own_resources(config: Any) -> bool:
    return any(part is not None for role in (config.master, config.worker) for part in (role.requests, role.limits))


def _replica_findings(config: Any) -> Findings:
    """Fields of a ``PyTorch`` job's replicas that Ray cannot honour."""
    problems = []
    restarts = False
    for role, replica in (("master", config.master), ("worker", config.worker)):
        if replica.image is not None:
            problems.append(f"{role}.image: Ray nodes run the image of their cluster; leave it out")
        policy = replica.restart_policy
        if policy is None:
            continue
        if policy.value == RestartPolicy.ALWAYS.value:
            problems.append(f"{role}.restart_policy ALWAYS would run a function again that has returned; use FAILURE")
        restarts |= policy.value == RestartPolicy.FAILURE.value
    roles = {replica.restart_policy.value for replica in (config.master, config.worker) if replica.restart_policy}
    if {RestartPolicy.NEVER.value, RestartPolicy.FAILURE.value} <= roles:
        problems.append("restart_policy: on Ray all replicas restart together, so both roles need the same one")
    backoff_limit = None if config.run_policy is None else config.run_policy.backoff_limit
    if restarts and backoff_limit is None:
        problems.append("restart_policy FAILURE needs run_policy.backoff_limit on Ray: how often may the group start?")
    warnings = []
    if backoff_limit is not None and not restarts:
        warnings.append("run_policy.backoff_limit has no effect without restart_policy FAILURE")
    return Findings(tuple(problems), tuple(warnings))
