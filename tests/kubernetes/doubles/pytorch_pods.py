"""The Pods and Services that the training operator makes of a PyTorchJob: pure, from documents to documents.

Follows kubeflow/training-operator 1.9.0: pkg/controller.v1/pytorch/envvar.go, elastic.go, master.go and
initcontainer.go, pkg/controller.v1/common/pod.go and service.go, pkg/apis/kubeflow.org/v1/pytorch_defaults.go. What
differs: workers wait for the master's name with getent, which asks what is in the place of DNS here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from doubles.api import Document

CONTAINER = "pytorch"
PORT_NAME = "pytorchjob-port"
PORT = 23456
JOB_LABEL = "training.kubeflow.org/job-name"
TYPE_LABEL = "training.kubeflow.org/replica-type"
INDEX_LABEL = "training.kubeflow.org/replica-index"


def defaulted(job: Document) -> Document:
    """A PyTorchJob as the operator sees it, with what it does not say."""
    job = copy.deepcopy(job)
    spec = job["spec"]
    spec.setdefault("runPolicy", {}).setdefault("cleanPodPolicy", "None")
    replicas = spec["pytorchReplicaSpecs"]
    for replica in replicas.values():
        replica.setdefault("replicas", 1)
        replica.setdefault("restartPolicy", "OnFailure")
        for container in replica["template"]["spec"]["containers"]:
            if container["name"] == CONTAINER and _port(container) is None:
                container.setdefault("ports", []).append({"name": PORT_NAME, "containerPort": PORT})
    elastic = spec.get("elasticPolicy")
    if elastic is not None:
        given = elastic.get("minReplicas") or elastic.get("maxReplicas") or replicas["Worker"]["replicas"]
        elastic.setdefault("minReplicas", given)
        elastic.setdefault("maxReplicas", given)
    if elastic is None or "nProcPerNode" not in elastic:
        spec.setdefault("nprocPerNode", "auto")
    return job


def name_of(job: Document, kind: str, index: int) -> str:
    """Of a replica's Pod, and of its Service."""
    return f"{job['metadata']['name']}-{kind.lower()}-{index}"


def labels_of(job: Document, kind: str, index: int) -> dict[str, str]:
    """Of a replica's Pod, and of its Service; the Pod of a master has its role beside."""
    return {
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        JOB_LABEL: job["metadata"]["name"],
        TYPE_LABEL: kind.lower(),
        INDEX_LABEL: str(index),
    }


def service(job: Document, kind: str, index: int) -> Document:
    """A replica's headless Service, by whose name the others find it."""
    labels = labels_of(job, kind, index)
    ports = [{"name": PORT_NAME, "port": _port_of(job, kind)}]
    return {
        "metadata": {"name": name_of(job, kind, index), "labels": labels, "ownerReferences": [_owner(job)]},
        "spec": {"clusterIP": "None", "selector": labels, "ports": ports},
    }


def pod(job: Document, kind: str, index: int) -> Document:
    """A replica's Pod.

    Args:
        job: The PyTorchJob, with its defaults.
        kind: ``Master`` or ``Worker``.
        index: Of the replica.
    """
    replica = job["spec"]["pytorchReplicaSpecs"][kind]
    template = copy.deepcopy(replica["template"])
    meta, spec = template.get("metadata", {}), template["spec"]
    variables = variables_of(job, kind, index)
    for container in spec["containers"]:
        container["env"] = [*container.get("env", []), *({"name": n, "value": v} for n, v in variables.items())]
    if kind == "Worker" and "Master" in job["spec"]["pytorchReplicaSpecs"]:
        wait = f"until getent hosts {name_of(job, 'Master', 0)}; do echo waiting for master; sleep 0.2; done"
        first = {"name": "init-pytorch", "image": "alpine:3.10", "command": ["sh", "-c", wait]}
        spec["initContainers"] = [*spec.get("initContainers", []), first]
    spec["restartPolicy"] = "Never" if replica["restartPolicy"] == "ExitCode" else replica["restartPolicy"]
    role = {"training.kubeflow.org/job-role": "master"} if kind == "Master" else {}
    return {
        "metadata": {
            "name": name_of(job, kind, index),
            "labels": {**meta.get("labels", {}), **labels_of(job, kind, index), **role},
            "annotations": dict(meta.get("annotations", {})),
            "ownerReferences": [_owner(job)],
        },
        "spec": spec,
    }


def variables_of(job: Document, kind: str, index: int) -> dict[str, str]:
    """What every container of a replica finds in its environment."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    count = sum(replica["replicas"] for replica in replicas.values())
    each = str(spec.get("nprocPerNode", ""))
    found = {"PYTHONUNBUFFERED": "1"}
    if "Master" in replicas:
        host, port = name_of(job, "Master", 0), str(_port_of(job, "Master"))
        rank = str(index + (kind == "Worker"))
        # Words such as "auto" count as one process.
        world_size = str(count * int(each)) if each.isdigit() else str(count)
        found |= {"MASTER_PORT": port, "PET_MASTER_PORT": port, "MASTER_ADDR": host, "PET_MASTER_ADDR": host}
        found |= {"WORLD_SIZE": world_size, "RANK": rank, "PET_NODE_RANK": rank}
    if each:
        found["PET_NPROC_PER_NODE"] = each
    if "elasticPolicy" in spec:
        return found | _of_an_elastic_job(job, spec["elasticPolicy"])
    return {**found, "PET_NNODES": str(count)}


def _of_an_elastic_job(job: Document, policy: Mapping[str, object]) -> dict[str, str]:
    host = policy.get("rdzvHost", name_of(job, "Worker", 0))
    found = {
        "PET_RDZV_ENDPOINT": f"{host}:{policy.get('rdzvPort', _port_of(job, 'Worker'))}",
        "PET_RDZV_BACKEND": str(policy.get("rdzvBackend", "c10d")),
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
    }
    others = {"maxRestarts": "PET_MAX_RESTARTS", "nProcPerNode": "PET_NPROC_PER_NODE", "rdzvId": "PET_RDZV_ID"}
    return found | {name: str(policy[field]) for field, name in others.items() if field in policy}


def _owner(job: Document) -> Document:
    meta = job["metadata"]
    reference = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": meta["name"], "uid": meta["uid"]}
    return {**reference, "controller": True, "blockOwnerDeletion": True}


def _port_of(job: Document, kind: str) -> int:
    containers = job["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]["containers"]
    return next(port for container in containers if container["name"] == CONTAINER and (port := _port(container)))


def _port(container: Document) -> int | None:
    return next((one["containerPort"] for one in container.get("ports", []) if one.get("name") == PORT_NAME), None)
