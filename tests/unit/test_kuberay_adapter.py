"""What a task on KubeRay registers with Flyte, what is refused, and what its driver does on the head pod."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections import OrderedDict
from typing import Any

import pytest
from flyteidl.plugins import ray_pb2
from flytekit import FlyteContextManager, PodTemplate, Resources, task
from flytekit.configuration import FastSerializationSettings, Image, ImageConfig, SerializationSettings
from flytekit.core.resources import ResourceSpec
from flytekit.extras.accelerators import A100
from flytekit.tools.translator import get_serializable_task
from google.protobuf.json_format import MessageToDict, ParseDict
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

from kfpytorch_ray import (
    BackendUnavailableError,
    CleanPodPolicy,
    ConfigError,
    Elastic,
    KubeRayBackend,
    Master,
    PyTorch,
    RayBackend,
    RunPolicy,
    Worker,
)
from kfpytorch_ray.adapters.kuberay import KubeRayAdapter, inside_options, outside_request
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.plan import FlyteContext, LaunchPlan
from kfpytorch_ray.planning import Call, current_context, node_resources, plan_elastic, plan_pytorch
from kfpytorch_ray.task_arguments import TaskArguments

IMAGE = Image(name="default", fqn="registry.example/train", tag="1")
SETTINGS = SerializationSettings(
    project="p", domain="d", version="v1", image_config=ImageConfig(default_image=IMAGE, images=[IMAGE])
)
FAST = (
    SETTINGS.new_builder()
    .with_fast_serialization_settings(
        FastSerializationSettings(
            enabled=True, destination_dir="/code", distribution_location="s3://bucket/code.tar.gz"
        )
    )
    .build()
)
GPU_NODE = Resources(cpu="16", mem="64Gi", gpu="8", ephemeral_storage="100Gi")


def train(x: int) -> int:
    """Train."""
    return x


def on_kuberay(config: Any, **arguments: Any) -> Any:
    config.backend = config.backend or "kuberay"
    return task(task_config=config, **arguments)(train)


def registered(made: Any, settings: SerializationSettings = SETTINGS) -> Any:
    """The template as it goes to Flyte."""
    return get_serializable_task(OrderedDict(), settings, made).template.to_flyte_idl()


def job_of(made: Any) -> ray_pb2.RayJob:
    """``custom`` as Flyte reads it; an unknown field would be an error here."""
    return ParseDict(MessageToDict(registered(made).custom), ray_pb2.RayJob())


def container_of(pod: Any) -> dict[str, Any]:
    (container,) = MessageToDict(pod.pod_spec)["containers"]
    return container


def test_a_task_is_a_ray_job_whose_workers_have_its_resources() -> None:
    """The submitting pod and the head are small and have no GPU; nothing runs on the head."""
    made = on_kuberay(Elastic(nnodes=2, nproc_per_node=8), requests=GPU_NODE)
    template = registered(made)
    assert (template.type, template.task_type_version) == ("ray", 1)
    assert {entry.value for entry in template.container.resources.requests} == {"500m", "1Gi"}
    assert template.container.resources.requests == template.container.resources.limits
    cluster = job_of(made).ray_cluster
    amounts = {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "8", "ephemeral-storage": "100Gi"}
    (group,) = cluster.worker_group_spec
    assert container_of(group.k8s_pod) == {
        "name": "ray-worker",
        "resources": {"requests": amounts, "limits": amounts},
    }
    head = {"cpu": "1", "memory": "4Gi"}
    assert container_of(cluster.head_group_spec.k8s_pod) == {
        "name": "ray-head",
        "resources": {"requests": head, "limits": head},
    }
    assert cluster.head_group_spec.ray_start_params == {"num-cpus": "0"}


@pytest.mark.parametrize(
    ("nnodes", "replicas", "autoscaling"),
    [(1, (1, 1, 1), False), ("1", (1, 1, 1), False), (3, (3, 3, 3), False), ("2:5", (2, 2, 5), True)],
)
def test_a_range_starts_with_the_fewest_nodes(
    nnodes: int | str, replicas: tuple[int, int, int], autoscaling: bool
) -> None:
    """KubeRay submits the job when all replicas are there, so a range would else wait for the most."""
    cluster = job_of(on_kuberay(Elastic(nnodes=nnodes))).ray_cluster
    (group,) = cluster.worker_group_spec
    assert (group.replicas, group.min_replicas, group.max_replicas) == replicas
    assert cluster.enable_autoscaling is autoscaling


def test_a_master_with_resources_of_its_own_is_a_group_of_its_own() -> None:
    """Equal replicas share one group, the master among them."""
    master = Master(requests=Resources(cpu="4"))
    groups = job_of(on_kuberay(PyTorch(master, Worker(replicas=3)))).ray_cluster.worker_group_spec
    assert [(group.group_name, group.replicas) for group in groups] == [("master", 1), ("worker", 3)]
    assert container_of(groups[0].k8s_pod)["resources"]["limits"] == {"cpu": "4"}
    (alone,) = job_of(on_kuberay(PyTorch(master, Worker(replicas=0)))).ray_cluster.worker_group_spec
    assert (alone.replicas, container_of(alone.k8s_pod)["resources"]["limits"]) == (1, {"cpu": "4"})
    (alike,) = job_of(on_kuberay(PyTorch(worker=Worker(replicas=3)))).ray_cluster.worker_group_spec
    assert alike.replicas == 4


def test_a_worker_pod_holds_what_the_driver_will_ask_of_ray() -> None:
    """CPUs that the task does not name are counted from its workers, in the pod as in the plan."""
    made = on_kuberay(Elastic(nproc_per_node=6))
    (group,) = job_of(made).ray_cluster.worker_group_spec
    assert container_of(group.k8s_pod)["resources"]["limits"] == {"cpu": "6"}
    assert node_resources(made.resources, workers=6).amounts == {"CPU": 6.0}
    # Without memory of theirs, workers must not get the submitting pod's: nobody names any.
    assert [entry.value for entry in registered(made).container.resources.limits] == ["500m"]


def test_default_resources_of_the_registration_reach_pods_and_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container reads the task's file again, where they are not; so they are recorded beside it."""
    defaults = ResourceSpec(requests=Resources(gpu="2", mem="8Gi"), limits=Resources())
    how = dataclasses.replace(SETTINGS, default_resources=defaults)
    template = registered(on_kuberay(Elastic()), how)
    job = ParseDict(MessageToDict(template.custom), ray_pb2.RayJob())
    limits = {"cpu": "1", "memory": "8Gi", "nvidia.com/gpu": "2"}
    assert container_of(job.ray_cluster.worker_group_spec[0].k8s_pod)["resources"]["limits"] == limits
    assert {entry.value for entry in template.container.resources.limits} == {"500m", "1Gi"}
    monkeypatch.setenv(*((entry := template.container.env[-1]).key, entry.value))
    assert on_kuberay(Elastic())._registered_resources() == defaults
    own = on_kuberay(Elastic(), requests=Resources(cpu="3"))
    assert own._registered_resources() == own.resources
    assert registered(own, how).container.env[-1].key == BACKEND_VARIABLE


