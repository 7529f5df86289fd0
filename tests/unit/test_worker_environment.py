from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray import RayBackend
from kfpytorch_ray.cluster.environment import (
    NEVER_CARRIED,
    carried_environment,
    launch_environment,
    node_environment,
    one_thread_each,
)
from kfpytorch_ray.plan import FlyteContext, LaunchPlan, NodeResources


def plan(nproc: int = 1, environment: dict[str, str] | None = None, **execution_id: str) -> LaunchPlan:
    plain: dict[str, Any] = {"name": "train", "run_id": "f123", "function": max, "args": (), "kwargs": {}}
    return LaunchPlan(
        **plain,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        resources=NodeResources({"CPU": 1.0}),
        flyte=FlyteContext("s3://raw", execution_id=execution_id),
        environment=environment or {},
    )


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), set()),
        (("HF_*",), {"HF_HOME", "HF_TOKEN"}),
        (("TZ",), {"TZ"}),
        (("HF_T*", "TZ"), {"HF_TOKEN", "TZ"}),
        (("hf_*",), set()),
        (("[HX]?_*",), {"HF_HOME", "HF_TOKEN"}),
    ],
)
def test_variables_are_carried_by_shell_patterns(patterns: tuple[str, ...], names: set[str]) -> None:
    """A pattern matches whole names and minds upper and lower case; values stay as they are."""
    driver = {"HF_HOME": "/h", "HF_TOKEN": "t", "TZ": "UTC", "TZDIR": "/z", "OTHER": "o"}
    assert carried_environment(driver, patterns) == {name: driver[name] for name in names}


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "PWD", "TMPDIR", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
        *("LD_LIBRARY_PATH", "PYTHONPATH", "HOSTNAME", "RAY_ADDRESS", "PET_NNODES", "TORCHELASTIC_RUN_ID"),
        *("KFPYTORCH_RAY_AGENT", "KFPYTORCH_RAY_HEARTBEAT"),
    ],
)
def test_some_variables_never_travel(name: str) -> None:
    """What means something else elsewhere stays, even where the pattern is its name or everything."""
    assert carried_environment({name: "x", "ELSE": "y"}, ("*", name)) == {"ELSE": "y"}


PLAIN_NAMES = frozenset(name for name in NEVER_CARRIED if "*" not in name)


@given(
    st.dictionaries(st.sampled_from([*PLAIN_NAMES, "A", "B_C"]), st.text(max_size=3)),
    st.lists(st.sampled_from(["*", "A", "B*", "R*", "PATH"])).map(tuple),
)
def test_carried_variables_are_the_drivers_own(driver: dict[str, str], patterns: tuple[str, ...]) -> None:
    """Nothing is invented or changed, and nothing of NEVER_CARRIED is among them."""
    carried = carried_environment(driver, patterns)
    assert carried.items() <= driver.items()
    assert not carried.keys() & PLAIN_NAMES


def test_later_sources_win() -> None:
    """Driver, Flyte execution, the task's environment, the backend's env: each wins over those before it."""
    names = ["FLYTE_A", "FLYTE_B", "FLYTE_C", "FLYTE_D"]
    driver = dict.fromkeys(names, "driver")
    execution = dict.fromkeys(names[1:], "execution")
    task = dict.fromkeys(names[2:], "task")
    backend = dict.fromkeys(names[3:], "backend")
    environment = launch_environment(driver, plan(environment=task, **execution), RayBackend(env=backend))
    assert environment == {"FLYTE_A": "driver", "FLYTE_B": "execution", "FLYTE_C": "task", "FLYTE_D": "backend"}


def test_the_user_may_set_what_is_never_carried() -> None:
    """The rule is about the driver's environment; what a user writes down is meant."""
    environment = launch_environment({"TMPDIR": "/a"}, plan(), RayBackend(env={"TMPDIR": "/scratch"}))
    assert environment == {"TMPDIR": "/scratch"}


def test_the_backends_patterns_are_used() -> None:
    """``carried_environment`` replaces the defaults."""
    driver = {"HF_HOME": "/h", "MINE_A": "1"}
    assert launch_environment(driver, plan(), RayBackend()) == {"HF_HOME": "/h"}
    assert launch_environment(driver, plan(), RayBackend(carried_environment=("MINE_*",))) == {"MINE_A": "1"}


def test_one_worker_keeps_all_threads() -> None:
    """As by torchrun, OMP_NUM_THREADS is left alone where a worker has the node for itself."""
    assert launch_environment({}, plan(nproc=1), RayBackend()) == {}


def test_several_workers_get_one_thread_each_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """As by torchrun, with a warning that tells how to change it."""
    with caplog.at_level(logging.WARNING):
        assert launch_environment({}, plan(nproc=2), RayBackend()) == {"OMP_NUM_THREADS": "1"}
    (message,) = caplog.messages
    assert "OMP_NUM_THREADS is not set" in message
    assert "2 workers" in message


@pytest.mark.parametrize(
    ("driver", "task", "backend"),
    [
        ({"OMP_NUM_THREADS": "7"}, {}, {}),
        ({}, {"OMP_NUM_THREADS": "7"}, {}),
        ({}, {}, {"OMP_NUM_THREADS": "7"}),
    ],
)
def test_a_number_of_threads_that_somebody_chose_is_kept(
    driver: dict[str, str], task: dict[str, str], backend: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it was set, without a word."""
    environment = launch_environment(driver, plan(nproc=4, environment=task), RayBackend(env=backend))
    assert environment == {"OMP_NUM_THREADS": "7"}
    assert caplog.messages == []


def test_the_environment_that_was_given_is_not_changed() -> None:
    """Plans and options stay what the user wrote."""
    given = {"A": "1"}
    assert one_thread_each(given, 2) == {"A": "1", "OMP_NUM_THREADS": "1"}
    alone = one_thread_each(given, 1)
    alone["B"] = "2"
    assert given == {"A": "1"}


@pytest.mark.parametrize(("launch", "threads"), [({}, None), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_the_nodes_number_of_threads_is_dropped(launch: dict[str, str], threads: str | None) -> None:
    """Ray sets it in its workers and torchrun does not: only what the launch says counts."""
    environment = node_environment({"OMP_NUM_THREADS": "16", "PATH": "/bin"}, launch)
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment["PATH"] == "/bin"


def test_the_launch_is_laid_over_the_node() -> None:
    """The node's variables stay, but for those that the launch sets."""
    assert node_environment({"PATH": "/bin", "A": "node"}, {"A": "launch", "B": "launch"}) == {
        "PATH": "/bin",
        "A": "launch",
        "B": "launch",
    }
