"""Which function ``FILE:FUNCTION`` names, and what of this machine has to travel for it."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rich_click as click
from flytekit import Resources
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray import ConfigError, Elastic, RayBackend
from kfpytorch_ray.cli.job import Wanted, elastic_of, pod_resources
from kfpytorch_ray.cli.options import Reach, amounts, runtime_environment
from kfpytorch_ray.cli.targets import Target, find_target
from kfpytorch_ray.cli.travel import working_dir_for
from kfpytorch_ray.config import DEFAULT_WORKING_DIR_EXCLUDES
from kfpytorch_ray.payload import import_root

ADDRESS = "http://head:8265"
FLOW = """
from flytekit import Resources, task, workflow
from kfpytorch_ray import Elastic, KubeflowBackend, KubeRayBackend, PyTorch, RayBackend

@task(task_config=Elastic(nnodes="1:2", nproc_per_node=2, max_restarts=1, backend=RayBackend(env={"A": "1"}, storage="s3://theirs")))
def train(x: int) -> int:
    return x

@task(task_config=Elastic(nproc_per_node=2))
def plain(x: int) -> int:
    return x

@task(task_config=Elastic(backend=KubeflowBackend()))
def kubeflow(x: int) -> int:
    return x

@task(task_config=Elastic(backend=KubeRayBackend(image="i")))
def kuberay(x: int) -> int:
    return x

@task(task_config=Elastic(backend=KubeRayBackend(image="i", working_dir="")))
def in_the_image(x: int) -> int:
    return x

@task(task_config=Elastic(), environment={"KFPYTORCH_RAY_BACKEND": "kubeflow"})
def by_variable(x: int) -> int:
    return x

@task(task_config=PyTorch(num_workers=1))
def replicas(x: int) -> int:
    return x

@task
def ordinary(x: int) -> int:
    return x

@workflow
def flow(x: int) -> int:
    return train(x=x)
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test imports, and from where, is gone after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def name() -> str:
    """Of a module that no other test has imported."""
    return f"m{uuid.uuid4().hex[:12]}"


def write(path: Path, text: str = "def main(x: int = 1) -> int:\n    return x\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def in_file(path: Path, text: str | None = None) -> Target:
    return find_target(f"{write(path, text) if text else write(path)}:main")


def test_a_file_is_imported_by_the_name_that_workers_will_use(tmp_path: Path, name: str) -> None:
    """From its own folder, whatever the current one is."""
    target = in_file(tmp_path / "else" / f"{name}.py")
    assert (target.function(x=3), target.task) == (3, None)
    assert target.function.__module__ == name
    assert str(target.root) == import_root(target.function) == str(tmp_path / "else")


def test_a_file_of_a_package_is_imported_below_it(tmp_path: Path, name: str) -> None:
    """So that its relative imports work."""
    for folder in (name, f"{name}/deep"):
        write(tmp_path / folder / "__init__.py", "")
    write(tmp_path / name / "deep" / "helper.py", "VALUE = 7\n")
    target = in_file(
        tmp_path / name / "deep" / "job.py", "from .helper import VALUE\ndef main() -> int:\n    return VALUE\n"
    )
    assert target.function() == 7
    assert target.function.__module__ == f"{name}.deep.job"
    assert str(target.root) == import_root(target.function) == str(tmp_path)


def test_a_relative_path_and_a_dotted_module_name_the_same(tmp_path: Path, name: str) -> None:
    """A module is looked for in the current folder, too."""
    write(tmp_path / f"{name}.py")
    by_path = find_target(f"{name}.py:main")
    by_module = find_target(f"{name}:main")
    assert by_path.function is by_module.function
    assert by_module.root is None


def test_a_static_method_can_be_launched(tmp_path: Path, name: str) -> None:
    """Names may have parts."""
    write(tmp_path / f"{name}.py", "class Trainer:\n    @staticmethod\n    def fit() -> int:\n        return 2\n")
    assert find_target(f"{name}.py:Trainer.fit").function() == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train.py", "expected FILE:FUNCTION"),
        (":main", "expected FILE:FUNCTION"),
        ("there_is_none.py:main", "no file 'there_is_none.py'"),
        ("there.is.none:main", "no module 'there'"),
    ],
)
def test_what_is_not_there_is_said(text: str, told: str) -> None:
    """By what was typed."""
    with pytest.raises(ConfigError, match=told):
        find_target(text)


