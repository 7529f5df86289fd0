"""What a ``@dynamic`` makes of our tasks in its own container, which knows less than the process that registered it.

Registered as ``pyflyte register`` does it, and run by the command that Flyte would run; each in a fresh interpreter.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.core.dynamic_job_pb2 import DynamicJobSpec
from flyteidl.core.literals_pb2 import LiteralMap
from flyteidl.core.tasks_pb2 import TaskTemplate
from flytekit import dynamic, task
from flytekit.configuration import ImageConfig, SerializationSettings
from flytekit.core.context_manager import FlyteEntities
from flytekit.tools.translator import get_serializable_task

from kfpytorch_ray import Elastic
from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.routing import ROUTE_VARIABLE

FLOW = """
from flytekit import dynamic, task
from {package} import Elastic

@task(task_config=Elastic(nnodes=2))
def train() -> int:
    return 1

@dynamic
def sweep() -> int:
    return train()
"""

REGISTER = """
import sys
from flytekit.configuration import ImageConfig, SerializationSettings
from flytekit.tools.repo import serialize_to_folder

env = dict(pair.split("=") for pair in sys.argv[1:])
settings = SerializationSettings(
    project="p", domain="d", version="v", image_config=ImageConfig.auto(img_name="registry.example/train:1"), env=env
)
serialize_to_folder(["flow"], settings, ".", "registered")
"""

OUTSIDE = {key: value for key, value in os.environ.items() if key not in (BACKEND_VARIABLE, ROUTE_VARIABLE)}


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a process in ``folder`` says."""
    environment = {**OUTSIDE, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def register(folder: Path, *env: str, package: str = "kfpytorch_ray", **variables: str) -> tuple[dict[str, Any], str]:
    """The templates of the tasks of a file by name, and what was said."""
    (folder / "flow.py").write_text(FLOW.format(package=package))
    (folder / "registered").mkdir()
    said = run([sys.executable, "-c", REGISTER, *env], folder, **variables)
    tasks = {}
    for path in (folder / "registered").glob("*_1.pb"):
        template = TaskSpec.FromString(path.read_bytes()).template
        tasks[template.id.name] = template
    return tasks, said


def execute(template: TaskTemplate, folder: Path) -> tuple[TaskTemplate, str]:
    """The task that a dynamic wants to have run, and what its container says."""
    (folder / "inputs.pb").write_bytes(LiteralMap().SerializeToString())
    values = {"{{.input}}": "inputs.pb", "{{.outputPrefix}}": "outputs", "{{.rawOutputDataPrefix}}": "raw"}
    program, *words = [values.get(word, "" if word.startswith("{{") else word) for word in template.container.args]
    script = str(Path(sys.executable).with_name(program))
    variables = {pair.key: pair.value for pair in template.container.env}
    said = run([script, *words], folder, FLYTE_INTERNAL_EXECUTION_ID="f1", **variables)
    (wanted,) = DynamicJobSpec.FromString((folder / "outputs" / "futures.pb").read_bytes()).tasks
    return wanted, said


def test_a_backend_given_by_env_at_registration_holds_in_a_dynamic(tmp_path: Path) -> None:
    """``pyflyte register --env`` chooses for the task and for who serialises it again, and nobody is warned."""
    tasks, said = register(tmp_path, f"{BACKEND_VARIABLE}=kuberay")
    assert "flow.train is" not in said
    again, said = execute(tasks["flow.sweep"], tmp_path)
    assert "flow.train is" not in said
    for template in (tasks["flow.train"], again):
        assert template.type == "ray"
        assert template.config["kfpytorch_ray.backend"] == "kuberay"
        assert BACKEND_VARIABLE in {pair.key for pair in template.container.env}


def test_who_registers_is_told_that_a_dynamic_does_not_know_this_process_variables(tmp_path: Path) -> None:
    """There the task falls back to the default."""
    tasks, said = register(tmp_path, **{BACKEND_VARIABLE: "kuberay"})
    assert "flow.train is registered for the backend 'kuberay', but where one of flow.sweep calls it" in said
    assert f"pyflyte register --env {BACKEND_VARIABLE}=kuberay\n" in said
    again, said = execute(tasks["flow.sweep"], tmp_path)
    assert (tasks["flow.train"].type, again.type) == ("ray", "pytorch")
    # The default may well be meant.
    assert "flow.train is" not in said


def test_upstreams_tasks_are_routed_in_a_dynamic_too_by_env_at_registration(tmp_path: Path) -> None:
    """Without, both variables are named; with them, the task is ours in the container as well."""
    switches = {BACKEND_VARIABLE: "kuberay", ROUTE_VARIABLE: "1"}
    env = [f"{name}={value}" for name, value in switches.items()]
    (tmp_path / "a").mkdir()
    _, said = register(tmp_path / "a", package="flytekitplugins.kfpytorch", **switches)
    assert f"pyflyte register --env {env[0]} --env {env[1]}\n" in said
    (tmp_path / "b").mkdir()
    tasks, said = register(tmp_path / "b", *env, package="flytekitplugins.kfpytorch", **switches)
    assert "flow.train is" not in said
    again, _ = execute(tasks["flow.sweep"], tmp_path / "b")
    assert again.type == "ray"


def train() -> int:
    return 1


@pytest.mark.parametrize("how", ["config", "environment", "dynamic"])
def test_nobody_is_warned_where_the_choice_is_in_the_code(
    how: str, double: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code is in the container of a dynamic, too; so is what the dynamic's own ``environment`` says."""
    monkeypatch.setattr(FlyteEntities, "entities", [])
    variable = {BACKEND_VARIABLE: "double"}
    monkeypatch.setenv(BACKEND_VARIABLE, "kubeflow" if how == "config" else "double")
    made: Any = task(
        task_config=Elastic(backend="double" if how == "config" else None),
        environment=variable if how == "environment" else None,
    )(train)
    dynamic(train, environment=variable if how == "dynamic" else None)
    settings = SerializationSettings(ImageConfig.auto(img_name="registry.example/train:1"), "p", "d", "v")
    with caplog.at_level(logging.WARNING):
        get_serializable_task({}, settings, made)  # type: ignore[arg-type]
    assert not caplog.records


def test_settings_that_name_another_backend_afterwards_do_not_reach_the_container(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``FlyteRemote.register_task(serialization_settings=)``: the container runs what is registered, and it is said."""
    made: Any = task(task_config=Elastic(nnodes=2), shared_memory=True)(train)
    image = ImageConfig.auto(img_name="registry.example/train:1")
    settings = SerializationSettings(image, "p", "d", "v", env={BACKEND_VARIABLE: "ray", "A": "1"})
    with caplog.at_level(logging.WARNING):
        template = get_serializable_task({}, settings, made).template  # type: ignore[arg-type]
    assert (template.type, template.container.env) == ("pytorch", {BACKEND_VARIABLE: "kubeflow", "A": "1"})
    assert "registered for the backend 'kubeflow', not for 'ray'" in caplog.text
