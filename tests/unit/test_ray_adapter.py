"""What the ray backend asks of Ray, without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from kfpytorch_ray import Elastic, PayloadError, PyTorch, RayBackend
from kfpytorch_ray.adapters.kubeflow import KubeflowAdapter
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.cluster.demand import Demand
from kfpytorch_ray.cluster.limits import Budgets, Limits
from kfpytorch_ray.cluster.runtime_env import runtime_env_of
from kfpytorch_ray.payload import load_payload
from kfpytorch_ray.plan import Contract, FlyteContext, LaunchPlan, NodeResources


def plan(**fields: Any) -> LaunchPlan:
    plain: dict[str, Any] = {
        "name": "train",
        "run_id": "f123",
        "function": max,
        "args": (1,),
        "kwargs": {},
        "min_nodes": 2,
        "max_nodes": 4,
        "nproc_per_node": 1,
        "resources": NodeResources({"CPU": 2.0, "GPU": 1.0}),
        "flyte": FlyteContext("s3://raw", execution_id={"FLYTE_INTERNAL_EXECUTION_ID": "f123"}),
    }
    return LaunchPlan(**{**plain, **fields})


@pytest.mark.parametrize(
    ("first_node", "per_node", "first", "other"),
    [
        (None, None, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}),
        ({"CPU": 8.0}, None, {"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}),
        (None, {"CPU": 3}, {"CPU": 3}, {"CPU": 3}),
        ({"CPU": 8.0}, {"CPU": 3, "disk": 1}, {"CPU": 3, "disk": 1}, {"CPU": 3, "disk": 1}),
        ({"CPU": 8.0}, {}, {}, {}),
    ],
)
def test_resources_are_the_options_else_the_tasks(
    first_node: dict[str, float] | None,
    per_node: dict[str, float] | None,
    first: dict[str, float],
    other: dict[str, float],
) -> None:
    """``resources_per_node`` wins for all nodes; without it node 0 may differ, as a master does."""
    first_resources = None if first_node is None else NodeResources(first_node)
    request = RayAdapter(RayBackend(resources_per_node=per_node)).build(plan(first_node_resources=first_resources))
    assert request.demand == Demand(first, other, 2, 4)


def test_the_payload_is_the_call_and_its_hash_is_announced() -> None:
    """Agents and workers check the SHA-256 before they unpickle."""
    request = RayAdapter(None).build(plan(function=max, args=(3, 7), kwargs={"key": abs}))
    assert load_payload(request.payload)() == 7
    assert request.setup.payload_sha256 == hashlib.sha256(request.payload).hexdigest()


def test_a_call_that_cannot_be_pickled_is_refused_before_ray_is_asked() -> None:
    """The message names the input, and no cluster was started for it."""
    with pytest.raises(PayloadError, match="position 0"):
        RayAdapter(None).build(plan(args=(threading.Lock(),)))
    assert not ray.is_initialized()


def test_the_setup_is_that_of_the_plan_and_the_options() -> None:
    """What agents need arrives as it was written."""
    options = RayBackend(stop_grace_s=1.5, preload=("numpy",))
    given = plan(nproc_per_node=8, contract=Contract.OPERATOR, max_restarts=3, monitor_interval_s=0.5)
    setup = RayAdapter(options).build(given).setup
    assert (setup.name, setup.run_id, setup.nproc_per_node) == ("train", "f123", 8)
    assert (setup.contract, setup.flyte) == (Contract.OPERATOR, given.flyte)
    assert (setup.max_restarts, setup.monitor_interval_s) == (3, 0.5)
    assert (setup.stop_grace_s, setup.preload) == (1.5, ("numpy",))


def test_the_limits_are_those_of_the_plan_and_the_options() -> None:
    """Budgets, time-outs and the range arrive as they were written."""
    options = RayBackend(max_node_failures=5, checkpoint_grace_s=7, grow_cooldown_s=8, hang_timeout_s=9)
    limits = RayAdapter(options).build(plan(max_restarts=2, join_timeout_s=60.0, deadline_s=90.0)).limits
    assert limits == Limits(2, 4, Budgets(2, 5), 60.0, 10.0, 90.0, 7, 8, 9)


def test_the_environment_is_carried_and_laid_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's matching variables, the execution's names, the task's, the options': the last one wins."""
    for name in ("NCCL_DEBUG", "NCCL_ALGO", "NCCL_PROTO"):
        monkeypatch.setenv(name, "driver")
    monkeypatch.setenv("NOT_CARRIED", "driver")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = plan(nproc_per_node=2, environment={"NCCL_ALGO": "task", "NCCL_PROTO": "task"})
    environment = RayAdapter(RayBackend(env={"NCCL_PROTO": "options"})).build(given).setup.environment
    assert environment["NCCL_DEBUG"] == "driver"
    assert environment["NCCL_ALGO"] == "task"
    assert environment["NCCL_PROTO"] == "options"
    assert environment["FLYTE_INTERNAL_EXECUTION_ID"] == "f123"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "NOT_CARRIED" not in environment
    assert "PATH" not in environment


