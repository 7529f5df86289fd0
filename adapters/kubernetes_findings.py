"""What is wrong with the options of pods that this process has an operator make, whichever operator it is. Pure."""

from __future__ import annotations

import json
from typing import Any

from flytekit import Resources

from kfpytorch_ray.adapters.ray_findings import is_amount
from kfpytorch_ray.config import KubernetesOptions


def kubernetes_option_problems(options: KubernetesOptions) -> list[str]:
    """One sentence for each problem."""
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
    return problems + json_problems(options, "spec")


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
