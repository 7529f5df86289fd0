"""What of this machine travels to a cluster by Ray's runtime environment: the working directory, and options."""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

from kfpytorch_ray.backends import REMOTE_EXECUTION_VARIABLE
from kfpytorch_ray.config import CallOptions, RayBackend, RayRunOptions

logger = logging.getLogger(__name__)

_STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by a job's supervisor: how long its driver may take to stop its workers before it is killed."""
_STOP_MARGIN_S = 30.0


def runtime_env_of(options: RayBackend) -> dict[str, Any]:
    """The runtime environment that the options ask for, the working directory as a local folder where one is sent."""
    environment = dict(options.runtime_env or {})
    folder = working_dir_of(options)
    return {**environment, "working_dir": folder, "excludes": list(options.excludes)} if folder else environment


def working_dir_of(options: CallOptions) -> str:
    """The folder that is sent so that nodes find the user's modules; empty if none is."""
    if _job_brings_working_dir():
        return ""
    folder = os.getcwd() if options.working_dir is None else options.working_dir
    # A home or root folder is nobody's project; in Flyte's images the home folder is.
    if (
        options.working_dir is None
        and folder in ("/", os.path.expanduser("~"))
        and not os.environ.get(REMOTE_EXECUTION_VARIABLE)
    ):
        logger.info("Nothing is sent to other nodes: %s is no project folder. See RayBackend(working_dir=).", folder)
        return ""
    return folder


def driver_environment(options: RayRunOptions) -> dict[str, str]:
    """Variables of a driver that is a Ray job: the user's, and those that Ray reads for us."""
    environment = dict((options.runtime_env or {}).get("env_vars") or {})
    environment.setdefault(_STOP_WAIT_VARIABLE, str(math.ceil(options.stop_grace_s + _STOP_MARGIN_S)))
    # Ray would pass on similar lines of several ranks once only. It reads this when it is imported.
    environment.setdefault("RAY_DEDUP_LOGS", "0")
    return environment


def _job_brings_working_dir() -> bool:
    """Whether this process is a Ray job that was submitted with a working directory (``ray job submit --working-dir``).

    It is looked for where Ray writes it: variables of a job may name one as well.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return bool((job.get("runtime_env") or {}).get("working_dir"))
