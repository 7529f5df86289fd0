"""What the doctor says of a cluster and its nodes, given what they report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import requests

from kfpytorch_ray.cluster.doctor.clocks import ahead, round_trip
from kfpytorch_ray.cluster.doctor.judge_network import judge_clocks, judge_collective, judge_head_clock, judge_peers
from kfpytorch_ray.cluster.doctor.judgement import judge_nodes, judge_reports, judge_versions
from kfpytorch_ray.cluster.doctor.nodes import clock_of, read_nodes
from kfpytorch_ray.cluster.doctor.report import (
    ClusterNode,
    Collective,
    Interval,
    NodeReport,
    ObjectStore,
    Peer,
    StorageAnswer,
)
from kfpytorch_ray.cluster.doctor.wording import names_of
from kfpytorch_ray.cluster.remote.versions import Versions
from kfpytorch_ray.doctor.finding import Finding, Level
from kfpytorch_ray.doctor.machine import Space
from kfpytorch_ray.doctor.torch_report import TorchReport
from kfpytorch_ray.errors import explain

MINE = Versions("3.11.7", "2.60.0", "2.13.0+cpu", "1.16.31", "3.1.2", "0.1.0", 1)
TORCH = TorchReport("2.13.0+cpu", gloo=True, nccl=False, cuda=None, devices=0)
HEAD = ClusterNode("f" * 56, "10.0.0.1", head=True, resources={"memory": 2.0**33})
NODES = (
    HEAD,
    ClusterNode("a" * 56, "10.0.0.2", head=False, resources={"CPU": 4.0, "memory": 2.0**34}),
    ClusterNode("b" * 56, "10.0.0.3", head=False, resources={"CPU": 4.0, "memory": 2.0**34}),
)
ALL = Interval(-1000.0, 1000.0)
WITHIN = Interval(0.0, 0.001)


def report(rank: int, **changes: Any) -> NodeReport:
    """A healthy node, but for these changes."""
    node = NODES[rank + 1]
    healthy = NodeReport(
        rank=rank,
        address=node.address,
        interface="eth0",
        boot_id=f"boot-{rank}",
        hostname=f"worker-{rank}",
        host_addresses=(node.address,),
        object_store=ObjectStore(node.node_id, 2**30, "/dev/shm"),
        versions=MINE,
        torch=TORCH,
        shared_memory=Space("/dev/shm", 2**32, 2**31),
        temporary=Space("/tmp", 2**37, 2**36),
        open_files=65535,
        pidfd=True,
        gpus=(),
        began_at=100.0,
        ended_at=110.0,
        peers=(Peer(1 - rank, "", WITHIN),),
        collective=Collective("gloo", "", 0.001, 0.1),
        storage=StorageAnswer("", 100.0, 100.1),
    )
    return dataclasses.replace(healthy, **changes)


def bad(*reports: NodeReport, nodes: tuple[ClusterNode, ...] = NODES) -> list[Finding]:
    """What is not all right."""
    clocks = {one.rank: Interval(-0.1, 0.1) for one in reports}
    return [one for one in judge_reports(MINE, nodes, reports, clocks) if one.level is not Level.OK]


def test_healthy_nodes() -> None:
    """Nothing is wrong, every node has its line, and one line speaks for all nodes."""
    found = judge_reports(MINE, NODES, [report(0), report(1)], {0: Interval(0, 0.1), 1: Interval(0, 0.2)})
    assert {one.level for one in found} == {Level.OK}
    assert [one.check for one in found[:3]] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    said = {one.check: one.text for one in found}
    assert "4 CPUs, memory 16.0 GiB" in said["10.0.0.2"]
    assert "0 CPUs" in said["10.0.0.1"]
    assert "all 2 nodes" in said["versions"]
    assert "671 MB/s" in said["all_reduce gloo"]
    assert "0.2 s" in said["clocks"]


@pytest.mark.parametrize(
    ("changes", "check", "level", "text", "fix"),
    [
        ({"open_files": 1024}, "ulimit -n", Level.WARN, "1024 open files", "LimitNOFILE"),
        ({"pidfd": False}, "pidfd", Level.FAIL, "No handles", "seccomp"),
        ({"temporary": None}, "disk", Level.WARN, "cannot be written", "Make room"),
        ({"temporary": Space("/tmp", 2**37, 2**20)}, "disk", Level.WARN, "less than 1 GiB", "Make room"),
        ({"shared_memory": None}, "/dev/shm", Level.WARN, "it is not there", "--shm-size"),
        (
            {"shared_memory": Space("/dev/shm", 2**26, 2**26)},
            "/dev/shm",
            Level.WARN,
            "it has 64 MiB, the object store is to have 1.0 GiB",
            "--object-store-memory",
        ),
        (
            {"shared_memory": Space("/dev/shm", 2**30 + 2**29, 2**30)},
            "/dev/shm",
            Level.WARN,
            "it has 1.5 GiB, of which the object store may take 1.0 GiB: 512 MiB are left",
            "--shm-size",
        ),
        (
            {"shared_memory": Space("/dev/shm", 2**26, 2**26), "object_store": None},
            "/dev/shm",
            Level.WARN,
            "it has 64 MiB in all",
            "--shm-size",
        ),
        (
            {
                "shared_memory": Space("/dev/shm", 2**26, 2**26),
                "object_store": ObjectStore(NODES[2].node_id, 2**30, "/tmp"),
            },
            "/dev/shm",
            Level.WARN,
            "Ray keeps its object store in /tmp",
            "medium: Memory",
        ),
        ({"storage": StorageAnswer("no rights")}, "storage", Level.FAIL, "Not usable on 10.0.0.3. no rights", "s3fs"),
        (
            {"storage": StorageAnswer(explain("It cannot be read.", "Full.", "Make room."))},
            "storage",
            Level.FAIL,
            "It cannot be read. Full.",
            "Make room.",
        ),
    ],
)
def test_a_sick_node_is_named(changes: dict[str, Any], check: str, level: Level, text: str, fix: str) -> None:
    """One line for what is wrong, with the node and the fix."""
    (finding,) = bad(report(0), report(1, **changes))
    assert (finding.check, finding.level) == (check, level)
    assert text in finding.text
    assert "10.0.0.3" in finding.text
    assert "10.0.0.2" not in finding.text
    assert fix in finding.fix


def test_nodes_that_are_ill_alike_share_a_line() -> None:
    """Hundred nodes of one image have one fault."""
    (finding,) = bad(report(0, open_files=1024), report(1, open_files=1024))
    assert "10.0.0.2, 10.0.0.3" in finding.text


def test_nodes_that_are_in_use_are_named() -> None:
    """What has not reported was not looked at; that is no failure."""
    (finding,) = bad(report(0, peers=()))
    assert (finding.check, finding.level) == ("busy nodes", Level.WARN)
    assert "10.0.0.3" in finding.text


def test_reports_of_another_cluster() -> None:
    """A head whose machine runs several Rays may hand its jobs to another."""
    strange = report(0, object_store=ObjectStore("c" * 56, 2**30, "/dev/shm"))
    assert "another cluster" in bad(strange, report(1))[0].text


def test_a_cluster_without_cpus() -> None:
    """An autoscaler may make nodes, so it is a warning that says how."""
    (finding,) = judge_nodes([HEAD])
    assert finding.level is Level.WARN
    assert "autoscaling=True" in finding.fix


def test_versions_that_differ() -> None:
    """A breaking difference fails and names the node; mixed nodes are a warning beside it."""
    other = dataclasses.replace(MINE, python="3.12.1")
    reports = [report(0), report(1, versions=other)]
    found = [one for one in judge_versions(MINE, reports, names_of(reports, NODES)) if one.level is not Level.OK]
    assert [one.level for one in found] == [Level.FAIL, Level.WARN]
    assert "3.12.1 on 10.0.0.3" in found[0].text
    assert "differ from each other" in found[1].text


def test_a_pair_that_cannot_talk_is_named_in_its_direction() -> None:
    """So that the firewall's rule can be found."""
    reports = [report(0), report(1, peers=(Peer(0, "10.0.0.2:40001: timed out"),))]
    (finding,) = judge_peers(reports, names_of(reports, NODES))
    assert finding.level is Level.FAIL
    assert "10.0.0.3 -> 10.0.0.2 (10.0.0.2:40001: timed out)" in finding.text
    assert "NetworkPolicy" in finding.fix


