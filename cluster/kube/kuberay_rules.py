"""Would KubeRay refuse this RayJob or RayCluster? Asked before it is sent, because KubeRay says so late or softly.

Imitates ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7.0, written from a reading of it: a RayJob that
breaks a rule ends as ValidationFailed (before 1.5 with an event only), a RayCluster stays without a status for ever.
What the schema says (kuberay_fields.py, and the API server) is not repeated, and neither is what depends on the
operator's own feature gates, with the options behind those that are off by default (networkPolicy, tlsOptions,
historyServerOptions). The rules of a cluster's spec, which both kinds have, are in kuberay_cluster_rules.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kfpytorch_ray.cluster.kube.kinds import CLUSTER_LABEL
from kfpytorch_ray.cluster.kube.kuberay_cluster_rules import (
    autoscaling,
    cluster_spec_problems,
    items,
    mapping,
    restarts,
    whole,
)

MAX_NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47}
"""KubeRay appends up to ten characters to a cluster's name for a service, and six to a job's for its cluster."""

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
"""The schema takes any word."""

ORIGIN_LABEL = "ray.io/originated-from-crd"

_DNS_1035_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_GENERATED = "x" * 5
_DELETED_IN_THIS_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_NEEDS_OWN_CLUSTER = ("DeleteWorkers", "DeleteCluster")


def problems(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Every reason for which KubeRay would refuse the manifest, each with its field and how to mend it.

    Args:
        manifest: A RayJob or a RayCluster, as it is sent. Values of a wrong type are left to the schema.
    """
    kind = manifest.get("kind")
    if kind not in MAX_NAME_LENGTHS:
        return (f"kind: is {kind!r}; only RayJob and RayCluster can be judged here",)
    metadata, spec = mapping(manifest.get("metadata")), mapping(manifest.get("spec"))
    annotations = mapping(metadata.get("annotations"))
    found = [*_name_problems(kind, metadata)]
    if kind == "RayJob":
        found += _job_problems(spec)
        if spec.get("rayClusterSpec") is not None:
            cluster = mapping(spec["rayClusterSpec"])
            found += cluster_spec_problems(cluster, "spec.rayClusterSpec", annotations)
            found += _upgrade_problems(cluster, "spec.rayClusterSpec", "RayJob")
            if mapping(cluster.get("authOptions")).get("enableK8sTokenAuth"):
                where = "spec.rayClusterSpec.authOptions.enableK8sTokenAuth"
                found.append(f"{where}: cannot be had in a RayJob; leave it out, so that KubeRay makes a token")
    else:
        found += cluster_spec_problems(spec, "spec", annotations)
        found += _upgrade_problems(spec, "spec", mapping(metadata.get("labels")).get(ORIGIN_LABEL))
    return tuple(found)