def test_limits_alone_are_requests_too() -> None:
    """Flyte lays the worker's amounts over the small container's, so each kind needs both."""
    made = on_kuberay(Elastic(), requests=Resources(cpu="1"), limits=Resources(cpu="2", gpu="1"))
    (group,) = job_of(made).ray_cluster.worker_group_spec
    assert container_of(group.k8s_pod)["resources"] == {
        "requests": {"cpu": "1", "nvidia.com/gpu": "1"},
        "limits": {"cpu": "2", "nvidia.com/gpu": "1"},
    }


def test_an_accelerators_resource_name_is_the_clusters() -> None:
    """Flyte translates ``gpu`` in the task's container only, so the name is written out."""
    backend = KubeRayBackend(gpu_resource="amd.com/gpu")
    (group,) = job_of(on_kuberay(Elastic(backend=backend), requests=Resources(gpu="2"))).ray_cluster.worker_group_spec
    assert container_of(group.k8s_pod)["resources"]["limits"]["amd.com/gpu"] == "2"


@pytest.mark.parametrize(
    ("policy", "ttl"), [(None, 60), (RunPolicy(), 60), (RunPolicy(ttl_seconds_after_finished=7), 7)]
)
def test_the_cluster_is_shut_down_after_the_policys_time(policy: RunPolicy | None, ttl: int) -> None:
    """Both are written, because Flyte's own configuration counts otherwise."""
    job = job_of(on_kuberay(Elastic(run_policy=policy)))
    assert (job.shutdown_after_job_finishes, job.ttl_seconds_after_finished) == (True, ttl)


