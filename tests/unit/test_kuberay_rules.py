"""KubeRay's own rules, one by one: what each refuses, where, and that it refuses nothing else."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.kube.kuberay_rules import problems

GOLDEN = Path(__file__).parents[1] / "golden"

HEAD_POD: dict[str, Any] = {"spec": {"containers": [{"name": "ray-head", "image": "i", "env": []}, {"name": "log"}]}}
WORKER_POD: dict[str, Any] = {"spec": {"containers": [{"name": "ray-worker", "image": "i"}]}}
CLUSTER: dict[str, Any] = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": False,
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": HEAD_POD},
    "workerGroupSpecs": [
        {
            "groupName": "worker",
            "replicas": 2,
            "minReplicas": 2,
            "maxReplicas": 2,
            "rayStartParams": {},
            "template": WORKER_POD,
        }
    ],
}
RAY_JOB: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "train", "annotations": {}},
    "spec": {
        "entrypoint": "python train.py",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 60,
        "backoffLimit": 2,
        "activeDeadlineSeconds": 3600,
        "preRunningDeadlineSeconds": 600,
        "runtimeEnvYAML": "env_vars: {A: b}\n",
        "rayClusterSpec": CLUSTER,
    },
}
RAY_CLUSTER: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayCluster",
    "metadata": {"name": "train", "labels": {}},
    "spec": CLUSTER,
}

KEPT = {"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0}
USES = {"spec.rayClusterSpec": None, "spec.clusterSelector": {"ray.io/cluster": "c"}, "spec.backoffLimit": 0}
C, H, W = "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs[0]"
HEAD_ENV = f"{H}.template.spec.containers[0].env"
FT = f"{C}.gcsFaultToleranceOptions"
SCALED = {f"{C}.enableInTreeAutoscaling": True}
SCALED_2 = {**SCALED, f"{C}.autoscalerOptions": {"version": "v2"}}
RULES = "spec.deletionStrategy.deletionRules"


def changed(manifest: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values set by their paths, objects being made on the way."""
    manifest = copy.deepcopy(manifest)
    for path, value in changes.items():
        *way, last = [int(part) if part.isdigit() else part for part in re.split(r"\.|\[(?=\d)|\]\.?", path) if part]
        at: Any = manifest
        for part in way:
            at = at[part] if isinstance(part, int) else at.setdefault(part, {})
        at[last] = value
    return manifest


def variable(name: str, value: str = "x") -> list[dict[str, Any]]:
    return [{"name": "OTHER", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}, {"name": name, "value": value}]


def rule(policy: str, ttl_s: int = 0, **condition: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {"ttlSeconds": ttl_s, **(condition or {"jobStatus": "SUCCEEDED"})}}


def ends(success: str | None, failure: str | None) -> dict[str, Any]:
    return {"onSuccess": {"policy": success} if success else {}, "onFailure": {"policy": failure} if failure else {}}


