"""Manifests, configuration and the Dockerfile of docs/: as Kubernetes, KubeRay, Flyte and pip would read them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import rich_click as click
import tomllib
import yaml
from blocks import ROOT, Block, blocks
from crd_schema import CRDS, CRDS_VARIABLE, load_crd
from kubernetes import client

from kfpytorch_ray.adapters.kuberay import KubeRayAdapter
from kfpytorch_ray.cli.group import main

MANIFESTS = [
    pytest.param(manifest, id=f"{block}-{manifest['kind']}")
    for block in blocks("yaml")
    for manifest in yaml.safe_load_all(block.code)
    if "kind" in manifest
]
SETTINGS = [block for block in blocks("yaml") if "kind:" not in block.code]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_kubernetes_knows_every_field(manifest: dict[str, Any]) -> None:
    """Custom resources by their definitions, others by the official client's models."""
    if manifest["apiVersion"].startswith("ray.io/"):
        if not CRDS.is_dir():
            pytest.skip(f"no CRDs at {CRDS}; {CRDS_VARIABLE} may name a folder that has them")
        file = f"ray.io_{manifest['kind'].lower()}s.yaml"
        assert load_crd("kuberay-v1.7.0", file).problems(manifest) == []
        assert load_crd("kuberay-v1.3.2", file).problems(manifest) == []
    else:
        assert list(unknown_fields(f"V1{manifest['kind']}", manifest)) == []


def test_an_unknown_field_is_found() -> None:
    """What the test above leans on."""
    policy = {"spec": {"ingress": [{"from": [{"podSelectors": {}}]}], "podSelector": {}}, "kindly": 1}
    assert list(unknown_fields("V1NetworkPolicy", policy)) == ["kindly", "spec.ingress.from.podSelectors"]


def unknown_fields(model: str, value: Any, path: str = "") -> list[str]:
    """Paths of what a model of the official client does not have."""
    if listed := re.fullmatch(r"[Ll]ist\[(.+)\]", model):
        return [found for item in value for found in unknown_fields(listed[1], item, path)]
    if mapped := re.fullmatch(r"[Dd]ict[\[(]str, (.+)[\])]", model):
        return [found for item in value.values() for found in unknown_fields(mapped[1], item, path)]
    known = getattr(client, model, None)
    if known is None or not hasattr(known, "attribute_map"):
        return []
    types = {key: known.openapi_types[name] for name, key in known.attribute_map.items()}
    found = []
    for key, item in value.items():
        below = f"{path}.{key}".lstrip(".")
        found += unknown_fields(types[key], item, below) if key in types else [below]
    return sorted(found)


def test_the_commands_of_containers_are_taken() -> None:
    """Where a container runs kfpytorch-ray, it takes its words."""
    said = [
        words
        for (manifest,) in (one.values for one in MANIFESTS)
        for words in _lists(manifest)
        if words[:1] == ["kfpytorch-ray"]
    ]
    assert said
    for _, name, *rest in said:
        main.commands[name].make_context(name, rest, parent=click.Context(main))


def _lists(value: Any) -> list[list[Any]]:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, list) else []
    return own + [found for item in below for found in _lists(item)]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_flytes_configuration_enables_what_tasks_register(block: Block) -> None:
    """Both task types are enabled, and are the default of their plugin."""
    plugins = yaml.safe_load(block.code)["tasks"]["task-plugins"]
    for task_type in (KubeRayAdapter(None).task_type(None), "pytorch"):  # type: ignore[arg-type]
        assert plugins["default-for-task-types"][task_type] in plugins["enabled-plugins"]


@pytest.mark.parametrize("block", blocks("dockerfile"), ids=str)
def test_the_dockerfile_installs_what_is_tested(block: Block) -> None:
    """Its instructions exist, its versions are those of the tests, and the wheel and its extras are ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    lines = [line for line in block.code.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER"}
    pinned = dict(re.findall(r"'([\w-]+)(?:\[\w+\])?==([^']+)'", block.code))
    assert pinned
    assert pinned == {name: tested[name] for name in pinned}
    wheel = f"{project['name']}-{project['version']}-py3-none-any.whl"
    assert re.findall(r"\w+-[\d.]+-py3-none-any\.whl", block.code) == [wheel, wheel]
    (extras,) = re.findall(r"\.whl\[([\w,]+)\]", block.code)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