def test_the_choice_is_pinned_and_no_shared_memory_is_mounted() -> None:
    """KubeRay mounts /dev/shm itself, so the target stays a plain container."""
    template = registered(on_kuberay(Elastic(), environment={"A": "1"}))
    assert template.WhichOneof("target") == "container"
    assert {entry.key: entry.value for entry in template.container.env} == {"A": "1", BACKEND_VARIABLE: "kuberay"}
    assert dict(template.config) == {"kfpytorch_ray.backend": "kuberay"}


def test_templates_of_head_and_workers_are_laid_over() -> None:
    """The primary container takes the name that Flyte looks for; the rest goes along."""

    def template(key: str) -> PodTemplate:
        spec = V1PodSpec(
            containers=[V1Container(name="primary", image="registry.example/other:1")],
            tolerations=[V1Toleration(key=key, operator="Exists")],
        )
        return PodTemplate(pod_spec=spec, labels={"for": key}, annotations={"note": key})

    backend = KubeRayBackend(
        head_pod_template=template("head"),
        worker_pod_template=template("worker"),
        head_requests=Resources(cpu="2"),
        head_limits=Resources(mem="8Gi"),
        head_start_params={"log-color": "false"},
        worker_start_params={"object-store-memory": "1000000000"},
        idle_timeout_s=300,
        runtime_env={"env_vars": {"A": "1"}},
    )
    job = job_of(on_kuberay(Elastic(nnodes="1:2", backend=backend)))
    head, (group,) = job.ray_cluster.head_group_spec, job.ray_cluster.worker_group_spec
    for key, spec in (("head", head), ("worker", group)):
        assert dict(spec.k8s_pod.metadata.labels) == {"for": key}
        assert dict(spec.k8s_pod.metadata.annotations) == {"note": key}
        assert MessageToDict(spec.k8s_pod.pod_spec)["tolerations"] == [{"key": key, "operator": "Exists"}]
        assert container_of(spec.k8s_pod)["name"] == f"ray-{key}"
        assert container_of(spec.k8s_pod)["image"] == "registry.example/other:1"
    assert container_of(head.k8s_pod)["resources"]["limits"] == {"cpu": "2", "memory": "8Gi"}
    assert head.ray_start_params == {"log-color": "false", "num-cpus": "0"}
    assert group.ray_start_params == {"object-store-memory": "1000000000"}
    assert job.ray_cluster.autoscaler_options.idle_timeout_seconds == 300
    assert json.loads(job.runtime_env_yaml)["env_vars"]["A"] == "1"


