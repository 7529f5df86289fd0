"""Looking at a cluster from end to end: asked over HTTP, then by a launch whose ranks report on their nodes.

Everything that is written goes into one folder of the storage, which is removed at the end, and so is the job. What
cannot be done becomes a finding; the next checks are made as far as they can be without it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ray

from kfpytorch_ray.cluster.connect import connected
from kfpytorch_ray.cluster.doctor.judge_network import judge_collective, judge_head_clock, judge_peers
from kfpytorch_ray.cluster.doctor.judgement import describe_nodes, judge_head_versions, judge_nodes, judge_reports
from kfpytorch_ray.cluster.doctor.launcher import Launcher, own_temporary_folder, quiet, scratch
from kfpytorch_ray.cluster.doctor.nodes import clock_of, joined_nodes, nodes_of
from kfpytorch_ray.cluster.doctor.report import ClusterNode, NodeReport
from kfpytorch_ray.cluster.doctor.wording import names_of, shown_time
from kfpytorch_ray.cluster.listening import nobody_at
from kfpytorch_ray.cluster.remote.client import client_of
from kfpytorch_ray.cluster.remote.probe import probe
from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.doctor.finding import Finding, Group, Level, of_message
from kfpytorch_ray.errors import (
    AuthenticationError,
    KfpytorchRayError,
    LaunchError,
    PlacementTimeoutError,
    RunPendingError,
    StorageError,
)
from kfpytorch_ray.storage import Storage

_LEASE_S = 60.0
"""If this process is killed, its launch ends by itself."""
_LOCAL_NODES = 2
_NAME_STORAGE = "Name one that this machine and the cluster reach: --storage s3://bucket/prefix"


def examine_remote(options: RayBackend, address: str, wait_s: float) -> Iterator[Finding]:
    """Look at a cluster that is elsewhere.

    Args:
        options: How it is reached; without ``storage`` only what its head says can be looked at.
        address: Of its job API.
        wait_s: How long to wait for nodes that are in use.
    """
    try:
        client = client_of(options, address)
        sent_at = time.time()
        version = client.version()
        received_at = time.time()
        asked_at = time.time()
        clock = clock_of(client._do_request("GET", "/api/version"), asked_at, time.time())
    except KfpytorchRayError as error:
        check = "access" if isinstance(error, AuthenticationError) else "reachable"
        yield of_message(check, error, Group.CLUSTER)
        return
    yield _ok("reachable", f"{address} answers in {shown_time(received_at - sent_at)}")
    with_token = any(name.lower().endswith("authorization") for name in client._headers or {})
    yield _ok("access", "granted to the token" if with_token else "granted, no token was sent")
    yield _ok("ray", f"Ray {version['ray_version']}, {version.get('session_name', 'of an unknown session')}")
    yield from judge_head_clock(clock)
    try:
        nodes = nodes_of(client)
    except KfpytorchRayError as error:
        yield of_message("resources", error, Group.CLUSTER)
        return
    yield from judge_nodes(nodes)
    if not options.storage:
        yield from _not_looked_at(nodes, "a launch there needs a storage", _NAME_STORAGE)
        return
    with scratch(options.storage) as folder:
        if folder is None:
            yield from _not_looked_at(nodes, "a launch needs a storage that this machine can use")
            return
        try:
            answer = probe(client, folder, {}, fresh=True)
        except StorageError as error:
            yield of_message("head's storage", error, Group.CLUSTER)
            yield from _not_looked_at(nodes, "a launch needs a storage that the cluster can use")
            return
        except KfpytorchRayError as error:
            yield of_message("job", error, Group.CLUSTER)
            yield from _not_looked_at(nodes, "the cluster runs no job of ours")
            return
        yield _ok("head's storage", "a job on the head reads and writes it")
        yield from judge_head_versions(here(), answer.versions)
        inside = replace(options, address=address, storage=folder.uri, working_dir="", lease_s=_LEASE_S)
        yield from _nodes(Launcher(inside, client, folder, wait_s), nodes)
    yield from _left(folder)


def examine_joined(options: RayBackend, wait_s: float) -> Iterator[Finding]:
    """Look at a cluster that this machine belongs to.

    Args:
        options: How it is joined; ``storage`` is looked at where one is named.
        wait_s: How long to wait for nodes that are in use.
    """
    address = options.address or "auto"
    if error := nobody_at(address):
        yield Finding(
            "reachable",
            Level.FAIL,
            f"Nobody answers at {address}: {error}",
            "Name the GCS of a cluster that this machine belongs to (most often port 6379), or the job API of one that "
            "is elsewhere: http://HOST:8265",
            Group.CLUSTER,
        )
        return
    with contextlib.ExitStack() as undo:
        try:
            _join(undo, replace(options, address=address, working_dir=""), {})
        except KfpytorchRayError as error:
            yield of_message("reachable", error, Group.CLUSTER)
            return
        nodes = joined_nodes()
        yield _ok("reachable", f"joined {ray.get_runtime_context().gcs_address}, Ray {ray.__version__}")
        yield from judge_nodes(nodes)
        folder = undo.enter_context(scratch(options.storage)) if options.storage else None
        inside = replace(options, address="auto", storage=None, working_dir="")
        yield from _nodes(Launcher(inside, None, folder, wait_s), nodes)


def examine_local(wait_s: float) -> Iterator[Finding]:
    """Start a Ray on this machine, and have two agents on it do an all_reduce.

    Args:
        wait_s: How long the agents may take to start.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(own_temporary_folder())
        options = RayBackend(address="local", working_dir="")
        try:
            _join(undo, options, {"CPU": _LOCAL_NODES})
            launched = Launcher(options, None, None, wait_s).launch(_LOCAL_NODES, "gloo", {"CPU": 1})
        except KfpytorchRayError as error:
            yield of_message("local Ray", error)
            return
        names = {report.rank: f"rank {report.rank}" for report in launched.reports}
        for finding in (*judge_peers(launched.reports, names), *judge_collective(launched.reports, names)):
            yield replace(finding, check="local Ray", group=Group.MACHINE)


