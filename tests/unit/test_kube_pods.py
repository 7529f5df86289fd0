"""Pods that are made of templates."""

from __future__ import annotations

from typing import Any

from flytekit import PodTemplate
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.client import V1Container, V1EnvVar, V1PodSpec, V1Toleration, V1Volume, V1VolumeMount

from kfpytorch_ray.adapters.kube_pods import laid_over, pod

named = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("abc")}, optional={"value": st.integers(0, 3)}),
    max_size=3,
    unique_by=lambda item: item["name"],
)
values = st.recursive(
    st.integers(0, 3) | named,
    lambda inner: st.dictionaries(st.sampled_from(["x", "y", "env"]), inner, max_size=3),
    max_leaves=8,
)
dicts = st.dictionaries(st.sampled_from(["x", "y", "env"]), values, max_size=3)


def template(primary: str = "primary", **spec: Any) -> PodTemplate:
    return PodTemplate(pod_spec=V1PodSpec(**{"containers": [], **spec}), primary_container_name=primary)


@given(dicts)
def test_laying_nothing_over_changes_nothing(base: dict[str, Any]) -> None:
    """Neither does laying it over nothing, nor over itself."""
    assert laid_over(base, {}) == laid_over({}, base) == laid_over(base, base) == base


@given(dicts, dicts)
def test_what_is_over_counts(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Every value of it is in what comes out, and neither argument is changed."""
    before = repr((base, over))
    merged = laid_over(base, over)
    assert laid_over(merged, over) == merged
    assert set(merged) == set(base) | set(over)
    assert repr((base, over)) == before


def test_lists_are_merged_by_what_tells_their_items_apart() -> None:
    """Variables by name, mounts by path; tolerations, which have nothing of it, are joined, arguments replaced."""
    base = {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        "volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/b"}],
        "tolerations": [{"key": "gpu"}],
        "args": ["x"],
    }
    over = {
        "env": [{"name": "B", "value": "3"}],
        "volumeMounts": [{"name": "w", "mountPath": "/b"}],
        "tolerations": [{"key": "gpu", "effect": "NoSchedule"}, {"key": "gpu"}],
        "args": ["y"],
    }
    assert laid_over(base, over) == {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}],
        "volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "w", "mountPath": "/b"}],
        "tolerations": [{"key": "gpu"}, {"key": "gpu", "effect": "NoSchedule"}],
        "args": ["y"],
    }


def test_the_primary_container_comes_first_and_is_ours() -> None:
    """Whatever the user calls it and wherever it stands; what they say of it wins, but for its resources."""
    users = template(
        "main",
        containers=[
            V1Container(name="side", image="s"),
            V1Container(name="main", image="theirs", env=[V1EnvVar(name="A", value="1")]),
        ],
        node_selector={"pool": "gpu"},
    )
    more = template(
        "ray",
        containers=[V1Container(name="ray", volume_mounts=[V1VolumeMount(name="data", mount_path="/data")])],
        volumes=[V1Volume(name="data")],
        tolerations=[V1Toleration(key="gpu")],
    )
    more.labels = {"queue": "q"}
    ours = {"image": "ours", "lifecycle": {"preStop": {}}}
    amounts = {"limits": {"cpu": "1"}}
    made = pod("ray-worker", ours, (users, None, more), amounts, serviceAccountName="robot", restartPolicy=None)
    assert made == {
        "metadata": {"labels": {"queue": "q"}},
        "spec": {
            "containers": [
                {
                    "name": "ray-worker",
                    "image": "theirs",
                    "lifecycle": {"preStop": {}},
                    "resources": {"limits": {"cpu": "1"}},
                    "env": [{"name": "A", "value": "1"}],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                },
                {"name": "side", "image": "s"},
            ],
            "nodeSelector": {"pool": "gpu"},
            "serviceAccountName": "robot",
            "tolerations": [{"key": "gpu"}],
            "volumes": [{"name": "data"}],
        },
    }
    assert users.pod_spec is not None
    assert users.pod_spec.containers[1].name == "main"