def test_one_node_has_no_pairs() -> None:
    """Nothing is said of a network that was not used."""
    assert judge_peers([report(0, peers=())], {0: "10.0.0.2"}) == []


FAILED = Collective("gloo", "connect refused")


def test_an_all_reduce_that_failed_for_the_host_names() -> None:
    """Nodes can connect, but gloo offers 127.0.1.1: the fix names the interface that would do."""
    reports = [report(0, collective=FAILED), report(1, collective=FAILED, host_addresses=("127.0.1.1",))]
    (finding,) = judge_collective(reports, names_of(reports, NODES))
    assert finding.level is Level.FAIL
    assert "connect refused" in finding.text
    assert "'GLOO_SOCKET_IFNAME': 'eth0'" in finding.fix


def test_an_all_reduce_that_failed_for_the_network() -> None:
    """What the connections tell comes first."""
    reports = [report(0, collective=FAILED), report(1, collective=FAILED, peers=(Peer(0, "timed out"),))]
    (finding,) = judge_collective(reports, names_of(reports, NODES))
    assert finding.fix == "Mend the network first, see above."


def test_a_slow_all_reduce_is_a_warning() -> None:
    """64 MiB in seconds is what every step of a training would wait for."""
    reports = [report(rank, collective=Collective("gloo", "", 0.01, 3.0)) for rank in (0, 1)]
    (finding,) = judge_collective(reports, names_of(reports, NODES))
    assert finding.level is Level.WARN
    assert "22 MB/s" in finding.text


GPU_NODES = tuple(dataclasses.replace(node, resources={**node.resources, "GPU": 2.0}) for node in NODES[1:])


