from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import sample_reports

from kfpytorch_ray.report.breakdown import segments, totals
from kfpytorch_ray.report.charts import metric_charts, thinned
from kfpytorch_ray.report.data import Activity, Metric, NodeFacts, RunReport
from kfpytorch_ray.report.page import fragment, page
from kfpytorch_ray.report.scales import duration, memory, time_ticks, top_of
from kfpytorch_ray.report.timeline import timeline_of

EVIL = "<script>alert('x')</script>\"'&"
MOST_BYTES = 300_000
VOID = {"meta", "link", "br", "rect", "path", "polyline"}


class Elements(HTMLParser):
    """Every element that a browser would make of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")], (tag, attrs)
        if tag not in VOID or tag in ("rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def often(nodes: int, nproc: int, rounds: int) -> RunReport:
    """Every rank fails in every round, with long lines."""
    report = sample_reports.failure(nodes, nproc)
    long = tuple("x" * 5000 for _ in range(20))
    bad = tuple(
        replace(rank, outcome="raised", message="m" * 900, traceback="t" * 90_000, log_tail=long)
        for rank in report.rounds[0].ranks
    )
    seconds = 40.0 / rounds
    return replace(
        report,
        rounds=tuple(
            replace(
                report.rounds[0],
                index=index,
                ranks=bad,
                started_at=sample_reports.START + 6.5 + index * seconds,
                ended_at=sample_reports.START + 6.5 + (index + 1) * seconds,
            )
            for index in range(rounds)
        ),
    )


REPORTS = {
    "success": sample_reports.success(),
    "gpus": sample_reports.success(gpus=True),
    "failure": sample_reports.failure(),
    "large": sample_reports.success(8, 8, gpus=True, count=120),
    "large failure": sample_reports.failure(16, 4),
    "all fail often": often(16, 4, 6),
    "never placed": sample_reports.never_placed(),
    "nothing known": RunReport("f", "id", "kubeflow", 1.0, 1.0),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_stands_alone(name: str) -> None:
    """Elements are closed; no script, nothing that a browser would fetch, and less than 300 KB for 64 ranks."""
    html = page(REPORTS[name])
    found = Elements(html)
    assert found.open == []
    assert not found.names & {"script", "iframe", "img", "object", "embed", "form"}
    assert {*found.addresses} <= {"data:,"}
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html.encode()) < MOST_BYTES


def test_values_of_users_stay_text() -> None:
    """Whatever a message, a name, a log line, a metric or a host contains, no element comes of it."""
    report = sample_reports.failure(message=f"ValueError: {EVIL}")
    evil_rank = replace(report.rounds[1].ranks[3], traceback=EVIL, log_tail=(EVIL,), stacks=EVIL, logs=(EVIL,))
    evil_round = replace(
        report.rounds[1],
        ranks=(*report.rounds[1].ranks[:3], evil_rank),
        ending=EVIL,
        paid=EVIL,
        metrics=(Metric(EVIL, 0, ((0, 1.0), (1, 2.0))),),
    )
    evil_node = replace(
        report.nodes[0],
        address=EVIL,
        lost_because=EVIL,
        resources=((EVIL, 1.0),),
        facts=NodeFacts(hostname=EVIL, processor=EVIL, cpus=1, devices=(EVIL,), versions=((EVIL, EVIL),)),
    )
    report = replace(
        report,
        name=EVIL,
        run_id=EVIL,
        rounds=(report.rounds[0], evil_round),
        nodes=(evil_node, report.nodes[1]),
        versions=((EVIL, EVIL),),
    )
    for html in (page(report), fragment(report)):
        found = Elements(html)
        assert "script" not in found.names
        assert found.text.count(EVIL) > 10
        assert "<script" not in html


def test_a_failure_comes_first_with_its_cause_and_what_to_do() -> None:
    """The root cause's rank, message, place, hint and traceback are read before anything else of the run."""
    text = Elements(page(sample_reports.failure())).text
    order = [
        "Root cause",
        f"Rank 3 raised {sample_reports.MESSAGE}",
        "in round 1, on node 1 (10.0.0.2), local rank 1, exit code 1, after step 140",
        "Why it raised while running the function, exit code 1. 1 of 4 ranks failed this way.",
        "What to do Correct what the message names.",
        "Traceback of rank 3",
        "in criterion",
        "Total time",
        "Where the time went",
        "Timeline",
        "Rounds",
        "not tried again: max_restarts is spent",
        "Ranks",
        "Metrics",
        "Use of resources by rank",
        "Nodes",
        "Last lines",
        "Versions",
    ]
    places = []
    for words in order:
        assert words in text, words
        places.append(text.index(words, places[-1] if places else 0))
    assert places == sorted(places)


