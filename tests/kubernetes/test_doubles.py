"""The doubles of node and operator do on a real API server what the real ones do."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.node import Node
from kubernetes import client

from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import is_running

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:Unverified HTTPS request")]


def pod(name: str, *command: str, image: str = "any", policy: str = "Never", **container: Any) -> Document:
    """A Pod of one container."""
    spec = {"name": "main", "image": image, "command": list(command), **container}
    return {"metadata": {"name": name}, "spec": {"containers": [spec], "restartPolicy": policy}}


def status(api: Api, namespace: str, name: str) -> Document:
    found = api.get("pods", namespace, name)
    return {} if found is None else found["status"]


def wait_for_phase(api: Api, namespace: str, name: str, phase: str) -> Document:
    wait_until(lambda: status(api, namespace, name).get("phase") == phase, f"{name} to be {phase}")
    return status(api, namespace, name)


def reason(api: Api, namespace: str, name: str) -> str:
    """Why a Pod's container waits."""
    containers = status(api, namespace, name).get("containerStatuses", [])
    return next((one["state"].get("waiting", {}).get("reason", "") for one in containers), "")


def events(api: Api, namespace: str, name: str) -> set[str]:
    """The reasons of what was told about an object."""
    found = api.find("events", namespace)
    return {event["reason"] for event in found if event["involvedObject"]["name"] == name}


def test_a_pod_runs_with_its_variables_and_leaves_its_exit_code(api: Api, namespace: str, node: Node) -> None:
    """Values, fields, Secrets and references arrive; the log tells, and the exit code and the message are there."""
    secret = {"metadata": {"name": "keys"}, "data": {"KEY": base64.b64encode(b"open").decode()}}
    api.create("secrets", namespace, secret)
    body = pod(
        "plain",
        "/bin/sh",
        "-c",
        "echo $NAME $ADDRESS $KEY $BOTH `hostname`; python -c 'import kfpytorch_ray'; exit 3",
        env=[
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "BOTH", "value": "$(NAME)-$(KEY)"},
        ],
        envFrom=[{"secretRef": {"name": "keys"}}],
        terminationMessagePolicy="FallbackToLogsOnError",
    )
    api.create("pods", namespace, body)
    found = wait_for_phase(api, namespace, "plain", "Failed")
    terminated = found["containerStatuses"][0]["state"]["terminated"]
    assert terminated["exitCode"] == 3
    expected = f"plain {found['podIP']} open plain-open plain"
    assert terminated["message"].strip() == expected


def test_a_log_is_read_and_followed(connection: client.ApiClient, api: Api, namespace: str, node: Node) -> None:
    """The API server hands the container's real output on, while it is written and after its end."""
    script = "for i in 1 2 3; do echo line $i; done; until test -e /tmp/go; do sleep 0.05; done; echo last"
    api.create("pods", namespace, pod("talks", "/bin/sh", "-c", script))
    wait_for_phase(api, namespace, "talks", "Running")
    core = client.CoreV1Api(connection)
    wait_until(lambda: "line 3" in core.read_namespaced_pod_log("talks", namespace), "three lines")
    assert core.read_namespaced_pod_log("talks", namespace, tail_lines=1) == "line 3\n"
    answer = core.read_namespaced_pod_log("talks", namespace, follow=True, _preload_content=False)
    lines = iter(answer)
    received = next(lines)
    for process in node.processes(namespace, "talks"):
        open(f"/proc/{process}/root/tmp/go", "w", encoding="utf-8").close()
    received += b"".join(lines)
    assert received == b"line 1\nline 2\nline 3\nlast\n"
    wait_for_phase(api, namespace, "talks", "Succeeded")
    assert core.read_namespaced_pod_log("talks", namespace).endswith("last\n")


