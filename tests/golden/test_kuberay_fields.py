"""Fields that a KubeRay does not know: found on small schemas, and checked against what KubeRay publishes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_schema import KUBERAY_VERSIONS, ray_job_crds

from kfpytorch_ray.cluster.kube.kuberay_fields import GONE, SINCE, since, unknown_field_problems, unknown_fields

FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}

TEXT = {"type": "string"}
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "spec": {
            "type": "object",
            "properties": {
                "size": {"type": "integer"},
                "words": {"type": "object", "additionalProperties": TEXT},
                "parts": {"type": "object", "additionalProperties": {"type": "object", "properties": {"a": TEXT}}},
                "any": {"type": "object", "additionalProperties": True},
                "free": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": True,
                    "properties": {"known": {"type": "object", "properties": {"a": TEXT}}},
                },
                "closed": {"type": "object"},
                "pod": {"type": "object", "x-kubernetes-embedded-resource": True, "properties": {"spec": TEXT}},
                "list": {"type": "array", "items": {"type": "object", "properties": {"name": TEXT}}},
                "lists": {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "object", "properties": {"a": TEXT}}},
                },
            },
        }
    },
}


@functools.cache
def schema(version: str, kind: str, folder: Path) -> dict[str, Any]:
    """As a cluster's definition has it."""
    definition = yaml.load((folder / f"kuberay-v{version}" / FILES[kind]).read_text(), yaml.CSafeLoader)
    (own,) = (entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
    found: dict[str, Any] = own["schema"]["openAPIV3Schema"]
    return found


def knows(of: dict[str, Any], path: str) -> bool:
    """Whether a schema has a field; a reading of the schema that is not the one under test."""
    for part in path.split("."):
        of = of.get("properties", {}).get(part.removesuffix("[]"), {})
        of = of.get("items", {}) if part.endswith("[]") else of
    return bool(of)


def minor(version: str) -> tuple[int, int]:
    major, second = version.split(".")[:2]
    return int(major), int(second)


def job_with(path: str, value: Any) -> dict[str, Any]:
    """A RayJob with one field, in each list of its path one item."""
    for part in reversed(path.split(".")):
        value = {part.removesuffix("[]"): [value] if part.endswith("[]") else value}
    found: dict[str, Any] = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}, **value}
    return found


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ({}, ()),
        ({"size": 1, "words": {"a": "b"}, "any": {"a": {"b": 1}}, "free": {"a": {"b": 1}}}, ()),
        ({"sizes": 1, "size": 2}, ("spec.sizes",)),
        ({"sizes": {"a": {"b": 1}}}, ("spec.sizes",)),
        ({"sizes": None}, ("spec.sizes",)),
        ({"parts": {"one": {"a": "x", "b": "y"}}}, ("spec.parts.one.b",)),
        ({"free": {"known": {"a": "x", "b": "y"}}}, ("spec.free.known.b",)),
        ({"closed": {"a": 1}}, ("spec.closed.a",)),
        ({"pod": {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": "x", "status": {}}}, ("spec.pod.status",)),
        ({"list": [{"name": "a"}, {"nam": "b"}, {"nam": "c", "x": 1}]}, ("spec.list[].nam", "spec.list[].x")),
        ({"lists": [[{"a": "x"}], [{"b": "y"}]]}, ("spec.lists[][].b",)),
        ({"size": {"a": 1}, "words": [1]}, ("spec.size.a",)),
    ],
)
def test_what_a_server_would_drop_is_named_once(spec: dict[str, Any], paths: tuple[str, ...]) -> None:
    """Open objects and maps keep what they hold, everything else only what the schema has; items share a path."""
    manifest = {"apiVersion": "v1", "kind": "Thing", "metadata": {"any": {"thing": 1}}, "spec": spec}
    assert unknown_fields(manifest, SMALL) == paths


def test_metadata_belongs_to_the_whole_object_only() -> None:
    """Every object has apiVersion, kind and metadata, whatever its schema says; a part of it has not."""
    assert unknown_fields({"metadata": {}, "data": 1, "spec": {"metadata": {}}}, SMALL) == ("data", "spec.metadata")


@pytest.mark.parametrize("path", sorted(SINCE))
def test_the_table_is_what_kuberay_publishes(path: str, crds: Path) -> None:
    """A field is in no definition before its version, and in all from it on until it is gone."""
    kinds = [kind for kind in FILES if any(knows(schema(version, kind, crds), path) for version in KUBERAY_VERSIONS)]
    assert kinds, "no definition has it"
    for kind in kinds:
        for version in KUBERAY_VERSIONS:
            lives = minor(version) >= minor(SINCE[path]) and not (
                path in GONE and minor(version) >= minor(GONE[path][0])
            )
            assert knows(schema(version, kind, crds), path) == lives, f"{kind} of {version}"


def test_the_table_misses_no_field_of_kuberays_own(crds: Path) -> None:
    """Whatever the definitions gained, but for what comes from Kubernetes itself and for statuses, has its version."""
    foreign = ("emplate", "valueFrom", "status")

    def gained(new: dict[str, Any], old: dict[str, Any], path: str) -> list[str]:
        found = []
        for name, part in new.get("properties", {}).items():
            at = f"{path}.{name}" if path else name
            if any(word in at for word in foreign):
                continue
            before = old.get("properties", {}).get(name)
            found += [at] if before is None else gained(part, before, at)
        if "items" in new:
            found += gained(new["items"], old.get("items", {}), f"{path}[]")
        return found

    for kind in FILES:
        versions = [schema(version, kind, crds) for version in KUBERAY_VERSIONS]
        for old, new in itertools.pairwise(versions):
            fields = gained(new, old, "")
            assert fields
            assert [field for field in fields if field not in SINCE] == []


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("spec.preRunningDeadlineSeconds", "1.6"),
        ("spec.rayClusterSpec.workerGroupSpecs[].idleTimeoutSeconds", "1.3"),
        ("spec.workerGroupSpecs[3].priority", "1.7"),
        ("spec.deletionStrategy.deletionRules[].policy", "1.5"),
        ("spec.deletionStrategy.deletionRules[0].condition.jobDeploymentStatus", "1.6"),
        ("spec.rayClusterSpec.authOptions.mode", "1.5"),
        ("spec.rayClusterSpec.authOptions.secretName", "1.6"),
        ("spec.rayClusterSpec.tlsOptions.anything[].below", "1.7"),
        ("spec.entrypoint", None),
        ("spec.backoffLimits", None),
        ("spec", None),
        ("", None),
    ],
)
def test_a_field_is_as_new_as_what_it_lies_in(path: str, version: str | None) -> None:
    """The longest known beginning of a path, in whole names, says the version."""
    assert since(path) == version


