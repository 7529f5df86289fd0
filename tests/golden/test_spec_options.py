"""What only ``spec=`` can say is in the RayJob, and every KubeRay that has it takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from crd_schema import KUBERAY_VERSIONS, ray_job_crds
from spec_options import CASES, CONFIG, Case, has

from kfpytorch_ray import KubeRayBackend
from kfpytorch_ray.adapters.kuberay import KubeRayAdapter
from kfpytorch_ray.cluster.kube.kuberay_rules import problems
from kfpytorch_ray.task_arguments import TaskArguments

BACKEND = KubeRayBackend(image="registry.example/train:1", storage="s3://bucket/prefix")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_in_the_manifest_and_valid_where_it_is_known(case: Case, crds: Path) -> None:
    """By KubeRay's own rules and by the definitions of those versions that have it."""
    (job,) = KubeRayAdapter(case.on(BACKEND)).kubernetes_manifests(CONFIG, TaskArguments())
    assert case.found(job)
    assert problems(job) == ()
    refused = {version: ray_job_crds()[version].problems(job) for version in KUBERAY_VERSIONS}
    assert {version for version in refused if has(version, case)} <= {
        version for version, found in refused.items() if not found
    }, refused
