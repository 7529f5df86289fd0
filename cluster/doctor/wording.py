"""How findings speak of nodes: their names, lists that stay short, times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from kfpytorch_ray.cluster.doctor.report import ClusterNode, NodeReport

_NAMED = 4


def names_of(reports: Sequence[NodeReport], nodes: Sequence[ClusterNode]) -> Mapping[int, str]:
    """What the nodes that have reported are called, by rank: by Ray's address where Ray's node is known."""
    known = {node.node_id: name_of(node, nodes) for node in nodes}
    return {
        report.rank: (known.get(report.object_store.node_id) if report.object_store else None)
        or f"{report.address} (rank {report.rank})"
        for report in reports
    }


def name_of(node: ClusterNode, nodes: Sequence[ClusterNode]) -> str:
    """What a node is called: its address, and Ray's id where several have the same."""
    several = sum(other.address == node.address for other in nodes) > 1
    return f"{node.address} ({node.node_id[:8]})" if several else node.address


def nodes_with(
    reports: Sequence[NodeReport], names: Mapping[int, str], problem: Callable[[NodeReport], str]
) -> dict[str, list[str]]:
    """The nodes that have each problem."""
    found: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        if what := problem(report):
            found[what].append(names[report.rank])
    return dict(found)


def listed(items: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    shown = ", ".join(items[:_NAMED])
    return f"{shown} and {len(items) - _NAMED} more" if len(items) > _NAMED else shown


def everywhere(reports: Sequence[NodeReport]) -> str:
    """How a line that speaks for all nodes names them."""
    return "the node" if len(reports) == 1 else f"all {len(reports)} nodes"


def counted(number: int, what: str) -> str:
    """A number and what it counts, in the right number."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def counts_of(items: Sequence[str]) -> str:
    """How many there are of each kind."""
    counts = {item: items.count(item) for item in items}
    return ", ".join(f"{count} x {item}" for item, count in counts.items())


def shown_time(seconds: float) -> str:
    """A time for people."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
