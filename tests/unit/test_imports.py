"""Import orders and routing, each in a fresh interpreter that has our entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FINDS_OURS = """
from flytekit.core.task import TaskPlugins
import kfpytorch_ray.task as own
for module in modules:
    assert TaskPlugins.find_pythontask_plugin(module.Elastic) is own.PytorchElasticFunctionTask, module
    assert TaskPlugins.find_pythontask_plugin(module.PyTorch) is own.PyTorchFunctionTask, module
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with what an installed kfpytorch_ray leaves behind."""
    info = tmp_path / "kfpytorch_ray-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kfpytorch_ray\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[flytekit.plugins]\nkfpytorch_ray = kfpytorch_ray.task\n")
    return tmp_path


def run(code: str, site: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KFPYTORCH_RAY_")}
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
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


def test_flytekit_alone_registers_the_tasks(site: Path) -> None:
    """The entry point suffices: our task classes are there without an import of ours."""
    assert "True" in run("import flytekit, sys\nprint('kfpytorch_ray.task' in sys.modules)", site)


def test_the_import_is_light(site: Path) -> None:
    """Neither ray nor torch nor kubernetes is imported before a task needs it."""
    heavy = "import kfpytorch_ray, sys\nprint({'ray', 'torch', 'kubernetes'} & set(sys.modules))"
    assert run(heavy, site).strip() == "set()"


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
    assert shown.strip() == f"kfpytorch_ray.task {expected}"
