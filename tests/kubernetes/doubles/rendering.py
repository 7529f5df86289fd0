"""The Pods, Service and Job that KubeRay makes of a RayCluster and a RayJob: pure, from documents to documents.

Follows KubeRay 1.7.0: ray-operator/controllers/ray/common/pod.go, service.go and job.go. What differs: no DNS here, so
that addresses are the head Pod's; of the probes only those of readiness; workers wait for the head's port rather than
for `ray health-check`; the head keeps Ray's monitor also with autoscaling, which is not in a sidecar here.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import yaml

from doubles.api import Document
from doubles.scheduling import amounts

GCS_PORT = 6379
DASHBOARD_PORT = 8265
AGENT_PORT = 52365
HEAD_GROUP = "headgroup"
_WITH_VALUE = ("log-color", "include-dashboard")
"""Flags of ``ray start`` that take true and false as a value."""
_PORTS = {"client": 10001, "gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "metrics": 8080, "serve": 8000}


def owner(document: Document, kind: str) -> Document:
    """The owner reference that has what belongs to an object collected with it."""
    meta = document["metadata"]
    reference = {"apiVersion": "ray.io/v1", "kind": kind, "name": meta["name"], "uid": meta["uid"]}
    return {**reference, "controller": True, "blockOwnerDeletion": True}


def ray_cluster(job: Document, name: str) -> Document:
    """The RayCluster of a RayJob."""
    meta = job["metadata"]
    labels = {**meta.get("labels", {}), **_originated(job, "RayJob")}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": dict(meta.get("annotations", {})),
            "ownerReferences": [owner(job, "RayJob")],
        },
        "spec": copy.deepcopy(job["spec"]["rayClusterSpec"]),
    }


def head_service_name(cluster: Document) -> str:
    """Of the head's Service."""
    return f"{cluster['metadata']['name']}-head-svc"


def head_service(cluster: Document) -> Document:
    """The head's Service, which nothing serves here: it is an object only."""
    template = cluster["spec"]["headGroupSpec"]["template"]
    declared = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", [])}
    labels = _labels(cluster, "head", HEAD_GROUP)
    return {
        "metadata": {
            "name": head_service_name(cluster),
            "labels": labels,
            "ownerReferences": [owner(cluster, "RayCluster")],
        },
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            "ports": [{"name": name, "port": port} for name, port in (declared or _PORTS).items()],
        },
    }


def head_pod(cluster: Document) -> Document:
    """The head's Pod."""
    group = cluster["spec"]["headGroupSpec"]
    defaults = {"dashboard-host": "0.0.0.0", "metrics-export-port": "8080"}
    params = {**defaults, **(group.get("rayStartParams") or {})}
    pod = _pod(cluster, group["template"], "head", HEAD_GROUP)
    address = f"127.0.0.1:{GCS_PORT}"
    _complete(pod, params, "ray start --head", {"RAY_ADDRESS": address})
    _probe(pod, DASHBOARD_PORT, "api/gcs_healthz")
    return pod


def worker_pod(cluster: Document, group: Document, head_ip: str) -> Document:
    """A worker's Pod."""
    address = f"{head_ip}:{GCS_PORT}"
    defaults = {"address": address, "metrics-export-port": "8080"}
    params = {**defaults, **(group.get("rayStartParams") or {})}
    pod = _pod(cluster, group["template"], "worker", group["groupName"])
    _complete(pod, params, "ray start", {"FQ_RAY_IP": head_ip, "RAY_IP": head_ip, "RAY_ADDRESS": address})
    _probe(pod, AGENT_PORT, "api/local_raylet_healthz")
    wait = f"until (exec 3<>/dev/tcp/{head_ip}/{GCS_PORT}) 2>/dev/null; do sleep 0.2; done"
    spec = pod["spec"]
    image = spec["containers"][0].get("image", "")
    first = {"name": "wait-gcs-ready", "image": image, "command": ["/bin/bash", "-c", "--"], "args": [wait]}
    spec["initContainers"] = [*spec.get("initContainers", []), first]
    return pod


def _pod(cluster: Document, template: Document, node_type: str, group: str) -> Document:
    meta = template.get("metadata", {})
    name = cluster["metadata"]["name"]
    prefix = f"{name}-head-" if node_type == "head" else f"{name}-{group}-worker-"
    return {
        "metadata": {
            "generateName": prefix,
            "labels": {**meta.get("labels", {}), **_labels(cluster, node_type, group), **_origin(cluster)},
            "annotations": dict(meta.get("annotations", {})),
            "ownerReferences": [owner(cluster, "RayCluster")],
        },
        "spec": copy.deepcopy(template["spec"]),
    }


def _complete(pod: Document, params: dict[str, str], start: str, env: dict[str, str]) -> None:
    """Have the first container start Ray, with what it needs in its environment."""
    container = pod["spec"]["containers"][0]
    ray_start = f"{start} {_options({**_amounts(container), 'block': 'true', **params})}"
    own = " ".join([*container.get("command", []), *container.get("args", [])])
    limit = "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; "
    if pod["metadata"]["annotations"].get("ray.io/overwrite-container-cmd") != "true":
        container["command"] = ["/bin/bash", "-c", "--"]
        container["args"] = [f"{own} && {limit}{ray_start}" if own else limit + ray_start]
    named = {one["name"] for one in container.get("env", [])}
    values = {
        "RAY_PORT": str(GCS_PORT),
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        "KUBERAY_GEN_RAY_START_CMD": ray_start,
        **env,
    }
    fields = {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }
    container["env"] = [
        *container.get("env", []),
        *({"name": name, "value": value} for name, value in values.items() if name not in named),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
    ]