def where(found: tuple[str, ...]) -> list[str]:
    return [problem.split(": ")[0] for problem in found]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metadata.name": "a" * 47},
        {"metadata.name": None, "metadata.generateName": "train-"},
        {"spec.submissionMode": "HTTPMode"},
        {"spec.submissionMode": "SidecarMode"},
        {"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 0},
        {"spec.submissionMode": None},
        {"spec.suspend": True},
        {"metadata.generateName": "a" * 60},
        {"spec.runtimeEnvYAML": "null"},
        {"spec.ttlSecondsAfterFinished": 0},
        {f"{W}.minReplicas": "2"},
        {f"{W}.suspend": True},
        USES,
        KEPT,
        {"spec.runtimeEnvYAML": ""},
        {"spec.runtimeEnvYAML": "# nothing\n"},
        {f"{H}.rayStartParams": {}, f"{H}.resources": {"CPU": "1"}, f"{H}.labels": {"example.org/a": "b", "c": ""}},
        {f"{W}.minReplicas": None, f"{W}.maxReplicas": None, **SCALED},
        {f"{W}.minReplicas": 0, f"{W}.maxReplicas": 0},
        {f"{W}.idleTimeoutSeconds": 60, f"{W}.priority": 3, **SCALED_2},
        {f"{W}.idleTimeoutSeconds": 60, HEAD_ENV: variable("RAY_enable_autoscaler_v2", "1"), **SCALED},
        {f"{H}.template.spec.restartPolicy": "Never", **SCALED_2},
        {f"{H}.template.spec.restartPolicy": "Always", f"{W}.template.spec.restartPolicy": "Always", **SCALED},
        {
            **SCALED_2,
            f"{C}.enableInTreeAutoscaling": False,
            f"{H}.template.spec.restartPolicy": "Always",
            f"{W}.template.spec.restartPolicy": "Always",
            HEAD_ENV: variable("RAY_enable_autoscaler_v2", "false"),
        },
        {**SCALED_2, f"{W}.idleTimeoutSeconds": 0, f"{C}.autoscalerOptions.idleTimeoutSeconds": 0},
        {f"{C}.autoscalerOptions.idleTimeoutSeconds": 60},
        {HEAD_ENV: variable("RAY_enable_autoscaler_v2", "0")},
        {FT: {"redisAddress": "redis:6379"}},
        {FT: {"backend": "rocksdb", "storage": {"claimName": "c"}}},
        {FT: {"backend": "rocksdb", "storage": {"size": "1Gi"}}},
        {HEAD_ENV: variable("RAY_REDIS_ADDRESS"), "metadata.annotations": {"ray.io/ft-enabled": "True"}},
        {f"{C}.authOptions": {"mode": "token", "secretName": "s"}, f"{C}.rayVersion": "2.52"},
        {f"{C}.authOptions": {"mode": "disabled"}, f"{C}.rayVersion": None},
        {"spec.deletionStrategy": ends("DeleteCluster", "DeleteSelf")},
        {"spec.deletionStrategy": ends("DeleteNone", "DeleteSelf"), **KEPT},
        {
            RULES: [
                rule("DeleteWorkers", 10),
                rule("DeleteCluster", 10),
                rule("DeleteSelf", 20),
                rule("DeleteSelf", 5, jobStatus="FAILED"),
                rule("DeleteCluster", 9, jobDeploymentStatus="Failed"),
            ],
            **KEPT,
        },
    ],
)
def test_what_kuberay_takes_has_no_problems(changes: dict[str, Any]) -> None:
    """Every rule has another side, on which nothing is refused."""
    assert problems(changed(RAY_JOB, changes)) == ()


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("metadata.name", {"metadata.name": "a" * 48}),
        ("metadata.name", {"metadata.name": "1train"}),
        ("metadata.name", {"metadata.name": None}),
        ("metadata.generateName", {"metadata.name": None, "metadata.generateName": "a" * 43}),
        ("spec.suspend", {"spec.suspend": True, **KEPT}),
        ("spec.suspend", {"spec.suspend": True, **USES}),
        ("spec.ttlSecondsAfterFinished", {"spec.ttlSecondsAfterFinished": -1}),
        ("spec.ttlSecondsAfterFinished", {"spec.shutdownAfterJobFinishes": False}),
        ("spec.activeDeadlineSeconds", {"spec.activeDeadlineSeconds": 0}),
        ("spec.preRunningDeadlineSeconds", {"spec.preRunningDeadlineSeconds": 0}),
        ("spec.backoffLimit", {"spec.backoffLimit": -1}),
        ("spec.backoffLimit", {**USES, "spec.backoffLimit": 1}),
        ("spec.backoffLimit", {"spec.submissionMode": "InteractiveMode"}),
        ("spec", {C: None}),
        ("spec.clusterSelector", {**USES, "spec.clusterSelector": {"cluster": "c"}}),
        ("spec.submissionMode", {**USES, "spec.submissionMode": "SidecarMode"}),
        ("spec.submissionMode", {"spec.submissionMode": "HttpMode"}),
        ("spec.submissionMode", {"spec.submissionMode": ""}),
        ("spec.submitterPodTemplate", {"spec.submissionMode": "SidecarMode", "spec.submitterPodTemplate": {}}),
        ("spec.submitterConfig", {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}}),
        (
            f"{H}.template.spec.restartPolicy",
            {"spec.submissionMode": "SidecarMode", f"{H}.template.spec.restartPolicy": "Always"},
        ),
        ("spec.runtimeEnvYAML", {"spec.runtimeEnvYAML": "env_vars: {A"}),
        ("spec.runtimeEnvYAML", {"spec.runtimeEnvYAML": "pip"}),
        (f"{C}.upgradeStrategy", {f"{C}.upgradeStrategy": {"type": "Recreate"}}),
        ("spec.deletionStrategy", {"spec.deletionStrategy": {}}),
        (RULES, {RULES: [rule("DeleteSelf")]}),
        ("spec.deletionStrategy.onSuccess", {"spec.deletionStrategy": ends("DeleteSelf", None), RULES: [{}], **KEPT}),
        ("spec.deletionStrategy.onFailure.policy", {"spec.deletionStrategy": ends("DeleteSelf", None)}),
        ("spec.deletionStrategy.onFailure.policy", {"spec.deletionStrategy": ends("DeleteSelf", "DeleteNone")}),
        (
            "spec.deletionStrategy.onSuccess.policy",
            {"spec.deletionStrategy": ends("DeleteWorkers", "DeleteSelf"), **SCALED},
        ),
        (
            "spec.deletionStrategy.onSuccess.policy",
            {"spec.deletionStrategy": ends("DeleteCluster", "DeleteSelf"), **USES},
        ),
        (f"{RULES}[1].condition", {RULES: [rule("DeleteSelf"), {"policy": "DeleteSelf", "condition": {}}], **KEPT}),
        (
            f"{RULES}[0].condition",
            {RULES: [rule("DeleteSelf", jobStatus="FAILED", jobDeploymentStatus="Failed")], **KEPT},
        ),
        (f"{RULES}[0].condition.ttlSeconds", {RULES: [rule("DeleteSelf", -1)], **KEPT}),
        (f"{RULES}[0].policy", {RULES: [rule("DeleteCluster")], **KEPT, **USES}),
        (f"{RULES}[0].policy", {RULES: [rule("DeleteWorkers")], **KEPT, **SCALED}),
        (f"{RULES}[1]", {RULES: [rule("DeleteSelf", 1), rule("DeleteSelf", 2)], **KEPT}),
        (RULES, {RULES: [rule("DeleteSelf", 1), rule("DeleteWorkers", 2)], **KEPT}),
        (f"{H}.template.spec.containers", {f"{H}.template.spec.containers": []}),
        (f"{W}.template.spec.containers", {f"{W}.template.spec.containers": []}),
        (f"{H}.template.spec.containers", {f"{H}.template.spec.containers": [{"name": "log"}, {"name": "ray-head"}]}),
        (
            f"{W}.template.spec.containers",
            {f"{W}.template.spec.containers": [{"name": "log"}, {"name": "ray-worker"}]},
        ),
        (f"{H}.resources", {f"{H}.resources": {"CPU": "1"}}),
        (f"{W}.resources", {f"{W}.resources": {"CPU": "1"}, f"{W}.rayStartParams": {"memory": "1"}}),
        (f"{H}.rayStartParams.labels", {f"{H}.rayStartParams.labels": "a=b"}),
        (f"{H}.labels", {f"{H}.labels": {"-a": "b"}}),
        (f"{W}.labels.a", {f"{W}.labels": {"a": "b" * 64}}),
        (f"{W}.minReplicas", {f"{W}.minReplicas": None}),
        (f"{W}.maxReplicas", {f"{W}.maxReplicas": None}),
        (f"{W}.minReplicas", {f"{W}.minReplicas": -1}),
        (f"{W}.maxReplicas", {f"{W}.maxReplicas": -1}),
        (f"{W}.minReplicas", {f"{W}.minReplicas": 3}),
        (f"{W}.idleTimeoutSeconds", {f"{W}.idleTimeoutSeconds": -1, **SCALED_2}),
        (f"{W}.idleTimeoutSeconds", {f"{W}.idleTimeoutSeconds": 60, **SCALED}),
        (f"{W}.priority", {f"{W}.priority": 1, **SCALED}),
        (f"{W}.priority", {f"{W}.priority": 1, f"{C}.rayVersion": "2.55.9", **SCALED_2}),
        (f"{W}.suspend", {f"{W}.suspend": True, **SCALED}),
        (f"{W}.template.spec.restartPolicy", {f"{W}.template.spec.restartPolicy": "OnFailure", **SCALED_2}),
        (f"{H}.template.spec.restartPolicy", {f"{H}.template.spec.restartPolicy": "OnFailure", **SCALED_2}),
        (HEAD_ENV, {HEAD_ENV: variable("RAY_enable_autoscaler_v2", "true")}),
        (HEAD_ENV, {HEAD_ENV: variable("RAY_enable_autoscaler_v2", "0"), **SCALED_2}),
        (f"{C}.autoscalerOptions.idleTimeoutSeconds", {f"{C}.autoscalerOptions.idleTimeoutSeconds": -1}),
        (
            f"{C}.autoscalerOptions.env",
            {f"{C}.autoscalerOptions.env": variable("KUBERAY_GEN_AUTOSCALER_START_CMD")},
        ),
        (f"{H}.rayStartParams.redis-username", {f"{H}.rayStartParams.redis-username": "u"}),
        (HEAD_ENV, {HEAD_ENV: variable("REDIS_USERNAME")}),
        (HEAD_ENV, {HEAD_ENV: variable("RAY_REDIS_ADDRESS")}),
        (HEAD_ENV, {HEAD_ENV: variable("RAY_REDIS_ADDRESS"), FT: {}}),
        (HEAD_ENV, {HEAD_ENV: variable("REDIS_PASSWORD"), FT: {}}),
        (f"{H}.rayStartParams.redis-password", {f"{H}.rayStartParams.redis-password": "p", FT: {}}),
        ("metadata.annotations", {"metadata.annotations": {"ray.io/ft-enabled": "true"}, FT: {}}),
        ("metadata.annotations", {"metadata.annotations": {"ray.io/external-storage-namespace": "n"}, FT: {}}),
        (f"{FT}.storage", {FT: {"storage": {"size": "1Gi"}}}),
        (f"{FT}.redisAddress", {FT: {"backend": "rocksdb", "redisAddress": "redis:6379"}}),
        (f"{FT}.storage.claimName", {FT: {"backend": "rocksdb", "storage": {"claimName": "c", "size": "1Gi"}}}),
        (f"{C}.authOptions.mode", {f"{C}.authOptions.mode": "token", f"{C}.rayVersion": None}),
        (f"{C}.authOptions.mode", {f"{C}.authOptions.mode": "token", f"{C}.rayVersion": "nightly"}),
        (f"{C}.authOptions.mode", {f"{C}.authOptions.mode": "token", f"{C}.rayVersion": "2.51.9"}),
        (
            f"{C}.authOptions.enableK8sTokenAuth",
            {f"{C}.authOptions": {"mode": "token", "enableK8sTokenAuth": True}},
        ),
    ],
)
def test_a_broken_rule_is_one_problem_at_its_field(path: str, changes: dict[str, Any]) -> None:
    """A job that breaks one of KubeRay's rules is refused for that only, with the path, the reason and what to do."""
    found = problems(changed(RAY_JOB, changes))
    assert where(found) == [path], found
    assert "; " in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (None, {}),
        (None, {"metadata.name": "a" * 53}),
        (None, {"spec.upgradeStrategy.type": "Recreate"}),
        (None, {"spec.authOptions": {"mode": "token", "enableK8sTokenAuth": True}}),
        ("metadata.name", {"metadata.name": "a" * 54}),
        ("metadata.name", {"metadata.name": "Train"}),
        ("spec.upgradeStrategy.type", {"spec.upgradeStrategy.type": "Rolling"}),
        (
            "spec.upgradeStrategy",
            {"spec.upgradeStrategy.type": "None", "metadata.labels": {"ray.io/originated-from-crd": "RayService"}},
        ),
        ("spec.authOptions.enableK8sTokenAuth", {"spec.authOptions.enableK8sTokenAuth": True}),
        (
            "spec.authOptions.enableK8sTokenAuth",
            {"spec.authOptions": {"mode": "token", "enableK8sTokenAuth": True}, "spec.rayVersion": "2.54.1"},
        ),
        (
            "spec.authOptions.secretName",
            {"spec.authOptions": {"mode": "token", "enableK8sTokenAuth": True, "secretName": "s"}},
        ),
        ("spec.workerGroupSpecs[0].minReplicas", {"spec.workerGroupSpecs[0].minReplicas": 3}),
        ("kind", {"kind": "RayService"}),
    ],
)
def test_a_cluster_has_the_rules_of_its_spec_and_its_own(path: str | None, changes: dict[str, Any]) -> None:
    """A RayCluster is judged by the same rules as the one inside a RayJob, and by those for its kind."""
    found = problems(changed(RAY_CLUSTER, changes))
    assert where(found) == ([path] if path else []), found


