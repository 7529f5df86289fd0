"""What a launch asks of a cluster, and what of it the cluster can hold. Pure: no Ray, no waiting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Resources = Mapping[str, float]
"""Amount by Ray resource name; memory in bytes."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The bundles of a launch.

    Attributes:
        first: Of node rank 0.
        other: Of every other node.
        min_nodes: Fewest bundles.
        max_nodes: Most bundles.
    """

    first: Resources
    other: Resources
    min_nodes: int
    max_nodes: int

    def bundles(self, count: int) -> list[dict[str, float]]:
        """The bundles of ``count`` nodes, by node rank; what Ray takes for one."""
        return [bundle_of(self.first), *(bundle_of(self.other) for _ in range(count - 1))]

    def total(self, count: int) -> dict[str, float]:
        """All resources of ``count`` nodes."""
        bundles = self.bundles(count)
        names = {name for bundle in bundles for name in bundle}
        return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}


def bundle_of(resources: Resources) -> dict[str, float]:
    """Ray refuses amounts of zero, and a bundle without any amount."""
    return {name: amount for name, amount in resources.items() if amount} or {"CPU": 0.01}


def fitting(demand: Demand, nodes: Mapping[str, Resources], *, private: bool) -> int:
    """How many nodes of the demand fit, up to the maximum.

    Args:
        demand: What is asked.
        nodes: What each node has.
        private: Whether the nodes of the launch share one machine.
    """
    if private:
        (machine,) = list(nodes.values())[:1] or [{}]
        return max((count for count in range(1, demand.max_nodes + 1) if fits(demand.total(count), machine)), default=0)
    first = {node for node, has in nodes.items() if fits(bundle_of(demand.first), has)}
    other = {node for node, has in nodes.items() if fits(bundle_of(demand.other), has)}
    if not first:
        return 0
    # One node for rank 0, the rest from those that hold the others, and no node twice.
    return min(demand.max_nodes, len(other) + 1, len(first | other))


def fits(wanted: Resources, has: Resources) -> bool:
    """Whether a node that has so much can hold what is wanted."""
    return all(has.get(name, 0) >= amount for name, amount in wanted.items())


def missing(bundles: list[dict[str, float]], free: Mapping[str, Resources], totals: Mapping[str, Resources]) -> str:
    """What bundles that are not placed ask for, and how far the cluster is from holding one of them.

    Args:
        bundles: Those that are not placed.
        free: What each node has free now; nodes of this launch left out.
        totals: What each node has in all.
    """
    counts: dict[str, int] = {}
    for bundle in bundles:
        text = shown(bundle)
        counts[text] = counts.get(text, 0) + 1
    asked = ", ".join(f"{count} x {text}" for text, count in counts.items())
    nearest = _nearest(bundles[0], free)
    largest = _nearest(bundles[0], totals)
    near = f"the nearest node has {shown(nearest)} free" if nearest is not None else "no other node is there"
    large = f"the largest has {shown(largest)} in all" if largest is not None else "the cluster has no node"
    return f"Missing: {asked}; {near}, {large}."


def _nearest(wanted: Resources, nodes: Mapping[str, Resources]) -> Resources | None:
    """The node that comes closest to holding a bundle."""

    def closeness(has: Resources) -> tuple[float, float]:
        shares = [min(1.0, has.get(name, 0) / amount) for name, amount in wanted.items()]
        return min(shares), sum(shares)

    return max(nodes.values(), key=closeness, default=None)


def shown(resources: Resources) -> str:
    """Resources for people: no node markers, memory in GiB."""
    amounts = {
        name: f"{amount / 2**30:.1f}GiB" if "memory" in name else f"{amount:g}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "bundle_group", "accelerator_type:")) and "_group_" not in name
    }
    return "{" + ", ".join(f"{name}: {amount}" for name, amount in amounts.items()) + "}"
