"""The kubeflow backend: what Flyte registers as a PyTorchJob, torch elastic in this process, PyTorchJobs of our own.

Registers exactly what flytekitplugins-kfpytorch 1.16 registers. Executes as it does: inside a PyTorchJob's pod, where
the operator's PET_* variables lead to the other nodes, and on one machine without them. A ``PyTorch`` job's processes
are started by the operator, so there is nothing to launch. Where the options name a cluster and Flyte has not started
this process, it creates the PyTorchJob and follows it as any remote run. Found by kfpytorch_ray.backends.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import kubeflow_findings
from kfpytorch_ray.adapters.job_message import is_plain_pod, job_message
from kfpytorch_ray.adapters.kubeflow_report import report_of
from kfpytorch_ray.adapters.search_path import search_path
from kfpytorch_ray.adapters.stored_runs import (
    EXAMPLE_IMAGE,
    EXAMPLE_RUN,
    EXAMPLE_STORAGE,
    address_of,
    located,
    manifest_of,
    staging,
)
from kfpytorch_ray.backends import REMOTE_EXECUTION_VARIABLE, Findings, JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.cluster.torch_elastic import launch_config, run_node
from kfpytorch_ray.config import Elastic, KubeflowBackend
from kfpytorch_ray.errors import ConfigError, KfpytorchRayError, ResultError, explain
from kfpytorch_ray.flyte_worker import (
    UNPICKLABLE_MARKER,
    leave_marker,
    run_in_current_context,
    spawn_helper,
)
from kfpytorch_ray.payload import dump_payload, dump_result, importable, load_payload, load_result
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.run import Run
from kfpytorch_ray.runs import Manifest, run_folder, storage_of
from kfpytorch_ray.storage import Digest, Storage
from kfpytorch_ray.task_arguments import TaskArguments

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from kfpytorch_ray.cluster.kube.pod_request import PodRequest
    from kfpytorch_ray.cluster.remote.handle import RemoteRun

logger = logging.getLogger(__name__)

MULTI_NODE_TASK_TYPE = "pytorch"
SINGLE_NODE_TASK_TYPE = "python-task"

NEEDS_IMAGE = explain(
    "no image is named.",
    "Without Flyte this process creates the PyTorchJob, and all of its pods run one image.",
    "Give KubeflowBackend(image='REGISTRY/NAME:TAG'); it has torch and kfpytorch_ray as this machine has them.",
)


class KubeflowAdapter:
    """PyTorchJobs, and torch elastic in this process. See ``KubeflowBackend`` for the options."""

    def __init__(self, options: KubeflowBackend | None = None) -> None:
        self._options = options or KubeflowBackend()

    def check(self, config: JobConfig) -> Findings:
        """Name what is wrong with the options, and what torch elastic's launcher does not know."""
        return kubeflow_findings.find(config, self._options)

    def task_type(self, config: JobConfig) -> str:
        """``python-task`` for one node, given as a number; ``pytorch`` otherwise, also for ``"1"`` and ``"1:1"``."""
        return SINGLE_NODE_TASK_TYPE if is_plain_pod(config) else MULTI_NODE_TASK_TYPE

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The PyTorchJob as Flyte's message; None for an elastic job of one node, which needs no operator."""
        return job_message(config)

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive, and why. Upstream's plugin loses the same."""
        return kubeflow_findings.lost(config, self._options, arguments)

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The PyTorchJob, or the Pod of a single node, that Flyte makes of a task template."""
        from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
        from kfpytorch_ray.cluster.kube.flyte_pod import pod_manifest
        from kfpytorch_ray.cluster.kube.flyte_pytorchjob import pytorch_job

        render = pod_manifest if template["type"] == SINGLE_NODE_TASK_TYPE else pytorch_job
        return (render(template, FlyteExecution()),)

    def launches(self, config: JobConfig) -> bool:
        """Elastic jobs are launched here, and PyTorchJobs of our own; a ``PyTorch`` job's processes by the operator."""
        return is_elastic(config) or self._creates_job()

    def kubernetes_manifests(self, config: JobConfig, arguments: TaskArguments) -> tuple[dict[str, Any], ...]:
        """The PyTorchJob that this process creates without Flyte; what no option names is an example."""
        from kfpytorch_ray.adapters.pytorchjob_manifest import pytorch_job
        from kfpytorch_ray.cluster.kube.entrypoint import POD, command

        folder = f"{self._options.storage or EXAMPLE_STORAGE}/runs/{EXAMPLE_RUN}"
        example = Digest("0" * 64, 0)
        options = replace(self._options, image=self._options.image or EXAMPLE_IMAGE)
        words = command(POD, EXAMPLE_RUN, folder, example.sha256, example)
        return (pytorch_job(config, options, arguments, name=EXAMPLE_RUN, command=words),)

    def kubernetes_lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive where this process creates the PyTorchJob, and why."""
        return kubeflow_findings.lost_without_flyte(config, self._options, arguments)

    def build(self, plan: LaunchPlan) -> LaunchConfig:
        """The configuration of torch elastic's launcher; the operator names the rendezvous in PET_RDZV_ENDPOINT.

        Raises:
            ImportError: torch is not installed.
        """
        return launch_config(plan)

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run this node's workers, whose results it holds; or a PyTorchJob, with the results of all ranks.

        Raises:
            ImportError: torch is not installed.
            ConfigError: An option that is needed is missing.
            PayloadError: The function or an input cannot be pickled.
            ClusterError: The Kubernetes cluster cannot be used.
            StorageError: The storage cannot be used.
            PlacementTimeoutError: Too few nodes met within the join timeout.
            RecoverableWorkerError: The first rank to fail raised FlyteRecoverableException.
            ResultError: A rank's result cannot be pickled.
            WorkerFailedError: The first rank to fail did so in another way.
            LaunchInterruptedError: This process was told to stop.
            LaunchError: Torch elastic failed itself.
        """
        if self._creates_job():
            return self._submit(plan).follow()
        config = self.build(plan)
        _warn_outside_job(plan)
        entrypoint, args = _entrypoint(plan)
        started_at = time.time()
        try:
            with importable(plan.function):
                outputs = run_node(plan, config, entrypoint, args)
        except KfpytorchRayError as error:
            error.report = report_of(plan, started_at, (), error)
            raise
        report = report_of(plan, started_at, outputs)
        return ElasticResult(tuple(outputs), lambda rank: load_result(outputs[rank]), report=report)

    def start(self, plan: LaunchPlan) -> Run:
        """Create a PyTorchJob for the plan, and return at once.

        Raises:
            ConfigError: The options name no cluster, or one that is needed is missing.
            KfpytorchRayError: As ``run``, but for what happens to the plan itself.
        """
        if not self._creates_job():
            problem = explain(
                "wait=False needs a cluster.",
                "Without one the ranks are children of this process, and would end with it.",
                "Name where the run goes on: KubeflowBackend(image=..., namespace=..., storage=...)",
            )
            raise ConfigError("launch", (problem,))
        run = self._submit(plan)
        run.keep_lease()
        return run

    def attach(self, manifest: Manifest) -> Run:
        """Open a run whose PyTorchJob was created before.

        Raises:
            ConfigError: The kubeconfig or the context is not there.
        """
        from kfpytorch_ray.cluster.kube.pytorch_job import PyTorchJob
        from kfpytorch_ray.cluster.kube.submission import namespace_of
        from kfpytorch_ray.cluster.remote.handle import RemoteRun

        options = located(self._options, manifest.address)
        folder = run_folder(storage_of(manifest.storage), manifest.run_id)
        return RemoteRun(
            manifest,
            folder,
            options,
            lambda: PyTorchJob(namespace_of(options), manifest.run_id, manifest.name, folder, options.ready_timeout_s),
        )

    def _creates_job(self) -> bool:
        """Whether this process has a PyTorchJob made; inside one, and under Flyte, it is a part of it."""
        inside = REMOTE_EXECUTION_VARIABLE in os.environ or "PET_NNODES" in os.environ
        return self._options.creates_job and not inside

    def _submit(self, plan: LaunchPlan) -> RemoteRun:
        from kfpytorch_ray.adapters.pytorchjob_manifest import pytorch_job
        from kfpytorch_ray.cluster.kube.entrypoint import POD, command
        from kfpytorch_ray.cluster.kube.kinds import PYTORCH_JOB
        from kfpytorch_ray.cluster.kube.preflight import check_pytorch_job
        from kfpytorch_ray.cluster.kube.pytorch_job import PyTorchJob
        from kfpytorch_ray.cluster.kube.submission import destination, namespace_of, submit

        options = self._options
        if options.image is None:
            raise ConfigError("KubeflowBackend", (NEEDS_IMAGE,))
        if problems := kubeflow_findings.template_problems(plan.arguments.pod_template):
            raise ConfigError("KubeflowBackend", problems)
        storage = storage_of(options.storage)
        namespace = namespace_of(options)
        run = manifest_of(plan, options.name, options, storage.uri, address_of(namespace.name, options))

        def render(folder: str, sha256: str, packed: Digest | None) -> dict[str, Any]:
            words = command(POD, run.run_id, folder, sha256, packed)
            return pytorch_job(plan.config, options, plan.arguments, name=run.run_id, command=words)

        def job(folder: Storage) -> PyTorchJob:
            return PyTorchJob(namespace, run.run_id, run.name, folder, options.ready_timeout_s)

        to = destination(options, namespace, storage)
        check_pytorch_job(render("", "", None), namespace)
        with staging(plan, run, storage) as staged:
            return submit(_pod_request(staged, options), run, PYTORCH_JOB, job, render, options, to)


