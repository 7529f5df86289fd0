"""What KubeRay, reached through Flyte, cannot honour: refused or said when the task is defined, listed by ``render``.

What Flyte does is read in its source at v1.16.8 (flyteplugins/go/tasks/plugins/k8s/ray/ray.go and
pluginmachinery/flytek8s); the reasons name the rule. Pure.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from flytekit import PodTemplate, Resources

from kfpytorch_ray.adapters.flyte_ray import DEFAULT_TTL_S, HEAD_CONTAINER, WORKER_CONTAINER
from kfpytorch_ray.adapters.kuberay_manifest import deletion_rules
from kfpytorch_ray.adapters.kubernetes_findings import (
    json_problems,
    kubernetes_option_problems,
    left_to_flyte,
    text_problems,
)
from kfpytorch_ray.adapters.ray_findings import job_findings, run_option_problems, stored_option_problems
from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import deadline_s, one_of
from kfpytorch_ray.config import CallOptions, KubeRayBackend, KubernetesOptions
from kfpytorch_ray.errors import explain
from kfpytorch_ray.planning import amount_of
from kfpytorch_ray.pod_template import primary_container
from kfpytorch_ray.task_arguments import TaskArguments

_OWNED_BY_US = frozenset({"num-cpus", "num-gpus", "resources"})

SUBMISSION_MODES = ("K8sJobMode", "SidecarMode", "HTTPMode")
"""Of KubeRay, less the one in which a person submits the job."""

_SHARED = {"gpu_resource", *(field.name for field in fields(CallOptions))}
_WITHOUT_FLYTE = (
    *sorted({field.name for field in fields(KubernetesOptions)} - _SHARED),
    *("cluster", "ray_version", "submission_mode"),
)
"""Options that have no effect under Flyte, which creates the RayJob itself."""

OVERRIDES = (
    "with_overrides(requests=, limits=, resources=) of a workflow node changes the submitting pod only, because head "
    "and workers bring resources of their own: give them to @task"
)
"""Cannot be seen in a task, so it is said of every one."""

_NOT_BY_FLYTE = "Flyte 1.16.8 takes one container of a group's own pod, {!r}, and drops what else is in it."
_BY_THE_TASK = (
    "Give them by @task(pod_template=), behind the primary container; without Flyte they are taken here, too."
)


def find(config: JobConfig, options: KubeRayBackend) -> Findings:
    """Fields of a config that cannot be honoured."""
    found = job_findings(config)
    problems = [
        *run_option_problems(options),
        *stored_option_problems(options),
        *_option_problems(options),
        *_direct_problems(options),
        *found.problems,
    ]
    warnings = [*_run_policy_warnings(config.run_policy), *found.warnings]
    if not config.increase_shared_mem:
        warnings.append("increase_shared_mem=False has no effect: KubeRay mounts /dev/shm in every pod of Ray's")
    return Findings(tuple(problems), tuple(warnings))


def find_in_arguments(options: KubeRayBackend, arguments: TaskArguments) -> Findings:
    """What stands beside the config and cannot be honoured."""
    warnings = []
    if arguments.accelerator is not None:
        warnings.append(
            "accelerator has no effect: Flyte looks for GPUs in the task's own container, the submitting pod's; "
            "select nodes by KubeRayBackend(worker_pod_template=PodTemplate(V1PodSpec(node_selector=...)))"
        )
    problems = [*_resource_problems(arguments), *_repeated(options, arguments)]
    if arguments.pod_template is not None:
        problems += _template_problems(arguments.pod_template)
    if arguments.environment.get("FLYTE_FAIL_ON_ERROR"):
        problems.append(
            "environment FLYTE_FAIL_ON_ERROR: with another exit code than 0 Flyte does not read the error file and "
            "runs the task again; leave it out"
        )
    return Findings(tuple(problems), tuple(warnings))


def lost(config: JobConfig, options: KubeRayBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else, on the way through Flyte to KubeRay."""
    found = [*find(config, options).warnings, *find_in_arguments(options, arguments).warnings]
    policy = config.run_policy
    if policy is None or policy.ttl_seconds_after_finished is None:
        found.append(
            f"run_policy.ttl_seconds_after_finished=None means {DEFAULT_TTL_S} s here, not for ever: Flyte always has "
            "KubeRay remove the cluster"
        )
    if deadline_s(config) is not None:
        found.append(
            "run_policy.active_deadline_seconds counts from the driver's start: Flyte cannot set it on the RayJob, so "
            "pods that never start are bounded by @task(timeout=) only"
        )
    plain = KubeRayBackend()
    found += [
        f"KubeRayBackend({name}) has no effect under Flyte, which creates the RayJob itself"
        for name in _WITHOUT_FLYTE
        if getattr(options, name) != getattr(plain, name)
    ]
    if not arguments.bounded:
        found.append(
            "rdzv join time-outs do not bound the wait for the first pods, because the driver starts when all of them "
            "run, and Flyte does not look at pending ones: set @task(timeout=)"
        )
    if arguments.pod_template is not None:
        found.append("pod_template shapes head, workers and submitting pod alike; so do its node selectors")
    return (*dict.fromkeys(found), OVERRIDES)


