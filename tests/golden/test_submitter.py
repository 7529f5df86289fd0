"""The pod that submits a RayJob which this package creates: it starts where the head does, and is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_schema import ray_job_crds
from flytekit import PodTemplate, Resources, task
from kubernetes.client import (
    V1Affinity,
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1LabelSelector,
    V1LocalObjectReference,
    V1NodeAffinity,
    V1NodeSelector,
    V1NodeSelectorRequirement,
    V1NodeSelectorTerm,
    V1PodAffinityTerm,
    V1PodAntiAffinity,
    V1PodSecurityContext,
    V1PodSpec,
    V1SecurityContext,
    V1Toleration,
    V1Volume,
    V1VolumeMount,
)

from kfpytorch_ray import Elastic, KubeRayBackend
from kfpytorch_ray.cluster.kube.kuberay_rules import problems
from kfpytorch_ray.rendering import render

ZONE = V1NodeSelectorTerm(match_expressions=[V1NodeSelectorRequirement(key="zone", operator="In", values=["a"])])
ON_NODES = V1NodeAffinity(
    required_during_scheduling_ignored_during_execution=V1NodeSelector(node_selector_terms=[ZONE])
)
OF_THE_TASK = PodTemplate(
    pod_spec=V1PodSpec(
        containers=[
            V1Container(
                name="primary",
                command=["train"],
                env=[V1EnvVar(name="A", value="1")],
                image_pull_policy="Always",
                security_context=V1SecurityContext(run_as_non_root=True),
                volume_mounts=[V1VolumeMount(name="data", mount_path="/data")],
            ),
            V1Container(name="proxy", image="registry.example/proxy:1"),
        ],
        init_containers=[V1Container(name="fetch", image="registry.example/fetch:1")],
        volumes=[V1Volume(name="data", empty_dir=V1EmptyDirVolumeSource())],
        affinity=V1Affinity(node_affinity=ON_NODES, pod_anti_affinity=V1PodAntiAffinity()),
        host_network=True,
        node_selector={"pool": "train"},
        priority_class_name="high",
        runtime_class_name="gvisor",
        security_context=V1PodSecurityContext(run_as_user=1000),
        service_account_name="trainer",
        tolerations=[V1Toleration(key="dedicated", operator="Exists")],
    ),
    annotations={"sidecar.istio.io/inject": "false"},
    labels={"team": "a"},
)
OF_THE_HEAD = PodTemplate(
    pod_spec=V1PodSpec(
        containers=[],
        image_pull_secrets=[V1LocalObjectReference(name="registry")],
        tolerations=[V1Toleration(key="spot", operator="Exists")],
    ),
    labels={"team": "b"},
)
SMALL = {"cpu": "500m", "memory": "1Gi"}
CONTAINER = {
    "name": "ray-job-submitter",
    "image": "registry.example/train:1",
    "resources": {"requests": SMALL, "limits": SMALL},
}
AS_THE_TASK = {
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    },
    "nodeSelector": {"pool": "train"},
    "priorityClassName": "high",
    "runtimeClassName": "gvisor",
    "securityContext": {"runAsUser": 1000},
    "serviceAccountName": "trainer",
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "containers": [{**CONTAINER, "imagePullPolicy": "Always", "securityContext": {"runAsNonRoot": True}}],
    "restartPolicy": "Never",
}
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}


def train() -> int:
    return 1


def ray_job(
    template: PodTemplate | None, head: PodTemplate | None = None, workers: PodTemplate | None = None
) -> dict[str, Any]:
    """Of a task with GPUs, in whose namespace all pods have a service account."""
    backend = KubeRayBackend(
        image="registry.example/train:1",
        service_account="pods",
        head_pod_template=head,
        worker_pod_template=workers,
    )
    made = task(task_config=Elastic(2, backend=backend), pod_template=template, requests=Resources(gpu="8"))(train)
    (job,) = render(made, via="kubernetes").manifests
    return job


@pytest.mark.parametrize(
    ("template", "head", "submitter"),
    [
        (
            None,
            None,
            {"spec": {"serviceAccountName": "pods", "containers": [CONTAINER], "restartPolicy": "Never"}},
        ),
        (OF_THE_TASK, None, {"metadata": {"labels": {"team": "a"}, "annotations": NO_SIDECAR}, "spec": AS_THE_TASK}),
        (
            OF_THE_TASK,
            OF_THE_HEAD,
            {
                "metadata": {"labels": {"team": "b"}, "annotations": NO_SIDECAR},
                "spec": {
                    **AS_THE_TASK,
                    "imagePullSecrets": [{"name": "registry"}],
                    "tolerations": [{"key": key, "operator": "Exists"} for key in ("dedicated", "spot")],
                },
            },
        ),
        (
            PodTemplate(labels={"team": "a"}),
            OF_THE_HEAD,
            {
                "metadata": {"labels": {"team": "b"}},
                "spec": {
                    "imagePullSecrets": [{"name": "registry"}],
                    "serviceAccountName": "pods",
                    "tolerations": [{"key": "spot", "operator": "Exists"}],
                    "containers": [CONTAINER],
                    "restartPolicy": "Never",
                },
            },
        ),
    ],
)
def test_it_is_put_pulled_and_allowed_as_the_head_is(
    template: PodTemplate | None, head: PodTemplate | None, submitter: dict[str, Any]
) -> None:
    """Without its containers, mounts, GPUs and what keeps nodes apart: it only talks to the job server."""
    assert ray_job(template, head)["spec"]["submitterPodTemplate"] == submitter


@pytest.mark.parametrize("of", ["head", "workers"])
def test_pods_that_are_kept_apart_by_labels_do_not_keep_it_away(of: str) -> None:
    """A rule that each of them has a node of its own counts against whoever has their labels."""
    apart = V1PodAffinityTerm(
        label_selector=V1LabelSelector(match_labels={"team": "a"}), topology_key="kubernetes.io/hostname"
    )
    rule = V1PodAntiAffinity(required_during_scheduling_ignored_during_execution=[apart])
    template = PodTemplate(pod_spec=V1PodSpec(containers=[], affinity=V1Affinity(pod_anti_affinity=rule)))
    labelled = PodTemplate(labels={"team": "a"}, annotations=NO_SIDECAR)
    job = ray_job(labelled, **{of: template})
    assert job["spec"]["submitterPodTemplate"]["metadata"] == {"annotations": NO_SIDECAR}


@pytest.mark.parametrize("head", [None, OF_THE_HEAD])
def test_every_kuberay_takes_it(head: PodTemplate | None, crds: Path) -> None:
    """By the definitions of its versions and by its own rules; and no part of the manifest is in it twice."""
    job = ray_job(OF_THE_TASK, head)
    assert {version: crd.problems(job) for version, crd in ray_job_crds().items()} == {
        version: [] for version in ray_job_crds()
    }
    assert problems(job) == ()
    assert "&id" not in yaml.safe_dump(job)
