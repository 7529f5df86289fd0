"""Plans for machines that do not see this one's disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flytekit import FlyteDirectory, FlyteFile

from kfpytorch_ray.plan import FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.relocation import relocated
from kfpytorch_ray.storage import Storage


def plan(flyte: FlyteContext, *args: Any, **kwargs: Any) -> LaunchPlan:
    return LaunchPlan("train", "launch-1", max, args, kwargs, 1, 1, 1, NodeResources({"CPU": 1.0}), flyte)


def test_local_places_move_into_the_storage(tmp_path: Path) -> None:
    """Outputs and checkpoints of this machine's disk would be another machine's own."""
    local = FlyteContext("/tmp/flyte/raw", "/tmp/flyte/checkpoints", "/tmp/flyte/before", {"A": "b"})
    moved = relocated(plan(local), Storage(f"file://{tmp_path}"), "kfr-one").flyte
    outputs, checkpoints = f"{tmp_path}/outputs/kfr-one", f"{tmp_path}/checkpoints/kfr-one"
    staged, logs = f"{tmp_path}/runs/kfr-one/inputs", f"{tmp_path}/outputs/kfr-one/logs"
    assert moved == FlyteContext(outputs, checkpoints, None, {"A": "b"}, staged, logs)


def test_checkpoints_of_two_runs_do_not_meet(tmp_path: Path) -> None:
    """Flyte names every task that is executed locally alike; the second would go on where the first has ended."""
    local = FlyteContext("/tmp/flyte/raw", "/tmp/flyte/checkpoints")
    storage = Storage(f"file://{tmp_path}")
    runs = [replace(plan(local), run_id="local") for _ in range(2)]
    places = {relocated(run, storage, f"kfr-{number}").flyte.checkpoint_dest for number, run in enumerate(runs)}
    assert len(places) == 2


def test_remote_places_stay(tmp_path: Path) -> None:
    """What Flyte has given is reached from everywhere."""
    remote = FlyteContext("s3://raw", "s3://checkpoints", "s3://before", logs_prefix="s3://raw/logs")
    moved = relocated(plan(remote), Storage(str(tmp_path)), "kfr-one").flyte
    assert replace(moved, staged_prefix="") == remote


def test_no_place_for_checkpoints_stays_none(tmp_path: Path) -> None:
    """A local task has none, and gets none."""
    assert relocated(plan(FlyteContext("/raw")), Storage(str(tmp_path)), "kfr-one").flyte.checkpoint_dest is None


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_files_among_the_inputs_travel(tmp_path: Path, scheme: str) -> None:
    """Files and folders, also within lists and dicts, arrive as copies that plain ``open()`` reads."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    file, folder = FlyteFile(str(tmp_path / "b.txt")), FlyteDirectory(str(tmp_path / "data"))
    storage = Storage(f"{scheme}{tmp_path}/shared")
    moved = relocated(plan(FlyteContext("/raw"), [file, 3], folder=folder), storage, "kfr-one")
    (sent, three), sent_folder = moved.args[0], moved.kwargs["folder"]
    assert three == 3
    assert Path(sent.path).read_text() == "b"
    assert Path(sent_folder.path, "a.txt").read_text() == "a"
    assert moved.flyte.staged_prefix == str(tmp_path / "shared" / "runs" / "kfr-one" / "inputs")
    assert Path(sent.path).is_relative_to(moved.flyte.staged_prefix)
    assert Path(sent_folder.path).is_relative_to(moved.flyte.staged_prefix)


def test_remote_files_among_the_inputs_stay(tmp_path: Path) -> None:
    """The very same values go on."""
    file = FlyteFile("s3://bucket/file")
    assert relocated(plan(FlyteContext("/raw"), file), Storage(str(tmp_path)), "kfr-one").args == (file,)
