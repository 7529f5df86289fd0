"""A report as HTML: one page that needs nothing else, or a fragment of one for a Flyte deck. No script, no network.

What the templates say is here in the order in which it is read: the failure, a line of numbers, where the time went,
the timeline, ranks, curves, nodes, the last lines of logs, versions. Every value is escaped by Jinja2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kfpytorch_ray.report.breakdown import NO_FAILURE, totals
from kfpytorch_ray.report.charts import metric_charts, resource_charts
from kfpytorch_ray.report.data import NodeFacts, ReportedNode, ReportedRank, ReportedRound, RunReport
from kfpytorch_ray.report.scales import amount, duration, memory, moment
from kfpytorch_ray.report.timeline import timeline_of

if TYPE_CHECKING:
    from jinja2 import Environment

TITLE = "Elastic run"

_MOST_TEXT = 6000
_MOST_TRACEBACK = 12000
_MOST_TAILS = 10
_MOST_TAILS_OF_A_SUCCESS = 8
_MOST_LINE = 160
_SHORTEST_S = 0.005
_MOST_CELLS = 128
_PARTS = re.compile(r"\A(?P<what>.*?)\nWhy: (?P<why>.*?)\nFix: (?P<fix>.*?)(?:\n\n(?P<more>.*))?\Z", re.DOTALL)
_CONTROLS = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Colours and what else a terminal would obey; a tab and ends of lines stay."""
_SYMBOLS = {
    "succeeded": "✓",
    "raised": "✕",
    "exited": "✕",
    "killed": "✕",
    "hung": "…",
    "lost": "?",
    "stopped": "■",
}


def page(report: RunReport) -> str:
    """A whole HTML page."""
    return _environment().get_template("page.html").render(_context(report))


def fragment(report: RunReport) -> str:
    """The same as a part of another page; its style touches nothing around it."""
    return _environment().get_template("fragment.html").render(_context(report))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kfpytorch_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, memory=memory, amount=amount, moment=moment, devices=_devices)
    return environment


def _printable(value: object) -> object:
    """A value as a page can have it: a file's name that is not UTF-8 could not be written anywhere."""
    # What has this is a part of the page already.
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _CONTROLS.sub("", value).encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class _Share:
    """A part of the whole time."""

    kind: str
    name: str
    seconds: float
    percent: float


@dataclass(frozen=True, slots=True)
class _Cell:
    """A rank in the grid."""

    rank: ReportedRank
    symbol: str
    cause: bool
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class _GridRow:
    """A node's ranks in a round."""

    label: str
    address: str
    cells: tuple[_Cell, ...]


@dataclass(frozen=True, slots=True)
class _Grid:
    """The ranks of a round."""

    round: ReportedRound
    rows: tuple[_GridRow, ...]


@dataclass(frozen=True, slots=True)
class _Tail:
    """What a rank printed last in a round."""

    rank: ReportedRank
    round_index: int
    failed: bool
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cause:
    """What is said first of a launch that failed."""

    what: str
    why: str
    fix: str
    more: str
    error: str
    retryable: bool
    rank: ReportedRank | None
    round_index: int | None
    where: str
    traceback: str


@dataclass(frozen=True, slots=True)
class _Versions:
    """A package's version: where the driver ran, and on nodes where it is another."""

    name: str
    driver: str
    others: tuple[str, ...]


def _context(report: RunReport) -> dict[str, object]:
    last = report.rounds[-1] if report.rounds else None
    tails, left_out = _tails(report)
    return {
        "title": TITLE,
        "report": report,
        "status": _status(report),
        "last": last,
        "seconds": report.ended_at - report.started_at,
        "shares": _shares(report),
        "cause": _cause(report),
        "timeline": timeline_of(report),
        "grids": _grids(report),
        "metrics": metric_charts(report),
        "resources": resource_charts(report),
        "tails": tails,
        "tails_left_out": left_out,
        "versions": _versions(report),
        "addresses": {node.number: node.address for node in report.nodes},
    }


def _status(report: RunReport) -> tuple[str, str]:
    """How the run ended: kind and words."""
    if report.failure is not None:
        return "bad", "failed"
    early = sum(not one.succeeded for one in report.rounds)
    if not early:
        return "good", "succeeded"
    return "good", f"succeeded after {early} {'restart' if early == 1 else 'restarts'}"


def _shares(report: RunReport) -> tuple[_Share, ...]:
    seconds = totals(report)
    whole = sum(seconds.values()) or 1.0
    return tuple(
        _Share(activity.name.lower(), activity.value, total, round(100 * total / whole, 2))
        for activity, total in seconds.items()
        if total >= _SHORTEST_S
    )


