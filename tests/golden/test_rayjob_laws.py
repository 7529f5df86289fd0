"""Whatever a user configures, the RayJob that Flyte makes of it is valid in all KubeRay versions and lawful."""

from __future__ import annotations

import logging
import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from crd_schema import ray_job_crds
from flytekit import PodTemplate, Resources, task
from flytekit.configuration import FastSerializationSettings, Image, ImageConfig, SerializationSettings
from flytekit.extras.accelerators import A100
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes.client import (
    V1Affinity,
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1NodeAffinity,
    V1NodeSelector,
    V1NodeSelectorRequirement,
    V1NodeSelectorTerm,
    V1PodSpec,
    V1Toleration,
    V1Volume,
    V1VolumeMount,
)

from kfpytorch_ray import CleanPodPolicy, Elastic, KubeRayBackend, Master, PyTorch, RunPolicy, Worker
from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.planning import Call, amount_of, current_context, plan_elastic, plan_pytorch
from kfpytorch_ray.rendering import render

IMAGE = Image(name="default", fqn="registry.example/train", tag="1")
PLAIN = SerializationSettings(
    project="p", domain="d", version="v1", image_config=ImageConfig(default_image=IMAGE, images=[IMAGE])
)
FAST = (
    PLAIN.new_builder()
    .with_fast_serialization_settings(
        FastSerializationSettings(
            enabled=True, destination_dir="/root", distribution_location="s3://bucket/code.tar.gz"
        )
    )
    .build()
)
GPU = "nvidia.com/gpu"

labels = st.dictionaries(st.sampled_from(["team", "kueue.x-k8s.io/queue-name"]), st.sampled_from(["a", "b"]))
counts = st.integers(1, 16)
ranges = st.tuples(counts, counts).map(lambda pair: f"{min(pair)}:{max(pair)}")
ladder = {
    "cpu": ["250m", "1", "2", "7.5", "64"],
    "mem": ["512Mi", "4Gi", "1Ti"],
    "gpu": ["1", "4", "8"],
    "ephemeral_storage": ["1Gi", "100Gi"],
}


@st.composite
def amounts(draw: st.DrawFn) -> dict[str, Resources]:
    """Requests and limits as ``@task`` takes them; no request above its limit."""
    sides: dict[str, dict[str, str]] = {"requests": {}, "limits": {}}
    for kind, steps in ladder.items():
        low, high = sorted((draw(st.integers(0, len(steps) - 1)), draw(st.integers(0, len(steps) - 1))))
        which = draw(st.sampled_from(["none", "requests", "limits", "both"]))
        if which in ("requests", "both"):
            sides["requests"][kind] = steps[low]
        if which in ("limits", "both"):
            # A GPU's limit is its request.
            sides["limits"][kind] = steps[low if kind == "gpu" else high]
    return {side: Resources(**values) for side, values in sides.items()}


@st.composite
def pod_templates(draw: st.DrawFn, prefix: str, *, sidecars: bool) -> PodTemplate:
    """Templates whose names begin with ``prefix``, so that no two share one."""
    volume = f"{prefix}-data"
    containers = [
        V1Container(
            name="primary",
            env=draw(st.sampled_from([None, [V1EnvVar(name=f"{prefix}_A".upper(), value="1")]])),
            volume_mounts=draw(st.sampled_from([None, [V1VolumeMount(name=volume, mount_path=f"/{prefix}")]])),
        )
    ]
    if sidecars and draw(st.booleans()):
        containers.append(V1Container(name="proxy", image="registry.example/proxy:1"))
    requirement = V1NodeSelectorRequirement(key="zone", operator="In", values=["a", "b"])
    affinity = V1Affinity(
        node_affinity=V1NodeAffinity(
            required_during_scheduling_ignored_during_execution=V1NodeSelector(
                node_selector_terms=[V1NodeSelectorTerm(match_expressions=[requirement])]
            )
        )
    )
    spec = V1PodSpec(
        containers=draw(st.sampled_from([containers, []])),
        volumes=draw(st.sampled_from([None, [V1Volume(name=volume, empty_dir=V1EmptyDirVolumeSource())]])),
        tolerations=draw(st.sampled_from([None, [V1Toleration(key="gpu", operator="Exists")]])),
        node_selector=draw(st.none() | labels),
        affinity=draw(st.sampled_from([None, affinity])),
        priority_class_name=draw(st.sampled_from([None, "high"])),
        termination_grace_period_seconds=draw(st.sampled_from([None, 0, 120])),
    )
    return PodTemplate(
        pod_spec=draw(st.sampled_from([spec, None])),
        labels=draw(st.none() | labels),
        annotations=draw(st.none() | labels),
    )