def test_ray_gives_a_job_that_is_stopped_the_workers_grace() -> None:
    """Its own 3 s would have the driver killed before its workers have ended; and it merges no lines of ranks."""
    job = job_of(on_kuberay(Elastic(nnodes=2, backend=KubeRayBackend(stop_grace_s=60))))
    variables = json.loads(job.runtime_env_yaml)["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 60
    assert variables["RAY_DEDUP_LOGS"] == "0"


def test_a_tasks_pod_template_keeps_its_shape_with_small_resources() -> None:
    """It is the base of every pod, so the user's GPUs must not be in it; the user's own object stays as it was."""
    own = PodTemplate(pod_spec=V1PodSpec(containers=[V1Container(name="primary")], node_selector={"pool": "a"}))
    made = on_kuberay(Elastic(), pod_template=own, requests=GPU_NODE)
    spec = MessageToDict(registered(made, FAST).k8s_pod.pod_spec)
    assert spec["nodeSelector"] == {"pool": "a"}
    assert "volumes" not in spec
    assert spec["containers"][0]["resources"]["limits"] == {"cpu": "500m", "memory": "1Gi"}
    assert spec["containers"][0]["args"][0] == "pyflyte-fast-execute"
    assert made.resources == ResourceSpec(requests=GPU_NODE, limits=Resources())


def test_the_template_follows_an_overridden_backend() -> None:
    """``with_overrides(task_config=...)`` may change to KubeRay and back; the volume at /dev/shm comes and goes."""
    made: Any = task(task_config=Elastic(nnodes=2))(train)
    assert made.pod_template is not None
    made._task_config = Elastic(nnodes=2, backend="kuberay")
    assert registered(made).type == "ray"
    assert made.pod_template is None
    made._task_config = Elastic(nnodes=2)
    assert registered(made).type == "pytorch"
    assert made.pod_template.pod_spec.volumes[0].name == "shm"


SIDECAR_FIRST = PodTemplate(pod_spec=V1PodSpec(containers=[V1Container(name="proxy"), V1Container(name="primary")]))
WITH_RESOURCES = PodTemplate(
    pod_spec=V1PodSpec(
        containers=[V1Container(name="primary", resources=V1ResourceRequirements(limits={"nvidia.com/gpu": "1"}))]
    )
)
WITH_NAMES = PodTemplate(
    pod_spec=V1PodSpec(
        containers=[
            V1Container(
                name="primary",
                env=[V1EnvVar(name="A", value="2")],
                volume_mounts=[V1VolumeMount(name="data", mount_path="/data")],
            )
        ],
        volumes=[V1Volume(name="data", empty_dir=V1EmptyDirVolumeSource())],
    )
)
WITH_INIT = PodTemplate(
    pod_spec=V1PodSpec(init_containers=[V1Container(name="fetch")], containers=[V1Container(name="primary")])
)
WITH_SIDECAR = PodTemplate(
    pod_spec=V1PodSpec(containers=[V1Container(name="primary"), V1Container(name="fetch", image="i")])
)


MORE_GPUS = {
    "rayClusterSpec": {
        "workerGroupSpecs": [
            {
                "groupName": "worker",
                "template": {
                    "spec": {"containers": [{"name": "ray-worker", "resources": {"limits": {"nvidia.com/gpu": "8"}}}]}
                },
            }
        ]
    }
}


@pytest.mark.parametrize(
    ("backend", "arguments", "words"),
    [
        (KubeRayBackend(env={"A": 1}), {}, "KubeRayBackend(env)"),  # type: ignore[dict-item]
        (KubeRayBackend(stop_grace_s=-1), {}, "KubeRayBackend(stop_grace_s)"),
        (KubeRayBackend(head_requests=Resources(gpu="1")), {}, "KubeRayBackend(head_requests): a GPU"),
        (KubeRayBackend(head_limits={"cpu": 1}), {}, "KubeRayBackend(head_limits)"),  # type: ignore[arg-type]
        (KubeRayBackend(head_start_params={"num-cpus": "4"}), {}, "'num-cpus'"),
        (KubeRayBackend(worker_start_params={"num-gpus": 1}), {}, "dict of strings"),  # type: ignore[dict-item]
        (KubeRayBackend(idle_timeout_s=0), {}, "idle_timeout_s"),
        (KubeRayBackend(gpu_resource="nvidia.com/mig-1g"), {}, "gpu_resource"),
        (KubeRayBackend(runtime_env={"working_dir": "."}), {}, "working_dir"),
        (KubeRayBackend(runtime_env={"env_vars": object()}), {}, "JSON"),
        (KubeRayBackend(runtime_env="pip"), {}, "must be a dict"),  # type: ignore[arg-type]
        (KubeRayBackend(head_pod_template="x"), {}, "must be a PodTemplate"),  # type: ignore[arg-type]
        (KubeRayBackend(worker_pod_template=SIDECAR_FIRST), {}, "'proxy' before the primary one"),
        (KubeRayBackend(worker_pod_template=WITH_RESOURCES), {}, "requests="),
        (KubeRayBackend(spec=MORE_GPUS), {}, "(spec) gives resources to the container 'ray-worker'"),
        (None, {"pod_template": SIDECAR_FIRST}, "'proxy' before the primary one"),
        (None, {"pod_template": WITH_RESOURCES}, "Ray would not learn"),
        (None, {"environment": {"FLYTE_FAIL_ON_ERROR": "1"}}, "FLYTE_FAIL_ON_ERROR"),
        (None, {"requests": Resources(mem="4Gi"), "limits": Resources(mem="1Gi")}, "exceed limits mem='1Gi'"),
        (None, {"environment": {"A": "1"}, "pod_template": WITH_NAMES}, "variable 'A' is in environment and"),
        (
            KubeRayBackend(worker_pod_template=WITH_NAMES),
            {"environment": {"A": "1"}},
            "environment and in worker_pod_template",
        ),
    ],
)
def test_what_would_break_on_the_way_is_refused(
    backend: KubeRayBackend | None, arguments: dict[str, Any], words: str
) -> None:
    """When the task is defined, as one problem that names the field."""
    with pytest.raises(ConfigError) as caught:
        on_kuberay(Elastic(backend=backend), **arguments)
    (problem,) = caught.value.problems
    assert words in problem


@pytest.mark.parametrize("template", [WITH_INIT, WITH_SIDECAR], ids=["init container", "sidecar"])
def test_what_flyte_would_drop_of_a_groups_pod_is_refused_when_it_is_registered(template: PodTemplate) -> None:
    """And not before: without Flyte it is in the RayJob, behind the container in which Ray runs."""
    backend = KubeRayBackend(worker_pod_template=template, image="registry.example/train:1")
    made = on_kuberay(Elastic(backend=backend))
    with pytest.raises(ConfigError, match=r"(?s)containers fetch beside the primary one\.\n.*Why: Flyte.*Fix: "):
        registered(made)
    (job,) = KubeRayAdapter(backend).kubernetes_manifests(Elastic(), TaskArguments())
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert pod["containers"][0]["name"] == "ray-worker"
    assert "fetch" in [one["name"] for one in (*pod["containers"], *pod.get("initContainers", ()))]


def test_names_that_would_be_in_a_pod_twice_are_all_listed() -> None:
    """Flyte appends a group's lists to the task's, and the API server takes no name twice."""
    with pytest.raises(ConfigError) as caught:
        on_kuberay(Elastic(backend=KubeRayBackend(head_pod_template=WITH_NAMES)), pod_template=WITH_NAMES)
    assert [problem.split(" is in ")[0] for problem in caught.value.problems] == [
        "the environment variable 'A'",
        "the mount '/data'",
        "the volume 'data'",
    ]


def test_what_is_ignored_is_said_when_the_task_is_defined(caplog: pytest.LogCaptureFixture) -> None:
    """Once each, with the field's name."""
    policy = RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, ttl_seconds_after_finished=5)
    with caplog.at_level(logging.WARNING):
        on_kuberay(Elastic(run_policy=policy, increase_shared_mem=False), accelerator=A100)
    said = [record.getMessage() for record in caplog.records if record.name == "kfpytorch_ray.preflight"]
    assert len(said) == 3
    for words in ("clean_pod_policy", "increase_shared_mem=False", "accelerator"):
        assert sum(words in message for message in said) == 1


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (Elastic(), {}, "ttl_seconds_after_finished=None"),
        (Elastic(), {}, "with_overrides"),
        (Elastic(), {}, "@task(timeout=)"),
        (Elastic(run_policy=RunPolicy(active_deadline_seconds=9)), {}, "active_deadline_seconds"),
        (Elastic(run_policy=RunPolicy(backoff_limit=1)), {}, "backoff_limit"),
        (Elastic(rdzv_configs={"read_timeout": 1}), {}, "read_timeout"),
        (Elastic(start_method="fork"), {}, "start_method"),
        (Elastic(), {"accelerator": A100}, "accelerator"),
        (Elastic(), {"pod_template": PodTemplate()}, "pod_template"),
    ],
)
def test_every_lost_field_is_listed(config: Any, arguments: dict[str, Any], words: str) -> None:
    """What rendering shows: the warnings, and what changes its meaning on the way."""
    assert any(words in text for text in KubeRayAdapter(None).lost(config, TaskArguments(**arguments)))