def lost_without_flyte(config: JobConfig, options: KubeRayBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else, in a RayJob that this process creates."""
    found = [*find(config, options).warnings]
    policy = config.run_policy
    ttl = policy.ttl_seconds_after_finished if policy else None
    if deletion_rules(options):
        if ttl is not None:
            found.append("run_policy.ttl_seconds_after_finished has no effect: spec's deletionRules say what goes when")
    elif ttl is None:
        found.append(
            f"run_policy.ttl_seconds_after_finished=None means {DEFAULT_TTL_S} s here, not for ever: an ended cluster "
            "holds its nodes"
        )
    found += left_to_flyte(options, arguments, "RayJob", "KubeRayBackend(worker_pod_template")
    if arguments.shared_memory:
        found.append("shared_memory has no effect: KubeRay mounts /dev/shm, as large as the pod's memory limit")
    return tuple(dict.fromkeys(found))


def _run_policy_warnings(policy: Any) -> list[str]:
    if policy is None or policy.clean_pod_policy is None:
        return []
    return ["run_policy.clean_pod_policy has no effect: KubeRay removes all pods when the time to live has passed"]


def _option_problems(options: KubeRayBackend) -> list[str]:
    problems = []
    for name in ("head_requests", "head_limits"):
        asked = getattr(options, name)
        if asked is not None and not isinstance(asked, Resources):
            problems.append(f"KubeRayBackend({name}) must be Resources(...), not {asked!r}")
        elif asked is not None and asked.gpu is not None:
            problems.append(f"KubeRayBackend({name}): a GPU of the head would not be used, workers run on other pods")
    for name in ("head_start_params", "worker_start_params"):
        problems += _start_param_problems(name, getattr(options, name))
    for name, container in (("head_pod_template", HEAD_CONTAINER), ("worker_pod_template", WORKER_CONTAINER)):
        template = getattr(options, name)
        if template is not None:
            problems += [f"KubeRayBackend({name}): {text}" for text in _overlay_problems(template, container)]
    timeout = options.idle_timeout_s
    if timeout is not None and (not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 1):
        problems.append(
            f"KubeRayBackend(idle_timeout_s) must be a whole number of seconds greater than 0, not {timeout!r}"
        )
    return problems + json_problems(options, "runtime_env")


def _direct_problems(options: KubeRayBackend) -> list[str]:
    """Of the options of a RayJob that this process creates."""
    problems = kubernetes_option_problems(options, WORKER_CONTAINER)
    problems += text_problems(options, ("cluster", "ray_version"))
    if options.submission_mode not in SUBMISSION_MODES:
        problems.append(
            f"KubeRayBackend(submission_mode={options.submission_mode!r}): expected {one_of(SUBMISSION_MODES)}"
        )
    return problems


def _start_param_problems(name: str, params: Any) -> list[str]:
    if not (isinstance(params, dict) and all(isinstance(text, str) for pair in params.items() for text in pair)):
        return [f"KubeRayBackend({name}) must be a dict of strings, not {params!r}"]
    return [
        f"KubeRayBackend({name}): {key!r} follows from the pod's resources, on the head there are none for workers"
        for key in sorted(_OWNED_BY_US & params.keys())
    ]


def _overlay_problems(template: PodTemplate, container: str) -> list[str]:
    if not isinstance(template, PodTemplate):
        return [f"must be a PodTemplate, not {template!r}"]
    problems = []
    primary = primary_container(template)
    if primary is not None:
        problems += _order_problems("it", template)
    if primary is not None and primary.resources:
        problems.append(
            explain(
                f"it gives resources to the primary container, of which {container} is made.",
                "What Ray counts on a node follows from what is asked for: of more GPUs in a pod Ray would not learn.",
                "Give them as @task(requests=), or as KubeRayBackend(requests=, head_requests=).",
            )
        )
    return problems


def dropped_by_flyte(options: KubeRayBackend) -> tuple[str, ...]:
    """What of the groups' own pod templates is for RayJobs of our own only; refused when a task is registered."""
    problems = []
    for name, container in (("head_pod_template", HEAD_CONTAINER), ("worker_pod_template", WORKER_CONTAINER)):
        template: PodTemplate | None = getattr(options, name)
        spec = template.pod_spec if template is not None else None
        if template is None or spec is None:
            continue
        beside = [one.name for one in spec.containers or () if one.name != template.primary_container_name]
        beside += [one.name for one in spec.init_containers or ()]
        if beside:
            what = f"KubeRayBackend({name}): it has the containers {', '.join(beside)} beside the primary one."
            problems.append(explain(what, _NOT_BY_FLYTE.format(container), _BY_THE_TASK))
    return tuple(problems)


def _order_problems(whose: str, template: PodTemplate) -> list[str]:
    containers = (template.pod_spec and template.pod_spec.containers) or []
    primary = template.primary_container_name
    if not containers or containers[0].name == primary:
        return []
    return [
        explain(
            f"{whose} lists the container {containers[0].name!r} before the primary one, {primary!r}.",
            "KubeRay starts Ray in the first container, whichever it is.",
            "Put the primary one there.",
        )
    ]


def _resource_problems(arguments: TaskArguments) -> list[str]:
    """Flyte lowers a request to its limit in the task's container, but not in a group's own pod."""
    problems = []
    for kind in ("cpu", "mem", "gpu", "ephemeral_storage"):
        request, limit = (getattr(side, kind) for side in (arguments.resources.requests, arguments.resources.limits))
        try:
            if request is not None and limit is not None and amount_of(request) > amount_of(limit):
                problems.append(
                    f"requests {kind}={request!r} exceed limits {kind}={limit!r}: Kubernetes refuses such pods"
                )
        except (ValueError, ArithmeticError, TypeError):
            problems.append(f"{kind}={request!r}, {kind}={limit!r}: expected Kubernetes quantities such as 2 or '4Gi'")
    return problems


def _repeated(options: KubeRayBackend, arguments: TaskArguments) -> list[str]:
    """Names that would be in a pod twice, because Flyte appends lists: the API server refuses the RayJob for them."""
    problems = []
    for own in ("head_pod_template", "worker_pod_template"):
        named: dict[tuple[str, str], str] = {
            ("environment variable", name): "environment" for name in arguments.environment
        }
        templates = (("pod_template", arguments.pod_template), (own, getattr(options, own)))
        for source, template in templates:
            for key in _named_in(template):
                if key in named:
                    problems.append(f"the {key[0]} {key[1]!r} is in {named[key]} and in {source}: give it once")
                named[key] = source
    return list(dict.fromkeys(problems))


def _named_in(template: Any) -> list[tuple[str, str]]:
    if not isinstance(template, PodTemplate) or template.pod_spec is None:
        return []
    container = primary_container(template)
    variables = [] if container is None else container.env or []
    mounts = [] if container is None else container.volume_mounts or []
    return [
        *(("environment variable", variable.name) for variable in variables),
        *(("mount", mount.mount_path) for mount in mounts),
        *(("volume", volume.name) for volume in template.pod_spec.volumes or []),
    ]


def _template_problems(template: PodTemplate) -> list[str]:
    problems = _order_problems("pod_template", template)
    if (own := primary_container(template)) is not None and own.resources:
        problems.append(
            explain(
                "pod_template gives resources to the primary container.",
                "What Ray counts on a node follows from the task's: of more GPUs in its pod Ray would not learn.",
                "Give them as @task(requests=, limits=).",
            )
        )
    return problems
