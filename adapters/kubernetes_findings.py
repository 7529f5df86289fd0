"""What is wrong with the options of pods that this process has an operator make, whichever operator it is. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flytekit import Resources

from kfpytorch_ray.adapters.ray_findings import is_amount, secret_variable
from kfpytorch_ray.config import KubernetesOptions
from kfpytorch_ray.errors import explain
from kfpytorch_ray.task_arguments import TaskArguments


def kubernetes_option_problems(options: KubernetesOptions, container: str) -> list[str]:
    """One text for each problem.

    Args:
        options: The backend's.
        container: In which ranks run.
    """
    backend = type(options).__name__
    problems = [
        f"{backend}({name}) must be Resources(...), not {asked!r}"
        for name in ("requests", "limits")
        if (asked := getattr(options, name)) is not None and not isinstance(asked, Resources)
    ]
    problems += text_problems(options, ("image", "namespace", "context", "kubeconfig", "service_account"))
    for name in ("labels", "annotations"):
        words = getattr(options, name)
        if not (isinstance(words, dict) and all(isinstance(text, str) for pair in words.items() for text in pair)):
            problems.append(f"{backend}({name}) must be a dict of strings, not {words!r}")
    if not str(options.gpu_resource).endswith("gpu"):
        problems.append(f"{backend}(gpu_resource={options.gpu_resource!r}): expected a name that ends in 'gpu'")
    if not (is_amount(options.ready_timeout_s) and options.ready_timeout_s):
        problems.append(f"{backend}(ready_timeout_s) must be a number of seconds greater than 0")
    return [*problems, *json_problems(options, "spec"), *_amounts_in_spec(options, container)]


def _amounts_in_spec(options: KubernetesOptions, container: str) -> list[str]:
    """Where ``spec`` has other amounts than a node was asked to have: ranks would be started by these."""
    if not any(one.get("name") == container and one.get("resources") for one in _containers_in(options.spec)):
        return []
    backend = type(options).__name__
    return [
        explain(
            f"{backend}(spec) gives resources to the container {container!r}.",
            "How many ranks and GPUs a node has follows from what is asked for: of more GPUs in its pod nobody would "
            "learn.",
            f"Give them as @task(requests=, limits=), or as {backend}(requests=, limits=).",
        )
    ]


def _containers_in(spec: Any) -> Iterator[dict[str, Any]]:
    """The containers of all pods in a manifest."""
    if isinstance(spec, dict):
        for name, value in spec.items():
            if name == "containers" and isinstance(value, list):
                yield from (one for one in value if isinstance(one, dict))
            else:
                yield from _containers_in(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _containers_in(value)


def left_to_flyte(options: KubernetesOptions, arguments: TaskArguments, job: str, template: str) -> list[str]:
    """What of a task only Flyte's platform knows, or keeps.

    Args:
        options: The backend's.
        arguments: What stands beside the config in ``@task(...)``.
        job: Kind of the custom resource.
        template: The argument whose pod template shapes the workers' pods.
    """
    found = []
    if arguments.accelerator is not None:
        found.append(
            "accelerator has no effect: what its node label is called Flyte's platform knows; select nodes by "
            f"{template}=PodTemplate(V1PodSpec(node_selector=...)))"
        )
    if arguments.pod_template_name is not None:
        found.append(
            f"pod_template_name has no effect: Flyte looks PodTemplate {arguments.pod_template_name!r} up; give what "
            f"is in it as {template}=PodTemplate(...))"
        )
    found += [
        f"secret_requests has no effect: Flyte gives pods their secrets; have {secret_variable(secret)} from a "
        f"Secret of the namespace by {template}=PodTemplate(V1PodSpec(...))), with V1EnvVarSource(secret_key_ref=...)"
        for secret in arguments.secrets
    ]
    if arguments.bounded:
        found.append("@task(timeout=) is Flyte's: give run_policy.active_deadline_seconds")
    if options.image is None:
        found.append(
            f"container_image is Flyte's: give {type(options).__name__}(image=...), or no {job} can be created"
        )
    return found


def text_problems(options: KubernetesOptions, names: tuple[str, ...]) -> list[str]:
    """Of options that are a text or None."""
    return [
        f"{type(options).__name__}({name}) must be a string, not {text!r}"
        for name in names
        if (text := getattr(options, name)) is not None and not (isinstance(text, str) and text)
    ]


def json_problems(options: Any, name: str) -> list[str]:
    """Of an option that goes into a manifest as it is."""
    try:
        json.dumps(getattr(options, name))
    except (TypeError, ValueError) as error:
        return [f"{type(options).__name__}({name}) cannot be written as JSON: {error}"]
    return []
