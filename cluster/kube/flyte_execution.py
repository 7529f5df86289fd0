"""What Flyte knows when it renders a task: the execution, and the platform's configuration at its defaults.

Imitates FlytePropeller at v1.16.8. Names and places of a real execution are not known here, so rendering shows readable
ones. What an installation configures (labels of its own, tolerations, default pod templates, secrets) is not shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FlytePlatform:
    """Configuration, with the defaults of flytek8s/config/config.go and k8s/ray/config.go.

    Attributes:
        cpu: Request of a container that names none.
        memory: Likewise.
        gpu_resource: What ``gpu`` of a task's container becomes.
        accelerator_label: Node label of a GPU's model.
        partition_label: Node label of a GPU's partition size.
        annotations: Of every pod and resource.
        service_type: Of a Ray head's service.
        head_start_params: What Flyte adds to ``ray start`` on the head.
        worker_start_params: Likewise on workers.
        ttl_s: Time to live of a RayJob that says nothing.
    """

    cpu: str = "1"
    memory: str = "1Gi"
    gpu_resource: str = "nvidia.com/gpu"
    accelerator_label: str = "k8s.amazonaws.com/accelerator"
    partition_label: str = "k8s.amazonaws.com/gpu-partition-size"
    annotations: Mapping[str, str] = field(
        default_factory=lambda: {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    )
    service_type: str = "NodePort"
    head_start_params: Mapping[str, str] = field(
        default_factory=lambda: {
            "include-dashboard": "true",
            "node-ip-address": "$MY_POD_IP",
            "dashboard-host": "0.0.0.0",  # noqa: S104 - inside the cluster's network
            "disable-usage-stats": "true",
        }
    )
    worker_start_params: Mapping[str, str] = field(
        default_factory=lambda: {"node-ip-address": "$MY_POD_IP", "disable-usage-stats": "true"}
    )
    ttl_s: int = 3600


@dataclass(frozen=True, slots=True)
class FlyteExecution:
    """One attempt of a task, or of one element of a map.

    Attributes:
        name: Of the resource that Flyte creates; made of execution, node and attempt, and cut to the plugin's limit.
        namespace: Where it is created; ``project-domain`` unless configured otherwise.
        execution: Name of the workflow's execution.
        project: Of the execution.
        domain: Of the execution.
        workflow: Name of the workflow.
        prefix: Where Flyte keeps the node's inputs and outputs.
        service_account: Of the pods.
        attempt: How often it was tried before.
        index: Of the element, where the task is a map: each is run as if it were a task of its own.
        platform: Configuration.
    """

    name: str = "execution-n0-0"
    namespace: str = "project-domain"
    execution: str = "execution"
    project: str = "project"
    domain: str = "domain"
    workflow: str = "workflow"
    prefix: str = "s3://bucket/metadata/execution/n0/data"
    service_account: str = "default"
    attempt: int = 0
    index: int | None = None
    platform: FlytePlatform = field(default_factory=FlytePlatform)

    @property
    def output_prefix(self) -> str:
        """Where the attempt leaves its outputs, or its error (for a map: nodes/array/handler.go)."""
        return self._output_prefix_of(self.attempt)

    def fill_in(self, argument: str) -> str:
        """An argument with its template variables replaced, as core/template/template.go does."""
        before = self._output_prefix_of(self.attempt - 1)
        values = {
            "input": f"{self.prefix}/inputs.pb",
            "inputPrefix": self.prefix,
            "outputPrefix": self.output_prefix,
            "rawOutputDataPrefix": f"{self.output_prefix}/raw",
            "checkpointOutputPrefix": f"{self.output_prefix}/_flytecheckpoints",
            # Of a first attempt: two quotes, which flytekit takes for empty.
            "prevCheckpointPrefix": f"{before}/_flytecheckpoints" if self.attempt else '""',
        }
        for variable, value in values.items():
            argument = re.sub(rf"(?i)\{{\{{\s*\.{variable}\s*\}}\}}", value, argument)
        return argument

    def environment(self, task: Mapping[str, str]) -> list[dict[str, str]]:
        """Variables that Flyte sets in every container (flytek8s/k8s_resource_adds.go).

        Args:
            task: The ``id`` of the task template.
        """
        variables = {
            "FLYTE_INTERNAL_EXECUTION_WORKFLOW": f"{self.project}:{self.domain}:{self.workflow}",
            "FLYTE_INTERNAL_EXECUTION_ID": self.execution,
            "FLYTE_INTERNAL_EXECUTION_PROJECT": self.project,
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": self.domain,
            "FLYTE_ATTEMPT_NUMBER": str(self.attempt),
        }
        for field_name in ("project", "domain", "name", "version"):
            variables[f"FLYTE_INTERNAL_TASK_{field_name.upper()}"] = task.get(field_name, "")
        for field_name in ("project", "domain", "name", "version"):
            variables[f"FLYTE_INTERNAL_{field_name.upper()}"] = task.get(field_name, "")
        if self.index is not None:
            # nodes/array/execution_context.go: a name of the variable, and the variable.
            variables["BATCH_JOB_ARRAY_INDEX_VAR_NAME"] = "FLYTE_K8S_ARRAY_INDEX"
            variables["FLYTE_K8S_ARRAY_INDEX"] = str(self.index)
        return [{"name": name, "value": value} for name, value in variables.items()]

    def _output_prefix_of(self, attempt: int) -> str:
        # The inputs of a map's elements are the map's, of which each takes its own.
        return f"{self.prefix}/{attempt}" if self.index is None else f"{self.prefix}/0/{self.index}/{attempt}"