def _cause(report: RunReport) -> _Cause | None:
    failure = report.failure
    if failure is None:
        return None
    found = _PARTS.match(failure.message)
    said = found.groupdict() if found else {"what": failure.message, "why": "", "fix": "", "more": ""}
    last = report.rounds[-1] if report.rounds else None
    rank = None
    if last is not None and last.cause is not None:
        rank = next(one for one in last.ranks if one.rank == last.cause)
    where = ""
    if rank is not None and last is not None:
        address = next((node.address for node in report.nodes if node.number == rank.node), "")
        where = f"node {last.node_rank(rank.node)} ({address}), local rank {rank.local_rank}"
    return _Cause(
        what=_cut(said["what"] or ""),
        why=_cut(said["why"] or ""),
        fix=_cut(said["fix"] or ""),
        # With a rank, the traceback and the last lines that follow in the message are shown by themselves.
        more="" if rank is not None and not rank.stacks else _cut(said["more"] or "", _MOST_TRACEBACK),
        error=failure.error,
        retryable=failure.retryable,
        rank=rank,
        round_index=last.index if last is not None else None,
        where=where,
        traceback=_cut_front(rank.traceback.rstrip(), _MOST_TRACEBACK) if rank is not None else "",
    )


def _grids(report: RunReport) -> tuple[_Grid, ...]:
    """The ranks of the last round, and of those before it as far as there is room."""
    grids: list[_Grid] = []
    cells = 0
    for one in reversed(report.rounds):
        cells += len(one.ranks)
        if grids and cells > _MOST_CELLS:
            break
        grids.append(_grid(report, one))
    return tuple(grids)


def _grid(report: RunReport, one: ReportedRound) -> _Grid:
    addresses = {node.number: node.address for node in report.nodes}
    peaks = {
        samples.rank: max((s.memory_bytes for s in samples.samples if s.round_index == one.index), default=None)
        for samples in report.samples
    }
    rows = []
    for number in one.nodes:
        cells = tuple(
            _Cell(rank, _SYMBOLS.get(rank.outcome, "·"), rank.rank == one.cause, peaks.get(rank.rank))
            for rank in one.ranks
            if rank.node == number
        )
        rows.append(_GridRow(f"node {one.node_rank(number)}", addresses.get(number, ""), cells))
    return _Grid(one, tuple(rows))


def _tails(report: RunReport) -> tuple[tuple[_Tail, ...], int]:
    """The last lines of the last round's ranks, the cause's first; and how many ranks' are not shown."""
    found = [
        _Tail(rank, one.index, rank.outcome not in NO_FAILURE, tuple(_cut(line, _MOST_LINE) for line in rank.log_tail))
        for one in report.rounds[::-1]
        for rank in sorted(one.ranks, key=lambda rank, one=one: (rank.rank != one.cause, rank.outcome in NO_FAILURE))  # type: ignore[misc]
        if rank.log_tail and (one is report.rounds[-1] or rank.outcome not in NO_FAILURE)
    ]
    most = _MOST_TAILS_OF_A_SUCCESS if report.failure is None else _MOST_TAILS
    return tuple(found[:most]), len(found[most:])


def _versions(report: RunReport) -> tuple[_Versions, ...]:
    driver = dict(report.versions)
    names = list(dict.fromkeys([*driver, *(name for node in report.nodes for name, _ in _told(node))]))
    rows = []
    for name in names:
        others: dict[str, list[str]] = {}
        for node in report.nodes:
            version = dict(_told(node)).get(name, "")
            if version and version != driver.get(name):
                others.setdefault(version, []).append(node.address)
        rows.append(
            _Versions(
                name,
                driver.get(name, ""),
                tuple(f"{version} on {', '.join(_few(addresses))}" for version, addresses in others.items()),
            )
        )
    return tuple(rows)


def _told(node: ReportedNode) -> tuple[tuple[str, str], ...]:
    return node.facts.versions if node.facts is not None else ()


def _devices(facts: NodeFacts) -> str:
    """Its GPUs, equal ones counted, and its processors."""
    counted = Counter(facts.devices)
    words = [name if count == 1 else f"{count} × {name}" for name, count in counted.items()]
    if facts.cpus:
        words.append(f"{facts.cpus} × {facts.processor or 'CPU'}")
    if facts.memory_bytes:
        words.append(memory(facts.memory_bytes))
    return ", ".join(words)


def _few(names: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(names))
    return unique if len(unique) <= 3 else [*unique[:3], f"{len(unique) - 3} others"]


def _cut(text: str, most: int = _MOST_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"


def _cut_front(text: str, most: int) -> str:
    return text if len(text) <= most else f"({len(text) - most} characters before) … {text[-most:]}"
