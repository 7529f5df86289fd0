"""Requests and limits as Flyte completes them.

Imitates flyteplugins/go/tasks/pluginmachinery/flytek8s/container_helper.go and utils.go at v1.16.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kubernetes.utils import parse_quantity

from kfpytorch_ray.cluster.kube.flyte_execution import FlytePlatform

Amounts = dict[str, dict[str, str]]
"""``requests`` and ``limits`` by Kubernetes's names."""

_NAMES = {
    "CPU": "cpu",
    "MEMORY": "memory",
    "GPU": "gpu",
    "STORAGE": "storage",
    "EPHEMERAL_STORAGE": "ephemeral-storage",
}


def from_message(resources: Mapping[str, Any] | None, platform: FlytePlatform) -> Amounts:
    """``Resources`` of Flyte's IDL, with ``gpu`` under its name in the cluster."""
    sides: Amounts = {}
    for side in ("requests", "limits"):
        entries: Iterable[Mapping[str, str]] = (resources or {}).get(side, ())
        sides[side] = {_NAMES[entry["name"]]: entry["value"] for entry in entries}
    return sanitised(sides, platform)


def sanitised(resources: Mapping[str, Any], platform: FlytePlatform) -> Amounts:
    """``gpu`` under its name in the cluster."""
    return {
        side: {
            platform.gpu_resource if name == "gpu" else name: str(amount)
            for name, amount in (resources.get(side) or {}).items()
        }
        for side in ("requests", "limits")
    }


def merged(base: Amounts, over: Amounts) -> Amounts:
    """``over`` wins, key by key."""
    return {side: {**base[side], **over[side]} for side in ("requests", "limits")}


def completed(amounts: Amounts, platform: FlytePlatform) -> Amounts:
    """A request is the limit where there is none, and a limit the request; CPU and memory are never left out."""
    requests, limits = dict(amounts["requests"]), dict(amounts["limits"])
    defaults = {"cpu": platform.cpu, "memory": platform.memory}
    optional = ("ephemeral-storage", platform.gpu_resource)
    for name in ("cpu", "memory", *(name for name in optional if name in requests or name in limits)):
        request = _positive(requests.get(name)) or _positive(limits.get(name)) or defaults.get(name, "0")
        limit = _positive(limits.get(name)) or request
        requests[name], limits[name] = _smaller(request, limit), limit
    return {"requests": requests, "limits": limits}


def kept_in_range(amounts: Amounts) -> Amounts:
    """Of containers beside the primary one: CPU and memory are written down, as 0 where there were none."""
    requests, limits = dict(amounts["requests"]), dict(amounts["limits"])
    for name in ("cpu", "memory"):
        requests[name], limits[name] = requests.get(name, "0"), limits.get(name, "0")
        if _positive(limits[name]):
            requests[name] = _smaller(requests[name], limits[name])
    return {"requests": requests, "limits": limits}


def _positive(amount: str | None) -> str | None:
    return amount if amount is not None and parse_quantity(amount) > 0 else None


def _smaller(request: str, limit: str) -> str:
    return limit if parse_quantity(request) > parse_quantity(limit) else request
