"""Tasks on the kubeflow backend register exactly what flytekitplugins-kfpytorch registers.

Differential: hypothesis generates valid configs and task arguments, both packages build and serialise the task, and
the whole TaskTemplate messages are compared. Nothing is filtered out: the strategies make only valid cases.
"""

from __future__ import annotations

import copy
import datetime
import warnings
from collections import OrderedDict
from typing import Any

import flytekitplugins.kfpytorch.task as upstream
import pytest
from flyteidl.core import tasks_pb2
from flytekit import PodTemplate, Resources, Secret, task
from flytekit.configuration import FastSerializationSettings, Image, ImageConfig, SerializationSettings
from flytekit.extras.accelerators import A100, T4, GPUAccelerator
from flytekit.tools.translator import get_serializable_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes.client import (
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1PodSpec,
    V1ResourceRequirements,
    V1Toleration,
    V1Volume,
    V1VolumeMount,
)

import kfpytorch_ray.task as own

IMAGE = Image(name="default", fqn="registry.example/train", tag="1")
PLAIN = SerializationSettings(
    project="p",
    domain="d",
    version="v1",
    env={"FROM": "settings", "SHARED": "settings"},
    image_config=ImageConfig(default_image=IMAGE, images=[IMAGE]),
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

texts = st.text(alphabet="abcdefghij-0123456789", min_size=1, max_size=8)
string_maps = st.dictionaries(texts, texts, max_size=3)
maybe = st.none()


# As text, because flytekit cannot serialise numbers in the container of a task; in a replica it can.
amounts_as_text = {"cpu": ["1", "500m"], "mem": ["2Gi", "512Mi"], "gpu": ["1", "8"], "ephemeral_storage": ["10Gi"]}
amounts_of_any_type = {"cpu": ["1", 2, 0.5], "mem": ["2Gi", 1024], "gpu": ["1", 8], "ephemeral_storage": ["10Gi", 4096]}


def resources(amounts: dict[str, list[Any]], *, pairs: bool = False) -> st.SearchStrategy[Resources]:
    """Resources of one side, or with (request, limit) pairs as ``@task(resources=...)`` takes them."""

    def one(kind: str) -> st.SearchStrategy[Any]:
        single = st.sampled_from(amounts[kind])
        return st.one_of(maybe, single, st.tuples(single, single)) if pairs else st.one_of(maybe, single)

    return st.builds(
        Resources, cpu=one("cpu"), mem=one("mem"), gpu=one("gpu"), ephemeral_storage=one("ephemeral_storage")
    )


@st.composite
def pod_templates(draw: st.DrawFn, clashing: bool) -> PodTemplate:
    """Templates of users; clashing ones have what increase_shared_mem refuses."""
    names = (
        ["primary", "sidecar"]
        if clashing and draw(st.booleans())
        else draw(st.sampled_from([[], ["primary"], ["other"]]))
    )
    mounts = [None, [], [V1VolumeMount(name="data", mount_path="/data")]]
    if clashing:
        mounts.append([V1VolumeMount(name="shm", mount_path="/dev/shm")])
    containers = [
        V1Container(
            name=name,
            image=draw(st.sampled_from([None, "registry.example/sidecar:2"])),
            volume_mounts=draw(st.sampled_from(mounts)),
            env=draw(st.sampled_from([None, [V1EnvVar(name="A", value="1")]])),
            resources=draw(st.sampled_from([None, V1ResourceRequirements(limits={"cpu": "3"})])),
        )
        for name in names
    ]
    spec = V1PodSpec(
        containers=containers,
        volumes=draw(st.sampled_from([None, [], [V1Volume(name="data", empty_dir=V1EmptyDirVolumeSource())]])),
        tolerations=draw(st.sampled_from([None, [V1Toleration(key="gpu", operator="Exists")]])),
        node_selector=draw(st.one_of(maybe, string_maps)),
    )
    return PodTemplate(
        pod_spec=draw(st.sampled_from([spec, None])),
        primary_container_name=draw(st.sampled_from(["primary", "trainer"])),
        labels=draw(st.one_of(maybe, string_maps)),
        annotations=draw(st.one_of(maybe, string_maps)),
    )


@st.composite
def task_arguments(draw: st.DrawFn, increase_shared_mem: bool) -> dict[str, Any]:
    """What stands beside task_config in ``@task(...)``."""
    shared_memory = draw(st.sampled_from([None, None, False, True, "2Gi"]))
    clashing = not increase_shared_mem or shared_memory not in (None, False)
    optional = {
        "environment": string_maps,
        "container_image": st.sampled_from(
            ["registry.example/mine:3", "{{.image.default.fqn}}:{{.image.default.version}}"]
        ),
        "secret_requests": st.lists(st.builds(Secret, group=texts, key=texts), min_size=1, max_size=2),
        "retries": st.integers(0, 5),
        "timeout": st.builds(datetime.timedelta, seconds=st.integers(1, 10**5)),
        "interruptible": st.booleans(),
        "pod_template": pod_templates(clashing),
        "pod_template_name": texts,
        "accelerator": st.sampled_from([T4, A100, A100.partition_1g_5gb, A100.unpartitioned, GPUAccelerator("x")]),
        "labels": string_maps,
        "annotations": string_maps,
        "enable_deck": st.booleans(),
        "deprecated": texts,
    }
    arguments = draw(st.fixed_dictionaries({}, optional=optional))
    if shared_memory is not None:
        arguments["shared_memory"] = shared_memory
    match draw(st.sampled_from(["none", "resources", "sides"])):
        case "resources":
            arguments["resources"] = draw(resources(amounts_as_text, pairs=True))
        case "sides":
            arguments["requests"] = draw(st.one_of(maybe, resources(amounts_as_text)))
            arguments["limits"] = draw(st.one_of(maybe, resources(amounts_as_text)))
    return arguments


counts = st.integers(1, 64)
node_ranges = st.tuples(counts, counts).map(lambda pair: f"{min(pair)}:{max(pair)}")
run_policies = st.one_of(
    maybe,
    st.fixed_dictionaries(
        {},
        optional={
            "clean_pod_policy": st.sampled_from(["NONE", "ALL", "RUNNING"]),
            "ttl_seconds_after_finished": st.integers(0, 10**6),
            "active_deadline_seconds": st.integers(0, 10**6),
            "backoff_limit": st.integers(0, 100),
        },
    ),
)
elastic_fields = st.fixed_dictionaries(
    {"increase_shared_mem": st.booleans(), "run_policy": run_policies},
    optional={
        "nnodes": st.one_of(st.just(1), counts, counts.map(str), node_ranges),
        "nproc_per_node": counts,
        "start_method": st.sampled_from(["spawn", "fork"]),
        "monitor_interval": st.integers(1, 60),
        "max_restarts": st.integers(0, 10),
        "rdzv_configs": st.dictionaries(
            st.sampled_from(["timeout", "join_timeout", "read_timeout"]), st.integers(1, 9999)
        ),
    },
)
replica_fields = {
    "image": st.sampled_from([None, "registry.example/replica:4"]),
    "requests": st.one_of(maybe, resources(amounts_of_any_type)),
    "limits": st.one_of(maybe, resources(amounts_of_any_type)),
    "restart_policy": st.sampled_from([None, "ALWAYS", "FAILURE", "NEVER"]),
}
worker_counts = st.one_of(
    st.fixed_dictionaries({"replicas": st.integers(0, 64), "num_workers": st.sampled_from([None, 0])}),
    st.fixed_dictionaries({"replicas": st.sampled_from([None, 0]), "num_workers": st.integers(0, 64)}),
)
pytorch_fields = st.fixed_dictionaries(
    {
        "increase_shared_mem": st.booleans(),
        "run_policy": run_policies,
        "worker": st.fixed_dictionaries(replica_fields),
        "master": st.fixed_dictionaries(replica_fields),
        "counts": worker_counts,
    }
)


def run_policy_of(package: Any, fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    policy = fields.get("clean_pod_policy")
    return package.RunPolicy(**{**fields, "clean_pod_policy": package.CleanPodPolicy[policy] if policy else None})


def replica_of(package: Any, kind: str, fields: dict[str, Any], **more: Any) -> Any:
    policy = fields["restart_policy"]
    return getattr(package, kind)(
        **{**fields, **more, "restart_policy": package.RestartPolicy[policy] if policy else None}
    )


def elastic_of(package: Any, fields: dict[str, Any]) -> Any:
    return package.Elastic(**{**fields, "run_policy": run_policy_of(package, fields["run_policy"])})


def pytorch_of(package: Any, fields: dict[str, Any]) -> Any:
    return package.PyTorch(
        master=replica_of(package, "Master", fields["master"]),
        worker=replica_of(package, "Worker", fields["worker"], replicas=fields["counts"]["replicas"]),
        num_workers=fields["counts"]["num_workers"],
        run_policy=run_policy_of(package, fields["run_policy"]),
        increase_shared_mem=fields["increase_shared_mem"],
    )


def train(epochs: int, name: str = "x") -> float:
    """Train."""
    return epochs * len(name)


def templates(config: Any, arguments: dict[str, Any]) -> list[tasks_pb2.TaskTemplate]:
    """The task's template, registered plainly and fast."""
    with warnings.catch_warnings():
        # Upstream warns of increase_shared_mem, which is True by default.
        warnings.simplefilter("ignore")
        built = task(task_config=config, **copy.deepcopy(arguments))(train)
    return [get_serializable_task(OrderedDict(), how, built).template.to_flyte_idl() for how in (PLAIN, FAST)]


@st.composite
def cases(draw: st.DrawFn, fields: st.SearchStrategy[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    drawn = draw(fields)
    return drawn, draw(task_arguments(drawn["increase_shared_mem"]))


@pytest.mark.parametrize(("fields", "make"), [(elastic_fields, elastic_of), (pytorch_fields, pytorch_of)])
def test_templates_equal_upstreams(fields: st.SearchStrategy[dict[str, Any]], make: Any) -> None:
    """Whatever valid config and task arguments are given, both packages register the same template."""
    compared = 0

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(fields))
    def compare(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
        nonlocal compared
        config, arguments = case
        assert templates(make(own, config), arguments) == templates(make(upstream, config), arguments)
        compared += 1

    compare()

    assert compared >= 400


def test_positional_arguments_are_upstreams() -> None:
    """Upstream's positional order works: our own field comes last."""
    for name in ("Elastic", "PyTorch", "Master", "Worker", "RunPolicy"):
        ours = list(getattr(own, name).__dataclass_fields__)
        theirs = list(getattr(upstream, name).__dataclass_fields__)
        assert ours[: len(theirs)] == theirs
        assert set(ours) - set(theirs) <= {"backend"}