def test_the_least_is_lost_where_all_is_said() -> None:
    """Only what cannot be seen in a task is left."""
    config = Elastic(run_policy=RunPolicy(ttl_seconds_after_finished=5))
    (text,) = KubeRayAdapter(None).lost(config, TaskArguments(bounded=True))
    assert "with_overrides" in text


def plan() -> LaunchPlan:
    return LaunchPlan(
        "train", "f1", max, (1, 2), {}, 1, 2, 1, node_resources(None, workers=1), FlyteContext("s3://raw")
    )


def test_the_driver_runs_the_plan_as_the_ray_backend_does() -> None:
    """The same request, on the cluster around it, with the options that concern a run."""
    options = KubeRayBackend(env={"A": "1"}, stop_grace_s=3, hang_timeout_s=60, head_requests=Resources(cpu="2"))
    same = RayBackend("auto", autoscaling=True, working_dir="", env={"A": "1"}, stop_grace_s=3, hang_timeout_s=60)
    assert inside_options(options) == same
    assert KubeRayAdapter(options).build(plan()) == RayAdapter(same).build(plan())


@pytest.mark.parametrize(
    ("config", "arguments", "sizes"),
    [
        (Elastic(nnodes=2, nproc_per_node=2), {}, [16, 16]),
        (Elastic(nnodes=2, nproc_per_node=2), {"requests": Resources(cpu="3")}, [3, 3]),
        (PyTorch(worker=Worker(replicas=1)), {}, [16, 16]),
        (PyTorch(Master(requests=Resources(cpu="2")), Worker(replicas=1)), {}, [2, 16]),
        (PyTorch(worker=Worker(replicas=1, limits=Resources(cpu="2"))), {"requests": Resources(cpu="3")}, [3, 2]),
    ],
)
def test_without_flyte_a_node_is_as_large_as_its_pod(
    config: Any, arguments: dict[str, Any], sizes: list[float]
) -> None:
    """A role's own amounts before the task's before the backend's: more than a pod has would never be had."""
    config.backend = KubeRayBackend(image="registry.example/train:1", requests=Resources(cpu="16"))
    made: Any = task(task_config=config, **arguments)(train)
    (job,) = KubeRayAdapter(config.backend).kubernetes_manifests(config, made.arguments)
    pods = [
        float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        for _ in range(group["replicas"])
    ]
    planned = plan_elastic if isinstance(config, Elastic) else plan_pytorch
    call = Call("train", "f1", train, (), {"x": 1}, current_context(), made.arguments)
    demand = outside_request(config.backend, planned(config, call)).demand
    assert [demand.first["CPU"], demand.other["CPU"]] == pods == sizes


