"""What the facts about a cluster and its nodes mean for launches. Pure: facts in, findings out.

Where all nodes are alike one line speaks for them; what is wrong names its nodes. What is between the nodes is judged
in kfpytorch_ray.cluster.doctor.judge_network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from kfpytorch_ray.cluster.doctor.judge_network import judge_clocks, judge_collective, judge_peers
from kfpytorch_ray.cluster.doctor.report import ClusterNode, Interval, NodeReport
from kfpytorch_ray.cluster.doctor.wording import counted, counts_of, everywhere, listed, name_of, names_of, nodes_with
from kfpytorch_ray.cluster.remote.versions import Versions, compare
from kfpytorch_ray.doctor.finding import Finding, Group, Level, of_message
from kfpytorch_ray.doctor.judgement import LOWEST_FREE_BYTES, LOWEST_OPEN_FILES, LOWEST_SHARED_BYTES, gib
from kfpytorch_ray.doctor.machine import SHARED_MEMORY


def judge_nodes(nodes: Sequence[ClusterNode]) -> list[Finding]:
    """What the nodes have, by what Ray says."""
    fit = [node for node in nodes if node.holds_agents]
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    gpus = f" and {total['GPU']:g} GPUs" if total["GPU"] else ""
    said = f"{counted(len(nodes), 'node')} alive, {len(fit)} of them with CPUs; {total['CPU']:g} CPUs{gpus} in all"
    if not fit:
        return [
            Finding(
                "resources",
                Level.WARN,
                f"{said}: no node can hold an agent now.",
                "Add nodes. Where an autoscaler adds them, launch with RayBackend(autoscaling=True).",
                Group.CLUSTER,
            )
        ]
    return [Finding("resources", Level.OK, said, "", Group.CLUSTER)]


def judge_head_versions(here: Versions, there: Versions) -> list[Finding]:
    """What a job's driver would run with."""
    return _versions("head's versions", here, there, "the head", Group.CLUSTER)


def judge_reports(
    here: Versions, nodes: Sequence[ClusterNode], reports: Sequence[NodeReport], clocks: Mapping[int, Interval]
) -> list[Finding]:
    """All that the nodes have reported.

    Args:
        here: This machine's versions.
        nodes: Which Ray knows.
        reports: By rank.
        clocks: What each node's clock shows more than this machine's, by rank.
    """
    names = names_of(reports, nodes)
    return [
        *describe_nodes(nodes, reports),
        *judge_coverage(nodes, reports),
        *judge_versions(here, reports, names),
        *judge_storage(reports, names),
        *judge_peers(reports, names),
        *judge_collective(reports, names),
        *judge_shared_memory(reports, names),
        *judge_disk(reports, names),
        *judge_limits(reports, names),
        *judge_gpus(nodes, reports, names),
        *judge_clocks(clocks, names),
    ]


def describe_nodes(nodes: Sequence[ClusterNode], reports: Sequence[NodeReport] = ()) -> list[Finding]:
    """What each node has: by Ray's word, and by its own where it has reported."""
    by_id = {report.object_store.node_id: report for report in reports if report.object_store}
    return [
        Finding(name_of(node, nodes), Level.OK, _described(node, by_id.get(node.node_id)), "", Group.NODES)
        for node in nodes
    ]


def _described(node: ClusterNode, report: NodeReport | None) -> str:
    amounts = node.resources
    said = ["head"] if node.head else []
    said += [f"{amounts.get('CPU', 0):g} CPUs"]
    said += [f"{amounts['GPU']:g} GPUs"] if amounts.get("GPU") else []
    said += [f"memory {gib(amounts['memory'])}"] if "memory" in amounts else []
    said += [f"object store {gib(amounts['object_store_memory'])}"] if "object_store_memory" in amounts else []
    if report is None:
        return ", ".join(said)
    said += [f"{SHARED_MEMORY} {gib(report.shared_memory.total_bytes)}"] if report.shared_memory else []
    said += [f"disk {gib(report.temporary.free_bytes)} free"] if report.temporary else []
    said += [counts_of(report.gpus)] if report.gpus else []
    return ", ".join([*said, f"host name {report.hostname}", f"rank {report.rank}"])


