from __future__ import annotations

import copy

import pytest
from flytekit import PodTemplate
from kubernetes.client import V1Container, V1PodSpec, V1Volume, V1VolumeMount

from kfpytorch_ray.pod_template import copy_template, shared_memory_problems, with_shared_memory


def template(*containers: V1Container) -> PodTemplate:
    return PodTemplate(pod_spec=V1PodSpec(containers=list(containers), volumes=[V1Volume(name="data")]))


def test_a_new_template_has_a_memory_backed_volume() -> None:
    """Without a template of the user the primary container gets the volume."""
    spec = with_shared_memory(None).pod_spec
    assert [container.name for container in spec.containers] == ["primary"]
    assert spec.volumes[0].empty_dir.medium == "Memory"
    assert spec.containers[0].volume_mounts[0].mount_path == "/dev/shm"
    assert spec.containers[0].volume_mounts[0].name == spec.volumes[0].name


def test_the_users_template_is_kept_and_not_changed() -> None:
    """The user's volumes stay in the copy, and two tasks may share one template."""
    shared = template(V1Container(name="primary", volume_mounts=[V1VolumeMount(name="data", mount_path="/data")]))
    before = copy.deepcopy(shared)
    first, second = with_shared_memory(shared), with_shared_memory(shared)
    assert shared == before
    assert first == second
    assert first is not second
    assert [volume.name for volume in first.pod_spec.volumes] == ["data", "shm"]
    assert [mount.name for mount in first.pod_spec.containers[0].volume_mounts] == ["data", "shm"]


def test_a_template_without_spec_gets_one() -> None:
    """A template whose spec was removed after construction is served too."""
    bare = PodTemplate()
    bare.pod_spec = None
    assert shared_memory_problems(bare) == ()
    assert with_shared_memory(bare).pod_spec.containers[0].name == "primary"
    assert bare.pod_spec is None


def test_a_copy_is_the_tasks_own() -> None:
    """Where nothing is added the template is copied all the same."""
    shared = template(V1Container(name="primary"))
    assert copy_template(shared) == shared
    assert copy_template(shared) is not shared
    assert copy_template(None) is None


@pytest.mark.parametrize(
    ("clashing", "words"),
    [
        (template(V1Container(name="primary"), V1Container(name="side")), "2 containers"),
        (
            template(V1Container(name="primary", volume_mounts=[V1VolumeMount(name="x", mount_path="/dev/shm")])),
            "already mounts",
        ),
    ],
)
def test_clashing_templates_are_problems_that_name_the_switch(clashing: PodTemplate, words: str) -> None:
    """A template that has its own idea of /dev/shm is refused, and the message says what to set."""
    (problem,) = shared_memory_problems(clashing)
    assert words in problem
    assert "increase_shared_mem=False" in problem


@pytest.mark.parametrize("harmless", [None, PodTemplate(), template(V1Container(name="primary"))])
def test_other_templates_have_no_problems(harmless: PodTemplate | None) -> None:
    """No container, or one without a mount at /dev/shm, is fine."""
    assert shared_memory_problems(harmless) == ()
