"""Reserving nodes: one placement group with one bundle per node, or an error that says why there is none.

On a cluster every bundle gets a Ray node of its own (STRICT_SPREAD). On a Ray that this process started on its own
machine they share it (PACK).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from kfpytorch_ray.errors import ConfigError, InfeasibleError, PlacementTimeoutError, explain

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 10.0

Resources = Mapping[str, float]


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
        return [_bundle(self.first), *(_bundle(self.other) for _ in range(count - 1))]

    def total(self, count: int) -> dict[str, float]:
        """All resources of ``count`` nodes."""
        bundles = self.bundles(count)
        names = {name for bundle in bundles for name in bundle}
        return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}


def _bundle(resources: Resources) -> dict[str, float]:
    """Ray refuses amounts of zero, and a bundle without any amount."""
    return {name: amount for name, amount in resources.items() if amount} or {"CPU": 0.01}


@dataclass(frozen=True, slots=True)
class Place:
    """One reserved bundle: its node rank, and the address that Ray knows for its node."""

    group: PlacementGroup
    index: int
    resources: Resources
    address: str


def driver_address() -> str:
    """The address of this process's node, as Ray knows it."""
    return str(ray.util.get_node_ip_address())


@contextmanager
def reserved(demand: Demand, *, private: bool, autoscaling: bool, timeout_s: float, name: str) -> Iterator[list[Place]]:
    """Hold the nodes of one launch.

    Args:
        demand: What is asked.
        private: Whether the Ray was started by this process, so that bundles may share the machine.
        autoscaling: Whether the cluster may grow to hold what it cannot hold now.
        timeout_s: Longest wait.
        name: Of the launch, for log lines.

    Yields:
        The places by node rank. For a range of nodes as many as were free, at least the minimum.

    Raises:
        ConfigError: Ray does not take the amounts.
        InfeasibleError: The cluster can never hold the minimum.
        PlacementTimeoutError: It did not within ``timeout_s``.
    """
    if not autoscaling:
        _refuse_infeasible(demand, private=private)
    group = _hold(demand, private=private, timeout_s=timeout_s, name=name)
    try:
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        node_ids = placement_group_table(group)["bundles_to_node_id"]
        yield [
            Place(group, index, bundle, addresses[node_ids[index]]) for index, bundle in enumerate(group.bundle_specs)
        ]
    finally:
        _release(group)


def _hold(demand: Demand, *, private: bool, timeout_s: float, name: str) -> PlacementGroup:
    """A placement group that is placed: of as many nodes as fit now, at least the minimum."""
    deadline = time.monotonic() + timeout_s
    group = None
    while (left := deadline - time.monotonic()) > 0:
        count = max(demand.min_nodes, _fitting(demand, _available(), private=private))
        if group is None or group.bundle_count != count:
            _release(group)
            group = _request(demand.bundles(count), "PACK" if private else "STRICT_SPREAD")
        try:
            if group.wait(min(left, REPORT_INTERVAL_S)):
                return group
        except BaseException:
            _release(group)
            raise
        logger.warning("%s waits for nodes. %s", name, _state(demand, private=private))
    _release(group)
    raise PlacementTimeoutError(
        explain(
            f"{name}: {demand.min_nodes} nodes were not free within {timeout_s:g} s.",
            _state(demand, private=private),
            "Wait for other work to end, add nodes, ask for less, or raise rdzv_configs['join_timeout'].",
        )
    )


def _request(bundles: list[dict[str, float]], strategy: str) -> PlacementGroup:
    try:
        group: PlacementGroup = placement_group(bundles, strategy=strategy)
    except ValueError as error:
        raise ConfigError("The resources of a node", (str(error),)) from error
    return group


def _release(group: PlacementGroup | None) -> None:
    # On a Ray that is gone there is nothing to give back, and the error that ended it is on its way.
    with contextlib.suppress(RayError):
        if group is not None and ray.is_initialized():
            remove_placement_group(group)


def _refuse_infeasible(demand: Demand, *, private: bool) -> None:
    totals = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    if _fitting(demand, totals, private=private) >= demand.min_nodes:
        return
    asked = f"{demand.min_nodes} nodes with {_shown(demand.other)} each"
    if demand.first != demand.other:
        asked = f"a node with {_shown(demand.first)} and {demand.min_nodes - 1} with {_shown(demand.other)} each"
    there = "; ".join(f"{_shown(resources)}" for resources in totals.values())
    if private:
        fix = "Ask for less, set RayBackend(resources_per_node=...), or start Ray with more: ray.init(num_cpus=...)."
    else:
        fix = (
            "Ask for fewer or smaller nodes, or add nodes; each node of the task needs a Ray node of its own. Where an "
            "autoscaler would add them, say so: RayBackend(autoscaling=True)."
        )
    raise InfeasibleError(
        explain(
            f"The cluster can never hold {asked}.",
            f"It has {len(totals)} Ray node(s), in all: {there}.",
            fix,
        )
    )


def _fitting(demand: Demand, nodes: Mapping[str, Resources], *, private: bool) -> int:
    """How many nodes of the demand fit, up to the maximum."""
    if private:
        (machine,) = list(nodes.values())[:1] or [{}]
        return max(
            (count for count in range(1, demand.max_nodes + 1) if _fits(demand.total(count), machine)), default=0
        )
    first = {node for node, has in nodes.items() if _fits(_bundle(demand.first), has)}
    other = {node for node, has in nodes.items() if _fits(_bundle(demand.other), has)}
    if not first:
        return 0
    # One node for rank 0, the rest from those that hold the others, and no node twice.
    return min(demand.max_nodes, len(other) + 1, len(first | other))


def _fits(wanted: Resources, has: Resources) -> bool:
    return all(has.get(name, 0) >= amount for name, amount in wanted.items())


def _available() -> dict[str, Resources]:
    return dict(ray._private.state.available_resources_per_node())


def _state(demand: Demand, *, private: bool) -> str:
    available = _available()
    free = "; ".join(_shown(resources) for resources in available.values()) or "nothing"
    fitting = _fitting(demand, available, private=private)
    return (
        f"Each node asks for {_shown(demand.other)}; {min(fitting, demand.min_nodes)} of {demand.min_nodes} fit now. "
        f"Free on the cluster's {len(available)} node(s): {free}."
    )


def _shown(resources: Resources) -> str:
    """Resources for people: no node markers, memory in GiB."""
    shown = {
        name: f"{amount / 2**30:.1f}GiB" if "memory" in name else f"{amount:g}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "bundle_group", "accelerator_type:")) and "_group_" not in name
    }
    return "{" + ", ".join(f"{name}: {amount}" for name, amount in shown.items()) + "}"