@pytest.mark.parametrize(
    "asks",
    [
        {"containers": [{"resources": {"limits": {"nvidia.com/gpu": "9"}}}]},
        {"nodeSelector": {"accelerator": "h100"}},
    ],
    ids=["too-much", "elsewhere"],
)
def test_a_pod_that_fits_nowhere_waits(asks: Document, api: Api, namespace: str, node: Node) -> None:
    """It stays Pending, with the scheduler's condition and Event, and is deleted at once."""
    body = pod("large", "true")
    container = asks.get("containers", [{}])[0]
    body["spec"] = {**body["spec"], **asks, "containers": [{**body["spec"]["containers"][0], **container}]}
    api.create("pods", namespace, body)
    wait_until(lambda: "FailedScheduling" in events(api, namespace, "large"), "FailedScheduling")
    found = status(api, namespace, "large")
    assert found["phase"] == "Pending"
    assert [(one["type"], one["reason"]) for one in found["conditions"]] == [("PodScheduled", "Unschedulable")]
    api.delete("pods", namespace, "large")
    assert api.get("pods", namespace, "large") is None


def test_an_image_that_is_missing_is_not_pulled(api: Api, namespace: str, node: Node) -> None:
    """ImagePullBackOff, with an Event."""
    api.create("pods", namespace, pod("no-image", "true", image="registry.example/missing:1"))
    wait_until(lambda: reason(api, namespace, "no-image") == "ImagePullBackOff", "ImagePullBackOff")
    assert status(api, namespace, "no-image")["phase"] == "Pending"
    wait_until(lambda: {"Failed", "BackOff"} <= events(api, namespace, "no-image"), "the Events")


def test_a_container_that_ends_again_and_again_is_held_back(api: Api, namespace: str, node: Node) -> None:
    """CrashLoopBackOff, with the exit code in lastState."""
    api.create("pods", namespace, pod("crashes", "/bin/sh", "-c", "exit 5", policy="Always"))
    wait_until(lambda: reason(api, namespace, "crashes") == "CrashLoopBackOff", "CrashLoopBackOff")
    found = status(api, namespace, "crashes")["containerStatuses"][0]
    assert found["restartCount"] >= 1
    assert found["lastState"]["terminated"]["exitCode"] == 5


def test_a_secret_that_is_missing_holds_a_container_up(api: Api, namespace: str, node: Node) -> None:
    """CreateContainerConfigError until it is there."""
    body = pod("waits", "true", envFrom=[{"secretRef": {"name": "later"}}])
    api.create("pods", namespace, body)
    wait_until(lambda: reason(api, namespace, "waits") == "CreateContainerConfigError", "CreateContainerConfigError")
    api.create("secrets", namespace, {"metadata": {"name": "later"}})
    wait_for_phase(api, namespace, "waits", "Succeeded")


def test_a_deleted_pod_has_time_to_end_and_then_is_gone(api: Api, namespace: str, node: Node) -> None:
    """SIGTERM reaches its first process; one that does not heed it is killed with all below it, and the Pod goes."""
    script = "trap 'echo heard' TERM; sleep 1000 & while true; do wait; done"
    api.create("pods", namespace, pod("stays", "/bin/bash", "-c", script))
    wait_for_phase(api, namespace, "stays", "Running")
    wait_until(lambda: any(map(is_running, node.processes(namespace, "stays"))), "its processes")
    processes = node.processes(namespace, "stays")
    api.delete("pods", namespace, "stays", gracePeriodSeconds=1)
    assert (
        "deletionTimestamp" in (api.get("pods", namespace, "stays") or {"metadata": {"deletionTimestamp"}})["metadata"]
    )
    wait_until(lambda: api.get("pods", namespace, "stays") is None, "the Pod to go")
    assert not any(map(is_running, processes))


def test_a_job_s_pods_are_its_doing(api: Api, namespace: str, node: Node) -> None:
    """The real Job controller makes a Pod, which runs, and the Job is complete."""
    template = {"spec": pod("x", "true")["spec"]}
    api.create("jobs", namespace, {"metadata": {"name": "job"}, "spec": {"template": template}})
    wait_until(
        lambda: (api.get("jobs", namespace, "job") or {})["status"].get("succeeded") == 1, "the Job to be complete"
    )
