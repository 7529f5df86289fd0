"""What only ``spec=`` can say, on API servers with the definitions of a new KubeRay and of an old one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from doubles.api import Api
from explained import assert_explained
from spec_options import CASES, CONFIG, Case, has

from kfpytorch_ray import ConfigError, Elastic, KubeRayBackend, launch

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_operator"),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]


def train(x: int) -> int:
    return x


def elastic(case: Case, backend: KubeRayBackend) -> Elastic:
    return replace(CONFIG, backend=case.on(backend))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kuberay_that_has_it_keeps_it(api: Api, namespace: str, backend: KubeRayBackend, case: Case) -> None:
    """As a user passes it, so it is in the RayJob on the cluster."""
    launch(train, 1, elastic=elastic(case, backend), wait=False)
    (job,) = api.find("rayjobs", namespace)
    assert case.found(job)


def test_one_that_is_too_old_is_told_by_its_version(
    old_control_plane: tuple[Path, str], backend: KubeRayBackend
) -> None:
    """Every field, with the version that has it, before anything is created; what it has it takes."""
    kubeconfig, version = old_control_plane
    old = replace(backend, kubeconfig=str(kubeconfig), namespace="default")
    for case in CASES.values():
        if has(version, case):
            launch(train, 1, elastic=elastic(case, old), wait=False).cancel()
            continue
        with pytest.raises(ConfigError) as caught:
            launch(train, 1, elastic=elastic(case, old), wait=False)
        assert_explained(caught.value)
        (told,) = [text for text in caught.value.problems if text.startswith(f"{case.unknown}: ")]
        assert f"KubeRay {case.since} and later do" in told
        assert not list(Path(str(backend.storage)).glob("runs/*/request*"))
