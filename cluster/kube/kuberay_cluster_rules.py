"""The part of KubeRay's validation that is about a cluster's spec, whether a RayCluster's or inside a RayJob.

Called by kuberay_rules.py, whose docstring says what is imitated. One rule is our own: KubeRay runs Ray in the first
container of a pod, whatever its name, so one that is named for Ray has to stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

RAY_CONTAINERS = ("ray-head", "ray-worker")
"""Names that Flyte and KubeRay's examples give to the container in which Ray runs."""

MIN_RAY = {"authOptions.mode": (2, 52, 0), "authOptions.enableK8sTokenAuth": (2, 55, 0), "priority": (2, 56, 0)}
"""The first Ray that can do what a field asks for."""

_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_FT_ANNOTATION = "ray.io/ft-enabled"
_NAMESPACE_ANNOTATION = "ray.io/external-storage-namespace"
_START_COMMAND = "KUBERAY_GEN_AUTOSCALER_START_CMD"
_AMOUNTS = ("num-cpus", "num-gpus", "memory", "resources")
_REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
_CLAIM_FIELDS = ("size", "storageClassName", "accessModes")

_VERSION = re.compile(r"\s*v?([0-9]+(?:\.[0-9]+)+)")
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"((?=.{{1,253}}/)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?{_WORD}")
_LABEL_VALUE = re.compile(rf"({_WORD})?")


def cluster_spec_problems(spec: Mapping[str, Any], where: str, annotations: Mapping[str, Any]) -> Iterator[str]:
    """Every reason for which KubeRay would refuse the spec.

    Args:
        spec: Of a RayCluster, or the ``rayClusterSpec`` of a RayJob.
        where: Its path in the manifest.
        annotations: Of the manifest.
    """
    head = mapping(spec.get("headGroupSpec"))
    yield from _group_problems(head, f"{where}.headGroupSpec")
    for index, group in enumerate(items(spec.get("workerGroupSpecs"))):
        at = f"{where}.workerGroupSpecs[{index}]"
        yield from _group_problems(group, at)
        yield from _replica_problems(group, at, autoscaling(spec))
        yield from _scaling_group_problems(spec, group, at)
    yield from _storage_problems(spec, where, annotations)
    yield from _autoscaler_problems(spec, where)
    yield from _auth_problems(spec, where)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or nothing where the manifest has no object."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list, or none where the manifest has no list."""
    return [mapping(item) for item in value] if isinstance(value, (list, tuple)) else []


def whole(value: Any) -> int | None:
    """The value, if it is a number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def autoscaling(spec: Mapping[str, Any]) -> bool:
    """Whether the cluster's spec asks for Ray's autoscaler."""
    return bool(spec.get("enableInTreeAutoscaling"))


def restarts(template: Mapping[str, Any]) -> bool:
    """Whether a pod's containers are started again where they are."""
    return mapping(template.get("spec")).get("restartPolicy") not in (None, "", "Never")


def _group_problems(group: Mapping[str, Any], where: str) -> Iterator[str]:
    names = [str(container.get("name")) for container in _containers(group)]
    if not names:
        yield f"{where}.template.spec.containers: is empty; give the container in which Ray runs"
    elif names[0] not in RAY_CONTAINERS and (own := [name for name in names if name in RAY_CONTAINERS]):
        yield (
            f"{where}.template.spec.containers: KubeRay would run Ray in the first one, {names[0]!r}; "
            f"put {own[0]!r} there"
        )
    params, resources = mapping(group.get("rayStartParams")), mapping(group.get("resources"))
    if resources and (twice := [name for name in _AMOUNTS if params.get(name)]):
        listed = ", ".join(twice)
        yield f"{where}.resources: cannot be had beside {listed} in rayStartParams; give all of them in one place"
    if "labels" in params:
        yield f"{where}.rayStartParams.labels: is refused; give {where}.labels instead"
    for key, value in mapping(group.get("labels")).items():
        if not _LABEL_KEY.fullmatch(str(key)):
            yield f"{where}.labels: {key!r} is no key of a Kubernetes label; use [PREFIX/]NAME of letters, digits, -_."
        if not _LABEL_VALUE.fullmatch(str(value)):
            yield f"{where}.labels.{key}: {value!r} is no value of a label; use up to 63 letters, digits, -_."