def judge_coverage(nodes: Sequence[ClusterNode], reports: Sequence[NodeReport]) -> list[Finding]:
    """Whether every node that could hold an agent has reported, and no other."""
    fit = [node for node in nodes if node.holds_agents]
    seen = {report.object_store.node_id for report in reports if report.object_store}
    if strangers := seen - {node.node_id for node in nodes}:
        return [
            Finding(
                "launch",
                Level.FAIL,
                f"It ran on nodes of another cluster: {listed(sorted(node[:8] for node in strangers))}.",
                "Several Rays run on the head's machine, and its jobs join the wrong one: give each a folder of its "
                "own (ray start --temp-dir), or stop the others.",
                Group.NODES,
            )
        ]
    if len(reports) >= len(fit):
        return []
    busy = [name_of(node, nodes) for node in fit if node.node_id not in seen]
    return [
        Finding(
            "busy nodes",
            Level.WARN,
            f"{counted(len(fit) - len(reports), 'node')} could not be looked at, having no CPU free: {listed(busy)}",
            "Run this again when other work has ended.",
            Group.NODES,
        )
    ]


def judge_versions(here: Versions, reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """What workers run with on each node, against this machine and each other."""
    alike: dict[Versions, list[str]] = defaultdict(list)
    for report in reports:
        alike[report.versions].append(names[report.rank])
    found = [
        finding
        for versions, where in alike.items()
        for finding in _versions("versions", here, versions, listed(where), Group.NODES)
    ]
    if len(alike) > 1:
        mixed = "; ".join(f"{listed(where)}: {versions}" for versions, where in alike.items())
        found.append(
            Finding(
                "versions", Level.WARN, f"Nodes differ from each other. {mixed}", "Use one image for all.", Group.NODES
            )
        )
    elif all(finding.level is Level.OK for finding in found):
        return [Finding("versions", Level.OK, f"as here on {everywhere(reports)}", "", Group.NODES)]
    return found


def _versions(check: str, here: Versions, there: Versions, where: str, group: Group) -> list[Finding]:
    compared = compare(here, there, where)
    found = [of_message(check, text, group) for text in compared.errors]
    found += [of_message(check, text, group, Level.WARN) for text in compared.warnings]
    return found or [Finding(check, Level.OK, str(there), "", group)]


def judge_storage(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """Whether every node reads and writes the storage."""
    fix = (
        "Give the nodes the rights and the package for it (s3fs for s3://, gcsfs for gs://). A local path has to be on "
        "a disk that all nodes share."
    )
    asked = [report for report in reports if report.storage is not None]
    wrong = nodes_with(asked, names, lambda report: report.storage.error if report.storage else "")
    found = [
        of_message("storage", message, Group.NODES, prefix=f"Not usable on {listed(where)}. ")
        for message, where in wrong.items()
    ]
    found = [one if one.fix else Finding(one.check, one.level, one.text, fix, one.group) for one in found]
    if asked and not found:
        return [Finding("storage", Level.OK, f"read and written on {everywhere(asked)}", "", Group.NODES)]
    return found


def judge_shared_memory(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """Shared memory against what the object store takes of it, and what is left for results and data loaders."""

    def problem(report: NodeReport) -> str:
        shared, store = report.shared_memory, report.object_store
        if shared is None:
            return "it is not there"
        has = f"it has {gib(shared.total_bytes)}"
        if store is None:
            return f"{has} in all" if shared.total_bytes < LOWEST_SHARED_BYTES else ""
        if not store.folder.startswith(SHARED_MEMORY):
            return f"it is too small ({gib(shared.total_bytes)}), so that Ray keeps its object store in {store.folder}"
        left_bytes = shared.total_bytes - store.size_bytes
        if left_bytes < 0:
            return f"{has}, the object store is to have {gib(store.size_bytes)}"
        if left_bytes < LOWEST_SHARED_BYTES:
            return f"{has}, of which the object store may take {gib(store.size_bytes)}: {gib(left_bytes)} are left"
        return ""

    wrong = nodes_with(reports, names, problem)
    if not wrong:
        return [Finding(SHARED_MEMORY, Level.OK, _shared_memory_left(reports), "", Group.NODES)]
    return [
        Finding(
            SHARED_MEMORY,
            Level.WARN,
            f"On {listed(where)} {what}. Results on their way and data loaders need it, too, at least "
            f"{gib(LOWEST_SHARED_BYTES)}, and a disk is slow.",
            "Give containers more than the object store: an emptyDir with medium: Memory at /dev/shm, or docker run "
            "--shm-size; or start Ray with a smaller object store: ray start --object-store-memory. Without a number "
            "Ray takes 30 % of the memory for it, and up to 95 % of /dev/shm.",
            Group.NODES,
        )
        for what, where in wrong.items()
    ]


def _shared_memory_left(reports: Sequence[NodeReport]) -> str:
    both = [(one.shared_memory, one.object_store) for one in reports]
    left = [shared.total_bytes - (store.size_bytes if store else 0) for shared, store in both if shared]
    return f"{gib(min(left))} or more are left beside the object store on {everywhere(reports)}"


def judge_disk(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """The folder for temporary files."""

    def problem(report: NodeReport) -> str:
        if report.temporary is None:
            return "cannot be written"
        return "has less than 1 GiB free" if report.temporary.free_bytes < LOWEST_FREE_BYTES else ""

    return [
        Finding(
            "disk",
            Level.WARN,
            f"The temporary folder {what} on {listed(where)}.",
            "Make room: Ray's logs and spilled objects, and ranks' output, lie there.",
            Group.NODES,
        )
        for what, where in nodes_with(reports, names, problem).items()
    ] or [Finding("disk", Level.OK, f"room for temporary files on {everywhere(reports)}", "", Group.NODES)]


def judge_limits(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """What the kernels allow."""
    found = [
        Finding(
            "ulimit -n",
            Level.WARN,
            f"{what} open files for a process on {listed(where)}.",
            "Raise the runtime's limit (docker run --ulimit nofile=65535, LimitNOFILE= of a service).",
            Group.NODES,
        )
        for what, where in nodes_with(
            reports, names, lambda one: str(one.open_files) if 0 <= one.open_files < LOWEST_OPEN_FILES else ""
        ).items()
    ]
    without = [names[report.rank] for report in reports if not report.pidfd]
    if without:
        found.append(
            Finding(
                "pidfd",
                Level.FAIL,
                f"No handles of processes on {listed(without)}, by which agents watch their workers.",
                "Use a kernel of 5.3 or newer, and a seccomp profile that allows pidfd_open.",
                Group.NODES,
            )
        )
    return found


def judge_gpus(nodes: Sequence[ClusterNode], reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """What Ray says of GPUs against the driver's word, and whether torch can use them."""
    counts = {node.node_id: node.resources.get("GPU", 0) for node in nodes}
    found = []
    for report in reports:
        told = counts.get(report.object_store.node_id, 0) if report.object_store else 0
        name = names[report.rank]
        if told and report.gpus and told != len(report.gpus):
            found.append(
                Finding(
                    "GPUs",
                    Level.WARN,
                    f"{name} has {len(report.gpus)}, and Ray was told {told:g}.",
                    "Start Ray there without --num-gpus, or with the number that is there.",
                    Group.NODES,
                )
            )
        if told and (report.torch is None or not report.torch.cuda):
            found.append(
                Finding(
                    "GPUs",
                    Level.FAIL,
                    f"{name} has {told:g}, by Ray's word, and torch there is built for CPUs only.",
                    "Install a build of torch for its GPUs, see pytorch.org/get-started.",
                    Group.NODES,
                )
            )
    return found
