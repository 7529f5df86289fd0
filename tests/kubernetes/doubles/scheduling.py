"""Which Pods fit on a node: the scheduler's arithmetic, without a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal

from kubernetes.utils.quantity import parse_quantity

from doubles.api import Document

Amounts = Mapping[str, Decimal]


def amounts(quantities: Mapping[str, str] | None) -> dict[str, Decimal]:
    """Quantities as numbers: ``500m`` is 0.5."""
    return {name: Decimal(parse_quantity(value)) for name, value in (quantities or {}).items()}


def requested(pod: Document) -> dict[str, Decimal]:
    """What a Pod asks for: the sum of its containers, or its largest init container if that is more."""
    total: Counter[str] = Counter()
    for container in pod["spec"]["containers"]:
        total.update(_requests(container))  # type: ignore[arg-type] # a Counter adds up whatever can be added
    found: dict[str, Decimal] = dict(total)  # type: ignore[arg-type]
    for container in pod["spec"].get("initContainers", []):
        for name, amount in _requests(container).items():
            found[name] = max(found.get(name, Decimal(0)), amount)
    return found


def _requests(container: Document) -> dict[str, Decimal]:
    resources = container.get("resources", {})
    # The API server copies limits where requests are missing, but not into a part of them.
    return amounts({**resources.get("limits", {}), **resources.get("requests", {})})


def what_hinders(pod: Document, labels: Mapping[str, str], capacity: Amounts, running: Iterable[Document]) -> str:
    """Why a Pod cannot be on a node, in the scheduler's words; empty if it can.

    Args:
        pod: The Pod.
        labels: The node's.
        capacity: The node's.
        running: Pods that are on it and have not ended.
    """
    selector: dict[str, str] = pod["spec"].get("nodeSelector") or {}
    if any(labels.get(name) != value for name, value in selector.items()):
        return "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
    used: Counter[str] = Counter()
    for other in running:
        used.update(requested(other))  # type: ignore[arg-type]
    short = [
        f"1 Insufficient {name}"
        for name, amount in requested(pod).items()
        if amount and used[name] + amount > capacity.get(name, Decimal(0))
    ]
    return f"0/1 nodes are available: {', '.join(short)}." if short else ""