def test_gpus_that_torch_cannot_use() -> None:
    """A CPU build on a node with GPUs trains nothing on them."""
    found = bad(report(0, gpus=("H100", "H100")), report(1, gpus=("H100",)), nodes=GPU_NODES)
    assert [(one.check, one.level) for one in found] == [
        ("GPUs", Level.FAIL),
        ("GPUs", Level.WARN),
        ("GPUs", Level.FAIL),
    ]
    assert "10.0.0.3 has 1, and Ray was told 2" in found[1].text


def test_names_tell_nodes_of_one_machine_apart() -> None:
    """Several Ray nodes may have one address."""
    same = tuple(dataclasses.replace(node, address="10.0.0.9") for node in NODES)
    reports = [report(0), report(1, object_store=None)]
    assert names_of(reports, same) == {0: "10.0.0.9 (aaaaaaaa)", 1: "10.0.0.3 (rank 1)"}


@pytest.mark.parametrize(
    ("interval", "level", "text"),
    [
        (Interval(-0.2, 0.4), Level.OK, "at most 0.4 s"),
        (Interval(-20.0, 4.0), Level.OK, "at most 20.0 s"),
        (Interval(6.0, 7.0), Level.WARN, "6.0 s or more ahead"),
        (Interval(-70.0, -60.0), Level.WARN, "60.0 s or more behind"),
    ],
)
def test_clocks(interval: Interval, level: Level, text: str) -> None:
    """Only what is certainly off is a warning."""
    for (finding,) in (judge_clocks({0: interval}, {0: "10.0.0.2"}), judge_head_clock(interval)):
        assert finding.level is level
        assert text in finding.text
        assert bool(finding.fix) is (level is Level.WARN)


def test_a_round_trip_bounds_a_clock() -> None:
    """Asked at 10, it said 110 meanwhile, answered at 12: between 98 and 100 ahead."""
    assert round_trip(10, Interval(110, 110), 12) == Interval(98, 100)


def test_the_launch_bounds_all_clocks() -> None:
    """A node that is 50 s ahead began after we launched and was done before we knew."""
    one = report(0, began_at=153.0, ended_at=158.0, storage=None, peers=())
    assert ahead([one], "", Interval(100, 110), {}) == {0: Interval(48, 53)}


def test_the_storage_bounds_them_more_narrowly() -> None:
    """What was written there before it was read, and what was seen after it was written."""
    one = report(0, began_at=153.0, ended_at=158.0, storage=StorageAnswer("", 104.0, 154.5), peers=())
    assert ahead([one], "", Interval(100, 110), {0: (154.75, 105.0)}) == {0: Interval(49.75, 50.5)}


def test_clocks_are_known_by_each_other() -> None:
    """One node exchanged times with this machine, the other only with that node."""
    near = report(0, storage=None, peers=(Peer(1, "", Interval(9.9, 10.1)),))
    far = report(1, storage=None, peers=(), began_at=110.0, ended_at=120.0)
    found = ahead([near, far], "", Interval(0, 1000), {0: (100.0, 100.2)})
    assert found[0].low == pytest.approx(-0.2)
    assert found[1].low == pytest.approx(9.7)


def test_a_node_on_this_machine_has_its_clock() -> None:
    """By the kernel; containers share it."""
    here, there = report(0, storage=None, peers=(Peer(1, "", Interval(2.0, 2.1)),)), report(1, storage=None, peers=())
    found = ahead([here, there], "boot-0", Interval(0, 1000), {})
    assert found == {0: Interval(0, 0), 1: Interval(2.0, 2.1)}


def test_clocks_that_were_set_meanwhile() -> None:
    """Bounds that contradict each other leave what is known without them."""
    one = report(0, storage=StorageAnswer("", 100.0, 50.0), peers=())
    assert ahead([one], "", Interval(100, 110), {}) == {0: Interval(0, 0)}


def test_the_clock_of_an_http_server() -> None:
    """Its whole seconds are rounded down; one that does not say the time has none."""
    answer = requests.Response()
    assert clock_of(answer, 0, 1) is None
    answer.headers["Date"] = "Thu, 01 Jan 1970 00:01:40 GMT"
    assert clock_of(answer, 99.5, 100.5) == Interval(-0.5, 1.5)


def test_the_nodes_of_the_state_api() -> None:
    """The head first; the dead are left out."""
    rows = [
        {"node_id": "b", "node_ip": "10.0.0.2", "is_head_node": False, "state": "ALIVE", "resources_total": {"CPU": 2}},
        {"node_id": "c", "node_ip": "10.0.0.3", "is_head_node": False, "state": "DEAD", "resources_total": None},
        {"node_id": "a", "node_ip": "10.0.0.9", "is_head_node": True, "state": "ALIVE", "resources_total": {}},
    ]
    nodes = read_nodes({"result": True, "data": {"result": {"result": rows}}})
    assert [(node.node_id, node.holds_agents) for node in nodes] == [("a", False), ("b", True)]


@pytest.mark.parametrize("said", [{}, {"data": None}, {"data": {"result": {"result": [{}]}}}])
def test_an_answer_that_is_none(said: dict[str, Any]) -> None:
    """Another Ray's state API, or none."""
    with pytest.raises((KeyError, TypeError)):
        read_nodes(said)
