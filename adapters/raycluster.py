"""The ray backend: a plan becomes agents on a Ray, and a controller beside them.

The task's own process is the driver, or where the address is that of a job API, the process that has a remote driver
do it. Under Flyte that is an ordinary pod either way, so the task is serialised as a plain Python task; which Ray it
joins is kfpytorch_ray.cluster.connect's question.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import ray_findings
from kfpytorch_ray.adapters.job_message import job_message
from kfpytorch_ray.adapters.search_path import search_path
from kfpytorch_ray.adapters.stored_runs import manifest_of, staging
from kfpytorch_ray.backends import Findings, JobConfig, require_package
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.doctor.finding import Finding
from kfpytorch_ray.errors import ConfigError, explain
from kfpytorch_ray.payload import dump_payload
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.run import Run
from kfpytorch_ray.runs import Manifest, run_folder, storage_of
from kfpytorch_ray.task_arguments import TaskArguments

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.remote.client import JobClient
    from kfpytorch_ray.cluster.remote.handle import RemoteRun
    from kfpytorch_ray.cluster.request import RayRequest
    from kfpytorch_ray.storage import Storage

logger = logging.getLogger(__name__)

INSTALL = "pip install 'ray[default]'"


class RayAdapter:
    """Runs plans on Ray. See ``RayBackend`` for the options."""

    def __init__(self, options: RayBackend | None, backend: str = RayBackend.name) -> None:
        self._options = options or RayBackend()
        self._backend = backend

    def check(self, config: JobConfig) -> Findings:
        """Name the fields that Ray cannot honour."""
        return ray_findings.find(config, self._options)

    def check_arguments(self, config: JobConfig, arguments: TaskArguments) -> Findings:
        """Name the arguments of the task without which its workers would fail."""
        return Findings(warnings=ray_findings.lost_secrets(self._options, arguments))

    def task_type(self, config: JobConfig) -> str:
        """A plain pod: it is the driver."""
        return "python-task"

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The job as upstream describes it, for the record: Flyte runs a plain pod and does not read it."""
        return job_message(config)

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive, and why."""
        return ray_findings.lost(config, self._options, arguments)

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The Pod that Flyte makes of a task template: the driver's."""
        from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
        from kfpytorch_ray.cluster.kube.flyte_pod import pod_manifest

        return (pod_manifest(template, FlyteExecution()),)

    def launches(self, config: JobConfig) -> bool:
        """Always: this process is the driver, never a worker."""
        return True

    def build(self, plan: LaunchPlan) -> RayRequest:
        """Everything that a launch needs but a Ray.

        Raises:
            PayloadError: The function or an input cannot be pickled.
        """
        from kfpytorch_ray.cluster.demand import Demand
        from kfpytorch_ray.cluster.environment import launch_environment
        from kfpytorch_ray.cluster.limits import Budgets, Limits
        from kfpytorch_ray.cluster.protocol import AgentSetup
        from kfpytorch_ray.cluster.request import RayRequest
        from kfpytorch_ray.cluster.runtime_env import working_dir_of

        options = self._options
        resources = plan.resources.amounts
        first = resources if plan.first_node_resources is None else plan.first_node_resources.amounts
        if options.resources_per_node is not None:
            first = resources = options.resources_per_node
        payload = dump_payload(plan.function, plan.args, plan.kwargs)
        return RayRequest(
            setup=AgentSetup(
                name=plan.name,
                run_id=plan.run_id,
                nproc_per_node=plan.nproc_per_node,
                contract=plan.contract,
                environment=launch_environment(os.environ, plan, options),
                sys_path=search_path(plan.function, working_dir_of(options)),
                working_directory="",
                preload=tuple(options.preload),
                flyte=plan.flyte,
                payload_sha256=hashlib.sha256(payload).hexdigest(),
                driver_address="",
                max_restarts=plan.max_restarts,
                monitor_interval_s=plan.monitor_interval_s,
                stop_grace_s=options.stop_grace_s,
                silence_timeout_s=options.silence_timeout_s,
                decks=options.decks,
                logs=options.logs,
                max_log_bytes=options.max_log_bytes,
                log_archive=_log_archive(options.log_folder, plan),
            ),
            demand=Demand(first, resources, plan.min_nodes, plan.max_nodes),
            limits=Limits(
                min_nodes=plan.min_nodes,
                max_nodes=plan.max_nodes,
                budgets=Budgets(plan.max_restarts, options.max_node_failures),
                join_timeout_s=plan.join_timeout_s,
                arrival_window_s=plan.arrival_window_s,
                deadline_s=plan.deadline_s,
                checkpoint_grace_s=options.checkpoint_grace_s,
                grow_cooldown_s=options.grow_cooldown_s,
                hang_timeout_s=options.hang_timeout_s,
            ),
            payload=payload,
        )

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run the plan on Ray: in this process as the driver, or on a remote cluster with this process looking on.

        Raises:
            BackendUnavailableError: Ray is not installed.
            PayloadError: The function or an input cannot be pickled.
            ClusterError: The remote cluster cannot be used.
            StorageError: The storage cannot be used.
            PlacementError: The nodes cannot be had.
            LaunchError: A rank or a node failed.
        """
        require_package("ray", "ray", INSTALL)
        if (address := self._remote_address()) is not None:
            return self._submit(plan, address).follow()
        for warning in ray_findings.without_effect(self._options):
            logger.warning("%s", warning)
        from kfpytorch_ray.cluster.fetching import Fetcher
        from kfpytorch_ray.cluster.launching import run_request

        launched = run_request(self.build(plan), self._options, backend=self._backend)
        ranks = tuple(range(len(launched.refs)))
        return ElasticResult(ranks, Fetcher(launched.refs), launched.rounds, report=launched.report)

    def start(self, plan: LaunchPlan) -> Run:
        """Start the plan on a remote cluster and return at once.

        Raises:
            ConfigError: No remote cluster is named.
            BackendUnavailableError: Ray is not installed.
            PayloadError: The function or an input cannot be pickled.
            ClusterError: The cluster cannot be used.
            StorageError: The storage cannot be used.
        """
        require_package("ray", "ray", INSTALL)
        address = self._remote_address()
        if address is None:
            raise ConfigError(
                "launch",
                (
                    explain(
                        "wait=False needs a cluster that is elsewhere.",
                        "On a Ray that this process joins the driver is this process, and the run would end with it.",
                        "Name the job API of one: RayBackend(address='http://HOST:8265', storage=...)",
                    ),
                ),
            )
        run = self._submit(plan, address)
        run.keep_lease()
        return run

    def attach(self, manifest: Manifest) -> Run:
        """Open a run on a remote cluster.

        Raises:
            BackendUnavailableError: Ray is not installed.
            StorageError: The storage cannot be used.
        """
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.remote.client import client_of
        from kfpytorch_ray.cluster.remote.handle import RemoteRun
        from kfpytorch_ray.cluster.remote.ray_job import RayJob

        folder = run_folder(storage_of(manifest.storage), manifest.run_id)
        address = self._options.address or manifest.address
        return RemoteRun(
            manifest, folder, self._options, lambda: RayJob(client_of(self._options, address), manifest.run_id)
        )

    def stacks(self, run: str, manifest: Manifest | None, rank: int | None) -> dict[int, str]:
        """The stacks of a run's ranks, by rank.

        Raises:
            KfpytorchRayError: As ``kfpytorch_ray.inspection.stacks``.
        """
        require_package("ray", "ray", INSTALL)
        if manifest is None:
            from kfpytorch_ray.cluster.inspection import stacks_of

            return stacks_of(run, rank, self._options.address)
        from kfpytorch_ray.cluster.remote.looking import remote_stacks

        return remote_stacks(*self._at(manifest), manifest.run_id, rank)

    def flamegraph(self, run: str, manifest: Manifest | None, rank: int, duration_s: int) -> str:
        """Where a rank spends its time, as an SVG.

        Raises:
            KfpytorchRayError: As ``kfpytorch_ray.inspection.flamegraph``.
        """
        require_package("ray", "ray", INSTALL)
        if manifest is None:
            from kfpytorch_ray.cluster.inspection import flamegraph_of

            return flamegraph_of(run, rank, duration_s, self._options.address)
        from kfpytorch_ray.cluster.remote.looking import remote_flamegraph

        return remote_flamegraph(*self._at(manifest), manifest.run_id, rank, duration_s)

    def _at(self, manifest: Manifest) -> tuple[JobClient, Storage, dict[str, Any]]:
        """The cluster of a run, its folder, and the runtime environment of a job there."""
        from kfpytorch_ray.cluster.remote.client import client_of
        from kfpytorch_ray.cluster.runtime_env import driver_environment

        folder = run_folder(storage_of(manifest.storage), manifest.run_id)
        client = client_of(self._options, self._options.address or manifest.address)
        runtime_env = {**(self._options.runtime_env or {}), "env_vars": driver_environment(self._options)}
        return client, folder, runtime_env

    def examine(self, wait_s: float) -> Iterator[Finding]:
        """Look at the cluster that a launch would run on.

        Raises:
            BackendUnavailableError: Ray is not installed.
        """
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.doctor.examination import examine_joined, examine_remote

        if (address := self._remote_address()) is not None:
            return examine_remote(self._options, address, wait_s)
        return examine_joined(self._options, wait_s)

    def examine_here(self, wait_s: float) -> Iterator[Finding]:
        """Start a Ray on this machine and launch on it.

        Raises:
            BackendUnavailableError: Ray is not installed.
        """
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.doctor.examination import examine_local

        return examine_local(wait_s)

    def _submit(self, plan: LaunchPlan, address: str) -> RemoteRun:
        from kfpytorch_ray.cluster.remote.submission import look, submit

        options = self._options
        storage = storage_of(options.storage)
        destination = look(options, address, storage)
        manifest = manifest_of(plan, options.name, options, storage.uri, address)
        with staging(plan, manifest, storage) as staged:
            return submit(self.build(staged), manifest, options, destination)

    def _remote_address(self) -> str | None:
        """The job API's address where the launch goes to another cluster; None where this process is the driver.

        A Ray that this process has joined comes before ``RAY_ADDRESS``, as for ``ray.init()``.
        """
        from kfpytorch_ray.cluster.connect import has_joined

        address = self._options.address
        if address is None and not has_joined():
            address = os.environ.get("RAY_ADDRESS")
        return address if address and address.startswith(("http://", "https://")) else None


def _log_archive(folder: str | None, plan: LaunchPlan) -> str:
    """Where ranks' logs are kept; empty: nowhere."""
    if folder is None or plan.flyte.staged_prefix:
        # Of a run that is elsewhere, its manifest has said where.
        return plan.flyte.logs_prefix
    if not folder:
        return ""
    # A name of its own for each launch: the same task may run again.
    place = folder.rstrip("/") if "://" in folder else os.path.abspath(folder)
    return f"{place}/{plan.run_id}-{uuid.uuid4().hex[:8]}"
