"""``kfpytorch-ray doctor`` against a real head over real HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kfpytorch_ray import RayBackend
from kfpytorch_ray.cli.doctor import doctor
from kfpytorch_ray.cluster.remote.client import JobClient, client_of
from kfpytorch_ray.testing import HeadCluster, NetworkCluster, nothing_left, unavailable, wait_until

Findings = list[dict[str, str]]


def run(*arguments: str) -> tuple[int, Findings]:
    """Exit code and findings of the command."""
    done = CliRunner().invoke(doctor, ["--json", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def of(found: Findings, group: str) -> dict[str, dict[str, str]]:
    """The findings of a group by what was checked."""
    return {one["check"]: one for one in found if one["group"] == group}


def jobs_of_ours(client: JobClient) -> set[str]:
    """Ids in the cluster's list; other tests' runs may be there as well as the doctor's."""
    return {job.submission_id for job in client.list_jobs() if (job.submission_id or "").startswith("kfr-")}


def test_a_healthy_cluster(head: HeadCluster, new_storage: str) -> None:
    """Everything is looked at and nothing fails; neither job nor file nor folder stays behind."""
    client = client_of(RayBackend(), head.address)
    before = jobs_of_ours(client)
    code, found = run("--address", head.address, "--storage", new_storage)
    failures = [one for one in found if one["level"] == "fail"]
    assert (code, failures) == (0, [])
    assert of(found, "cluster").keys() >= {
        "reachable",
        "access",
        "ray",
        "resources",
        "head's storage",
        "head's versions",
    }
    nodes = of(found, "nodes")
    assert nodes.keys() >= {"versions", "storage", "network", "all_reduce gloo", "/dev/shm", "clocks"}
    assert "all 2 nodes" in nodes["storage"]["text"]
    assert nodes["all_reduce gloo"]["text"].startswith("2 ranks")
    assert nodes["clocks"]["level"] == "ok"
    assert re.search(
        r"iB or more are left beside the object store|the object store may take", nodes["/dev/shm"]["text"]
    )
    assert not Path(new_storage.removeprefix("file://")).exists()
    # Ray writes a job anew that leaves before Ray's own last look at it.
    seen_at = time.monotonic()

    def clean_for_a_while() -> bool:
        nonlocal seen_at
        if jobs_of_ours(client) - before:
            seen_at = time.monotonic()
        return time.monotonic() - seen_at > 5

    wait_until(clean_for_a_while, "the doctor's jobs to leave the list for good")


def test_a_storage_that_only_this_machine_has(head: HeadCluster) -> None:
    """Memory of this process: written here, and not seen there. What can be told without a launch is told."""
    client = client_of(RayBackend(), head.address)
    before = jobs_of_ours(client)
    code, found = run("--address", head.address, "--storage", "memory://doctor/storage")
    assert code == 1
    assert of(found, "this machine")["storage"]["level"] == "ok"
    assert of(found, "cluster")["head's storage"]["level"] == "fail"
    assert "is not there" in of(found, "cluster")["head's storage"]["text"]
    assert of(found, "nodes")["launch"]["level"] == "warn"
    wait_until(lambda: jobs_of_ours(client) <= before, "the doctor's job to leave the list")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "ray://127.0.0.1:10001"])
def test_an_address_where_nobody_is(address: str) -> None:
    """One failure that says why, at once, after what is to be said of this machine."""
    code, found = run("--address", address)
    assert code == 1
    (finding,) = [one for one in found if one["group"] == "cluster"]
    assert (finding["check"], finding["level"]) == ("reachable", "fail")
    assert "http" in finding["fix"] or "http" in finding["text"]


def test_a_cluster_that_is_fully_used(head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """A warning that says so, no failure and no wait without an end."""
    released = tmp_path / "released"
    hold = (
        "import os, ray, time\nray.init()\n"
        "@ray.remote(num_cpus=4)\nclass Hold: pass\n"
        "held = [Hold.remote() for _ in range(2)]\n"
        "while ray.available_resources().get('CPU', 0) > 0: time.sleep(0.1)\n"
        f"print('held', flush=True)\nwhile not os.path.exists({str(released)!r}): time.sleep(0.1)\n"
    )
    client = client_of(RayBackend(), head.address)
    script = tmp_path / "hold.py"
    script.write_text(hold)
    job = client.submit_job(entrypoint=f"python {script}")
    try:
        wait_until(lambda: "held" in str(client.get_job_logs(job)), "all CPUs to be in use", 120)
        code, found = run("--address", head.address, "--storage", new_storage, "--wait", "3")
    finally:
        released.touch()
        client.wait_until_over(job)
    assert code == 0
    launch = of(found, "nodes")["launch"]
    assert launch["level"] == "warn"
    assert "fully used" in launch["text"]
    assert "--wait" in launch["fix"]


def test_a_cluster_that_this_machine_belongs_to(head: HeadCluster, new_storage: str) -> None:
    """By the address of the GCS the same nodes are looked at by a driver here. In a process of its own: it joins."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kfpytorch_ray.cli",
            "doctor",
            "--json",
            "--address",
            head.gcs_address,
            "--storage",
            new_storage,
        ],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = json.loads(done.stdout)
    assert (done.returncode, [one for one in found if one["level"] == "fail"]) == (0, []), done.stderr
    assert of(found, "nodes")["all_reduce gloo"]["text"].startswith("2 ranks")
    assert of(found, "nodes")["storage"]["level"] == "ok"
    assert not Path(new_storage.removeprefix("file://")).exists()


def test_a_ray_on_this_machine(tmp_path: Path) -> None:
    """Two agents on a Ray that is started for them, and gone afterwards with its folder."""
    done = subprocess.run(
        [sys.executable, "-m", "kfpytorch_ray.cli", "doctor", "--json", "--local-ray"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    said = [one for one in found if one["check"] == "local Ray"]
    assert len(said) == 2
    assert any(one["text"].startswith("2 ranks") for one in said)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "network namespaces")
def test_two_nodes_that_cannot_talk_to_each_other() -> None:
    """Both reach the driver, so the launch runs: the all_reduce fails, and the pair is named. Nothing hangs."""
    with NetworkCluster(nodes=3) as cluster, nothing_left(cluster.temp_dir):
        one, other, _ = cluster.nodes
        # One way is enough: no answer arrives.
        subprocess.run(["ip", "-n", one.network, "route", "add", "blackhole", other.address], check=True)
        driver = cluster.start_driver(
            "import sys\nfrom kfpytorch_ray.cli.group import main\nmain(sys.argv[1:])\n",
            *("doctor", "--json", "--address", cluster.address),
            stdout=subprocess.PIPE,
        )
        said, _ = driver.communicate(timeout=280)
        found = json.loads(said)
    nodes = of(found, "nodes")
    assert driver.returncode == 1
    assert nodes["all_reduce gloo"]["level"] == "fail"
    assert nodes["network"]["level"] == "fail"
    assert f"{other.address} -> {one.address}" in nodes["network"]["text"]
    assert "NetworkPolicy" in nodes["network"]["fix"]
