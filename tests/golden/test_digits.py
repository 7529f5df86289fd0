"""examples/digits.py as it is created on Kubernetes, compared whole with the files beside this one.

After a wanted change: pytest tests/golden --renew-golden, and look at what git says has changed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_schema import pytorch_job_crds, ray_job_crds
from flytekit.configuration import FastSerializationSettings, Image, ImageConfig, SerializationSettings

from kfpytorch_ray.config import KubeflowBackend, KubeRayBackend
from kfpytorch_ray.rendering import render

HERE = Path(__file__).parent
IMAGE = Image(name="default", fqn="registry.example/digits", tag="1")
SETTINGS = SerializationSettings(
    project="project",
    domain="domain",
    version="v1",
    image_config=ImageConfig(default_image=IMAGE, images=[IMAGE]),
    fast_serialization_settings=FastSerializationSettings(
        enabled=True, destination_dir="/root", distribution_location="s3://bucket/code.tar.gz"
    ),
)
OPTIONS = {
    ("kuberay", "kubernetes"): KubeRayBackend(
        image=IMAGE.full, namespace="digits", storage="s3://bucket/prefix", ray_version="2.60.0"
    ),
    ("kubeflow", "kubernetes"): KubeflowBackend(image=IMAGE.full, namespace="digits", storage="s3://bucket/prefix"),
}
WAYS = [("kuberay", "flyte"), ("kubeflow", "flyte"), *OPTIONS]
CRDS = {"kuberay": ray_job_crds, "kubeflow": pytorch_job_crds}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's task, from a module of its own name."""
    monkeypatch.setenv("KFPYTORCH_RAY_BACKEND", "ray")
    spec = importlib.util.spec_from_file_location("digits", HERE.parents[1] / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "digits", module)
    spec.loader.exec_module(module)
    return module.train


@pytest.mark.parametrize(("backend", "via"), WAYS)
def test_the_manifest_is_the_golden_one(backend: str, via: str, train: Any, request: pytest.FixtureRequest) -> None:
    """Every field, so that no change of it goes unseen."""
    rendered = render(train, OPTIONS.get((backend, via), backend), via, SETTINGS)
    golden = HERE / f"digits-{backend}-{via}.yaml"
    header = "".join(f"# lost: {text}\n" for text in rendered.lost)
    text = header + yaml.safe_dump_all(rendered.manifests, width=120)
    if request.config.getoption("--renew-golden"):
        golden.write_text(text)
    assert golden.read_text() == text


@pytest.mark.parametrize(("backend", "via"), WAYS)
def test_the_golden_manifest_is_valid(backend: str, via: str, crds: Path) -> None:
    """For every version of the operator that there is a definition of."""
    for manifest in yaml.safe_load_all((HERE / f"digits-{backend}-{via}.yaml").read_text()):
        assert {version: crd.problems(manifest) for version, crd in CRDS[backend]().items()} == {
            version: [] for version in CRDS[backend]()
        }