def _pod_request(plan: LaunchPlan, options: KubeflowBackend) -> PodRequest:
    from kfpytorch_ray.cluster.environment import launch_environment
    from kfpytorch_ray.cluster.kube.pod_request import PodRequest
    from kfpytorch_ray.cluster.runtime_env import working_dir_of

    payload = dump_payload(plan.function, plan.args, plan.kwargs)
    staged = replace(
        plan,
        function=functools.partial(load_payload, payload),
        args=(),
        kwargs={},
        # What they are for is in the PyTorchJob, and they hold whatever the user has put there.
        config=Elastic(),
        arguments=TaskArguments(),
    )
    return PodRequest(
        plan=staged,
        environment=launch_environment(os.environ, plan, options),
        sys_path=search_path(plan.function, working_dir_of(options)),
    )


def _warn_outside_job(plan: LaunchPlan) -> None:
    if plan.min_nodes > 1 and "PET_NNODES" not in os.environ:
        logger.warning(
            "%s wants %d nodes, but PET_NNODES is not set, so this is no PyTorchJob: nobody may come to the rendezvous "
            "within %.0f s.",
            plan.name,
            plan.min_nodes,
            plan.join_timeout_s,
        )


def _entrypoint(plan: LaunchPlan) -> tuple[Callable[..., bytes], tuple[Any, ...]]:
    """What torch elastic calls in each worker, and its arguments."""
    if plan.start_method == "fork":
        call = functools.partial(plan.function, *plan.args, **plan.kwargs)

        def train_in_forked_worker() -> bytes:
            return _bring_home(run_in_current_context(call))

        return train_in_forked_worker, ()
    flyte = plan.flyte
    payload = dump_payload(plan.function, plan.args, plan.kwargs)
    return train_in_spawned_worker, (payload, flyte.raw_output_prefix, flyte.checkpoint_dest, flyte.checkpoint_src)


def train_in_spawned_worker(
    payload: bytes, raw_output_prefix: str, checkpoint_dest: str | None, checkpoint_src: str | None
) -> bytes:
    """What a spawned worker runs; it finds this function by its name."""
    return _bring_home(spawn_helper(payload, raw_output_prefix, checkpoint_dest, checkpoint_src, {}))


def _bring_home(result: ElasticWorkerResult) -> bytes:
    """Pickle here, where a failure reaches the error file; torch's own queue would only end the process."""
    try:
        return dump_result(result, int(os.environ["RANK"]))
    except ResultError:
        leave_marker(UNPICKLABLE_MARKER)
        raise
