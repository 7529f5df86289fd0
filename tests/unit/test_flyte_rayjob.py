"""The port of Flyte's ray plugin: its rules, one by one, on templates as they reach Flyte."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kfpytorch_ray import ConfigError
from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.cluster.kube.flyte_rayjob import entrypoint, ray_job

TEMPLATE: dict[str, Any] = {
    "id": {"project": "p", "domain": "d", "name": "flow.train", "version": "v1"},
    "type": "ray",
    "container": {
        "image": "registry.example/train:1",
        "args": ["pyflyte-execute", "--inputs", "{{.input}}", "--prev-checkpoint", "{{.prevCheckpointPrefix}}"],
        "env": [{"key": "A", "value": "1"}],
        "resources": {"requests": [{"name": "CPU", "value": "500m"}]},
    },
    "custom": {
        "rayCluster": {
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}},
            "workerGroupSpec": [{"groupName": "worker", "replicas": 2.0, "minReplicas": 2.0, "maxReplicas": 5.0}],
            "enableAutoscaling": True,
        },
        "shutdownAfterJobFinishes": True,
    },
}


def rendered(**changes: Any) -> dict[str, Any]:
    """The RayJob of the template with parts of ``custom`` changed."""
    template = copy.deepcopy(TEMPLATE)
    template["custom"].update(changes.pop("custom", {}))
    template["custom"]["rayCluster"].update(changes.pop("cluster", {}))
    return ray_job({**template, **changes}, FlyteExecution())


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Head, first worker group and submitting pod."""
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }


def overlay(name: str, **fields: Any) -> dict[str, Any]:
    return {"podSpec": {"containers": [{"name": name, **fields}]}}


def test_the_entrypoint_is_the_arguments_without_quotes() -> None:
    """Joined by blanks, template variables filled in; nothing protects a blank or a dollar sign."""
    assert rendered()["spec"]["entrypoint"] == (
        'pyflyte-execute --inputs s3://bucket/metadata/execution/n0/data/inputs.pb --prev-checkpoint ""'
    )
    assert entrypoint(["a", "", "b c", "$D"]) == "a '' b c $D"


