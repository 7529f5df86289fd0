"""What a Kubernetes API server refuses becomes an error of ours that says what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from kfpytorch_ray.cluster.kube.kinds import PYTORCH_JOB, RAY_JOB, Kind
from kfpytorch_ray.cluster.kube.refusals import GoneError, refusal
from kfpytorch_ray.errors import AuthenticationError, ClusterError


def told(status: int, kind: Kind | None = None, body: str = "", **said: Any) -> ClusterError:
    error = ApiException(status=status, reason="Why")
    error.body = body or json.dumps(said)
    return refusal(error, "create it", "https://server", "train", kind)


@pytest.mark.parametrize(
    ("kind", "named"), [(RAY_JOB, "rayjobs.ray.io"), (PYTORCH_JOB, "delete on pytorchjobs.kubeflow.org,")]
)
def test_missing_rights_are_named_by_the_kind(kind: Kind, named: str) -> None:
    """Those on what the backend creates, and those on pods, logs and events."""
    error = told(403, kind, message="user cannot create")
    assert isinstance(error, AuthenticationError)
    assert named in str(error)
    assert "list and watch on pods, get on pods/log and list on events" in str(error)


def test_what_a_webhook_denies_is_no_matter_of_rights() -> None:
    """The training operator's denies with 403 what it does not take."""
    message = 'admission webhook "validator.pytorchjob" denied the request: spec.x: Forbidden: must be 1'
    error = told(403, PYTORCH_JOB, message=message)
    assert type(error) is ClusterError
    assert "must be 1" in str(error)
    assert "Role" not in str(error)


def test_a_kind_that_is_not_installed_and_one_that_is_gone() -> None:
    """Both are 404: the one has no name, as the server knows nothing to be named."""
    assert "Install Kubeflow's training operator" in str(told(404, PYTORCH_JOB, "404 page not found\n"))
    gone = told(404, PYTORCH_JOB, message='pytorchjobs "x" not found', details={"name": "x"})
    assert isinstance(gone, GoneError)