def _replica_problems(group: Mapping[str, Any], where: str, scaled: bool) -> Iterator[str]:
    least, most = whole(group.get("minReplicas")), whole(group.get("maxReplicas"))
    for field, number in (("minReplicas", least), ("maxReplicas", most)):
        if group.get(field) is None and not scaled:
            yield f"{where}.{field}: is missing; without enableInTreeAutoscaling a group needs both bounds"
        elif number is not None and number < 0:
            yield f"{where}.{field}: is {number}; give 0 or more"
    if least is not None and most is not None and least > most >= 0:
        yield f"{where}.minReplicas: {least} is more than maxReplicas, {most}; give at most that"


def _scaling_group_problems(spec: Mapping[str, Any], group: Mapping[str, Any], where: str) -> Iterator[str]:
    """What a worker group asks of the autoscaler."""
    version_2 = _version_2(spec) or _switched_on(spec)
    mend = "set autoscalerOptions.version to v2, or leave it out"
    idle_s = whole(group.get("idleTimeoutSeconds"))
    if idle_s is not None and idle_s < 0:
        yield f"{where}.idleTimeoutSeconds: is {idle_s}; give 0 or more"
    elif idle_s is not None and not version_2:
        yield f"{where}.idleTimeoutSeconds: needs the autoscaler's version 2; {mend}"
    if whole(group.get("priority")):
        if problem := _ray_problem(spec, "priority"):
            yield f"{where}.priority: {problem}"
        elif not version_2:
            yield f"{where}.priority: needs the autoscaler's version 2; {mend}"
    if group.get("suspend") and autoscaling(spec):
        yield f"{where}.suspend: cannot be had with enableInTreeAutoscaling; set replicas instead"
    if autoscaling(spec) and _version_2(spec) and restarts(mapping(group.get("template"))):
        yield f"{where}.template.spec.restartPolicy: must be Never with the autoscaler's version 2; leave it out"


def _autoscaler_problems(spec: Mapping[str, Any], where: str) -> Iterator[str]:
    options, head = mapping(spec.get("autoscalerOptions")), mapping(spec.get("headGroupSpec"))
    env = f"{where}.headGroupSpec.template.spec.containers[0].env"
    if not autoscaling(spec) and _switched_on(spec):
        yield f"{env}: {_AUTOSCALER_V2} needs enableInTreeAutoscaling; set that to true, or leave it out"
    if autoscaling(spec) and options.get("version") is not None and _AUTOSCALER_V2 in _head_env(spec):
        yield f"{env}: {_AUTOSCALER_V2} is also said by autoscalerOptions.version; leave it out"
    if autoscaling(spec) and _version_2(spec) and restarts(mapping(head.get("template"))):
        yield (
            f"{where}.headGroupSpec.template.spec.restartPolicy: must be Never with the autoscaler's version 2; "
            "leave it out"
        )
    if (idle_s := whole(options.get("idleTimeoutSeconds"))) is not None and idle_s < 0:
        yield f"{where}.autoscalerOptions.idleTimeoutSeconds: is {idle_s}; give 0 or more"
    if any(variable.get("name") == _START_COMMAND for variable in items(options.get("env"))):
        yield f"{where}.autoscalerOptions.env: {_START_COMMAND} is set by KubeRay; leave it out"


