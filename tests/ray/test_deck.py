"""The report of a run on a real Ray says what happened there, to ``launch()`` and to a Flyte task alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from flyte_contexts import decks, task_with_decks
from flytekit import task
from flytekit.exceptions.user import FlyteUserRuntimeException

from kfpytorch_ray import Elastic, PlacementError, RayBackend, WorkerFailedError, launch
from kfpytorch_ray.report.breakdown import segments
from kfpytorch_ray.report.data import Activity, Metric, ReportedRound, RunReport

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = Elastic(nnodes=2, nproc_per_node=2, max_restarts=1, backend=RayBackend(decks="all", stop_grace_s=0.5))
BUSY_S = 3.0
"""Longer than the first decks are left alone, and than several samples take, also by an agent that stood still."""


def train(recovers: bool) -> tuple[float, float]:
    """Work a while; rank 2 fails in the first round, and in the second as well unless it recovers."""
    import os
    import time

    import flytekit
    import torch.distributed

    import kfpytorch_ray

    began = time.time()
    rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    flytekit.Deck("curve", f"<p>rank {rank}, round {restarts}</p>")
    print(f"rank {rank} begins", flush=True)
    for step in range(3):
        kfpytorch_ray.progress(step, total=3, loss=3.0 - step - int(rank))
    while time.time() < began + BUSY_S:
        sum(range(10_000))
    # A rank that begins late has been busy as well before another one fails.
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if restarts == "1" and recovers:
        return began, time.time()
    if rank == "2":
        raise ValueError(f"<script> in round {restarts}")
    time.sleep(600)
    raise AssertionError


def told(html: str) -> dict[str, Any]:
    """What a page says that is the same for two runs of the same kind."""
    rounds = re.search(r'<section id="rounds">.*?</section>', html, re.DOTALL)
    assert rounds is not None
    rows = re.findall(r"<td[^>]*>(.*?)</td>", rounds[0], re.DOTALL)
    return {
        "status": re.findall(r'<span class="pill \w+">([^<]*)', html)[:1],
        "cells": re.findall(r'<div class="cell (\w+ ?\w*)"', html),
        "rounds": [row for row in rows if not re.fullmatch(r"[\d.]+ s", row)],
        "tiles": re.findall(r"<dt>(max_\w+)</dt><dd>(\d of \d)", html),
        "lanes": re.findall(r'<span class="label">(rank [\d, ]+)</span>', html),
        "headline": re.findall(r'<p class="headline">(.*?)</p>', html),
    }


def assert_in_order(report: RunReport) -> None:
    """Everything happened after what it follows from, by the times that were told."""
    for node in report.nodes:
        assert node.ready_at is not None
        assert report.started_at < node.started_at < node.ready_at < report.rounds[0].started_at
        assert node.ended_at is None
    ended_at = report.started_at
    for one in report.rounds:
        assert ended_at < one.started_at
        for rank in one.ranks:
            assert rank.started_at is not None
            assert rank.called_at is not None
            assert one.started_at < rank.started_at < rank.called_at < rank.ended_at < one.ended_at
        ended_at = one.ended_at
    assert ended_at < report.ended_at
    parts = segments(report)
    assert (parts[0].started_at, parts[-1].ended_at) == (report.started_at, pytest.approx(report.ended_at, abs=0.1))


def assert_sampled(report: RunReport) -> None:
    """Every rank was looked at in every round, while it ran."""
    assert [one.rank for one in report.samples] == [0, 1, 2, 3]
    for of in report.samples:
        for one in report.rounds:
            rank = one.ranks[of.rank]
            found = [sample for sample in of.samples if sample.round_index == one.index]
            assert len(found) >= 2, (of.rank, one.index)
            assert all(rank.started_at < sample.at < rank.ended_at for sample in found)
            assert max(sample.cpu_percent for sample in found) > 0
            assert all(sample.memory_bytes > 50 * 2**20 for sample in found)


def assert_failed(one: ReportedRound, index: int, paid: str) -> None:
    assert (one.index, one.succeeded, one.cause, one.paid) == (index, False, 2, paid)
    assert one.ranks[2].outcome == "raised"
    assert one.ranks[2].message == f"ValueError: <script> in round {index}"
    assert [rank.outcome for rank in one.ranks] == ["stopped", "stopped", "raised", "stopped"]
    assert [rank.node for rank in one.ranks] == [one.nodes[0]] * 2 + [one.nodes[1]] * 2
    assert [rank.log_tail[0] for rank in one.ranks] == [f"rank {rank} begins" for rank in range(4)]


def assert_decks(report: RunReport, restarts: int) -> None:
    """Of all ranks, of the last round; also of ranks that were stopped."""
    assert [(deck.rank, deck.name, deck.html) for deck in report.decks] == [
        (rank, "curve", f"<p>rank {rank}, round {restarts}</p>") for rank in range(4)
    ]


def by_task(recovers: bool, folder: Path) -> tuple[dict[str, str], RunReport | None]:
    """The decks that a task shows, and the report of its error; the failure's as they were published."""

    @task(task_config=CONFIG, enable_deck=True)
    def train_in_task(recovers: bool) -> None:
        train(recovers)

    with task_with_decks(folder) as prefix:
        if recovers:
            train_in_task.execute(recovers=recovers)
            return decks(), None
        with pytest.raises(FlyteUserRuntimeException) as caught:
            train_in_task.execute(recovers=recovers)
        published = (prefix / "deck.html").read_text()
        shown = decks()
        assert all(html in published for html in shown.values())
        error: Any = caught.value.value
        return shown, error.report


