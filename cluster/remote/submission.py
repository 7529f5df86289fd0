"""Sending a launch to a cluster that is elsewhere: look, stage, submit; and no job left behind where that fails.

What goes by which way: the request by the storage, its SHA-256 and the place by the job's entrypoint, the user's
modules by Ray's runtime environment. Headers and tokens stay here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kfpytorch_ray.cluster.remote import driver
from kfpytorch_ray.cluster.remote.client import JobClient, client_of
from kfpytorch_ray.cluster.remote.handle import RemoteRun, stop_job
from kfpytorch_ray.cluster.remote.probe import probe
from kfpytorch_ray.cluster.remote.ray_job import RayJob
from kfpytorch_ray.cluster.remote.versions import here, refuse_mismatch
from kfpytorch_ray.cluster.remote.working_dir import check, survey
from kfpytorch_ray.cluster.request import RayRequest
from kfpytorch_ray.cluster.runtime_env import driver_environment, runtime_env_of
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import KfpytorchRayError, UnknownRunError, VersionMismatchError
from kfpytorch_ray.notices import tell
from kfpytorch_ray.runs import REQUEST, Manifest, read_manifest, run_folder
from kfpytorch_ray.storage import Storage

logger = logging.getLogger(__name__)

_FOLDER = ("working_dir", "excludes")

RUN_KEY = "kfpytorch_ray.run"
ATTEMPT_OF_KEY = "kfpytorch_ray.attempt_of"
ATTEMPT_KEY = "kfpytorch_ray.attempt"
"""Metadata of a job: the run, the Flyte task execution that it is an attempt of, and which one."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A cluster that was looked at and found fit.

    Attributes:
        client: Of its job API.
        storage: That it shares with this machine.
        runtime_env: Of the job.
    """

    client: JobClient
    storage: Storage
    runtime_env: dict[str, Any]


def look(options: RayBackend, address: str, storage: Storage) -> Destination:
    """Look at a cluster and at what is to be sent there, before anything is.

    Raises:
        ConfigError: The working directory cannot be sent.
        ClusterError: The cluster cannot be reached, refuses, or does not fit.
        StorageError: The storage cannot be used here or there.
    """
    runtime_env = runtime_env_of(options)
    travels = survey(runtime_env["working_dir"], options.excludes) if "working_dir" in runtime_env else None
    if travels is not None:
        check(travels, options.max_working_dir_bytes)
    runtime_env["env_vars"] = driver_environment(options)
    client = client_of(options, address)
    _refuse_other_versions(client, storage, {name: part for name, part in runtime_env.items() if name not in _FOLDER})
    if travels is not None:
        tell(travels.describe())
    return Destination(client, storage, runtime_env)


def submit(request: RayRequest, manifest: Manifest, options: RayBackend, to: Destination) -> RemoteRun:
    """Stage a request and have the cluster run it. What is staged stays where this fails; the caller removes it.

    Raises:
        StorageError: It cannot be staged.
        ClusterError: The cluster cannot be reached, or refuses it.
    """
    folder = run_folder(to.storage, manifest.run_id)
    attempt = attempt_in(os.environ)
    if attempt is not None:
        _end_earlier_attempts(to, attempt, options)
    try:
        data = pickle.dumps((request, _inside(options)))
        sha256 = folder.upload(REQUEST, [data]).sha256
        to.client.submit_job(
            entrypoint=f"python -m {driver.__name__} {shlex.quote(f'{folder.uri}#{sha256}')}",
            submission_id=manifest.run_id,
            runtime_env=to.runtime_env,
            metadata={RUN_KEY: manifest.run_id, **(attempt.metadata if attempt else {})},
        )
    except BaseException:
        _stop(to.client, manifest.run_id)
        raise
    run = RemoteRun(manifest, folder, options, lambda: RayJob(to.client, manifest.run_id))
    tell(
        f"the run {manifest.run_id} is submitted to {to.client.address}. If this process ends, follow it: "
        f"{run.command('logs -f')}"
    )
    return run


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a Flyte task execution.

    Attributes:
        of: What all attempts of it have in common, hashed.
        number: 0 for the first.
    """

    of: str
    number: int

    @property
    def metadata(self) -> dict[str, str]:
        """For the job, by which a later attempt finds it."""
        return {ATTEMPT_OF_KEY: self.of, ATTEMPT_KEY: str(self.number)}

    def follows(self, metadata: Mapping[str, str]) -> bool:
        """Whether a job is one of an earlier attempt."""
        number = metadata.get(ATTEMPT_KEY, "")
        return metadata.get(ATTEMPT_OF_KEY) == self.of and number.isdecimal() and int(number) < self.number


def attempt_in(environment: Mapping[str, str]) -> Attempt | None:
    """The attempt that an environment belongs to; None where it cannot be told.

    Flyte names an attempt's pod after execution, node and attempt, in this order.
    """
    execution = environment.get("FLYTE_INTERNAL_EXECUTION_ID")
    number = environment.get("FLYTE_ATTEMPT_NUMBER", "")
    pod = environment.get("HOSTNAME", "")
    if not execution or not number.isdecimal() or not pod.endswith(f"-{number}"):
        return None
    names = ("FLYTE_INTERNAL_EXECUTION_PROJECT", "FLYTE_INTERNAL_EXECUTION_DOMAIN", "FLYTE_INTERNAL_TASK_NAME")
    parts = [execution, *(environment.get(name, "") for name in names), pod.removesuffix(f"-{number}")]
    return Attempt(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32], int(number))


def _end_earlier_attempts(to: Destination, attempt: Attempt, options: RayBackend) -> None:
    """Stop what an attempt whose pod was lost has left running: this one takes its place, and its nodes.

    Raises:
        ClusterError: It does not end.
    """
    for job in to.client.list_jobs():
        name = job.submission_id
        if name and attempt.follows(job.metadata or {}) and not job.status.is_terminal():
            tell(f"an earlier attempt of this task still runs as {name}; it is stopped.")
            _end(to, RayJob(to.client, name), name, options)


def _end(to: Destination, job: RayJob, run_id: str, options: RayBackend) -> None:
    try:
        manifest = read_manifest(to.storage, run_id)
    except UnknownRunError:
        # It was staged in another storage, where its driver leaves how it ended.
        stop_job(job, run_id, options)
    else:
        RemoteRun(manifest, run_folder(to.storage, run_id), options, lambda: job).cancel()


def _refuse_other_versions(client: JobClient, storage: Storage, runtime_env: dict[str, Any]) -> None:
    where = f"the cluster at {client.address}"
    try:
        refuse_mismatch(here(), probe(client, storage, runtime_env).versions, where)
    except VersionMismatchError:
        # What it answered before may be out of date.
        refuse_mismatch(here(), probe(client, storage, runtime_env, fresh=True).versions, where)


def _inside(options: RayBackend) -> RayBackend:
    """The options as the driver on the cluster needs them: it is there already, and knows no secret of the way."""
    return replace(
        options,
        address="auto",
        working_dir="",
        runtime_env=None,
        storage=None,
        headers={},
        verify=True,
        keep_warm_s=0.0,
    )


def _stop(client: JobClient, run_id: str) -> None:
    """Stop a job that the cluster may have taken all the same."""
    with contextlib.suppress(KfpytorchRayError):
        if client.job(run_id) is not None:
            client.stop_job(run_id)