def _nodes(launcher: Launcher, nodes: Sequence[ClusterNode]) -> Iterator[Finding]:
    fit = [node for node in nodes if node.holds_agents]
    if not fit:
        yield from _not_looked_at(nodes, "none of them has a CPU")
        return
    nnodes = f"1:{len(fit)}" if len(fit) > 1 else 1
    try:
        launched = launcher.launch(nnodes, "gloo", {"CPU": 1})
    except LaunchError as error:
        yield of_message("all_reduce gloo", error, Group.NODES)
        # What the nodes say without it tells why.
        try:
            launched = launcher.launch(nnodes, None, {"CPU": 1})
        except KfpytorchRayError as again:
            yield from (*describe_nodes(nodes), _of_launch(again))
            return
    except KfpytorchRayError as error:
        yield from (*describe_nodes(nodes), _of_launch(error))
        return
    yield from judge_reports(here(), nodes, launched.reports, launched.clocks)
    if _can_nccl(nodes, launched.reports):
        yield from _nccl(launcher, nodes, len(launched.reports))


def _can_nccl(nodes: Sequence[ClusterNode], reports: Sequence[NodeReport]) -> bool:
    with_gpu = {node.node_id for node in nodes if node.resources.get("GPU", 0) >= 1}
    return all(
        report.object_store is not None
        and report.object_store.node_id in with_gpu
        and report.torch is not None
        and report.torch.nccl
        for report in reports
    )


def _nccl(launcher: Launcher, nodes: Sequence[ClusterNode], count: int) -> Iterator[Finding]:
    check = "all_reduce nccl"
    try:
        launched = launcher.launch(count, "nccl", {"CPU": 1, "GPU": 1})
    except PlacementTimeoutError as error:
        yield of_message(check, error, Group.NODES, Level.WARN, "Not every node has a GPU free. ")
    except KfpytorchRayError as error:
        yield of_message(check, error, Group.NODES)
    else:
        yield from judge_collective(launched.reports, names_of(launched.reports, nodes))


def _of_launch(error: KfpytorchRayError) -> Finding:
    match error:
        case PlacementTimeoutError():
            finding = of_message("launch", error, Group.NODES, Level.WARN, "No node could be looked at. ")
            if "still starting" in finding.text:
                return finding
            return replace(
                finding,
                text=f"The cluster is fully used, and no node could be looked at. {finding.text.partition('. ')[2]}",
                fix="Run this again when other work has ended, or wait longer for it: --wait SECONDS.",
            )
        case RunPendingError():
            return of_message("launch", error, Group.NODES, prefix="A launch hangs, and was stopped. ")
        case _:
            return of_message("launch", error, Group.NODES)


def _join(undo: contextlib.ExitStack, options: RayBackend, demand: Mapping[str, float]) -> None:
    """Have a Ray until ``undo`` is closed, and be out of it then if this process was not in one before."""
    with quiet():
        if not ray.is_initialized():
            undo.callback(ray.shutdown)
        undo.enter_context(connected(options, demand))


def _left(folder: Storage) -> Iterator[Finding]:
    with contextlib.suppress(KfpytorchRayError):
        if folder.names():
            yield Finding(
                "clean-up", Level.WARN, f"{folder.uri} could not be removed.", "Remove it by hand.", Group.CLUSTER
            )


def _not_looked_at(nodes: Sequence[ClusterNode], why: str, fix: str = "Mend what is said above.") -> Iterator[Finding]:
    yield from describe_nodes(nodes)
    yield Finding("launch", Level.WARN, f"The nodes were not looked at: {why}.", fix, Group.NODES)


def _ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text, "", Group.CLUSTER)
