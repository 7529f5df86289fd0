from __future__ import annotations

from typing import Any

import flytekitplugins.kfpytorch as upstream
import pytest

from kfpytorch_ray import Elastic, PyTorch, RunPolicy, Worker
from kfpytorch_ray.checks import is_elastic, parse_nnodes, problems_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, (1, 1)), (4, (4, 4)), ("4", (4, 4)), ("1:1", (1, 1)), ("2:4", (2, 4)), ("3:3", (3, 3))],
)
def test_node_ranges_are_read_as_by_torchrun(value: int | str, expected: tuple[int, int]) -> None:
    """A number of nodes, as int or text, and MIN:MAX are understood."""
    assert parse_nnodes(value) == expected


@pytest.mark.parametrize(
    "value", [0, -1, "0", "3:2", "0:2", "a", "", ":", "1:", ":2", "1:2:3", "-1", "1.5", 1.0, True, False, None, [2]]
)
def test_impossible_node_ranges_are_problems(value: Any) -> None:
    """What is no number of nodes is refused, and the message repeats it."""
    with pytest.raises(ValueError, match="nnodes="):
        parse_nnodes(value)
    (problem,) = problems_of(Elastic(nnodes=value))
    assert repr(value) in problem


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nproc_per_node": 0}, "nproc_per_node=0"),
        ({"nproc_per_node": -2}, "nproc_per_node=-2"),
        ({"nproc_per_node": "8"}, "nproc_per_node='8'"),
        ({"nproc_per_node": True}, "nproc_per_node=True"),
        ({"start_method": "thread"}, "Bad start method"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"max_restarts": 1.5}, "max_restarts=1.5"),
        ({"monitor_interval": 0}, "monitor_interval=0"),
        ({"monitor_interval": "5"}, "monitor_interval='5'"),
        ({"rdzv_configs": "timeout=5"}, "rdzv_configs="),
        ({"rdzv_configs": {"join_timeout": "soon"}}, "rdzv_configs['join_timeout']='soon'"),
        ({"rdzv_configs": {"timeout": -1}}, "rdzv_configs['timeout']=-1"),
        ({"run_policy": RunPolicy(active_deadline_seconds=-1)}, "run_policy.active_deadline_seconds=-1"),
        ({"run_policy": RunPolicy(backoff_limit=-1)}, "run_policy.backoff_limit=-1"),
        ({"run_policy": RunPolicy(ttl_seconds_after_finished=-1)}, "run_policy.ttl_seconds_after_finished=-1"),
    ],
)
def test_each_bad_field_is_named_with_its_value(fields: dict[str, Any], words: str) -> None:
    """One bad field gives one problem, which names the field and repeats the value."""
    (problem,) = problems_of(Elastic(**fields))
    assert words in problem


def test_all_bad_fields_are_reported_at_once() -> None:
    """Nobody has to correct fields one run at a time."""
    config = Elastic(nnodes="3:2", nproc_per_node=0, start_method="x", run_policy=RunPolicy(backoff_limit=-1))
    assert len(problems_of(config)) == 4


@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_sound_elastic_configs_have_no_problems(start_method: str) -> None:
    """Every start method that some backend knows passes, with limits that are zero or fractions."""
    config = Elastic("1:3", 2, start_method, monitor_interval=0.5, run_policy=RunPolicy(backoff_limit=0))  # type: ignore[arg-type]
    assert problems_of(config) == ()


@pytest.mark.parametrize(
    "config",
    [
        PyTorch(num_workers=2, worker=Worker(replicas=3)),
        PyTorch(),
        PyTorch(num_workers=-1),
        PyTorch(worker=Worker(replicas=-1)),
        PyTorch(num_workers=2, run_policy=RunPolicy(backoff_limit=-1)),
    ],
)
def test_bad_worker_counts_are_problems(config: PyTorch) -> None:
    """The number of workers is given once, and is not negative."""
    assert len(problems_of(config)) == 1


@pytest.mark.parametrize(
    "config",
    [
        PyTorch(num_workers=2),
        PyTorch(num_workers=0),
        PyTorch(worker=Worker(replicas=2)),
        PyTorch(num_workers=0, worker=Worker(replicas=2)),
    ],
)
def test_sound_pytorch_configs_have_no_problems(config: PyTorch) -> None:
    """What upstream takes is taken."""
    assert problems_of(config) == ()


def test_upstreams_configs_are_understood() -> None:
    """Upstream's classes, which have no backend field, are checked like ours."""
    assert is_elastic(upstream.Elastic())
    assert not is_elastic(upstream.PyTorch())
    assert len(problems_of(upstream.Elastic(nnodes="0"))) == 1
    assert len(problems_of(upstream.PyTorch())) == 1
