"""What Ray knows of the cluster's nodes and of the placement groups on them. Looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.util.placement_group import placement_group_table

from kfpytorch_ray.cluster.demand import Resources
from kfpytorch_ray.cluster.sharing import Group

_JOB_ID_DIGITS = 8


def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray knows to be alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> dict[str, float]:
    """Nodes that Ray is about to take away: their ids, and when (seconds since the epoch; infinite where unknown)."""
    deadlines: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 if deadline else float("inf") for node, deadline in deadlines.items()}


def totals() -> dict[str, Resources]:
    """What each node has in all."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def available(but: AbstractSet[str] = frozenset()) -> dict[str, Resources]:
    """What is free on the nodes that take new work, some left out."""
    without = draining_nodes().keys() | but
    there: dict[str, Resources] = ray._private.state.available_resources_per_node()
    return {node: has for node, has in there.items() if node not in without}


def demand_that_waits() -> list[Resources]:
    """What tasks, actors and placement groups of all jobs ask for and do not have, as autoscalers are told it."""
    worker: Any = ray._private.worker.global_worker
    state = get_cluster_resource_state(worker.gcs_client)
    gangs = [request for gang in state.pending_gang_resource_requests for request in gang.requests]
    single = [each.request for each in state.pending_resource_requests]
    return [dict(request.resources_bundle) for request in [*single, *gangs]]


def groups() -> list[Group]:
    """The placement groups of all jobs, placed or not."""
    return [
        # A group's id ends in the id of the job that made it.
        Group(
            entry["name"],
            id_[-_JOB_ID_DIGITS:],
            tuple((entry["bundles_to_node_id"][index], bundle) for index, bundle in entry["bundles"].items()),
        )
        for id_, entry in placement_group_table().items()
        if entry["state"] != "REMOVED"
    ]
