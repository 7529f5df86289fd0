"""A job config as Flyte's PyTorchJob message, exactly as upstream writes it into a task template's ``custom``.

What the kubeflow backend has Flyte run, and what other backends leave in the template as a record of the job. Pure.
"""

from __future__ import annotations

from typing import Any

from flyteidl.plugins.kubeflow import common_pb2, pytorch_pb2
from flytekit.core.resources import convert_resources_to_resource_model
from google.protobuf.json_format import MessageToDict

from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.checks import is_elastic, parse_nnodes
from kfpytorch_ray.cluster.torch_elastic import RENDEZVOUS_BACKEND


def job_message(config: JobConfig) -> dict[str, Any] | None:
    """The message as a dict; None for an elastic job of one node."""
    if is_plain_pod(config):
        return None
    message: dict[str, Any] = MessageToDict(_elastic_job(config) if is_elastic(config) else _pytorch_job(config))
    return message


def is_plain_pod(config: JobConfig) -> bool:
    """Whether a job is one node by the number 1, which needs no operator; ``"1"`` and ``"1:1"`` are not."""
    return getattr(config, "nnodes", None) == 1


def _elastic_job(config: Any) -> pytorch_pb2.DistributedPyTorchTrainingTask:
    min_nodes, max_nodes = parse_nnodes(config.nnodes)
    return pytorch_pb2.DistributedPyTorchTrainingTask(
        worker_replicas=pytorch_pb2.DistributedPyTorchTrainingReplicaSpec(replicas=max_nodes),
        elastic_config=pytorch_pb2.ElasticConfig(
            rdzv_backend=RENDEZVOUS_BACKEND,
            min_replicas=min_nodes,
            max_replicas=max_nodes,
            nproc_per_node=config.nproc_per_node,
            max_restarts=config.max_restarts,
        ),
        run_policy=_run_policy(config.run_policy),
    )


def _pytorch_job(config: Any) -> pytorch_pb2.DistributedPyTorchTrainingTask:
    return pytorch_pb2.DistributedPyTorchTrainingTask(
        worker_replicas=_replica_spec(config.worker, config.num_workers or config.worker.replicas),
        master_replicas=_replica_spec(config.master, 1),
        run_policy=_run_policy(config.run_policy),
    )


def _replica_spec(replica: Any, replicas: int | None) -> pytorch_pb2.DistributedPyTorchTrainingReplicaSpec:
    resources = convert_resources_to_resource_model(requests=replica.requests, limits=replica.limits)
    return pytorch_pb2.DistributedPyTorchTrainingReplicaSpec(
        replicas=replicas,
        image=replica.image,
        resources=resources.to_flyte_idl(),
        restart_policy=_value_of(replica.restart_policy),
    )


def _run_policy(run_policy: Any) -> common_pb2.RunPolicy | None:
    if run_policy is None:
        return None
    return common_pb2.RunPolicy(
        clean_pod_policy=_value_of(run_policy.clean_pod_policy),
        ttl_seconds_after_finished=run_policy.ttl_seconds_after_finished,
        active_deadline_seconds=run_policy.active_deadline_seconds,
        backoff_limit=run_policy.backoff_limit,
    )


def _value_of(policy: Any) -> int | None:
    """By value, because upstream's enums are other classes."""
    return None if policy is None else policy.value
