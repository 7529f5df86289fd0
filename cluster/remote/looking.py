"""Looking inside the ranks of a run on a remote cluster: a small job there asks the agents, as the probe asks the head.

``python -m kfpytorch_ray.cluster.remote.looking FOLDER ANSWER WHAT RUN RANK SECONDS`` is its entrypoint. It leaves its
answer in the run's folder in the storage.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import uuid
from typing import Any

from kfpytorch_ray.cluster.inspection import flamegraph_of, stacks_of
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.errors import ClusterError, KfpytorchRayError, RunError, StorageError, UnknownRunError, explain
from kfpytorch_ray.storage import Storage

_STACKS, _FLAMEGRAPH = "stacks", "flamegraph"
_TIMEOUT_S = 600.0
"""pip packages of a runtime environment may have to be installed first."""


def remote_stacks(
    client: JobClient, folder: Storage, env: dict[str, Any], run: str, rank: int | None
) -> dict[int, str]:
    """As ``stacks_of``, by a job.

    Args:
        client: Of the cluster.
        folder: Of the run.
        env: The job's runtime environment.
        run: Id of the run.
        rank: Only this one; None for all.

    Raises:
        KfpytorchRayError: As ``stacks_of``; or the cluster or the storage cannot be used.
    """
    answer = _ask(client, folder, env, (_STACKS, run, "" if rank is None else str(rank), "0"))
    return {int(number): text for number, text in answer.items()}


def remote_flamegraph(
    client: JobClient, folder: Storage, env: dict[str, Any], run: str, rank: int, duration_s: int
) -> str:
    """As ``flamegraph_of``, by a job."""
    return str(_ask(client, folder, env, (_FLAMEGRAPH, run, str(rank), str(duration_s))))


def _ask(client: JobClient, folder: Storage, env: dict[str, Any], question: tuple[str, ...]) -> Any:
    name = f"answer-{uuid.uuid4().hex[:12]}"
    words = " ".join(shlex.quote(word) for word in (folder.uri, name, *question))
    job_id = client.submit_job(
        entrypoint=f"python -m {__name__} {words}", submission_id=f"kfr-look-{uuid.uuid4().hex[:12]}", runtime_env=env
    )
    try:
        client.wait_until_over(job_id, _TIMEOUT_S)
        said = folder.read(name)
    except BaseException as error:
        with contextlib.suppress(KfpytorchRayError):
            client.stop_job(job_id)
        if isinstance(error, TimeoutError):
            raise _cannot(client, str(error)) from error
        raise
    finally:
        with contextlib.suppress(StorageError):
            folder.remove(name)
    if said is None:
        last = str(client.get_job_logs(job_id)).strip().splitlines()[-1:] or ["it has printed nothing"]
        raise _cannot(client, last[0])
    client.forget(job_id)
    answer = json.loads(said)
    if "unknown" in answer:
        raise UnknownRunError(answer["unknown"])
    if "error" in answer:
        raise RunError(answer["error"])
    return answer["value"]


def _cannot(client: JobClient, why: str) -> ClusterError:
    what = f"The cluster at {client.address} could not look at the run by a small job."
    return ClusterError(explain(what, why, "Look at the job in Ray's dashboard."))


def _answer(what: str, run: str, rank: str, seconds: str) -> dict[str, Any]:
    try:
        if what == _STACKS:
            return {"value": stacks_of(run, int(rank) if rank else None, "auto")}
        return {"value": flamegraph_of(run, int(rank), int(seconds), "auto")}
    except UnknownRunError as error:
        return {"unknown": str(error)}
    except KfpytorchRayError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    Storage(sys.argv[1]).write(sys.argv[2], json.dumps(_answer(*sys.argv[3:])).encode())