def test_what_a_page_cannot_have_is_not_on_it() -> None:
    """Names of files that are not UTF-8 are escaped, colours and control characters of a terminal left out."""
    odd = "caf\udce9.jpg \x1b[1;32mINFO\x1b[0m\x00\x07 ok\tx"
    report = sample_reports.failure(message=odd)
    rank = replace(report.rounds[1].ranks[3], message=odd, traceback=odd, log_tail=(odd, odd))
    last = replace(
        report.rounds[1],
        ranks=(*report.rounds[1].ranks[:3], rank),
        paid=odd,
        metrics=(Metric(odd, 0, ((0, 1.0), (1, 2.0))),),
    )
    report = replace(report, name=odd, rounds=(report.rounds[0], last))
    for html in (page(report), fragment(report)):
        html.encode()
        assert html.count("caf\\udce9.jpg INFO ok\tx") > 6
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html)
        assert Elements(html).open == []


def test_a_success_says_so() -> None:
    """Status, size, time, rounds and budgets are in the first lines; what needs a failure is not there."""
    found = Elements(page(sample_reports.success()))
    assert "succeeded" in found.text
    assert "2 × 2" in found.text
    assert "1 min 07 s" in found.text
    assert "max_restarts 0 of 3" in found.text
    assert {"summary", "time", "timeline", "ranks", "metrics", "resources", "nodes", "logs", "versions"} <= {*found.ids}
    assert not {"cause", "rounds"} & {*found.ids}


def test_a_launch_without_nodes_is_drawn_as_far_as_it_came() -> None:
    """No round, no node: the reason, what to do, and where the time went."""
    found = Elements(page(sample_reports.never_placed()))
    assert "4 nodes were not ready within 60 s." in found.text
    assert "What to do Ask for less." in found.text
    assert "placing nodes 1 min 00 s" in found.text
    assert "ranks" not in found.ids


@pytest.mark.parametrize("succeeded", [False, True])
def test_a_round_without_ranks_is_drawn(succeeded: bool) -> None:
    """As one of which nothing is known: it has its time and its end."""
    report = sample_reports.failure()
    empty = replace(report.rounds[1], ranks=(), nodes=(), cause=None, succeeded=succeeded)
    report = replace(report, rounds=(report.rounds[0], empty))
    assert Elements(page(report)).open == []
    assert segments(report)[-1].ended_at == report.ended_at


def test_odd_versions_on_a_node_are_pointed_out() -> None:
    """A node that has another torch than the driver is named with it."""
    text = Elements(page(sample_reports.failure())).text
    assert "torch 2.12.0 2.13.0 on 10.0.0.1, 10.0.0.2" in text


def test_every_second_belongs_to_one_activity() -> None:
    """Segments follow each other without gaps or overlaps from the run's start to its end."""
    for report in (sample_reports.success(), sample_reports.failure(), sample_reports.never_placed()):
        found = segments(report)
        assert found[0].started_at == report.started_at
        assert found[-1].ended_at == report.ended_at
        for before, after in pairwise(found):
            assert before.ended_at == after.started_at
        assert sum(totals(report).values()) == pytest.approx(report.ended_at - report.started_at)


def test_a_round_is_divided_by_its_ranks() -> None:
    """Workers start until the last rank is called, run until the first failure, are stopped until the round's end."""
    report = sample_reports.failure()
    first = [segment for segment in segments(report) if segment.round_index == 0]
    called = max(rank.called_at or 0.0 for rank in report.rounds[0].ranks)
    failed = report.rounds[0].ranks[3].ended_at
    assert [(segment.activity, segment.ended_at) for segment in first] == [
        (Activity.WORKERS, called),
        (Activity.REPEATED, failed),
        (Activity.STOPPING, report.rounds[0].ended_at),
    ]
    success = [segment.activity for segment in segments(sample_reports.success()) if segment.round_index == 0]
    assert success == [Activity.WORKERS, Activity.RUNNING, Activity.RESULTS]


