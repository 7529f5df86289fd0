"""Tables of docs/ beside the code that they are about."""

from __future__ import annotations

import ast
import dataclasses
from enum import Enum
from importlib import import_module
from typing import Any

import pytest
import tomllib
from blocks import ROOT, code_spans, table
from flytekit import Resources

import kfpytorch_ray
from kfpytorch_ray.backends import choose_backend, load_adapter
from kfpytorch_ray.config import (
    CleanPodPolicy,
    Elastic,
    KubeRayBackend,
    Master,
    PyTorch,
    RayBackend,
    RestartPolicy,
    RunPolicy,
    Worker,
)

FIELDS = {code_spans(row[0])[0]: row[1:] for row in table("docs/guide.md", "| field |")}


def test_every_field_of_upstream_has_a_row() -> None:
    """And there is none of a field that upstream does not have."""
    upstream = import_module("flytekitplugins.kfpytorch.task")
    there = set()
    for name in ("Elastic", "PyTorch", "Master", "Worker", "RunPolicy"):
        there |= {f"{name}.{field.name}" for field in dataclasses.fields(getattr(upstream, name))}
    for policy in (upstream.RestartPolicy, upstream.CleanPodPolicy):
        assert issubclass(policy, Enum)
        there |= {f"{policy.__name__}.{member.name}" for member in policy}
    assert set(FIELDS) == there


def pytorch(**fields: Any) -> PyTorch:
    return PyTorch(worker=Worker(replicas=1), **fields)


TRIALS = {
    "Elastic.rdzv_configs": Elastic(rdzv_configs={"read_timeout": 9}),
    "Elastic.start_method": Elastic(start_method="fork"),
    "Elastic.increase_shared_mem": Elastic(increase_shared_mem=False),
    "Master.image": pytorch(master=Master(image="i")),
    "Worker.image": PyTorch(worker=Worker(replicas=1, image="i")),
    "Worker.replicas": pytorch(),
    "RunPolicy.clean_pod_policy": Elastic(run_policy=RunPolicy(clean_pod_policy=CleanPodPolicy.ALL)),
    "RunPolicy.ttl_seconds_after_finished": Elastic(run_policy=RunPolicy(ttl_seconds_after_finished=9)),
    "RunPolicy.active_deadline_seconds": Elastic(run_policy=RunPolicy(active_deadline_seconds=9)),
    "RunPolicy.backoff_limit": Elastic(run_policy=RunPolicy(backoff_limit=9)),
    "RestartPolicy.ALWAYS": pytorch(master=Master(restart_policy=RestartPolicy.ALWAYS)),
}


@pytest.mark.parametrize(("column", "backend"), [(0, "kubeflow"), (1, "ray"), (2, "kuberay")])
@pytest.mark.parametrize("field", TRIALS)
def test_what_is_said_to_be_refused_or_warned_of_is(field: str, column: int, backend: str) -> None:
    """A cell says "error" or "warning" where the backend's check does, and nowhere else."""
    config = TRIALS[field]
    cell = FIELDS[field][column]
    said = FIELDS[field][1] if cell.startswith(("as `ray`", "likewise")) else cell
    found = load_adapter(choose_backend(backend)).check(config)
    name = field.partition(".")[2] if field != "RestartPolicy.ALWAYS" else "restart_policy"
    assert any(name in problem for problem in found.problems) == said.startswith("an error"), (said, found)
    assert any(name in warning for warning in found.warnings) == ("warning" in said), (said, found)


@pytest.mark.parametrize("role", ["Master", "Worker"])
def test_two_ways_to_give_a_nodes_resources_are_refused(role: str) -> None:
    """As the rows of a master's and a worker's requests say."""
    asked = Resources(cpu="1")
    config = {
        "Master": pytorch(master=Master(requests=asked)),
        "Worker": PyTorch(worker=Worker(replicas=1, requests=asked)),
    }[role]
    adapter = load_adapter(choose_backend(RayBackend(resources_per_node={"CPU": 1})))
    assert "resources_per_node" in str(adapter.check(config).problems)
    assert "an error together with `resources_per_node`" in FIELDS[f"{role}.requests"][1]


def test_every_error_is_listed_with_whether_it_may_be_retried() -> None:
    """Those that a user can import."""
    rows = {code_spans(row[0])[0]: row[2] for row in table("docs/guide.md", "| error |")}
    errors = {
        name: value
        for name in kfpytorch_ray.__all__
        if isinstance(value := getattr(kfpytorch_ray, name), type)
        and issubclass(value, kfpytorch_ray.KfpytorchRayError)
    }
    assert rows == {name: "yes" if error.retryable else "no" for name, error in errors.items()}


def test_defaults_are_the_codes() -> None:
    """Of the options in the table on tuning."""
    options = RayBackend()
    for name, default, _ in table("docs/guide.md", "| option |"):
        (option,), (value,) = code_spans(name), code_spans(default)
        assert ast.literal_eval(value) == getattr(options, option), option
        assert option == "keep_warm_s" or hasattr(KubeRayBackend(), option)


def test_versions_are_those_of_the_tests() -> None:
    """Ranges as the package asks for them, and what the tests run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, span, version in table("docs/operations.md", "| package |"):
        assert f"{package}{span.strip('`')}" in asked
        assert version == tested[package]