def _probe(pod: Document, port: int, path: str) -> None:
    """As for Ray 2.53 and later, whose probes need no wget."""
    probe = {"httpGet": {"port": port, "path": path}, "periodSeconds": 1}
    pod["spec"]["containers"][0].setdefault("readinessProbe", probe)


def _options(params: dict[str, str]) -> str:
    words = []
    for name, value in params.items():
        if value.lower() in {"true", "false"} and name not in _WITH_VALUE:
            words += [f"--{name}"] if value.lower() == "true" else []
        else:
            words.append(f"--{name}={value}")
    return " ".join(words)


def _amounts(container: Document) -> dict[str, str]:
    """What Ray is told that the node has, as the container's limits say."""
    resources = container.get("resources", {})
    limits = amounts(resources.get("limits"))
    found = {}
    if cpus := limits.get("cpu") or amounts(resources.get("requests")).get("cpu"):
        found["num-cpus"] = str(math.ceil(cpus))
    if memory := limits.get("memory"):
        found["memory"] = str(int(memory))
    if gpus := sum(amount for name, amount in limits.items() if name.endswith("gpu")):
        found["num-gpus"] = str(int(gpus))
    return found


def _labels(cluster: Document, node_type: str, group: str) -> dict[str, str]:
    name = cluster["metadata"]["name"]
    return {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": name,
        "ray.io/node-type": node_type,
        "ray.io/group": group,
        "ray.io/identifier": f"{name}-{node_type}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }


def _origin(cluster: Document) -> dict[str, str]:
    labels = cluster["metadata"].get("labels", {})
    inherited = {name: value for name, value in labels.items() if name.startswith("ray.io/originated-from-")}
    return inherited or _originated(cluster, "RayCluster")


def _originated(document: Document, kind: str) -> dict[str, str]:
    return {"ray.io/originated-from-cr-name": document["metadata"]["name"], "ray.io/originated-from-crd": kind}


def submitter_job(job: Document, cluster: Document) -> Document:
    """The Job that submits a RayJob's entrypoint and follows its log."""
    meta, spec, status = job["metadata"], job["spec"], job["status"]
    template = copy.deepcopy(spec.get("submitterPodTemplate") or _default_submitter(cluster))
    container = template["spec"]["containers"][0]
    template["spec"].setdefault("restartPolicy", "Never")
    if not container.get("command"):
        container["command"] = ["/bin/bash", "-ce", "--"]
        container["args"] = [submit_command(job)]
    container["env"] = [
        *container.get("env", []),
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "RAY_DASHBOARD_ADDRESS", "value": status["dashboardURL"]},
        {"name": "RAY_JOB_SUBMISSION_ID", "value": status["jobId"]},
    ]
    return {
        "metadata": {
            "name": meta["name"],
            "labels": {**_originated(job, "RayJob"), "app.kubernetes.io/created-by": "kuberay-operator"},
            "annotations": dict(meta.get("annotations", {})),
            "ownerReferences": [owner(job, "RayJob")],
        },
        "spec": {
            "backoffLimit": (spec.get("submitterConfig") or {}).get("backoffLimit", 2),
            "template": template,
        },
    }


def _default_submitter(cluster: Document) -> Document:
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    resources = {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "200Mi"}}
    container = {"name": "ray-job-submitter", "image": head.get("image", ""), "resources": resources}
    return {"spec": {"containers": [container], "restartPolicy": "Never"}}


def submit_command(job: Document) -> str:
    """What the submitter's bash runs: submits once, however often it is started, and follows the log."""
    spec, status = job["spec"], job["status"]
    host, _, port = status["dashboardURL"].rpartition(":")
    address = f"http://{host}:{port}"
    options = [f"--submission-id {status['jobId']}"]
    if spec.get("runtimeEnvYAML"):
        options.append(f"--runtime-env-json {json.dumps(json.dumps(runtime_env(job)))}")
    if spec.get("metadata"):
        options.append(f"--metadata-json {json.dumps(json.dumps(spec['metadata']))}")
    for name, field in (("cpus", "entrypointNumCpus"), ("gpus", "entrypointNumGpus")):
        if spec.get(field):
            options.append(f"--entrypoint-num-{name} {spec[field]:f}")
    if spec.get("entrypointResources"):
        options.append(f"--entrypoint-resources {json.dumps(spec['entrypointResources'])}")
    submit = f"ray job submit --address {address} --no-wait {' '.join(options)} -- {spec['entrypoint'].strip()}"
    return (
        f"until (exec 3<>/dev/tcp/{host}/{port}) 2>/dev/null; do echo waiting for the dashboard; sleep 0.5; done ; "
        f"if ! ray job status --address {address} {status['jobId']} >/dev/null 2>&1 ; then {submit} ; fi ; "
        f"ray job logs --address {address} --follow {status['jobId']}"
    )


def runtime_env(job: Document) -> dict[str, Any]:
    """The RayJob's runtime environment."""
    found: dict[str, Any] = yaml.safe_load(job["spec"].get("runtimeEnvYAML") or "{}")
    return found