def test_a_run_that_recovers_is_told_as_it_was(tmp_path: Path) -> None:
    """One failure, one restart that max_restarts paid, and a success; the deck of a task says the same."""
    result = launch(train, recovers=True, elastic=CONFIG)
    report = result.report
    assert report is not None
    assert report.failure is None
    first, second = report.rounds
    assert_failed(first, 0, "max_restarts: 1 of 1")
    assert (second.succeeded, second.cause, second.paid) == (True, None, "")
    assert [rank.outcome for rank in second.ranks] == ["succeeded"] * 4
    assert_in_order(report)
    assert_sampled(report)
    assert_decks(report, 1)
    assert [one.metrics for one in report.rounds] == [(Metric("loss", 0, ((0, 3.0), (1, 2.0), (2, 1.0))),)] * 2
    for rank in second.ranks:
        # The functions' own word of when they ran.
        began, ended = result[rank.rank].return_value
        assert rank.called_at <= began
        assert ended < rank.ended_at
    assert {phase.activity for phase in report.phases} >= {Activity.JOINING, Activity.AGENTS, Activity.WAITING}

    shown, _ = by_task(True, tmp_path)
    assert list(shown) == [*(f"rank {rank}: curve" for rank in range(4)), "Elastic run"]
    assert shown["rank 3: curve"] == "<p>rank 3, round 1</p>"
    assert told(shown["Elastic run"]) == told(result.deck)
    assert told(result.deck)["status"] == ["succeeded after 1 restart"]


def test_a_run_that_fails_is_told_as_it_was(tmp_path: Path) -> None:
    """The budget is spent, and the second failure is the cause; the same by a task, published before its error."""
    with pytest.raises(WorkerFailedError) as caught:
        launch(train, recovers=False, elastic=CONFIG)
    error = caught.value
    report = error.report
    assert report is not None
    assert report.failure is not None
    assert report.failure.message == str(error)
    assert_failed(report.rounds[0], 0, "max_restarts: 1 of 1")
    assert_failed(report.rounds[1], 1, "not tried again: max_restarts is spent")
    assert_in_order(report)
    assert_sampled(report)
    assert_decks(report, 1)
    assert [(budget.name, budget.spent, budget.limit) for budget in report.budgets] == [
        ("max_restarts", 1, 1),
        ("max_node_failures", 0, 3),
    ]

    shown, by_flyte = by_task(False, tmp_path)
    assert by_flyte is not None
    assert_in_order(by_flyte)
    assert list(shown) == [*(f"rank {rank}: curve" for rank in range(4)), "Elastic run"]
    assert told(shown["Elastic run"]) == told(error.deck)
    assert told(error.deck)["headline"] == ["Rank 2 raised ValueError: &lt;script&gt; in round 1"]


def test_a_launch_that_has_no_nodes_says_why() -> None:
    """The error of a placement carries a report as well: no round, and why."""
    with pytest.raises(PlacementError) as caught:
        launch(train, True, elastic=Elastic(backend=RayBackend(resources_per_node={"GPU": 64})))
    report = caught.value.report
    assert report is not None
    assert (report.rounds, report.nodes) == ((), ())
    assert report.failure is not None
    assert report.failure.error == "InfeasibleError"
    assert "can never hold" in caught.value.deck
