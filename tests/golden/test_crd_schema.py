"""The validator finds what an API server would, on a small definition and on the real ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from crd_schema import Crd, ray_job_crds

SMALL = """
spec:
  group: example.org
  names: {kind: Thing}
  versions:
  - name: v1
    schema:
      openAPIV3Schema:
        type: object
        properties:
          apiVersion: {type: string}
          kind: {type: string}
          metadata: {type: object}
          spec:
            type: object
            required: [size]
            properties:
              size: {type: integer, format: int32, default: 1}
              port: {x-kubernetes-int-or-string: true, anyOf: [{type: integer}, {type: string}]}
              amount:
                anyOf: [{type: integer}, {type: string}]
                pattern: ^[0-9]+(Mi|Gi)?$
                x-kubernetes-int-or-string: true
              free: {type: object, x-kubernetes-preserve-unknown-fields: true}
              words: {type: object, additionalProperties: {type: string}}
              empty: {type: string, nullable: true}
              env:
                type: array
                x-kubernetes-list-type: map
                x-kubernetes-list-map-keys: [name]
                items: {type: object, required: [name], properties: {name: {type: string}}}
              policy:
                type: string
                x-kubernetes-validations:
                - {rule: "self in ['A', 'B']", message: A or B}
                - {rule: self == oldSelf, message: immutable}
"""


def thing(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "example.org/v1", "kind": "Thing", "metadata": {"name": "x", "labels": {}}, "spec": spec}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"size": 3, "port": "http", "amount": "4Gi", "policy": "A"},
        {"port": 80, "amount": 4, "free": {"any": ["thing"]}, "words": {"a": "b"}, "empty": None},
        {"env": [{"name": "A"}, {"name": "B"}]},
    ],
)
def test_what_is_right_has_no_problems(spec: dict[str, Any]) -> None:
    """Defaults satisfy what is required; int-or-string, open objects and null are Kubernetes's."""
    assert Crd(SMALL).problems(thing(**spec)) == []


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"sizes": 3}, "spec: "),
        ({"size": "3"}, "spec.size: "),
        ({"size": 3_000_000_000}, "spec.size: "),
        ({"amount": "4Go"}, "spec.amount: "),
        ({"words": {"a": 1}}, "spec.words.a: "),
        ({"env": [{}]}, "spec.env.0: "),
        ({"env": [{"name": "A", "vale": "1"}]}, "spec.env.0: "),
        ({"env": [{"name": "A"}, {"name": "A"}]}, "spec.env: "),
        ({"policy": "C"}, "spec.policy: A or B"),
    ],
)
def test_each_kind_of_problem_is_found(spec: dict[str, Any], where: str) -> None:
    """With the place where it is."""
    (problem,) = Crd(SMALL).problems(thing(**spec))
    assert problem.startswith(where)


def test_another_kind_is_not_looked_at() -> None:
    """A manifest that goes to another endpoint cannot be right here."""
    assert Crd(SMALL).problems({**thing(), "kind": "Other"}) == [
        "is a example.org/v1 Other, not a example.org/v1 Thing"
    ]


RAY_JOB: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "x"},
    "spec": {
        "rayClusterSpec": {
            "headGroupSpec": {
                "rayStartParams": {},
                "template": {"spec": {"containers": [{"name": "head", "image": "ray"}]}},
            }
        }
    },
}


@pytest.mark.parametrize(
    ("field", "value", "versions"),
    [
        ("managedBy", "ray.io/kuberay-operator", {"1.3.2", "1.5.1", "1.7.0"}),
        ("managedBy", "somebody", set()),
        ("deletionPolicy", "DeleteSelf", {"1.3.2"}),
        (
            "deletionStrategy",
            {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}},
            {"1.5.1", "1.7.0"},
        ),
        ("deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, set()),
        ("preRunningDeadlineSeconds", 60, {"1.7.0"}),
        ("noSuchField", 1, set()),
    ],
)
def test_the_real_definitions_know_their_versions_fields(
    field: str, value: Any, versions: set[str], crds: Path
) -> None:
    """A field that a KubeRay does not know, or a rule that is broken, is found in that version and not in others."""
    job = copy.deepcopy(RAY_JOB)
    job["spec"][field] = value
    assert {version for version, crd in ray_job_crds().items() if crd.problems(job) == []} == versions
