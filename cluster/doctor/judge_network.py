"""What was found between the nodes: connections, the all_reduce, clocks. Pure: facts in, findings out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from kfpytorch_ray.cluster.doctor.report import LARGE_BYTES, Interval, NodeReport
from kfpytorch_ray.cluster.doctor.wording import counted, listed, nodes_with, shown_time
from kfpytorch_ray.doctor.finding import Finding, Group, Level
from kfpytorch_ray.doctor.judgement import gib, loopback

SKEW_S = 5.0
"""Clocks that differ by more are set wrong; by less, NTP is at work and messages had their time."""

SLOW_BYTES_PER_S = 100e6
"""About what a link of 1 Gbit/s carries, at which gradients of any real model are waited for."""

_WHAT_CLOCKS_DO = (
    "The rank that failed first is found by it, signed requests to object stores and tokens are refused when it is "
    "minutes off, and gc goes by it."
)
_SYNC = "Have an NTP client (chrony, systemd-timesyncd) set it."


def judge_peers(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """Which nodes cannot connect to which."""
    broken = [
        f"{names[report.rank]} -> {names.get(peer.rank, f'rank {peer.rank}')} ({peer.error})"
        for report in reports
        for peer in report.peers
        if peer.error
    ]
    if broken:
        return [
            Finding(
                "network",
                Level.FAIL,
                f"Nodes cannot connect to each other: {listed(broken)}.",
                "Allow all TCP ports between the nodes (firewall, security group, NetworkPolicy): ranks listen on "
                "ports that the kernel picks.",
                Group.NODES,
            )
        ]
    if len(reports) < 2:
        return []
    pairs = sum(len(report.peers) for report in reports)
    trips = [peer.ahead.high - peer.ahead.low for report in reports for peer in report.peers if peer.ahead]
    said = f"all {pairs} connections between nodes can be made, a round trip takes {shown_time(median(trips))}"
    return [Finding("network", Level.OK, said, "", Group.NODES)]


def judge_collective(reports: Sequence[NodeReport], names: Mapping[int, str]) -> list[Finding]:
    """The all_reduce."""
    done = [(report, report.collective) for report in reports if report.collective is not None]
    if not done:
        return []
    backend = done[0][1].backend
    check = f"all_reduce {backend}"
    wrong = nodes_with(
        [report for report, _ in done], names, lambda report: report.collective.error if report.collective else ""
    )
    if wrong:
        said = "; ".join(f"{listed(where)}: {error}" for error, where in wrong.items())
        return [Finding(check, Level.FAIL, f"It failed. {said}", _collective_fix(reports), Group.NODES)]
    small, large = max(one.small_s for _, one in done), max(one.large_s for _, one in done)
    said = (
        f"{counted(len(done), 'rank')}: {shown_time(small)} for one number, {shown_time(large)} for {gib(LARGE_BYTES)}"
    )
    if len(done) < 2:
        return [Finding(check, Level.OK, f"{said} (alone)", "", Group.NODES)]
    # A ring sends and receives this much at each rank.
    speed = 2 * (len(done) - 1) / len(done) * LARGE_BYTES / large
    said += f" ({speed / 1e6:.0f} MB/s at each rank)"
    if speed < SLOW_BYTES_PER_S:
        return [
            Finding(
                check,
                Level.WARN,
                f"{said}: slow, and gradients of every step go this way.",
                "Look whether other work has the nodes busy, and whether it goes by the fast network: "
                f"RayBackend(env={{'{backend.upper()}_SOCKET_IFNAME': ...}}).",
                Group.NODES,
            )
        ]
    return [Finding(check, Level.OK, said, "", Group.NODES)]


def _collective_fix(reports: Sequence[NodeReport]) -> str:
    backend = next(report.collective.backend for report in reports if report.collective)
    by_loopback = [report for report in reports if report.host_addresses and loopback(report.host_addresses)]
    interfaces = {report.interface for report in reports if report.interface} or {"eth0"}
    named = f"RayBackend(env={{'{backend.upper()}_SOCKET_IFNAME': '{','.join(sorted(interfaces))}'}})"
    if any(peer.error for report in reports for peer in report.peers):
        return "Mend the network first, see above."
    if backend == "gloo" and by_loopback and len({report.address for report in reports}) > 1:
        return (
            f"The host name of {counted(len(by_loopback), 'node')} resolves to the node itself there, and gloo offers "
            f"that address to others. Name the interface: {named}"
        )
    return f"Name the network interface that connects the nodes: {named}"


def judge_head_clock(ahead: Interval | None) -> list[Finding]:
    """The head's clock, by what its HTTP server says."""
    if ahead is None:
        return []
    if _off(ahead):
        return [
            Finding(
                "head's clock",
                Level.WARN,
                f"The head, or a proxy before it, is {_shown(ahead)}. {_WHAT_CLOCKS_DO}",
                _SYNC,
                Group.CLUSTER,
            )
        ]
    return [Finding("head's clock", Level.OK, _shown(ahead), "", Group.CLUSTER)]


def judge_clocks(ahead: Mapping[int, Interval], names: Mapping[int, str]) -> list[Finding]:
    """The nodes' clocks against this machine's."""
    off = [f"{names[rank]} is {_shown(interval)}" for rank, interval in ahead.items() if _off(interval)]
    if off:
        return [Finding("clocks", Level.WARN, f"{listed(off)}. {_WHAT_CLOCKS_DO}", _SYNC, Group.NODES)]
    if not ahead:
        return []
    widest = max(ahead.values(), key=lambda one: max(abs(one.low), abs(one.high)))
    return [Finding("clocks", Level.OK, f"{_shown(widest)} on every node", "", Group.NODES)]


def _off(ahead: Interval) -> bool:
    return ahead.low > SKEW_S or ahead.high < -SKEW_S


def _shown(ahead: Interval) -> str:
    if ahead.low > SKEW_S:
        return f"{ahead.low:.1f} s or more ahead of this machine"
    if ahead.high < -SKEW_S:
        return f"{-ahead.high:.1f} s or more behind this machine"
    farthest = max(0.1, abs(ahead.low), abs(ahead.high))
    return f"at most {math.ceil(10 * farthest) / 10:.1f} s from this machine's"
