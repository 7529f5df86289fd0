"""The RayJob that this package creates itself, for the task type ``ray`` without Flyte. Pure.

Each node of a launch is a Ray worker pod, as on the way by Flyte; the driver is the job's entrypoint, on the head pod.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.adapters.flyte_ray import DEFAULT_TTL_S, HEAD_CONTAINER, SUBMITTER, WORKER_CONTAINER, head_resources
from kfpytorch_ray.adapters.kube_pods import DEFAULT_DEADLINE_S, Manifest, laid_over, pod, resource_metadata
from kfpytorch_ray.adapters.worker_pods import WorkerGroup, pod_resources, worker_groups, worker_resources
from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.checks import deadline_s
from kfpytorch_ray.cluster.kube.kinds import CLUSTER_LABEL, SUBMITTER_CONTAINER
from kfpytorch_ray.config import KubeRayBackend
from kfpytorch_ray.task_arguments import TaskArguments

_DEADLINE_MARGIN_S = 600
"""The driver keeps the user's deadline and says so; KubeRay's comes after it."""


_LIKE_THE_HEAD = (
    *("nodeSelector", "tolerations", "schedulerName", "priorityClassName", "preemptionPolicy"),
    *("imagePullSecrets", "runtimeClassName", "securityContext", "hostUsers", "os"),
    # Pull secrets hang on it, and on OpenShift what a pod may do.
    *("serviceAccountName", "automountServiceAccountToken"),
    *("dnsPolicy", "dnsConfig", "hostAliases"),
)
"""Fields without which the pod beside it may find no node, not get its image, be refused, or not reach the head."""


def ray_job(
    config: JobConfig,
    options: KubeRayBackend,
    arguments: TaskArguments,
    *,
    name: str,
    entrypoint: str,
    runtime_env: Mapping[str, Any],
) -> Manifest:
    """The manifest.

    Args:
        config: ``Elastic`` or ``PyTorch``.
        options: The backend's.
        arguments: What stands beside the config in ``@task(...)``.
        name: Of the RayJob, at most 47 characters.
        entrypoint: Of the driver, a shell command.
        runtime_env: Of the job.
    """
    policy = config.run_policy
    ttl = policy.ttl_seconds_after_finished if policy else None
    deadline = deadline_s(config)
    cluster = _cluster(config, options, arguments)
    spec: Manifest = {
        "entrypoint": entrypoint,
        "submissionMode": options.submission_mode,
        # A second try would meet what the first has left in the storage; restarts are the driver's business.
        "backoffLimit": 0,
        "activeDeadlineSeconds": DEFAULT_DEADLINE_S
        if deadline is None
        else deadline + int(options.ready_timeout_s) + _DEADLINE_MARGIN_S,
    }
    if runtime_env:
        # JSON is YAML.
        spec["runtimeEnvYAML"] = json.dumps(runtime_env, sort_keys=True)
    if options.submission_mode == "K8sJobMode":
        spec["submitterPodTemplate"] = _submitter(options, cluster)
    if options.cluster is not None:
        spec["clusterSelector"] = {CLUSTER_LABEL: options.cluster}
        # KubeRay refuses it together with a selector.
        del spec["backoffLimit"]
    else:
        if not deletion_rules(options):
            # KubeRay takes one or the other.
            spec["shutdownAfterJobFinishes"] = True
            spec["ttlSecondsAfterFinished"] = DEFAULT_TTL_S if ttl is None else ttl
        spec["rayClusterSpec"] = cluster
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": resource_metadata(name, options),
        "spec": laid_over(spec, options.spec),
    }


def deletion_rules(options: KubeRayBackend) -> bool:
    """Whether the user has rules of their own for what goes when a job is over."""
    strategy = options.spec.get("deletionStrategy")
    return isinstance(strategy, dict) and bool(strategy.get("deletionRules"))


def ray_version(options: KubeRayBackend) -> str:
    """Of the image; as installed here where the options do not say."""
    return options.ray_version or metadata.version("ray")


def _cluster(config: JobConfig, options: KubeRayBackend, arguments: TaskArguments) -> Manifest:
    groups = worker_groups(config, worker_resources(options, arguments), options.gpu_resource)
    grows = any(group.min_nodes < group.max_nodes for group in groups)
    cluster: Manifest = {
        # By it KubeRay knows that the image needs no wget for its probes.
        "rayVersion": ray_version(options),
        "enableInTreeAutoscaling": grows,
        "headGroupSpec": _head(options, arguments),
        "workerGroupSpecs": [_workers(group, options, arguments) for group in groups],
    }
    if grows and options.idle_timeout_s is not None:
        cluster["autoscalerOptions"] = {"idleTimeoutSeconds": options.idle_timeout_s}
    return cluster


def _head(options: KubeRayBackend, arguments: TaskArguments) -> Manifest:
    resources = pod_resources(head_resources(options), options.gpu_resource)
    return {
        "rayStartParams": {**options.head_start_params, "num-cpus": "0"},
        "template": pod(
            HEAD_CONTAINER,
            {"image": options.image},
            (arguments.pod_template, options.head_pod_template),
            resources,
            restartPolicy="Never" if options.submission_mode == "SidecarMode" else None,
            serviceAccountName=options.service_account,
        ),
    }


def _workers(group: WorkerGroup, options: KubeRayBackend, arguments: TaskArguments) -> Manifest:
    container = {
        "image": options.image,
        # So that Ray hears of a pod that is taken away before its silence tells.
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
    }
    return {
        "groupName": group.name,
        # KubeRay submits the job when all of these run, so a range starts with the fewest and grows by demand.
        "replicas": group.min_nodes,
        "minReplicas": group.min_nodes,
        "maxReplicas": group.max_nodes,
        "rayStartParams": dict(options.worker_start_params),
        "template": pod(
            WORKER_CONTAINER,
            container,
            (arguments.pod_template, options.worker_pod_template),
            group.resources,
            serviceAccountName=options.service_account,
        ),
    }


def _submitter(options: KubeRayBackend, cluster: Manifest) -> Manifest:
    """A small pod that is put, pulled and allowed as the head is, for it waits while the workers hold their nodes.

    It only talks to the job server, so nothing is mounted, and no command, variable or container of the templates is in
    it. Neither are rules of how pods lie to each other: it is none of the nodes that are to be kept together or apart.
    """
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    head: Manifest = copy.deepcopy(groups[0]["template"])
    if any(group["template"]["spec"].get("affinity", {}).get("podAntiAffinity") for group in groups):
        # Pods are kept from each other by their labels, which would keep this one from their nodes.
        head.get("metadata", {}).pop("labels", None)
    spec, container = head["spec"], head["spec"]["containers"][0]
    own = {
        "name": SUBMITTER_CONTAINER,
        "image": options.image,
        "resources": pod_resources(ResourceSpec(requests=SUBMITTER, limits=SUBMITTER), options.gpu_resource),
    }
    nodes = spec.get("affinity", {}).get("nodeAffinity")
    return {
        **head,
        "spec": {
            **({"affinity": {"nodeAffinity": nodes}} if nodes else {}),
            **_part(spec, _LIKE_THE_HEAD),
            "containers": [{**own, **_part(container, ("securityContext", "imagePullPolicy"))}],
            "restartPolicy": "Never",
        },
    }


def _part(manifest: Manifest, names: tuple[str, ...]) -> Manifest:
    return {name: manifest[name] for name in names if name in manifest}