backends = st.builds(
    KubeRayBackend,
    head_requests=st.sampled_from([None, Resources(cpu="2"), Resources(cpu="500m", mem="2Gi")]),
    head_limits=st.sampled_from([None, Resources(mem="8Gi")]),
    head_pod_template=st.none() | pod_templates("head", sidecars=False),
    worker_pod_template=st.none() | pod_templates("work", sidecars=False),
    head_start_params=st.sampled_from([{}, {"log-color": "false"}]),
    worker_start_params=st.sampled_from([{}, {"object-store-memory": "1000000000"}]),
    idle_timeout_s=st.none() | st.integers(1, 10**6),
    runtime_env=st.sampled_from([None, {}, {"env_vars": {"A": "it's: 1"}}]),
)
policies = st.none() | st.builds(
    RunPolicy,
    clean_pod_policy=st.none() | st.sampled_from(CleanPodPolicy),
    ttl_seconds_after_finished=st.none() | st.integers(0, 10**6),
    active_deadline_seconds=st.none() | st.integers(1, 10**6),
    backoff_limit=st.none() | st.integers(0, 9),
)
elastics = st.builds(
    Elastic,
    nnodes=counts | counts.map(str) | ranges,
    nproc_per_node=counts,
    max_restarts=st.integers(0, 3),
    increase_shared_mem=st.booleans(),
    run_policy=policies,
    backend=backends,
)
replicas = amounts().map(lambda sides: {side: value for side, value in sides.items() if value != Resources()})
pytorches = st.builds(
    lambda master, worker, count, policy, backend: PyTorch(
        Master(**master), Worker(**worker, replicas=count), policy, backend=backend
    ),
    replicas,
    replicas,
    st.integers(0, 16),
    policies,
    backends,
)
arguments = st.builds(
    lambda sides, more: {**sides, **more},
    amounts(),
    st.fixed_dictionaries(
        {},
        optional={
            "environment": st.just({"A": "1"}),
            "pod_template": pod_templates("base", sidecars=True),
            "accelerator": st.just(A100),
            "shared_memory": st.sampled_from([True, "2Gi"]),
            "labels": labels,
            "annotations": labels,
            "timeout": st.just(timedelta(hours=1)),
        },
    ),
)


def train(epochs: int) -> float:
    """Train."""
    return epochs


def plan_of(config: Any, made: Any) -> LaunchPlan:
    """What the driver will ask of Ray."""
    call = Call("train", "f1", train, (), {}, current_context(), made.arguments)
    return plan_elastic(config, call) if isinstance(config, Elastic) else plan_pytorch(config, call)


def test_every_rayjob_is_valid_and_lawful(crds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is filtered out: what is generated is what a task may be defined with."""
    monkeypatch.setattr(logging.getLogger("kfpytorch_ray.preflight"), "disabled", True)
    seen = 0

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(elastics | pytorches, arguments, st.sampled_from([PLAIN, FAST]))
    def check(config: Any, beside: dict[str, Any], how: SerializationSettings) -> None:
        nonlocal seen
        made = task(task_config=config, **beside)(train)
        (job,) = render(made, settings=how).manifests
        for version, crd in ray_job_crds().items():
            assert crd.problems(job) == [], version
        check_names(job)
        check_pods(job)
        check_groups(job, plan_of(config, made))
        seen += 1

    check()

    assert seen >= 200


def check_names(job: dict[str, Any]) -> None:
    """Within KubeRay's limits, and the entrypoint has nothing that a shell would read."""
    assert len(job["metadata"]["name"]) <= 47
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", group["groupName"])
    assert not re.search(r"[$`;&|<>*?()\\']", job["spec"]["entrypoint"])
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def check_pods(job: dict[str, Any]) -> None:
    """Ray is in the first container; GPUs are on workers only; the choice is in every pod; requests fit limits."""
    cluster = job["spec"]["rayClusterSpec"]
    head, submitter = cluster["headGroupSpec"]["template"], job["spec"]["submitterPodTemplate"]
    workers = [group["template"] for group in cluster["workerGroupSpecs"]]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert head["spec"]["containers"][0]["name"] == "ray-head"
    assert all(worker["spec"]["containers"][0]["name"] == "ray-worker" for worker in workers)
    for pod in (head, submitter):
        assert all(GPU not in str(container["resources"]) for container in pod["spec"]["containers"])
    for pod in (head, submitter, *workers):
        first = pod["spec"]["containers"][0]
        assert {"name": BACKEND_VARIABLE, "value": "kuberay"} in first["env"]
        requests, limits = first["resources"]["requests"], first["resources"]["limits"]
        assert requests.keys() == limits.keys()
        assert all(amount_of(requests[name]) <= amount_of(limits[name]) for name in limits)


def check_groups(job: dict[str, Any], plan: LaunchPlan) -> None:
    """As many nodes as the plan's, and each holds what the plan asks of it, as KubeRay counts a pod."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    assert sum(group["replicas"] for group in groups) == plan.min_nodes
    assert all(group["minReplicas"] == group["replicas"] for group in groups)
    assert sum(group["maxReplicas"] for group in groups) == plan.max_nodes
    assert cluster["enableInTreeAutoscaling"] == (plan.min_nodes < plan.max_nodes)
    wanted = [plan.resources.amounts] * (plan.min_nodes - 1)
    wanted.insert(0, (plan.first_node_resources or plan.resources).amounts)
    pods = [group["template"]["spec"] for group in groups for _ in range(group["replicas"])]
    for amounts_of_node, pod in zip(wanted, pods, strict=True):
        limits = pod["containers"][0]["resources"]["limits"]
        assert amounts_of_node.get("CPU", 0) <= math.ceil(amount_of(limits["cpu"]))
        assert amounts_of_node.get("memory", 0) <= amount_of(limits["memory"])
        assert amounts_of_node.get("GPU", 0) == amount_of(limits.get(GPU, 0))
