"""KubeRay by Flyte: the command that flytekit registers is the entrypoint of a Ray job, on a real cluster of two nodes.

What is not tested here is what needs Flyte and KubeRay themselves: who creates the RayJob, and who reads its status.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from flyteidl.core import errors_pb2, execution_pb2
from flytekit import map_task
from flytekit.configuration import FastSerializationSettings, SerializationSettings
from flytekit.constants import CopyFileDetection
from flytekit.tools.fast_registration import FastPackageOptions, fast_package
from in_image import on_ray
from propeller import Attempt
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_jobs import DEADLINE_S, ended, run_submitter, submitted, succeeded
from reported import assert_reported

from kfpytorch_ray.images import settings_for
from kfpytorch_ray.testing import HeadCluster, wait_until

pytestmark = pytest.mark.timeout(600)

Attempts = Callable[..., Attempt]
Registered = tuple[ModuleType, SerializationSettings]
"""Tasks, and the settings with which they were registered."""


def test_the_value_and_the_deck_arrive(head: HeadCluster, attempt: Attempts) -> None:
    """By the submitter's command, two shells between; rank 0's value and deck, under the execution's context."""
    one = attempt(on_ray.report)
    one.write_inputs(base=10)
    identifier, log = run_submitter(head, one)
    assert succeeded(ended(head, identifier))
    assert_reported(one)
    assert log.count("a line that every rank says") == 2
    assert "[repeated" not in log


def test_the_users_error_is_told_and_final(head: HeadCluster, attempt: Attempts) -> None:
    """The entrypoint succeeds, as Flyte needs it to read the error; the user's exception is in it, with its rank."""
    one = attempt(on_ray.fail)
    one.write_inputs(message="no such column: 'price'")
    assert succeeded(ended(head, submitted(head, one)))
    assert one.outputs() is None
    error = one.error()
    assert error.kind == errors_pb2.ContainerError.NON_RECOVERABLE
    assert error.origin == execution_pb2.ExecutionError.USER
    assert "ValueError: no such column: 'price'" in error.message
    assert "rank 1" in error.message
    assert "Root cause" in one.deck()
    assert "backend kuberay" in one.deck()
    assert "Rank 1 raised ValueError: no such column: &#39;price&#39;" in one.deck()


def test_a_recoverable_error_is_tried_again_and_resumes(head: HeadCluster, attempt: Attempts) -> None:
    """Flyte is told that it may; the next attempt finds the checkpoint of the one before."""
    first = attempt(on_ray.resume)
    first.write_inputs(steps=7)
    assert succeeded(ended(head, submitted(head, first)))
    assert first.outputs() is None
    assert first.error().kind == errors_pb2.ContainerError.RECOVERABLE
    assert "the node is pre-empted" in first.error().message
    second = attempt(on_ray.resume, attempt=1)
    assert succeeded(ended(head, submitted(head, second)))
    assert second.error() is None
    assert second.outputs() == {"o0": 7}


def test_a_task_without_outputs(head: HeadCluster, attempt: Attempts, tmp_path: Path) -> None:
    """An empty outputs.pb and no error: it ran."""
    one = attempt(on_ray.leave_note)
    one.write_inputs(folder=str(tmp_path))
    assert succeeded(ended(head, submitted(head, one)))
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
    assert one.outputs() == {}
    assert one.error() is None


def test_a_map_runs_the_task_for_each_input(head: HeadCluster, attempt: Attempts) -> None:
    """Every element is a launch on two nodes; it takes its own of the inputs, and leaves its own output.

    One of the command's arguments is empty, which the submitter's two shells must not lose, nor the one of the job API.
    """
    mapped = map_task(on_ray.total)
    first, second = attempt(mapped, index=0), attempt(mapped, index=1)
    first.write_inputs(base=[0, 100])
    assert succeeded(ended(head, submitted(head, first)))
    identifier, _ = run_submitter(head, second)
    assert succeeded(ended(head, identifier))
    assert [element.error() for element in (first, second)] == [None, None]
    assert [element.outputs() for element in (first, second)] == [{"o0": 1}, {"o0": 201}]


FLOW = """
from flytekit import task
from in_image import training
from in_image.on_ray import on_two_nodes
from steps.places import places_of_all_ranks


@task(**on_two_nodes())
def train() -> list[str]:
    return places_of_all_ranks()


@task(**on_two_nodes())
def train_for_ever(folder: str, goodbye_s: float) -> None:
    training.train_for_ever(folder, goodbye_s)
"""

PLACES = """
from pathlib import Path

from in_image.training import of_all_ranks


def places_of_all_ranks():
    beside = {path.name for path in Path(__file__).parents[1].iterdir() if path.is_file()}
    return of_all_ranks(" ".join([__file__, *beside]))
"""


@pytest.fixture
def in_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registered]:
    """Tasks of a project that no image contains, registered as by ``pyflyte register --copy all``."""
    project, image_folder, bucket = tmp_path / "project", tmp_path / "root", tmp_path / "bucket"
    for folder in (project / "steps", image_folder, bucket):
        folder.mkdir(parents=True)
    (project / "flow_in_a_tar.py").write_text(FLOW)
    (project / "steps" / "__init__.py").touch()
    (project / "steps" / "places.py").write_text(PLACES)
    options = FastPackageOptions([], copy_style=CopyFileDetection.ALL)
    tar = Path(fast_package(project, bucket, options=options))
    monkeypatch.syspath_prepend(str(project))
    flow = importlib.import_module("flow_in_a_tar")
    settings = dataclasses.replace(
        settings_for(flow.train),
        fast_serialization_settings=FastSerializationSettings(
            enabled=True, destination_dir=str(image_folder), distribution_location=tar.as_uri()
        ),
    )
    yield flow, settings
    for name in ("flow_in_a_tar", "steps", "steps.places"):
        sys.modules.pop(name, None)


def test_code_of_fast_registration_reaches_every_node(
    head: HeadCluster, attempt: Attempts, in_a_tar: Registered
) -> None:
    """Flyte unpacks it beside the driver only; workers import what the driver sent them, without the tar."""
    flow, settings = in_a_tar
    one = attempt(flow.train, settings)
    one.write_inputs()
    assert succeeded(ended(head, submitted(head, one)))
    assert one.error() is None
    outputs = one.outputs()
    assert outputs is not None
    assert len(outputs["o0"]) == 2
    for place in outputs["o0"]:
        assert re.fullmatch(r".*/working_dir_files/\w+/steps/places.py flow_in_a_tar.py", place)


def test_a_cancelled_job_stops_its_workers_in_order(
    head: HeadCluster, attempt: Attempts, tmp_path: Path, in_a_tar: Registered
) -> None:
    """They have their grace, longer than Ray's own 3 s; nothing says success, and no process stays.

    The driver is asked twice: by Ray, and by pyflyte-fast-execute above it, which Ray asks as well.
    """
    flow, settings = in_a_tar
    one = attempt(flow.train_for_ever, settings)
    one.write_inputs(folder=str(tmp_path), goodbye_s=4.0)
    identifier = submitted(head, one)
    wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2, "both ranks to train", DEADLINE_S)
    JobSubmissionClient(head.address).stop_job(identifier)
    details = ended(head, identifier)
    assert details.status == JobStatus.STOPPED
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
    assert one.outputs() is None
    assert one.error() is None
    assert not one.folder.exists() or not any(one.folder.glob("*.pb"))
