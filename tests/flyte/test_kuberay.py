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
from ray_jobs import ended, run_submitter, submitted, succeeded

from kfpytorch_ray.images import settings_for
from kfpytorch_ray.testing import HeadCluster, wait_until

pytestmark = pytest.mark.timeout(600)

Attempts = Callable[..., Attempt]
Registered = tuple[ModuleType, SerializationSettings | None]
"""Tasks, and the settings with which they were registered."""


def test_the_value_and_the_deck_arrive(head: HeadCluster, attempt: Attempts) -> None:
    """By the submitter's command, two shells between; rank 0's value and deck, under the execution's context."""
    one = attempt(on_ray.report)
    one.write_inputs(base=10)
    identifier, log = run_submitter(head, one)
    assert succeeded(ended(head, identifier))
    assert one.error() is None
    assert one.outputs() == {
        "o0": {
            "sum": "21",
            "execution": "execution",
            "raw": f"{one.execution.output_prefix}/raw",
            "RANK": "0",
            "WORLD_SIZE": "2",
            "OF_THE_TASK": "yes",
            "FLYTE_INTERNAL_EXECUTION_ID": "execution",
            "FLYTE_ATTEMPT_NUMBER": "0",
        }
    }
    assert "drawn by rank 0" in one.deck()
    assert "drawn by rank 1" not in one.deck()
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
    """Every element is a launch on two nodes; it takes its own of the inputs, and leaves its own output."""
    mapped = map_task(on_ray.total)
    for index, expected in enumerate((1, 201)):
        element = attempt(mapped, index=index)
        element.write_inputs(base=[0, 100])
        identifier = submitted(head, element)
        assert succeeded(ended(head, identifier))
        assert element.error() is None
        assert element.outputs() == {"o0": expected}


def test_a_map_passes_the_submitters_shells(head: HeadCluster, attempt: Attempts) -> None:
    """One of its arguments is empty, which two shells must not lose."""
    element = attempt(map_task(on_ray.total), index=1)
    element.write_inputs(base=[0, 100])
    identifier, _ = run_submitter(head, element)
    assert succeeded(ended(head, identifier))
    assert element.outputs() == {"o0": 201}


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
def in_the_image() -> Registered:
    """Tasks that every pod has."""
    return on_ray, None


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


@pytest.mark.parametrize("code", ["in_the_image", "in_a_tar"])
def test_a_cancelled_job_stops_its_workers_in_order(
    head: HeadCluster, attempt: Attempts, tmp_path: Path, code: str, request: pytest.FixtureRequest
) -> None:
    """They have their grace, longer than Ray's own 3 s; nothing says success, and no process stays.

    From a tar the driver is asked twice: by Ray, and by flytekit's process above it, which Ray asks as well.
    """
    tasks, settings = request.getfixturevalue(code)
    one = attempt(tasks.train_for_ever, settings)
    one.write_inputs(folder=str(tmp_path), goodbye_s=5.0)
    identifier = submitted(head, one)
    wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2, "both ranks to train")
    JobSubmissionClient(head.address).stop_job(identifier)
    details = ended(head, identifier)
    assert details.status == JobStatus.STOPPED
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
    assert one.outputs() is None
    assert one.error() is None
    assert not one.folder.exists() or not any(one.folder.glob("*.pb"))
