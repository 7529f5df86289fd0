"""Import orders and routing, each in a fresh interpreter that has our entry point."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kfpytorch_ray

ROOT = Path(__file__).resolve().parents[2]

FINDS_OURS = """
from flytekit.core.task import TaskPlugins
import kfpytorch_ray.task as own
for module in modules:
    module.Elastic(), module.PyTorch()
    assert TaskPlugins.find_pythontask_plugin(module.Elastic) is own.PytorchElasticFunctionTask, module
    assert TaskPlugins.find_pythontask_plugin(module.PyTorch) is own.PyTorchFunctionTask, module
"""

FIRST_IMPORTS = """
import importlib.metadata, os, sys, traceback
import kubernetes, ray, torch

# flytekit's modules, without the package itself, whose import is what ends with that of our entry point.
find = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **wanted: [] if wanted.get("group") == "flytekit.plugins" else find(**wanted)
import flytekit.bin.entrypoint
importlib.metadata.entry_points = find
del sys.modules["flytekit"]
assert not [name for name in sys.modules if name.split(".")[0] == "kfpytorch_ray"]

def import_first(name):
    importlib.import_module(name)
    from kfpytorch_ray import Elastic, launch
    config = Elastic()
    assert "flytekit" in sys.modules and "kfpytorch_ray.task" in sys.modules
    from flytekit.core.task import TaskPlugins
    assert TaskPlugins.find_pythontask_plugin(type(config)).__name__ == "PytorchElasticFunctionTask"
    assert callable(launch)

names = sys.stdin.read().split()
for name in names:
    child = os.fork()
    if not child:
        try:
            import_first(name)
        except BaseException as error:
            print(name, *traceback.format_exception_only(error), flush=True)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
print(len(names), "done")
"""
"""Each module in a fork of a process that has only what others have made: starting 200 interpreters takes minutes."""


def modules_below(folder: Path, package: str) -> list[str]:
    """The names of all modules of a package, and its own; imports none."""
    names = [package]
    for module in pkgutil.iter_modules([str(folder)]):
        name = f"{package}.{module.name}"
        names += modules_below(folder / module.name, name) if module.ispkg else [name]
    return names


MODULES = modules_below(ROOT / "kfpytorch_ray", "kfpytorch_ray")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with what an installed kfpytorch_ray leaves behind."""
    info = tmp_path / "kfpytorch_ray-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kfpytorch_ray\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[flytekit.plugins]\nkfpytorch_ray = kfpytorch_ray.task\n")
    return tmp_path


def run(code: str, site: Path, given: str = "", **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KFPYTORCH_RAY_")}
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": path, **environment},
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    ["flytekit", "kfpytorch_ray", "kfpytorch_ray.config", "kfpytorch_ray.task", "kfpytorch_ray.adapters.kubeflow"],
)
def test_any_import_order_works(first: str, site: Path) -> None:
    """flytekit imports us at its own end; whoever is imported first, both are whole afterwards."""
    run(f"import {first}\nimport kfpytorch_ray as package\nimport flytekit\nmodules = [package]\n{FINDS_OURS}", site)


@pytest.mark.parametrize("part", range(2))
def test_any_module_of_ours_may_be_the_first(part: int, site: Path) -> None:
    """flytekit's import then meets one that is half made; whoever makes a config finds its task class all the same."""
    names = MODULES[part::2]
    told = run(FIRST_IMPORTS, site, "\n".join(names))
    assert told.splitlines() == [f"{len(names)} done"]


def test_flytekit_alone_registers_the_tasks(site: Path) -> None:
    """The entry point suffices: our task classes are there without an import of ours."""
    assert "True" in run("import flytekit, sys\nprint('kfpytorch_ray.task_classes' in sys.modules)", site)


@pytest.mark.parametrize("first", ["kfpytorch_ray", "kfpytorch_ray.cluster.agent"])
def test_agents_do_without_flytekit_and_torch(first: str, site: Path) -> None:
    """Every node of every cold start would wait for the import of either."""
    heavy = f"import {first}, sys\nprint({{'flytekit', 'ray', 'torch', 'kubernetes'}} & set(sys.modules))"
    assert run(heavy, site).strip() == "set()"


def test_type_checkers_see_what_is_imported_by_name() -> None:
    """The names of a lazy package are listed three times; none of the lists may drift."""
    tree = ast.parse(Path(kfpytorch_ray.__file__).read_text())
    (shown,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in shown.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname or alias.name: f"{node.module}" for node in imports for alias in node.names}
    assert homes == {name: f"kfpytorch_ray.{module}" for name, module in kfpytorch_ray._HOMES.items()}
    assert sorted(homes) == sorted(kfpytorch_ray.__all__)


