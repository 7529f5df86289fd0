"""The test bed itself: clusters that start, take jobs, break and leave nothing."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from kfpytorch_ray.testing import HeadCluster, Laptop, Relay, kill_node, unavailable, wait_until
from kfpytorch_ray.testing.processes import all_processes, command, environment


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client takes these for an address that it is given."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def says(client: JobSubmissionClient, text: str) -> bool:
    """Whether a job that says a text succeeds."""
    job = client.submit_job(entrypoint=f"echo {text}")
    wait_until(lambda: client.get_job_status(job).is_terminal(), "the job to end")
    return client.get_job_status(job) == "SUCCEEDED" and text in client.get_job_logs(job)


def test_jobs_run(head: HeadCluster) -> None:
    """At once, without a look at whether the server can start them."""
    assert says(JobSubmissionClient(head.address), "here I am")
    assert [job["entrypoint"] for job in head.jobs()].count("echo here I am") == 1
    assert len(head.nodes) == 2


def test_a_cluster_starts_clean_and_ends_whole(package: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows nothing of this process's settings; nothing of it outlives ``kill()``, nor its folder the block."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    monkeypatch.setenv("KFPYTORCH_RAY_BACKEND", "nothing")
    with HeadCluster(nodes=0, env={**package, "OURS": "1"}) as head:
        folder = Path(head.temp_dir).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        node = head.add_node()
        assert head.nodes == (node,)
        variables = environment(node.raylet)
        assert not {"RAY_ADDRESS", "KFPYTORCH_RAY_BACKEND"} & variables.keys()
        assert (variables["OURS"], variables["TMPDIR"]) == ("1", head.temp_dir)
        assert variables["PATH"].startswith(str(Path(sys.executable).parent))
        kill_node(node)
        assert head.nodes == ()
        head.kill()
        assert not [process for process in all_processes() if environment(process).get("TMPDIR") == head.temp_dir]
        monkeypatch.delenv("RAY_ADDRESS")
        with pytest.raises(ConnectionError):
            JobSubmissionClient(head.address)
    assert not folder.exists()


def test_a_cluster_ends_with_its_maker() -> None:
    """Also when that is killed."""
    code = """
import os, signal
from kfpytorch_ray.testing import HeadCluster
with HeadCluster(nodes=0) as head:
    print(head.temp_dir, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    temp_dir = done.stdout.strip()
    wait_until(lambda: not Path(temp_dir).parent.exists(), "the janitor")
    assert not [process for process in all_processes() if environment(process).get("TMPDIR") == temp_dir]


def test_a_token_is_asked_for(package: dict[str, str]) -> None:
    """Without it the job server refuses; it stands in no command line."""
    token = "s3cret-" * 6
    with HeadCluster(nodes=1, token=token, env=package) as head:
        with pytest.raises(AuthenticationError, match="Missing"):
            JobSubmissionClient(head.address)
        with pytest.raises(AuthenticationError, match="Invalid"):
            JobSubmissionClient(head.address, headers={"Authorization": "Bearer wrong"})
        assert says(JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {token}"}), "hi")
        for process in all_processes():
            assert token not in command(process)
            assert token not in environment(process).values()


def test_tls_in_front_of_it(head: HeadCluster, tmp_path: Path) -> None:
    """As a proxy does it: a client that has the authority's certificate submits, one that has not is turned away."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    host, port = head.address.removeprefix("http://").split(":")
    with Relay(host, int(port), tls=context) as relay:
        assert says(JobSubmissionClient(relay.url, verify=str(bundle)), "hi")
        with pytest.raises(ConnectionError):
            JobSubmissionClient(relay.url)


def test_a_laptop_ends_with_what_runs_on_it() -> None:
    """And leaves no network."""
    if reason := unavailable():
        pytest.skip(reason)
    with Laptop() as laptop:
        process = laptop.start("import signal\nsignal.pause()")
    assert process.returncode == -signal.SIGKILL
    assert laptop.gateway not in subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout
