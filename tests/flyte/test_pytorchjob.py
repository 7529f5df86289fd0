"""PyTorchJobs by Flyte: the command that flytekit registers runs in each pod, under the operator's variables.

Pods share this machine's network here; that they find each other by name on a cluster's is not tested.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flyteidl.core import errors_pb2, execution_pb2
from flytekit import map_task
from in_image import on_pytorchjob
from propeller import Attempt
from pytorch_job_pods import DEADLINE_S, Ended, delete, run_pods, running_pods
from reported import assert_reported

from kfpytorch_ray.testing import wait_until

Attempts = Callable[..., Attempt]
IGNORED = "IgnoreOutputs received"
"""What flytekit says in a pod whose outputs do not count."""


def exit_codes(ended: dict[str, Ended]) -> dict[str, int]:
    return {name: pod.exit_code for name, pod in ended.items()}


def test_one_pod_writes_value_and_deck(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """That with rank 0, whichever it is; the other one leaves nothing, and both succeed."""
    one = attempt(on_pytorchjob.report)
    one.write_inputs(base=10)
    ended = run_pods(one, image, tmp_path)
    assert exit_codes(ended) == {"worker-0": 0, "worker-1": 0}
    assert sum(IGNORED in pod.log for pod in ended.values()) == 1
    assert_reported(one)


def test_a_task_without_outputs(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """An empty outputs.pb of one pod, and no error."""
    one = attempt(on_pytorchjob.leave_note)
    one.write_inputs(folder=str(tmp_path))
    ended = run_pods(one, image, tmp_path)
    assert exit_codes(ended) == {"worker-0": 0, "worker-1": 0}
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
    assert one.outputs() == {}
    assert one.error() is None


@pytest.mark.parametrize(("failing", "rank"), [(on_pytorchjob.fail_forked, "0"), (on_pytorchjob.fail, "1")])
def test_the_users_error_is_told(
    attempt: Attempts, image: dict[str, str], tmp_path: Path, failing: Any, rank: str
) -> None:
    """Exit code 0 of all, as Flyte needs it to read the error: the user's, and not what follows from it elsewhere."""
    one = attempt(failing)
    one.write_inputs(message="no such column: 'price'", rank=rank, told=str(one.folder / "error.pb"))
    ended = run_pods(one, image, tmp_path)
    assert exit_codes(ended) == {"worker-0": 0, "worker-1": 0}
    assert one.outputs() is None
    error = one.error()
    assert error.kind == errors_pb2.ContainerError.NON_RECOVERABLE
    assert error.origin == execution_pb2.ExecutionError.USER
    assert "ValueError: no such column: 'price'" in error.message
    assert "Root cause" in one.deck()
    assert "no such column: &#39;price&#39;" in one.deck()


def test_a_recoverable_error_is_tried_again_and_resumes(
    attempt: Attempts, image: dict[str, str], tmp_path: Path
) -> None:
    """Flyte is told that it may, and not what follows elsewhere; the next attempt finds the checkpoint of this one."""
    first = attempt(on_pytorchjob.resume)
    first.write_inputs(steps=7, told=str(first.folder / "error.pb"))
    assert exit_codes(run_pods(first, image, tmp_path)) == {"worker-0": 0, "worker-1": 0}
    assert first.outputs() is None
    error = first.error()
    assert error.kind == errors_pb2.ContainerError.RECOVERABLE
    assert error.origin == execution_pb2.ExecutionError.USER
    assert "the node is pre-empted" in error.message
    second = attempt(on_pytorchjob.resume, attempt=1)
    assert exit_codes(run_pods(second, image, tmp_path)) == {"worker-0": 0, "worker-1": 0}
    assert second.error() is None
    assert second.outputs() == {"o0": 7}


def test_a_cancelled_job_stops_its_ranks_in_order(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """Its pods are deleted: their ranks have time to end, nothing says success, and no process stays."""
    one = attempt(on_pytorchjob.train_for_ever)
    one.write_inputs(folder=str(tmp_path), goodbye_s=1.0)
    with running_pods(one, image, tmp_path) as pods:
        wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2, "both ranks to train", DEADLINE_S)
        ended = delete(pods)
    assert not {pod.exit_code for pod in ended.values()} & {-signal.SIGKILL}
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
    assert one.outputs() is None
    # Nobody reads it of a task that was aborted; of pods that were evicted Flyte learns that it may try again.
    assert one.error().kind == errors_pb2.ContainerError.RECOVERABLE


def test_a_map_runs_the_task_for_each_input(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """An element's pods take its own of the inputs, and one of them leaves its output."""
    element = attempt(map_task(on_pytorchjob.total), index=1)
    element.write_inputs(base=[0, 100])
    assert exit_codes(run_pods(element, image, tmp_path)) == {"worker-0": 0, "worker-1": 0}
    assert element.outputs() == {"o0": 201}


def test_replicas_are_called_as_they_are(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """A ``PyTorch`` job: the master and its workers each call the function once, under the operator's ranks.

    As upstream: each writes what it returns to the same file, so that they do well to return the same.
    """
    one = attempt(on_pytorchjob.total_of_replicas)
    one.write_inputs(base=10)
    ended = run_pods(one, image, tmp_path)
    assert exit_codes(ended) == {"master-0": 0, "worker-0": 0}
    assert not any(IGNORED in pod.log for pod in ended.values())
    assert one.outputs() == {"o0": 21}
    assert one.error() is None


def test_gathered_errors_tell_the_first_one(attempt: Attempts, image: dict[str, str], tmp_path: Path) -> None:
    """With Flyte's aggregation of errors every pod writes a file of its own, and the earliest is the user's."""
    one = attempt(on_pytorchjob.fail_forked)
    one.write_inputs(message="no such column: 'price'", rank="1", told="")
    ended = run_pods(one, {**image, "_F_DES": "EARLIEST"}, tmp_path)
    assert exit_codes(ended) == {"worker-0": 0, "worker-1": 0}
    errors = [one.error(path.name) for path in one.folder.glob("error-*.pb")]
    assert {error.worker for error in errors} == {"execution-n0-0-worker-0", "execution-n0-0-worker-1"}
    earliest = min(errors, key=lambda error: error.timestamp.ToNanoseconds())
    assert "no such column: 'price'" in earliest.message
