"""Which nodes a cluster has: by Ray's state API over HTTP, or for a driver by what it is told when it joins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import ray
import requests

from kfpytorch_ray.cluster.doctor.clocks import round_trip
from kfpytorch_ray.cluster.doctor.report import ClusterNode, Interval
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.errors import ClusterError, explain

# What `ray list nodes` asks, whose own client takes neither headers nor certificates.
_NODES = "/api/v0/nodes?limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"


def nodes_of(client: JobClient) -> tuple[ClusterNode, ...]:
    """The nodes that are alive.

    Raises:
        ClusterError: The cluster does not say.
    """
    answer = client._do_request("GET", _NODES)
    try:
        return read_nodes(answer.json())
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            explain(
                f"The cluster at {client.address} does not say which nodes it has.",
                f"Its state API answers with status {answer.status_code}: {answer.text.strip()[:200]}",
                "Look whether the head runs with ray[default], and into the dashboard's log there.",
            )
        ) from error


def read_nodes(said: Mapping[str, Any]) -> tuple[ClusterNode, ...]:
    """The nodes in an answer of the state API.

    Raises:
        KeyError: It is none.
        TypeError: It is none.
    """
    return _sorted(
        ClusterNode(node["node_id"], node["node_ip"], bool(node["is_head_node"]), node["resources_total"] or {})
        for node in said["data"]["result"]["result"]
        if node["state"] == "ALIVE"
    )


def joined_nodes() -> tuple[ClusterNode, ...]:
    """The nodes of the cluster that this process has joined."""
    return _sorted(
        ClusterNode(
            node["NodeID"],
            str(node["NodeManagerAddress"]),
            "node:__internal_head__" in node["Resources"],
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    )


def clock_of(answer: requests.Response, sent_at: float, received_at: float) -> Interval | None:
    """What the clock of an HTTP server shows more than this machine's; None if it does not say the time."""
    try:
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
    # Whole seconds, rounded down.
    return round_trip(sent_at, Interval(date, date + 1), received_at)


def _sorted(nodes: Iterable[ClusterNode]) -> tuple[ClusterNode, ...]:
    return tuple(sorted(nodes, key=lambda node: (not node.head, node.address, node.node_id)))