def _name_problems(kind: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    name, most = metadata.get("name"), MAX_NAME_LENGTHS[kind]
    where = "metadata.name"
    if not name and metadata.get("generateName"):
        name, where = f"{metadata['generateName']}{_GENERATED}", "metadata.generateName"
    name = str(name or "")
    if len(name) > most:
        longer = f" with the {len(_GENERATED)} that are appended" if where.endswith("generateName") else ""
        yield f"{where}: has {len(name)} characters{longer}, and KubeRay takes {most} for a {kind}; shorten it"
    if not _DNS_1035_LABEL.fullmatch(name):
        yield (
            f"{where}: {name!r} is no DNS-1035 label; use small letters, digits and '-', begin with a letter and do "
            "not end with '-'"
        )


def _job_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    yield from _life_problems(spec)
    yield from _selector_problems(spec)
    yield from _submission_problems(spec)
    yield from _deletion_problems(spec)
    yield from _runtime_env_problems(spec)


def _life_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    """How long a job and its cluster live, and how often it is tried."""
    shutdown = bool(spec.get("shutdownAfterJobFinishes"))
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend: needs spec.shutdownAfterJobFinishes; set that to true, or do not suspend"
    ttl_s = whole(spec.get("ttlSecondsAfterFinished")) or 0
    if ttl_s < 0:
        yield f"spec.ttlSecondsAfterFinished: is {ttl_s}; give 0 or more"
    if ttl_s > 0 and not shutdown:
        yield "spec.ttlSecondsAfterFinished: needs spec.shutdownAfterJobFinishes; set that to true, or leave it out"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if (deadline_s := whole(spec.get(field))) is not None and deadline_s <= 0:
            yield f"spec.{field}: is {deadline_s}; give 1 or more, or leave it out"
    if _retries(spec) < 0:
        yield f"spec.backoffLimit: is {_retries(spec)}; give 0 or more"


def _selector_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    selector = mapping(spec.get("clusterSelector"))
    if not selector:
        if spec.get("rayClusterSpec") is None:
            yield "spec: has neither rayClusterSpec nor clusterSelector; give the cluster to make, or the one to use"
        return
    if not selector.get(CLUSTER_LABEL):
        yield f"spec.clusterSelector: does not name a cluster; set {CLUSTER_LABEL!r} to the name of the RayCluster"
    if spec.get("suspend"):
        yield "spec.suspend: cannot be had with spec.clusterSelector; give rayClusterSpec instead, or do not suspend"
    if _retries(spec) > 0:
        yield "spec.backoffLimit: cannot be had with spec.clusterSelector; set it to 0, or give rayClusterSpec instead"


def _submission_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    mode = spec.get("submissionMode")
    if mode is not None and mode not in SUBMISSION_MODES:
        yield f"spec.submissionMode: {mode!r} is unknown; use one of {', '.join(SUBMISSION_MODES)}"
    if mode == "InteractiveMode" and _retries(spec) > 0:
        yield "spec.backoffLimit: cannot be had in InteractiveMode; set it to 0, or use another submissionMode"
    if mode == "SidecarMode":
        yield from _sidecar_problems(spec)


def _sidecar_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    if mapping(spec.get("clusterSelector")):
        yield "spec.submissionMode: SidecarMode cannot be had with spec.clusterSelector; use K8sJobMode or HTTPMode"
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield f"spec.{field}: cannot be had in SidecarMode, which has no submitting pod; leave it out"
    head = mapping(mapping(mapping(spec.get("rayClusterSpec")).get("headGroupSpec")).get("template"))
    if restarts(head):
        yield (
            "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy: must be Never in SidecarMode; "
            "set it to Never, or leave it out"
        )


def _runtime_env_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    text = spec.get("runtimeEnvYAML")
    if not isinstance(text, str):
        return
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        # Its lines would look like further problems.
        reason = " ".join(str(error).split())
        yield f"spec.runtimeEnvYAML: is no YAML ({reason}); quote what has a ':' or '#' in it, and indent with blanks"
        return
    if not (node is None or isinstance(node, yaml.MappingNode) or node.tag == "tag:yaml.org,2002:null"):
        yield "spec.runtimeEnvYAML: is no mapping; give fields of Ray's runtime_env, as in 'env_vars: {A: b}'"


def _upgrade_problems(cluster: Mapping[str, Any], where: str, maker: Any) -> Iterator[str]:
    kind = mapping(cluster.get("upgradeStrategy")).get("type")
    if kind is None:
        return
    if maker in ("RayJob", "RayService"):
        yield f"{where}.upgradeStrategy: cannot be had for a cluster that a {maker} makes; leave it out"
    elif kind not in ("Recreate", "None"):
        yield f"{where}.upgradeStrategy.type: {kind!r} is unknown; use Recreate or None"


def _deletion_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    if spec.get("deletionStrategy") is None:
        return
    where, strategy = "spec.deletionStrategy", mapping(spec["deletionStrategy"])
    ends = [end for end in ("onSuccess", "onFailure") if strategy.get(end) is not None]
    rules = items(strategy.get("deletionRules"))
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{where}.deletionRules: cannot be had with spec.shutdownAfterJobFinishes; set that to false"
    if rules and ends:
        yield f"{where}.{ends[0]}: cannot be had with deletionRules; make a rule of it"
    elif ends:
        yield from _end_problems(spec, strategy, where)
    elif rules:
        yield from _deletion_rule_problems(spec, rules, f"{where}.deletionRules")
    else:
        yield f"{where}: is empty; give deletionRules, or both onSuccess and onFailure, or leave it out"


def _end_problems(spec: Mapping[str, Any], strategy: Mapping[str, Any], where: str) -> Iterator[str]:
    for end in ("onSuccess", "onFailure"):
        policy = mapping(strategy.get(end)).get("policy")
        if policy is None:
            yield f"{where}.{end}.policy: is missing; both ends of a job need one"
        elif reason := _policy_problem(spec, policy):
            yield f"{where}.{end}.policy: {reason}"
        elif policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield f"{where}.{end}.policy: DeleteNone contradicts spec.shutdownAfterJobFinishes; set that to false"


def _policy_problem(spec: Mapping[str, Any], policy: Any) -> str | None:
    if policy in _NEEDS_OWN_CLUSTER and mapping(spec.get("clusterSelector")):
        return f"{policy} cannot be had with spec.clusterSelector; use DeleteSelf or DeleteNone"
    if policy == "DeleteWorkers" and autoscaling(mapping(spec.get("rayClusterSpec"))):
        return "DeleteWorkers cannot be had with enableInTreeAutoscaling; use DeleteCluster"
    return None


def _deletion_rule_problems(spec: Mapping[str, Any], rules: list[Mapping[str, Any]], where: str) -> Iterator[str]:
    times: dict[tuple[str, Any], dict[Any, int]] = {}
    for index, rule in enumerate(rules):
        policy, condition = rule.get("policy"), mapping(rule.get("condition"))
        given = [(field, condition[field]) for field in ("jobStatus", "jobDeploymentStatus") if condition.get(field)]
        ttl_s = whole(condition.get("ttlSeconds")) or 0
        if len(given) != 1:
            yield f"{where}[{index}].condition: needs one of jobStatus and jobDeploymentStatus; give exactly one"
        elif ttl_s < 0:
            yield f"{where}[{index}].condition.ttlSeconds: is {ttl_s}; give 0 or more"
        elif reason := _policy_problem(spec, policy):
            yield f"{where}[{index}].policy: {reason}"
        elif policy in times.setdefault(given[0], {}):
            yield f"{where}[{index}]: there is a rule for {policy} on {given[0][1]} already; leave one of them out"
        else:
            times[given[0]][policy] = ttl_s
    for (_, status), by_policy in times.items():
        ordered = [policy for policy in _DELETED_IN_THIS_ORDER if policy in by_policy]
        for sooner, later in itertools.pairwise(ordered):
            if by_policy[later] < by_policy[sooner]:
                yield (
                    f"{where}: on {status}, {later} comes after {by_policy[later]} s, before {sooner} after "
                    f"{by_policy[sooner]} s; give {later} a ttlSeconds that is not smaller"
                )


def _retries(spec: Mapping[str, Any]) -> int:
    return whole(spec.get("backoffLimit")) or 0
