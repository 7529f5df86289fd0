"""Does a Kubernetes API server take a manifest? Asked of the CustomResourceDefinitions that its projects publish.

As by an API server that is asked for strict validation: defaults first, then the structural schema (OpenAPI 3.0, by
openapi-schema-validator), unknown fields, keys of list maps that occur twice, and the CEL rules (by cel-python; those
on changes need an older object and are left out). The CRDs lie beside the repository, or where CRDS_VARIABLE says.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import yaml
from openapi_schema_validator import OAS30Validator, oas30_format_checker

CRDS_VARIABLE = "KFPYTORCH_RAY_CRDS"

CRDS = Path(os.environ.get(CRDS_VARIABLE) or Path(__file__).resolve().parents[3] / "shared" / "crds")

KUBERAY_VERSIONS = ("1.3.2", "1.5.1", "1.7.0")
TRAINING_OPERATOR_VERSIONS = ("1.9.0",)


class Crd:
    """One version of a custom resource's definition.

    Args:
        text: The definition, YAML.
        version: Of the resource, as in ``apiVersion``.
    """

    def __init__(self, text: str, version: str = "v1") -> None:
        definition = yaml.load(text, yaml.CSafeLoader)
        (schema,) = (
            entry["schema"]["openAPIV3Schema"] for entry in definition["spec"]["versions"] if entry["name"] == version
        )
        self._kind = definition["spec"]["names"]["kind"]
        self._api = f"{definition['spec']['group']}/{version}"
        self._schema = schema
        strict = _strict(schema)
        # Its own schema belongs to every Kubernetes object.
        strict["properties"]["metadata"] = {"type": "object"}
        self._validator = OAS30Validator(strict, format_checker=oas30_format_checker)

    def problems(self, manifest: dict[str, Any]) -> list[str]:
        """Everything for which an API server would refuse the manifest."""
        if (manifest.get("kind"), manifest.get("apiVersion")) != (self._kind, self._api):
            return [f"is a {manifest.get('apiVersion')} {manifest.get('kind')}, not a {self._api} {self._kind}"]
        whole = defaulted(self._schema, copy.deepcopy(manifest))
        found = [f"{_path(error.absolute_path)}: {error.message[:300]}" for error in self._validator.iter_errors(whole)]
        # Rules are made for what has the right shape.
        return found or [*_rule_problems(self._schema, whole, ()), *_key_problems(self._schema, whole, ())]


@functools.cache
def load_crd(folder: str, file: str) -> Crd:
    """The definition in a folder of CRDS. Read once: they have a megabyte each."""
    return Crd((CRDS / folder / file).read_text())


def ray_job_crds() -> dict[str, Crd]:
    """RayJob in every version of KubeRay, by version."""
    return {version: load_crd(f"kuberay-v{version}", "ray.io_rayjobs.yaml") for version in KUBERAY_VERSIONS}


def pytorch_job_crds() -> dict[str, Crd]:
    """PyTorchJob, by version of the training operator."""
    file = "kubeflow.org_pytorchjobs.yaml"
    return {version: load_crd(f"training-operator-v{version}", file) for version in TRAINING_OPERATOR_VERSIONS}


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """The value with the schema's defaults; they come before what is required is looked for."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, part in properties.items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
    for part, _, inner in _parts(schema, value):
        defaulted(part, inner)
    return value


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy that refuses fields that an API server would drop."""
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        strict["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict


def _parts(schema: dict[str, Any], value: Any) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """What a value consists of, each with its schema and its name or index."""
    if isinstance(value, dict):
        beside = schema.get("additionalProperties")
        for name, inner in value.items():
            part = schema.get("properties", {}).get(name) or (beside if isinstance(beside, dict) else None)
            if part:
                yield part, name, inner
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield schema["items"], index, inner


def _rule_problems(schema: dict[str, Any], value: Any, path: tuple[Any, ...]) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            yield f"{_path(path)}: {rule.get('message', rule['rule'])}"
    for part, name, inner in _parts(schema, value):
        yield from _rule_problems(part, inner, (*path, name))


def _key_problems(schema: dict[str, Any], value: Any, path: tuple[Any, ...]) -> Iterator[str]:
    if isinstance(value, list) and schema.get("x-kubernetes-list-type") in ("map", "set"):
        keys = schema.get("x-kubernetes-list-map-keys")
        seen = [tuple(str(item.get(key)) for key in keys) if keys else item for item in value]
        for item in sorted({str(key) for key in seen if seen.count(key) > 1}):
            yield f"{_path(path)}: {item} occurs more than once"
    for part, name, inner in _parts(schema, value):
        yield from _key_problems(part, inner, (*path, name))


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _path(path: Any) -> str:
    return ".".join(str(part) for part in path) or "the manifest"