@pytest.mark.parametrize(
    ("source", "function", "told"),
    [
        (
            "def main(): pass\ndef other(): pass\nfrom json import loads\n",
            "train",
            "has no 'train'; it has main, other$",
        ),
        ("main = 3\n", "main", "main is of type int"),
        ("import no_such_package\n", "main", "No module named 'no_such_package'"),
        ("def broken(:\n", "main", "SyntaxError"),
        (FLOW, "flow", "is a PythonFunctionWorkflow"),
    ],
)
def test_what_cannot_be_launched_says_why(source: str, function: str, told: str, tmp_path: Path, name: str) -> None:
    """With the user's own lines where their module fails."""
    path = write(tmp_path / f"{name}.py", source)
    with pytest.raises(ConfigError, match=told):
        find_target(f"{path}:{function}")


def test_a_module_that_fails_shows_the_users_lines_only(tmp_path: Path, name: str) -> None:
    """Neither ours nor those of the import machinery."""
    path = write(tmp_path / f"{name}.py", "def load():\n    raise RuntimeError('no data')\nload()\n")
    with pytest.raises(ConfigError) as caught:
        find_target(f"{path}:main")
    text = str(caught.value)
    assert "RuntimeError: no data" in text
    assert text.count("File ") == 2
    assert "targets.py" not in text


def test_a_file_that_another_module_hides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Something else would run."""
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError, match="Another module has this name"):
        in_file(tmp_path / f"{name}.py")


def test_a_name_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    """Python would look for a package."""
    with pytest.raises(ConfigError, match="without other dots"):
        in_file(tmp_path / "v1.2.py")


@pytest.mark.parametrize("address", [None, "local"])
def test_on_this_machine_nothing_has_to_travel(address: str | None, tmp_path: Path, name: str) -> None:
    """A Ray of this process reads the same disk."""
    assert working_dir_for(in_file(tmp_path / "else" / f"{name}.py"), address) is None


def test_a_file_below_the_current_folder_travels_with_it(tmp_path: Path, name: str) -> None:
    """As everywhere."""
    assert working_dir_for(in_file(tmp_path / "sub" / f"{name}.py"), ADDRESS) is None


def test_a_file_elsewhere_travels_with_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So that it can be run from anywhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert working_dir_for(in_file(tmp_path / "else" / f"{name}.py"), ADDRESS) == str(tmp_path / "else")
    monkeypatch.setenv("RAY_ADDRESS", ADDRESS)
    assert working_dir_for(in_file(tmp_path / "else" / f"{name}.py"), None) == str(tmp_path / "else")


def test_a_home_folder_is_never_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds keys and more; the function travels by value, and a folder below the home folder by itself."""
    import cloudpickle

    monkeypatch.setenv("HOME", str(tmp_path))
    target = in_file(tmp_path / f"{name}.py")
    assert working_dir_for(target, ADDRESS) == ""
    assert "travels by value" in capsys.readouterr().err
    assert b"def main" not in cloudpickle.dumps(target.function)
    assert len(cloudpickle.dumps(target.function)) > 200
    cloudpickle.unregister_pickle_by_value(target.module)
    below = in_file(tmp_path / "project" / f"{name}x.py")
    assert working_dir_for(below, ADDRESS) == str(tmp_path / "project")


@pytest.fixture
def flow(tmp_path: Path, name: str) -> Any:
    """The tasks of FLOW, by name."""
    path = write(tmp_path / f"{name}.py", FLOW)
    return lambda function: find_target(f"{path}:{function}")


def test_a_plain_function_runs_on_ray_with_one_worker(tmp_path: Path, name: str) -> None:
    """What this command line is for, where nobody chose otherwise."""
    assert elastic_of(in_file(tmp_path / f"{name}.py"), Wanted()) == Elastic(backend="ray")