@pytest.mark.parametrize("name", kfpytorch_ray.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """By attribute, once and again, and in ``dir()``; it is that of its home."""
    home = importlib.import_module(f"kfpytorch_ray.{kfpytorch_ray._HOMES[name]}")
    assert getattr(kfpytorch_ray, name) is getattr(kfpytorch_ray, name) is getattr(home, name)
    assert name in dir(kfpytorch_ray)


def test_no_module_has_a_public_name() -> None:
    """Its import would put the module in the place of the function or class."""
    assert not {f"kfpytorch_ray.{name}" for name in kfpytorch_ray.__all__} & {*MODULES}


def test_modules_are_there_as_attributes(site: Path) -> None:
    """As ``import kfpytorch_ray`` has always left them; other names are errors that look like any module's."""
    code = """
import kfpytorch_ray
assert kfpytorch_ray.errors.ConfigError is kfpytorch_ray.ConfigError
assert kfpytorch_ray.task.PytorchElasticFunctionTask is kfpytorch_ray.PytorchElasticFunctionTask
assert kfpytorch_ray.task.spawn_helper is kfpytorch_ray.spawn_helper
for name in ("lunch", "__wrapped__", "a.b"):
    assert not hasattr(kfpytorch_ray, name), name
assert not hasattr(kfpytorch_ray.task, "lunch")
"""
    run(code, site)


def test_defining_an_elastic_task_does_not_import_torch(tmp_path: Path, site: Path) -> None:
    """Registering many tasks stays fast."""
    (tmp_path / "flow.py").write_text(
        "from flytekit import task\nfrom kfpytorch_ray import Elastic\n"
        "@task(task_config=Elastic(nnodes=2))\ndef train(x: int) -> int:\n    return x\n"
    )
    assert "False" in run("import flow, sys\nprint('torch' in sys.modules)", site)


@pytest.mark.parametrize(
    "imports",
    [
        "import flytekitplugins.kfpytorch as upstream\nimport kfpytorch_ray",
        "import kfpytorch_ray\nimport flytekitplugins.kfpytorch as upstream",
    ],
)
def test_upstreams_types_are_routed_on_request(imports: str, site: Path) -> None:
    """Whichever was imported first, and however often it is asked for."""
    route = "kfpytorch_ray.route_upstream()\nkfpytorch_ray.route_upstream()\nmodules = [kfpytorch_ray, upstream]\n"
    run(f"{imports}\n{route}{FINDS_OURS}", site)


@pytest.mark.parametrize(
    "imports",
    [
        "import flytekitplugins.kfpytorch as upstream",
        "import flytekit\nimport flytekitplugins.kfpytorch as upstream",
        "import kfpytorch_ray\nimport flytekitplugins.kfpytorch as upstream",
        "import kfpytorch_ray.planning\nimport flytekitplugins.kfpytorch as upstream",
    ],
)
def test_upstreams_types_are_routed_by_the_environment(imports: str, site: Path) -> None:
    """Unedited code runs on our classes, also where upstream's import is what imports flytekit."""
    switched = f"{imports}\nimport kfpytorch_ray\nmodules = [kfpytorch_ray, upstream]\n{FINDS_OURS}"
    run(switched, site, KFPYTORCH_RAY_ROUTE_UPSTREAM="1")


def test_without_the_switch_upstream_serves_its_own_types(site: Path) -> None:
    """Nothing is routed unasked."""
    code = """
import kfpytorch_ray
import flytekitplugins.kfpytorch.task as upstream
from flytekit.core.task import TaskPlugins
assert TaskPlugins.find_pythontask_plugin(upstream.Elastic) is upstream.PytorchElasticFunctionTask
"""
    run(code, site)


def test_without_upstream_routing_names_the_pip_command(site: Path) -> None:
    """Asked for, it is an error; switched on by environment, flytekit can still be imported."""
    code = """
import sys
sys.modules["flytekitplugins"] = None
import kfpytorch_ray
try:
    kfpytorch_ray.route_upstream()
except kfpytorch_ray.BackendUnavailableError as error:
    print(error)
"""
    assert "pip install flytekitplugins-kfpytorch" in run(code, site, KFPYTORCH_RAY_ROUTE_UPSTREAM="1")


def test_a_routed_task_is_ours_from_definition_to_template(tmp_path: Path, site: Path) -> None:
    """Unedited upstream code gets the backend of the environment, and its container routes again."""
    (tmp_path / "flow.py").write_text(
        "from flytekit import task\nfrom flytekitplugins.kfpytorch import Elastic, PyTorch\n"
        "@task(task_config=Elastic(nnodes=2))\ndef train(x: int) -> int:\n    return x\n"
    )
    shown = run(
        "import flow\nprint(type(flow.train).__module__, flow.train.environment)",
        site,
        KFPYTORCH_RAY_ROUTE_UPSTREAM="1",
        KFPYTORCH_RAY_BACKEND="ray",
    )
    expected = "{'KFPYTORCH_RAY_BACKEND': 'ray', 'KFPYTORCH_RAY_ROUTE_UPSTREAM': '1'}"
    assert shown.strip() == f"kfpytorch_ray.task_classes {expected}"