def test_the_timeline_is_to_scale() -> None:
    """Bars lie where their times lie, whatever clock a node has; each rank's bars follow each other."""
    report = sample_reports.failure()
    ahead = replace(
        report.rounds[0].ranks[0], started_at=sample_reports.START - 500, ended_at=sample_reports.START + 900
    )
    report = replace(
        report, rounds=(replace(report.rounds[0], ranks=(ahead, *report.rounds[0].ranks[1:])), report.rounds[1])
    )
    seconds = report.ended_at - report.started_at
    drawn = timeline_of(report)
    assert [bar.x for bar in drawn.rounds.bars] == [
        pytest.approx(1000 * (one.started_at - report.started_at) / seconds, abs=0.1) for one in report.rounds
    ]
    assert [lane.node.detail for lane in drawn.nodes] == ["10.0.0.1", "10.0.0.2"]
    lanes = [lane for one in drawn.nodes for lane in one.ranks]
    assert [lane.label for lane in lanes] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    for lane in lanes:
        for before, after in pairwise(lane.bars):
            assert before.end <= after.x + 0.2
    assert [end.kind for end in lanes[3].endings] == ["cause", "cause"]
    assert lanes[0].endings == ()
    round_0 = drawn.rounds.bars[0]
    assert lanes[0].bars[0].x == round_0.x
    assert lanes[0].bars[1].end == pytest.approx(round_0.end, abs=0.2)


def test_many_points_keep_their_peaks() -> None:
    """A curve that is thinned out still shows the highest and the lowest value."""
    points = [(float(step), 1.0) for step in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, -7.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert {points[1234], points[4321]} <= {*kept}
    assert kept == sorted(kept)


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    """A loss that was NaN for a while does not spoil the page."""
    report = sample_reports.success()
    broken = Metric("loss", 0, ((0, 2.0), (1, float("nan")), (2, float("inf")), (3, 1.0)))
    html = page(replace(report, rounds=(replace(report.rounds[0], metrics=(broken,)),)))
    assert "1 at step 3" in html
    assert "nan" not in html.lower().replace("nanny", "")


def test_metrics_that_end_as_no_numbers_say_so() -> None:
    """The last number that is drawn does not stand for what came after it; also where none is drawn."""
    nan, inf = float("nan"), float("inf")
    report = sample_reports.success()
    metrics = (
        Metric("loss", 0, ((0, 2.0), (1, inf), (2, 0.25), (3, nan), (4, inf), (5, nan))),
        Metric("norm", 0, ((12344, 3.0), (12345, inf))),
        Metric("gone", 0, ((0, nan), (1, nan))),
    )
    report = replace(report, rounds=(replace(report.rounds[0], metrics=metrics),))
    lines = [line for chart in metric_charts(report) for line in chart.lines]
    assert [line.title for line in lines] == [
        "round 0: 0.25 at step 2, then nan from step 3",
        "round 0: 3 at step 12344, then inf from step 12345",
        "round 0: nan from step 0",
    ]
    text = Elements(page(report)).text
    for words in ("round 0: nan from step 3", "round 0: inf from step 12345", "round 0: nan from step 0"):
        assert words in text


def test_of_many_rounds_the_last_are_drawn() -> None:
    """How it ended is among them, and that there were more is said."""
    (first,) = sample_reports.success().rounds
    rounds = tuple(
        replace(first, index=index, metrics=(Metric("loss", 0, ((0, 2.0), (1, float(index)))),)) for index in range(20)
    )
    report = replace(sample_reports.success(), rounds=rounds)
    (chart,) = metric_charts(report)
    assert [line.label for line in chart.lines] == [f"round {index}" for index in range(4, 20)]
    assert "by step, the last 16 of 20 curves" in Elements(page(report)).text
    (chart,) = metric_charts(replace(report, rounds=rounds[:16]))
    assert (chart.unit, len(chart.lines)) == ("by step", 16)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.417, "0.42 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (7499, "2 h 05 min"),
    ],
)
def test_durations_are_said_shortly(seconds: float, text: str) -> None:
    """Three figures at most, and never sixty seconds."""
    assert duration(seconds) == text


def test_axes_end_at_round_values() -> None:
    """Ends hold what is drawn and are round: in tens, or in powers of two for bytes."""
    assert [top_of(value) for value in (0, 0.35, 2.3, 97, 101, 430)] == [1.0, 0.4, 3, 100, 200, 500]
    assert [memory(top_of(value * 2**20, binary=True)) for value in (700, 1500, 90_000)] == [
        "768 MiB",
        "2 GiB",
        "96 GiB",
    ]
    assert [tick.text for tick in time_ticks(66)] == ["0 s", "10 s", "20 s", "30 s", "40 s", "50 s", "1:00"]


def test_a_report_survives_pickling() -> None:
    """It is plain data: what comes back is equal."""
    report = sample_reports.failure()
    assert pickle.loads(pickle.dumps(report)) == report


def test_drawing_is_loaded_when_it_is_asked_for() -> None:
    """Importing the package, or a report's data, loads no template engine."""
    code = (
        "import sys, kfpytorch_ray, kfpytorch_ray.report.data, kfpytorch_ray.report.page\n"
        "print(sorted({'jinja2', 'psutil', 'pynvml'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