def _storage_problems(spec: Mapping[str, Any], where: str, annotations: Mapping[str, Any]) -> Iterator[str]:
    """Where the head keeps what it knows, so that another can go on with it."""
    at, env = f"{where}.gcsFaultToleranceOptions", _head_env(spec)
    head = f"{where}.headGroupSpec"
    params = mapping(mapping(spec.get("headGroupSpec")).get("rayStartParams"))
    if params.get("redis-username"):
        yield f"{head}.rayStartParams.redis-username: is refused; give {at}.redisUsername instead"
    variables = f"{head}.template.spec.containers[0].env"
    if "REDIS_USERNAME" in env:
        yield f"{variables}: REDIS_USERNAME is refused; give {at}.redisUsername instead"
    if spec.get("gcsFaultToleranceOptions") is None:
        if "RAY_REDIS_ADDRESS" in env and str(annotations.get(_FT_ANNOTATION, "")).lower() != "true":
            yield f"{variables}: RAY_REDIS_ADDRESS alone is refused; give {at}.redisAddress instead"
        return
    for annotation, instead in ((_FT_ANNOTATION, at), (_NAMESPACE_ANNOTATION, f"{at}.externalStorageNamespace")):
        if annotations.get(annotation):
            yield f"metadata.annotations: {annotation} cannot be had with {at}; give {instead} only"
    if params.get("redis-password"):
        yield f"{head}.rayStartParams.redis-password: cannot be had with {at}; give {at}.redisPassword instead"
    for variable, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if variable in env:
            yield f"{variables}: {variable} cannot be had with {at}; give {at}.{field} instead"
    yield from _storage_backend_problems(mapping(spec["gcsFaultToleranceOptions"]), at)


def _storage_backend_problems(options: Mapping[str, Any], where: str) -> Iterator[str]:
    storage = options.get("storage")
    if options.get("backend") != "rocksdb":
        if storage is not None:
            yield f"{where}.storage: is for the backend rocksdb; leave it out, or set backend to rocksdb"
        return
    for field in _REDIS_FIELDS:
        if options.get(field) not in (None, ""):
            yield f"{where}.{field}: is for the backend redis; leave it out"
    if mapping(storage).get("claimName") and (new := [field for field in _CLAIM_FIELDS if mapping(storage).get(field)]):
        yield f"{where}.storage.claimName: names a claim that exists; leave {', '.join(new)} out"


def _auth_problems(spec: Mapping[str, Any], where: str) -> Iterator[str]:
    options, at = mapping(spec.get("authOptions")), f"{where}.authOptions"
    by_kubernetes = bool(options.get("enableK8sTokenAuth"))
    if options.get("mode") != "token":
        if by_kubernetes:
            yield f"{at}.enableK8sTokenAuth: needs authOptions.mode; set that to token"
        return
    asked = "authOptions.enableK8sTokenAuth" if by_kubernetes else "authOptions.mode"
    if problem := _ray_problem(spec, asked):
        yield f"{where}.{asked}: {problem}"
    if by_kubernetes and options.get("secretName"):
        yield f"{at}.secretName: cannot be had with enableK8sTokenAuth, which needs no secret; leave it out"


def _ray_problem(spec: Mapping[str, Any], asked: str) -> str | None:
    """Why the Ray that the spec says cannot do what a field of it asks for."""
    least, given = ".".join(map(str, MIN_RAY[asked])), spec.get("rayVersion")
    found = _VERSION.match(str(given or ""))
    if not given:
        return f"needs rayVersion, which is missing; give the image's, {least} or later"
    if not found:
        return f"needs rayVersion, and {given!r} is none; give the image's, {least} or later"
    version = tuple(int(part) for part in found.group(1).split("."))
    if (*version, 0)[: len(MIN_RAY[asked])] < MIN_RAY[asked]:
        return f"needs Ray {least} or later, and rayVersion is {given}; use a newer one, or leave it out"
    return None


def _version_2(spec: Mapping[str, Any]) -> bool:
    return mapping(spec.get("autoscalerOptions")).get("version") == "v2"


def _switched_on(spec: Mapping[str, Any]) -> bool:
    return _head_env(spec).get(_AUTOSCALER_V2) in ("1", "true")


def _head_env(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the head's Ray container; those with a valueFrom have no value."""
    first = _containers(mapping(spec.get("headGroupSpec")))[:1]
    return {str(variable.get("name")): variable.get("value") for own in first for variable in items(own.get("env"))}


def _containers(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return items(mapping(mapping(group.get("template")).get("spec")).get("containers"))