@pytest.mark.parametrize(("working_dir", "sent"), [(None, ["src", ".", "src/deep"]), ("src", [".", "deep"]), ("", [])])
def test_the_search_path_is_absolute_but_for_what_is_sent(
    working_dir: str | None, sent: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is relative here means nothing on a node; what lies in the working directory is where that is unpacked."""
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["src", "", "src/deep", "/elsewhere", *sys.path])
    setup = RayAdapter(RayBackend(working_dir=working_dir)).build(plan()).setup
    here = (str(tmp_path / "src"), str(tmp_path), str(tmp_path / "src/deep"), "/elsewhere")
    assert setup.sys_path[:4] == here
    assert [path for path in setup.sys_path if not os.path.isabs(path)] == sent


@pytest.mark.parametrize(
    ("runtime_env", "sent"),
    [
        ({"working_dir": "gcs://_ray_pkg_1.zip"}, False),
        ({"env_vars": {"working_dir": "/elsewhere"}}, True),
        (None, True),
    ],
)
def test_a_job_that_brings_a_folder_is_sent_no_other(
    runtime_env: dict[str, Any] | None, sent: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray refuses two; a variable that happens to be called so is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env, "metadata": {}}))
    assert runtime_env_of(RayBackend()).get("working_dir") == (str(tmp_path) if sent else None)


def test_building_changes_nothing_and_starts_nothing() -> None:
    """The same plan gives the same request, and no Ray is there afterwards."""
    adapter = RayAdapter(RayBackend(resources_per_node={"CPU": 1}))
    given = plan()
    assert adapter.build(given) == adapter.build(given)
    assert not ray.is_initialized()


def test_building_does_not_import_ray_or_torch() -> None:
    """A request can be made, and a task be registered, where neither is wanted."""
    code = """
import sys
from kfpytorch_ray import Elastic
from kfpytorch_ray.adapters.kubeflow import KubeflowAdapter
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.plan import FlyteContext, LaunchPlan, NodeResources
adapter = RayAdapter(None)
adapter.check(Elastic())
given = LaunchPlan("train", "f123", max, (1, 2), {}, 1, 1, 2, NodeResources({"CPU": 1.0}), FlyteContext("s3://raw"))
assert len(adapter.build(given).payload) > 0
print(sorted({"ray", "torch", "kubernetes"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("config", [Elastic(nnodes=2), PyTorch(num_workers=1)])
def test_a_task_on_ray_is_a_plain_pod_that_launches(config: Any) -> None:
    """Its process is the driver; what the template says of the job is a record of it, in upstream's words."""
    adapter = RayAdapter(RayBackend())
    assert adapter.task_type(config) == "python-task"
    assert adapter.launches(config)
    assert adapter.custom(config) == KubeflowAdapter(None).custom(config)
