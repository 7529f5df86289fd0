"""What KubeRay does with the RayJobs that Flyte creates, on a Ray cluster that is there already.

Imitates KubeRay 1.7.0. ``submitted`` as its HTTPMode does (utils/dashboardclient/dashboard_httpclient.go), or by the
command of a submitter pod (common/job.go). The variables of its pods are the job's here, because one cluster serves
all tests.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from doubles.rendering import runtime_env, submit_command
from propeller import Attempt, values_of
from ray.job_submission import JobStatus, JobSubmissionClient

from kfpytorch_ray.cluster.kube.flyte_rayjob import ray_job
from kfpytorch_ray.testing import HeadCluster, wait_until

DEADLINE_S = 240.0


def manifest_of(attempt: Attempt) -> dict[str, Any]:
    """The RayJob that Flyte creates, with the head pod's variables in its runtime environment."""
    job = copy.deepcopy(ray_job(attempt.template, attempt.execution))
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = runtime_env(job)
    variables = {**values_of(head["env"]), **environment.get("env_vars", {})}
    job["spec"]["runtimeEnvYAML"] = json.dumps({**environment, "env_vars": variables})
    return job


def submitted(head: HeadCluster, attempt: Attempt) -> str:
    """Submit the entrypoint; the id of the job."""
    job = manifest_of(attempt)
    client = JobSubmissionClient(head.address)
    identifier: str = client.submit_job(entrypoint=job["spec"]["entrypoint"], runtime_env=runtime_env(job))
    return identifier


def run_submitter(head: HeadCluster, attempt: Attempt) -> tuple[str, str]:
    """Run the submitter pod's command to its end; the id of the job and what it printed."""
    identifier = f"{attempt.execution.name}-{os.urandom(4).hex()}"
    status = {"dashboardURL": head.address.removeprefix("http://"), "jobId": identifier}
    command = submit_command({**manifest_of(attempt), "status": status})
    done = subprocess.run(
        ["/bin/bash", "-ce", "--", command],
        env={**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return identifier, done.stdout


def ended(head: HeadCluster, identifier: str) -> Any:
    """Wait for the end of a job; its details. Its log is shown when the test fails."""
    client = JobSubmissionClient(head.address)
    try:
        wait_until(lambda: client.get_job_status(identifier).is_terminal(), f"{identifier} to end", DEADLINE_S)
    except TimeoutError:
        # It would hold the nodes that the next test needs.
        client.stop_job(identifier)
        raise
    finally:
        print(client.get_job_logs(identifier))
    return client.get_job_info(identifier)


def succeeded(details: Any) -> bool:
    """Whether the entrypoint ended with exit code 0, of which Flyte makes a success or reads an error."""
    return (details.status, details.driver_exit_code) == (JobStatus.SUCCEEDED, 0)
