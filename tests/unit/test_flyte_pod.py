"""The port of Flyte's pod and PyTorchJob: its rules, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from kfpytorch_ray import ConfigError
from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.cluster.kube.flyte_pod import base_pod, pod_manifest
from kfpytorch_ray.cluster.kube.flyte_pytorchjob import pytorch_job

EXECUTION = FlyteExecution()


def container(**resources: dict[str, str]) -> dict[str, Any]:
    sides = {
        side: [{"name": name, "value": value} for name, value in amounts.items()] for side, amounts in resources.items()
    }
    return {"image": "i:1", "args": ["a"], "resources": sides}


def pod_task(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "config": {"primary_container_name": "primary"},
        "k8sPod": {"podSpec": {"containers": list(containers), **spec}},
    }


@pytest.mark.parametrize(
    ("given", "requests", "limits"),
    [
        ({}, {"cpu": "1", "memory": "1Gi"}, {"cpu": "1", "memory": "1Gi"}),
        ({"requests": {"CPU": "2"}}, {"cpu": "2", "memory": "1Gi"}, {"cpu": "2", "memory": "1Gi"}),
        ({"limits": {"MEMORY": "4Gi"}}, {"cpu": "1", "memory": "4Gi"}, {"cpu": "1", "memory": "4Gi"}),
        (
            {"requests": {"CPU": "4"}, "limits": {"CPU": "2"}},
            {"cpu": "2", "memory": "1Gi"},
            {"cpu": "2", "memory": "1Gi"},
        ),
        (
            {"requests": {"GPU": "8", "EPHEMERAL_STORAGE": "1Gi"}},
            {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "8", "ephemeral-storage": "1Gi"},
            {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "8", "ephemeral-storage": "1Gi"},
        ),
    ],
)
def test_requests_and_limits_complete_each_other(
    given: dict[str, dict[str, str]], requests: dict[str, str], limits: dict[str, str]
) -> None:
    """The platform's defaults fill what is left; a request never exceeds its limit."""
    pod = base_pod({"container": container(**given)}, EXECUTION)
    assert pod.container["resources"] == {"requests": requests, "limits": limits}


def test_a_pod_template_keeps_the_order_of_its_containers() -> None:
    """The primary one is found by name; its neighbours' CPU and memory are written down as 0."""
    pod = base_pod(pod_task({"name": "proxy"}, {"name": "primary", "args": ["{{.outputPrefix}}"]}), EXECUTION)
    assert pod.primary == 1
    assert pod.container["args"] == ["s3://bucket/metadata/execution/n0/data/0"]
    zero = {"cpu": "0", "memory": "0"}
    assert pod.spec["containers"][0]["resources"] == {"requests": zero, "limits": zero}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({}, "neither a container"),
        (pod_task({"name": "other"}), "no primary container 'primary'"),
        (
            {
                **pod_task({"name": "primary", "volumeMounts": [{"name": "x", "mountPath": "/dev/shm"}]}),
                "extendedResources": {"sharedMemory": {"mountName": "s", "mountPath": "/dev/shm"}},
            },
            "mounted at /dev/shm",
        ),
        (
            {
                **pod_task({"name": "primary"}, volumes=[{"name": "s"}]),
                "extendedResources": {"sharedMemory": {"mountName": "s", "mountPath": "/dev/shm"}},
            },
            "a volume 's'",
        ),
    ],
)
def test_what_flyte_refuses(template: dict[str, Any], words: str) -> None:
    """BadTaskSpecification, said here before it is registered."""
    with pytest.raises(ConfigError, match=words):
        base_pod(template, EXECUTION)