def test_all_problems_are_found_at_once() -> None:
    """KubeRay tells its first reason only; here a user mends a manifest in one go."""
    job = changed(RAY_JOB, {"metadata.name": "1" * 48, "spec.backoffLimit": -1, f"{W}.minReplicas": 3})
    assert where(problems(job)) == ["metadata.name", "metadata.name", "spec.backoffLimit", f"{W}.minReplicas"]


@pytest.mark.parametrize("spec", [None, [], {"rayClusterSpec": []}, {"rayClusterSpec": {"workerGroupSpecs": ["x"]}}])
def test_a_wrong_shape_is_the_schemas_business(spec: Any) -> None:
    """Nothing of the wrong type makes the rules fail; what is missing by it is still told."""
    assert problems({"kind": "RayJob", "metadata": {"name": "a"}, "spec": spec})


@given(st.one_of(st.text(max_size=60), st.from_regex(r"[a-z][-a-z0-9]{0,59}", fullmatch=True)))
def test_names_are_judged_as_by_their_definition(name: str) -> None:
    """A name is refused if it is too long for its kind or no DNS-1035 label, and else not."""
    letters, label = "abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz0123456789-"
    lawful = bool(name) and name[0] in letters and name[-1] != "-" and all(letter in label for letter in name)
    for manifest, most in ((RAY_JOB, 47), (RAY_CLUSTER, 53)):
        found = problems(changed(manifest, {"metadata.name": name}))
        assert len(found) == (not lawful) + (len(name) > most)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.yaml")), ids=lambda file: file.stem)
def test_golden_manifests_have_no_problems(file: Path) -> None:
    """What is made for users today is taken by KubeRay's rules."""
    jobs = [manifest for manifest in yaml.safe_load_all(file.read_text()) if manifest["kind"] == "RayJob"]
    assert [problems(job) for job in jobs] == [()] * len(jobs)
    assert jobs or "kubeflow" in file.stem