@pytest.mark.parametrize(
    ("path", "version", "sentence"),
    [
        ("spec.preRunningDeadlineSeconds", "1.5.1", "KubeRay 1.6 and later do"),
        ("spec.rayClusterSpec.upgradeStrategy", "1.5.1", "KubeRay 1.6 and later do"),
        ("spec.rayClusterSpec.workerGroupSpecs[].priority", "1.5.1", "KubeRay 1.7 and later do"),
        ("spec.deletionStrategy", "1.3.2", "KubeRay 1.5 and later do"),
        ("spec.deletionPolicy", "1.7.0", "only those from 1.3 on and before 1.5 do"),
        ("spec.deletionStrategy.noSuchField", "1.5.1", "Check the spelling"),
        ("spec.noSuchField", "1.7.0", "Check the spelling"),
    ],
)
def test_an_unknown_field_is_a_problem_with_the_version_that_has_it(
    path: str, version: str, sentence: str, crds: Path
) -> None:
    """The cluster's own definition decides, and a misspelt field inside a newer one is not blamed on the version."""
    (problem,) = unknown_field_problems(job_with(path, "x"), schema(version, "RayJob", crds))
    assert problem.startswith(f"{path}: this cluster's KubeRay does not know it.\nWhy: ")
    assert sentence in problem
    assert "\nFix: " in problem


@pytest.mark.parametrize("version", KUBERAY_VERSIONS)
def test_golden_manifests_lose_nothing(version: str, crds: Path) -> None:
    """A manifest that the definition takes as it is has no unknown field."""
    manifests = [
        manifest
        for file in sorted(Path(__file__).parent.glob("*.yaml"))
        for manifest in yaml.safe_load_all(file.read_text())
        if manifest["kind"] == "RayJob" and ray_job_crds()[version].problems(manifest) == []
    ]
    assert manifests
    assert [unknown_field_problems(manifest, schema(version, "RayJob", crds)) for manifest in manifests] == [()] * len(
        manifests
    )


@pytest.mark.parametrize("version", KUBERAY_VERSIONS)
def test_a_mode_that_this_kuberay_does_not_know_is_a_problem(version: str, crds: Path) -> None:
    """Its schema takes any word: how old it is its fields tell."""
    found = unknown_field_problems(job_with("spec.submissionMode", "SidecarMode"), schema(version, "RayJob", crds))
    assert bool(found) == (minor(version) < (1, 5))
    assert all("does not know SidecarMode.\nWhy: KubeRay 1.5 and later do;" in problem for problem in found)
    assert not unknown_field_problems(job_with("spec.submissionMode", "HTTPMode"), schema(version, "RayJob", crds))
