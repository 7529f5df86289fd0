from __future__ import annotations

from typing import Any

import flytekitplugins.kfpytorch as upstream
import pytest
from flytekit import PodTemplate
from kubernetes.client import V1Container, V1PodSpec, V1ResourceRequirements

from kfpytorch_ray import ConfigError, Elastic, KubeflowBackend, PyTorch, RestartPolicy, RunPolicy, Worker
from kfpytorch_ray.adapters.kubeflow import KubeflowAdapter
from kfpytorch_ray.plan import FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.task_arguments import TaskArguments

ADAPTER = KubeflowAdapter(KubeflowBackend())


def plan(**fields: Any) -> LaunchPlan:
    plain: dict[str, Any] = {
        "name": "train",
        "run_id": "f123",
        "function": max,
        "args": (),
        "kwargs": {},
        "min_nodes": 2,
        "max_nodes": 4,
        "nproc_per_node": 8,
        "resources": NodeResources({"CPU": 1.0}),
        "flyte": FlyteContext("s3://raw"),
        "rdzv_configs": {"timeout": 30},
    }
    return LaunchPlan(**{**plain, **fields})


@pytest.mark.parametrize(
    ("config", "task_type"),
    [
        (Elastic(nnodes=1), "python-task"),
        (Elastic(nnodes="1"), "pytorch"),
        (Elastic(nnodes="1:1"), "pytorch"),
        (Elastic(nnodes=2), "pytorch"),
        (PyTorch(num_workers=1), "pytorch"),
        (upstream.Elastic(nnodes=1), "python-task"),
    ],
)
def test_only_the_number_one_needs_no_operator(config: Any, task_type: str) -> None:
    """One node is a plain pod; text that means one node is a PyTorchJob, as upstream has it."""
    assert ADAPTER.task_type(config) == task_type
    assert (ADAPTER.custom(config) is None) == (task_type == "python-task")


def test_an_elastic_job_says_its_nodes() -> None:
    """Range, workers and restarts reach the operator."""
    assert ADAPTER.custom(Elastic("2:4", 8, max_restarts=3, run_policy=RunPolicy(backoff_limit=1))) == {
        "workerReplicas": {"replicas": 4},
        "elasticConfig": {
            "rdzvBackend": "c10d",
            "minReplicas": 2,
            "maxReplicas": 4,
            "nprocPerNode": 8,
            "maxRestarts": 3,
        },
        "runPolicy": {"backoffLimit": 1},
    }


def test_a_pytorch_job_says_its_replicas() -> None:
    """Master and workers reach the operator with image and policy."""
    config = PyTorch(worker=Worker(image="w:1", replicas=2, restart_policy=RestartPolicy.FAILURE))
    assert ADAPTER.custom(config) == {
        "workerReplicas": {
            "replicas": 2,
            "image": "w:1",
            "resources": {},
            "restartPolicy": "RESTART_POLICY_ON_FAILURE",
        },
        "masterReplicas": {"replicas": 1, "resources": {}},
    }


def test_the_operator_starts_the_processes_of_a_pytorch_job() -> None:
    """There is nothing to launch in the pod; an elastic job's workers are launched there."""
    assert ADAPTER.launches(Elastic())
    assert not ADAPTER.launches(PyTorch(num_workers=1))


def test_a_fork_server_is_a_problem() -> None:
    """torch elastic's launcher does not get one here."""
    (problem,) = ADAPTER.check(Elastic(start_method="forkserver")).problems
    assert "Bad start method" in problem
    assert ADAPTER.check(Elastic()).problems == ()
    assert ADAPTER.check(PyTorch(num_workers=1)).problems == ()


def test_the_launcher_is_configured_from_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes, workers and rendezvous are the plan's; the endpoint is the operator's."""
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "master-0:23456")
    config = ADAPTER.build(plan(monitor_interval_s=2, max_restarts=3, start_method="fork"))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 4, 8)
    assert (config.run_id, config.rdzv_backend, config.rdzv_endpoint) == ("f123", "c10d", "master-0:23456")
    assert (config.max_restarts, config.monitor_interval, config.start_method) == (3, 2, "fork")
    assert config.rdzv_configs == {"timeout": 30}


def test_without_an_operator_the_rendezvous_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop the workers meet on a free port of this machine."""
    monkeypatch.delenv("PET_RDZV_ENDPOINT", raising=False)
    assert ADAPTER.build(plan()).rdzv_endpoint == "localhost:0"


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (V1Container(name="pytorch"), "Fix: Rename it"),
        (V1Container(name="primary", resources=V1ResourceRequirements(limits={"nvidia.com/gpu": "8"})), "requests="),
        (V1Container(name="primary", command=["sleep"]), "Fix: Leave command and args out"),
    ],
)
def test_a_template_that_a_pytorchjob_of_our_own_cannot_have(container: V1Container, words: str) -> None:
    """Refused before anything is asked of a cluster; Flyte, which makes its own of it, is left alone."""
    template = PodTemplate(pod_spec=V1PodSpec(containers=[container]))
    adapter = KubeflowAdapter(KubeflowBackend(image="i:1", namespace="n", storage="/nowhere"))
    with pytest.raises(ConfigError, match=words):
        adapter.run(plan(arguments=TaskArguments(pod_template=template)))
    assert adapter.check(Elastic()).problems == ()
    (_, said) = adapter.kubernetes_lost(Elastic(), TaskArguments(pod_template=template))
    assert words in said


def test_a_pytorchjob_of_our_own_does_not_stay_for_ever() -> None:
    """Nobody may be left to remove it: it goes with what the run has left in the storage, which is said."""
    adapter = KubeflowAdapter(KubeflowBackend(image="i:1", retention_s=59.5))
    for policy, ttl_s in ((None, 60), (RunPolicy(), 60), (RunPolicy(ttl_seconds_after_finished=0), 0)):
        config = Elastic(2, run_policy=policy)
        (job,) = adapter.kubernetes_manifests(config, TaskArguments())
        assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == ttl_s
        assert bool(adapter.kubernetes_lost(config, TaskArguments())) == bool(ttl_s)