def test_the_three_pods_are_copies_of_the_tasks() -> None:
    """With the same image and resources; head and worker lose their arguments, the submitter keeps them."""
    made = pods(rendered())
    for pod in made.values():
        (container,) = pod["spec"]["containers"]
        assert container["image"] == "registry.example/train:1"
        half, default = "500m", "1Gi"
        assert container["resources"] == {side: {"cpu": half, "memory": default} for side in ("requests", "limits")}
        assert {"name": "A", "value": "1"} in container["env"]
        assert {"name": "FLYTE_INTERNAL_EXECUTION_ID", "value": "execution"} in container["env"]
        assert pod["spec"]["restartPolicy"] == "Never"
        assert pod["spec"]["serviceAccountName"] == "default"
        assert pod["metadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    names = [pod["spec"]["containers"][0]["name"] for pod in made.values()]
    assert names == ["ray-head", "ray-worker", "execution-n0-0"]
    assert ["args" in pod["spec"]["containers"][0] for pod in made.values()] == [False, False, True]


def test_what_head_and_worker_get_besides() -> None:
    """Ports on both; the pod's address; ``ray stop`` before a worker ends."""
    made = pods(rendered())
    head, worker = (made[name]["spec"]["containers"][0] for name in ("head", "worker"))
    assert [port["containerPort"] for port in head["ports"]] == [6379, 10001, 8265]
    assert head["ports"] == worker["ports"]
    assert head["env"][-1] == {"name": "MY_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert worker["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sh", "-c", "ray stop"]
    amounts = {
        entry["name"]: entry["valueFrom"]["resourceFieldRef"]["resource"]
        for entry in worker["env"]
        if "resourceFieldRef" in entry.get("valueFrom", {})
    }
    assert amounts == {
        "CPU_REQUEST": "requests.cpu",
        "CPU_LIMITS": "limits.cpu",
        "MEMORY_REQUESTS": "requests.cpu",
        "MEMORY_LIMITS": "limits.cpu",
    }


def test_start_parameters_are_ours_and_flytes() -> None:
    """Ours win; Flyte adds those that are missing."""
    cluster = rendered(cluster={"headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "::"}}})[
        "spec"
    ]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {
        "num-cpus": "0",
        "dashboard-host": "::",
        "include-dashboard": "true",
        "node-ip-address": "$MY_POD_IP",
        "disable-usage-stats": "true",
    }
    assert cluster["workerGroupSpecs"][0]["rayStartParams"] == {
        "node-ip-address": "$MY_POD_IP",
        "disable-usage-stats": "true",
    }


@pytest.mark.parametrize(
    ("asked", "expected"), [((2, 2, 5), (2, 2, 5)), ((3, 5, 1), (3, 3, 3)), ((4, 0, 0), (4, 0, 4))]
)
def test_replicas_lie_within_their_bounds(asked: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    """Flyte moves the bounds, not the number."""
    group = dict(zip(("replicas", "minReplicas", "maxReplicas"), map(float, asked), strict=True))
    made = rendered(cluster={"workerGroupSpec": [{"groupName": "w", **group}]})
    (spec,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (spec["replicas"], spec["minReplicas"], spec["maxReplicas"]) == expected


@pytest.mark.parametrize(
    ("custom", "ttl"),
    [
        ({"shutdownAfterJobFinishes": True}, 0),
        ({"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 9.0}, 9),
        ({"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 9.0}, 3600),
    ],
)
def test_shutdown_cannot_be_turned_off(custom: dict[str, Any], ttl: int) -> None:
    """Without the flag Flyte's own configuration counts, and the time to live is not read."""
    spec = rendered(custom=custom)["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, ttl)


def test_a_groups_own_pod_is_laid_over() -> None:
    """By the container's name; amounts change or are added, lists grow, labels are this pod's."""
    own = overlay("ray-worker", resources={"limits": {"cpu": "8", "nvidia.com/gpu": "1"}}, env=[{"name": "B"}])
    own["podSpec"].update(tolerations=[{"key": "gpu"}], nodeSelector={"pool": "gpu"})
    own["metadata"] = {"labels": {"kind": "worker"}}
    group = {"groupName": "w", "replicas": 1.0, "k8sPod": own}
    made = pods(rendered(cluster={"workerGroupSpec": [group]}))
    worker = made["worker"]["spec"]
    assert worker["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "1Gi", "nvidia.com/gpu": "1"}
    assert worker["containers"][0]["env"][-1] == {"name": "B"}
    assert (worker["tolerations"], worker["nodeSelector"]) == ([{"key": "gpu"}], {"pool": "gpu"})
    assert made["worker"]["metadata"]["labels"] == {"kind": "worker"}
    for other in ("head", "submitter"):
        assert "nvidia.com/gpu" not in str(made[other])
        assert "labels" not in made[other]["metadata"]


def test_other_containers_of_a_groups_pod_are_dropped() -> None:
    """Init containers as well: the lists are the base's."""
    own = overlay("sidecar")
    own["podSpec"]["initContainers"] = [{"name": "fetch"}]
    made = pods(rendered(cluster={"workerGroupSpec": [{"groupName": "w", "replicas": 1.0, "k8sPod": own}]}))
    assert [container["name"] for container in made["worker"]["spec"]["containers"]] == ["ray-worker"]
    assert "initContainers" not in made["worker"]["spec"]


def test_labels_of_task_and_template_are_the_resources() -> None:
    """``@task(labels=)`` is the RayJob's; a pod template's is the pods' too."""
    template = {
        **TEMPLATE,
        "metadata": {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "q"}}},
        "config": {"primary_container_name": "main"},
        "k8sPod": {"metadata": {"labels": {"a": "b"}}, "podSpec": {"containers": [{"name": "main", "args": ["x"]}]}},
    }
    del template["container"]
    made = ray_job(template, FlyteExecution())
    assert made["metadata"]["labels"] == {"a": "b", "kueue.x-k8s.io/queue-name": "q"}
    assert all(pod["metadata"]["labels"] == {"a": "b"} for pod in pods(made).values())


def test_autoscaler_options_arrive() -> None:
    """Since Flyte 1.16.7."""
    options = {"idleTimeoutSeconds": 60.0, "upscalingMode": "UPSCALING_MODE_AGGRESSIVE"}
    spec = rendered(cluster={"autoscalerOptions": options})["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"] == {"idleTimeoutSeconds": 60, "upscalingMode": "Aggressive", "resources": {}}


def test_what_flyte_fails_on_is_refused() -> None:
    """A template without a cluster, which is a nil pointer there, and a name that KubeRay would not take."""
    with pytest.raises(ConfigError, match="rayCluster"):
        ray_job({**TEMPLATE, "custom": {}}, FlyteExecution())
    with pytest.raises(ConfigError, match="47"):
        ray_job(TEMPLATE, FlyteExecution(name="x" * 48))


def test_a_later_attempt_knows_where_the_one_before_kept_its_checkpoints() -> None:
    """It leaves its own outputs beside those of the earlier attempt."""
    execution = FlyteExecution(prefix="s3://b/data", attempt=1)
    assert (
        execution.fill_in("{{.outputPrefix}} {{.prevCheckpointPrefix}}")
        == "s3://b/data/1 s3://b/data/0/_flytecheckpoints"
    )
    assert {"name": "FLYTE_ATTEMPT_NUMBER", "value": "1"} in execution.environment({})


def test_an_element_of_a_map_is_told_its_index() -> None:
    """It reads the inputs of the whole map, and leaves its outputs in a folder of its own."""
    execution = FlyteExecution(prefix="s3://b/data", index=3)
    assert execution.fill_in("{{.input}} {{.outputPrefix}}") == "s3://b/data/inputs.pb s3://b/data/0/3/0"
    variables = {one["name"]: one["value"] for one in execution.environment({})}
    assert variables[variables["BATCH_JOB_ARRAY_INDEX_VAR_NAME"]] == "3"