def test_the_environment_and_options_choose_another_backend(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option before the variable."""
    target = in_file(tmp_path / f"{name}.py")
    monkeypatch.setenv("KFPYTORCH_RAY_BACKEND", "kubeflow")
    assert elastic_of(target, Wanted()).backend == "kubeflow"
    assert elastic_of(target, Wanted(backend="ray")).backend == "ray"


def test_a_tasks_own_config_is_the_base_and_options_win(flow: Any) -> None:
    """Field by field, also in its backend's options."""
    target = flow("train")
    assert target.function(x=4) == 4
    wanted = Wanted({"nproc_per_node": 4}, None, {"address": ADDRESS, "lease_s": 60.0}, {"B": "2"})
    made = elastic_of(target, wanted)
    backend = RayBackend(address=ADDRESS, env={"A": "1", "B": "2"}, storage="s3://theirs", lease_s=60.0)
    assert made == Elastic("1:2", 4, max_restarts=1, backend=backend)
    assert target.task.task_config.nproc_per_node == 2, "the task's own config stays as it is"


def test_what_travels_is_laid_over_the_tasks_own(flow: Any) -> None:
    """Patterns and the parts of a runtime environment come beside those that there are; amounts replace them."""
    options = {"resources_per_node": {"GPU": 1.0}}
    wanted = Wanted(options=options, excludes=("data/",), runtime_env={"pip": ["einops"]})
    made: Any = elastic_of(flow("train"), wanted).backend
    assert made.excludes == (*DEFAULT_WORKING_DIR_EXCLUDES, "data/")
    assert (made.runtime_env, made.resources_per_node) == ({"pip": ["einops"]}, {"GPU": 1.0})
    own = RayBackend(excludes=("own/",), runtime_env={"pip": [], "config": {}}, resources_per_node={"CPU": 2})
    target = flow("train")
    target.task.task_config.backend = own
    made = elastic_of(target, wanted).backend
    assert made.excludes == ("own/", "data/")
    assert (made.runtime_env, made.resources_per_node) == ({"pip": ["einops"], "config": {}}, {"GPU": 1.0})
    with pytest.raises(ConfigError, match="--resources: the backend 'kubeflow' has no such option"):
        elastic_of(flow("kubeflow"), Wanted(options=options))


@pytest.mark.parametrize(("function", "backend"), [("plain", "kuberay"), ("plain", "kubeflow"), ("kuberay", None)])
def test_pods_can_be_asked_for_on_the_command_line(flow: Any, function: str, backend: str | None) -> None:
    """Of a plain function, too; resources are what Kubernetes calls them."""
    pods = {"image": "train:1", "namespace": "training", "context": "lab"}
    asked = {"resources_per_node": amounts("CPU=8,GPU=1,memory=64Gi"), "storage": "s3://bucket", **pods}
    wanted = Wanted(backend=backend, options=asked)
    made: Any = elastic_of(flow(function), wanted).backend
    assert (made.image, made.namespace, made.context, made.storage) == (*pods.values(), "s3://bucket")
    assert pod_resources(flow(function), wanted) == spec(cpu="8", gpu="1", mem=str(64 * 2**30))
    half = Wanted(backend="kuberay", options={"resources_per_node": {"CPU": 0.5}})
    assert pod_resources(flow("plain"), half) == spec(cpu="500m")
    assert pod_resources(flow("train"), Wanted(options=asked)) is None
    for amount, said in (
        ({"TPU": 1.0}, r"a pod has no TPU(?s:.*)Fix: Name CPU, GPU, memory only"),
        ({"GPU": 0.5}, "whole"),
    ):
        with pytest.raises(ConfigError, match=said):
            pod_resources(flow("plain"), Wanted(backend="kuberay", options={"resources_per_node": amount}))


def spec(**requests: str) -> ResourceSpec:
    return ResourceSpec(requests=Resources(**requests), limits=Resources())


def test_amounts_and_runtime_environments_as_they_are_typed(tmp_path: Path) -> None:
    """Quantities as Kubernetes has them; YAML or JSON in a file, JSON on the command line."""
    assert amounts("CPU=8, GPU=0.5,memory=64Gi") == {"CPU": 8.0, "GPU": 0.5, "memory": 64.0 * 2**30}
    for wrong in ("CPU", "CPU=", "CPU=many", "CPU=1,,", "CPU=-1", "GPU=inf", "GPU=nan"):
        with pytest.raises(click.BadParameter):
            amounts(wrong)
    (tmp_path / "env.yaml").write_text("pip: [einops]\n")
    assert runtime_environment(str(tmp_path / "env.yaml")) == runtime_environment('{"pip": ["einops"]}')
    (tmp_path / "list.yaml").write_text("[einops]\n")
    for wrong in ("{", str(tmp_path / "none.yaml"), str(tmp_path / "list.yaml"), str(tmp_path)):
        with pytest.raises(click.BadParameter):
            runtime_environment(wrong)


@pytest.mark.parametrize(
    ("function", "backend"),
    [("plain", "ray"), ("kubeflow", "kubeflow"), ("by_variable", "kubeflow"), ("ordinary", "ray")],
)
def test_a_tasks_backend_counts(flow: Any, function: str, backend: str) -> None:
    """Its config's, its environment's; else ray."""
    made = elastic_of(flow(function), Wanted()).backend
    assert getattr(made, "name", made) == backend


def test_a_task_without_nodes_to_choose_is_refused(flow: Any) -> None:
    """Its replicas are not torch elastic's."""
    with pytest.raises(ConfigError, match="is a PyTorch"):
        elastic_of(flow("replicas"), Wanted())


def test_options_that_the_backend_does_not_have_are_refused_together(flow: Any) -> None:
    """By the names that were typed."""
    with pytest.raises(ConfigError, match="2 problems") as caught:
        elastic_of(flow("kubeflow"), Wanted(options={"address": ADDRESS, "headers": {}}))
    assert "--address: the backend 'kubeflow' has no such option" in str(caught.value)
    assert "--headers: the backend" in str(caught.value)


def test_a_file_that_lies_elsewhere_is_sent_to_kuberay_with_its_folder(
    flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to a Ray that is elsewhere, unless the task says that all is in the image."""
    found = flow("kuberay")
    assert elastic_of(found, Wanted()).backend.working_dir is None  # type: ignore[union-attr]
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert elastic_of(found, Wanted()).backend.working_dir == str(tmp_path)  # type: ignore[union-attr]
    assert elastic_of(flow("in_the_image"), Wanted()).backend.working_dir == ""  # type: ignore[union-attr]


def test_headers_come_from_the_environment(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for Ray's own command line; and nothing of them is repeated where they are wrong."""
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "secret"}')
    assert elastic_of(flow("train"), Wanted()).backend.headers == {"Authorization": "secret"}  # type: ignore[union-attr]
    assert elastic_of(flow("kubeflow"), Wanted()).backend.name == "kubeflow"  # type: ignore[union-attr]
    assert elastic_of(flow("kuberay"), Wanted()).backend.name == "kuberay"  # type: ignore[union-attr]
    assert Reach().options("ray") == RayBackend(headers={"Authorization": "secret"})
    assert Reach().options("kuberay") is None
    for wrong in ("secret", '["secret"]', '{"a": {"b": "secret"}}'):
        monkeypatch.setenv("RAY_JOB_HEADERS", wrong)
        with pytest.raises(ConfigError, match="RAY_JOB_HEADERS") as caught:
            elastic_of(flow("train"), Wanted())
        assert "secret" not in str(caught.value)


def test_a_launch_of_a_task_has_its_resources_and_environment(detached: Any) -> None:
    """They would be dropped in silence otherwise."""
    from flytekit import task

    from kfpytorch_ray.plain_call import launch_function

    @task(task_config=Elastic(backend="detached"), requests=Resources(cpu="3", gpu="1"), environment={"A": "1"})
    def train(x: int) -> int:
        return x

    launch_function(train.task_function, (), {"x": 1}, train.task_config, task=train)
    (plan,) = detached.plans
    assert plan.name == train.name
    assert plan.resources.amounts == {"CPU": 3.0, "GPU": 1.0}
    assert plan.environment["A"] == "1"