def test_shared_memory_is_a_volume() -> None:
    """In memory, with the size that was asked for."""
    memory = {"mountName": "flyte-shared-memory", "mountPath": "/dev/shm", "sizeLimit": "2Gi"}
    pod = base_pod({"container": container(), "extendedResources": {"sharedMemory": memory}}, EXECUTION)
    assert pod.spec["volumes"] == [
        {"name": "flyte-shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    ]
    assert pod.container["volumeMounts"] == [{"name": "flyte-shared-memory", "mountPath": "/dev/shm"}]


def test_an_accelerator_needs_a_gpu_in_the_tasks_container() -> None:
    """Nodes are selected by its label, and their taint is tolerated; without a GPU nothing happens."""
    wanted = {"gpuAccelerator": {"device": "nvidia-tesla-a100", "partitionSize": "1g.5gb"}}
    without = base_pod({"container": container(), "extendedResources": wanted}, EXECUTION).spec
    assert "affinity" not in without
    spec = base_pod({"container": container(limits={"GPU": "1"}), "extendedResources": wanted}, EXECUTION).spec
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert [(e["key"], e["values"]) for e in term["matchExpressions"]] == [
        ("k8s.amazonaws.com/accelerator", ["nvidia-tesla-a100"]),
        ("k8s.amazonaws.com/gpu-partition-size", ["1g.5gb"]),
    ]
    assert [toleration["value"] for toleration in spec["tolerations"]] == ["nvidia-tesla-a100", "1g.5gb"]
    whole = {"gpuAccelerator": {"device": "d", "unpartitioned": True}}
    own = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}
    task = pod_task({"name": "primary", "resources": {"limits": {"gpu": 1}}}, affinity={"nodeAffinity": own})
    affinity = base_pod({**task, "extendedResources": whole}, EXECUTION).spec["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"][1] == {"key": "k8s.amazonaws.com/gpu-partition-size", "operator": "DoesNotExist"}


def test_a_plain_task_is_a_pod() -> None:
    """What a single node on kubeflow, and the driver of the ray backend, become."""
    made = pod_manifest({"container": container(), "id": {"name": "t"}}, EXECUTION)
    assert (made["kind"], made["metadata"]["name"]) == ("Pod", "execution-n0-0")
    assert made["spec"]["containers"][0]["name"] == "execution-n0-0"


ELASTIC = {
    "taskTypeVersion": 1,
    "container": container(requests={"CPU": "4", "GPU": "2"}),
    "custom": {
        "workerReplicas": {"replicas": 3.0},
        "elasticConfig": {
            "minReplicas": 2.0,
            "maxReplicas": 3.0,
            "nprocPerNode": 8.0,
            "rdzvBackend": "c10d",
        },
    },
}
PLAIN = {
    "taskTypeVersion": 1,
    "container": container(requests={"CPU": "4", "GPU": "2"}),
    "custom": {
        "workerReplicas": {
            "replicas": 2.0,
            "resources": {"requests": [{"name": "CPU", "value": "8"}]},
            "restartPolicy": "RESTART_POLICY_ON_FAILURE",
            "image": "other:1",
        },
        "masterReplicas": {"replicas": 1.0, "resources": {}},
    },
}


def resources_of(replica: dict[str, Any]) -> dict[str, str]:
    limits: dict[str, str] = replica["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits


def test_an_elastic_job_has_workers_only() -> None:
    """As many as the most nodes; the primary container is called pytorch and knows its pod's name."""
    spec = pytorch_job(ELASTIC, EXECUTION)["spec"]
    (worker,) = spec["pytorchReplicaSpecs"].values()
    assert worker["replicas"] == 3
    assert resources_of(worker) == {"cpu": "4", "memory": "1Gi", "nvidia.com/gpu": "2"}
    own = worker["template"]["spec"]["containers"][0]
    assert own["name"] == "pytorch"
    assert own["env"][-1]["name"] == "_F_WN"
    assert spec["elasticPolicy"] == {
        "minReplicas": 2,
        "maxReplicas": 3,
        "rdzvBackend": "c10d",
        "nProcPerNode": 8,
        "maxRestarts": 0,
    }
    assert spec["runPolicy"] == {}


def test_replicas_resources_override_the_tasks() -> None:
    """An empty message too: then the platform's CPU and memory come, and only the task's GPUs stay."""
    replicas = pytorch_job(PLAIN, EXECUTION)["spec"]["pytorchReplicaSpecs"]
    assert resources_of(replicas["Worker"]) == {"cpu": "8", "memory": "1Gi", "nvidia.com/gpu": "2"}
    assert resources_of(replicas["Master"]) == {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "2"}
    assert (replicas["Worker"]["restartPolicy"], replicas["Master"]["restartPolicy"]) == ("OnFailure", "Never")
    images = [replicas[role]["template"]["spec"]["containers"][0]["image"] for role in ("Master", "Worker")]
    assert images == ["i:1", "other:1"]


def test_without_workers_the_master_is_alone() -> None:
    """And always one."""
    custom = {"workerReplicas": {}, "masterReplicas": {}}
    replicas = pytorch_job({**PLAIN, "custom": custom}, EXECUTION)["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1}


def test_a_run_policys_zeros_are_not_given() -> None:
    """Flyte cannot tell 0 from nothing; the clean-up policy always has a value."""
    policy = {"ttlSecondsAfterFinished": 0.0, "backoffLimit": 3.0}
    custom = {**ELASTIC["custom"], "runPolicy": policy}
    assert pytorch_job({**ELASTIC, "custom": custom}, EXECUTION)["spec"]["runPolicy"] == {
        "cleanPodPolicy": "None",
        "backoffLimit": 3,
    }
    with pytest.raises(ConfigError, match="version 0"):
        pytorch_job({**ELASTIC, "taskTypeVersion": 0}, EXECUTION)
