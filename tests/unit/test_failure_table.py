"""The failure table in the README, row by row against what the code decides."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException

from kfpytorch_ray import RayBackend
from kfpytorch_ray.cluster.failures import launch_error
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.policy import Finish, Present, Raise, Retry, decide
from kfpytorch_ray.errors import InfeasibleError, KfpytorchRayError, PayloadError, PlacementTimeoutError
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord, Stage
from kfpytorch_ray.task_classes import _flyte_error

README = Path(__file__).resolve().parents[2] / "README.md"
NOTHING_LEFT = Budgets(0, 0)
PLENTY = Budgets(9, 9)


def table() -> dict[str, list[str]]:
    """The cells of each row after the first, by the first."""
    section = README.read_text().split("## When something breaks")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    header, _, *events = rows
    assert header == ["event", "noticed by", "then", "counts against", "the task ends as"]
    return {row[0]: row[1:] for row in events}


def rank(outcome: Outcome, message: str = "", **fields: object) -> RankRecord:
    return RankRecord(0, 0, 0, "10.0.0.1", outcome, None, 1.0, message, **fields)  # type: ignore[arg-type]


def rounds(*ends: RankRecord, ending: Ending = Ending.FAILED) -> tuple[RoundRecord, ...]:
    return tuple(RoundRecord(index, 1, ("10.0.0.1",), 0.0, 9.0, (end,), ending) for index, end in enumerate(ends))


def launch(of: tuple[RoundRecord, ...], *, lost: int = 0) -> tuple[str, str]:
    """What a launch that went so pays, and what it ends as when nothing is left to pay with."""
    present = Present((0,), {}, 1, 1)
    decision = decide(of, lost, Spent(), PLENTY, present)
    paid = "nothing"
    if isinstance(decision, Retry):
        if decision.spent.restarts:
            paid = "`max_restarts`"
        elif decision.spent.node_failures:
            paid = "`max_node_failures`"
    end = decide(of, lost, Spent(), NOTHING_LEFT, present)
    if isinstance(end, Finish):
        return paid, "success"
    if not isinstance(end, Raise):
        return paid, "goes on"
    return paid, in_flyte(launch_error("train", of, end.reason, end.spent, NOTHING_LEFT, ["10.0.0.1: dead"]))


def in_flyte(error: KfpytorchRayError) -> str:
    return f"`{type(_flyte_error(error)).__name__}`"


crashed = rank(Outcome.RAISED, "ValueError", traceback="at line 7")
lost = rounds(rank(Outcome.LOST), ending=Ending.NODE_LOST)

SCENARIOS: dict[str, Callable[[], tuple[str, str]]] = {
    "a rank raises": lambda: launch(rounds(crashed)),
    "a rank raises `FlyteRecoverableException`": lambda: launch(rounds(rank(Outcome.RAISED, recoverable=True))),
    "a rank is killed by a signal, or exits with another code than 0": lambda: launch(
        rounds(rank(Outcome.KILLED, "killed by SIGKILL"))
    ),
    "the same rank fails at the same place twice, before any progress": lambda: (
        "`max_restarts`",
        launch(rounds(crashed, crashed))[1],
    ),
    "`sys.exit(0)` in a rank": lambda: launch(rounds(rank(Outcome.SUCCEEDED), ending=Ending.SUCCEEDED)),
    "the function, an input or a result cannot be pickled": lambda: launch(
        rounds(rank(Outcome.RAISED, stage=Stage.RESULT))
    ),
    "an agent dies": lambda: launch(lost, lost=1),
    "a node is lost": lambda: launch(lost, lost=1),
    "a node falls silent": lambda: launch(lost, lost=1),
    "the driver stands still (Ctrl-Z, a laptop that slept)": lambda: launch(lost),
    "Ray is about to take a node away (pre-emption)": lambda: launch(
        rounds(rank(Outcome.STOPPED), ending=Ending.DRAINED)
    ),
    "more nodes of a range arrive": lambda: launch(rounds(rank(Outcome.STOPPED), ending=Ending.GROWN)),
    "no rank makes progress for `hang_timeout_s` (off)": lambda: launch(rounds(rank(Outcome.HUNG), ending=Ending.HUNG)),
    "not enough nodes within `join_timeout`": lambda: ("nothing", in_flyte(PlacementTimeoutError("x"))),
    "no node of the cluster can ever hold what is asked": lambda: ("nothing", in_flyte(InfeasibleError("x"))),
    "`RunPolicy(active_deadline_seconds=...)` has passed": lambda: launch(
        rounds(rank(Outcome.STOPPED), ending=Ending.DEADLINE)
    ),
}
NOT_DECIDED_HERE = {
    "the user cancels (SIGINT, SIGTERM)": "the interruption, not success",
    "the driver dies": "the business of Flyte or of Ray's job API",
}
"""Rows in which no error of ours is made; tests/chaos breaks these for real, as it does all others."""


def test_every_row_is_known() -> None:
    """A row that somebody adds to the README needs a scenario here, and the other way round."""
    assert table().keys() == SCENARIOS.keys() | NOT_DECIDED_HERE.keys()


@pytest.mark.parametrize("event", SCENARIOS)
def test_a_row_says_what_the_code_decides(event: str) -> None:
    """Which budget pays, and what the task ends as once that budget is spent."""
    _, _, counts_against, ends_as = table()[event]
    paid, end = SCENARIOS[event]()
    assert counts_against == paid
    assert re.split(r"[;,]| that | with ", ends_as)[0] == end


def test_rows_that_end_without_an_error_of_ours_say_so() -> None:
    """They cost nothing and are no success."""
    for event, end in NOT_DECIDED_HERE.items():
        assert table()[event][2:] == ["nothing", end]


def test_the_defaults_in_the_table_are_those_of_the_options() -> None:
    """``silence_timeout_s`` (15) and the others."""
    section = README.read_text().split("## When something breaks")[1].split("\n## ")[0]
    options = RayBackend()
    for name, value in re.findall(r"`(\w+_s)` \((\w+)\)", section):
        default = getattr(options, name)
        assert value == ("off" if default is None else f"{default:g}"), name
    assert f"max_node_failures={options.max_node_failures}" in section
    assert f"stop_grace_s={options.stop_grace_s:g}" in section


def test_a_payload_that_cannot_be_pickled_is_the_users_own() -> None:
    """Flyte does not retry it."""
    assert isinstance(_flyte_error(PayloadError("x")), FlyteUserRuntimeException)
    assert not isinstance(_flyte_error(PayloadError("x")), FlyteRecoverableException)