def test_fast_registrations_code_is_sent_to_workers() -> None:
    """Flyte unpacks it for the driver only; code of the image is there already. The user's word wins."""
    assert inside_options(KubeRayBackend()).working_dir == ""
    with FlyteContextManager.with_context(FlyteContextManager.current_context().with_serialization_settings(FAST)):
        assert inside_options(KubeRayBackend()).working_dir == "/code"
        assert inside_options(KubeRayBackend(working_dir="/mine")).working_dir == "/mine"


def test_a_flyte_without_the_ray_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray is started in its place, and no RayJob is created: the user asked Flyte for one."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f123")
    with pytest.raises(BackendUnavailableError, match="plugin is not enabled") as caught:
        KubeRayAdapter(KubeRayBackend(image="i")).run(plan())
    assert "Fix:" in str(caught.value)


def test_without_flyte_an_image_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No default image would have this machine's versions."""
    for variable in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "FLYTE_INTERNAL_EXECUTION_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=r"(?s)Why: Without Flyte.*Fix: Give KubeRayBackend\(image='"):
        KubeRayAdapter(None).run(plan())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"submission_mode": "K8sJob"}, "submission_mode='K8sJob'"),
        ({"ready_timeout_s": 0}, "ready_timeout_s"),
        ({"labels": {"a": 1}}, "labels"),
        ({"spec": {"a": {1}}}, "spec.* JSON"),
        ({"requests": "2"}, "requests"),
        ({"namespace": ""}, "namespace"),
        ({"storage": "s3://user:secret@bucket"}, "credentials"),
        ({"lease_s": 0}, "lease_s"),
    ],
)
def test_options_without_flyte_are_looked_at_too(options: dict[str, Any], words: str) -> None:
    """When the task is defined, by the option's name."""
    (problem,) = KubeRayAdapter(KubeRayBackend(**options)).check(Elastic(2)).problems
    assert re.search(words, problem)


def test_what_flyte_does_not_take_is_said() -> None:
    """Options of a RayJob that we create are lost in one that Flyte creates."""
    lost = KubeRayAdapter(KubeRayBackend(image="i", spec={"suspend": True}, storage="s3://b")).lost(
        Elastic(2), TaskArguments()
    )
    for name in ("image", "spec", "storage"):
        assert any(f"KubeRayBackend({name}) has no effect under Flyte" in text for text in lost)
