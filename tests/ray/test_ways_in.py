"""The ways in which a user gets to Ray: a script, pyflyte, a submitted job. Each in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from kfpytorch_ray.testing import HeadCluster

BIN = Path(sys.executable).parent
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

WORKFLOW = """
from flytekit import task, workflow
from kfpytorch_ray import Elastic
from helper import sum_of_ranks

@task(task_config=Elastic(nnodes=2, nproc_per_node=2, backend="ray"))
def train(base: float) -> float:
    return sum_of_ranks(base)

@workflow
def wf(base: float = 0.5) -> float:
    return train(base=base)

if __name__ == "__main__":
    print("result:", wf())
"""

HELPER = """

import torch
import torch.distributed as dist

def sum_of_ranks(base):
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total) + base
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a workflow, and a module that it imports."""
    (tmp_path / "flow.py").write_text(WORKFLOW)
    (tmp_path / "helper.py").write_text(HELPER)
    return tmp_path


@pytest.fixture
def environment(short_folder: str) -> dict[str, str]:
    """What a shell has that knows nothing of Ray."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    path = f"{BIN}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "RAY_TMPDIR": short_folder, "RAY_AUTH_MODE": "disabled"}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run to the end; the output is shown when a test fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=240
    )
    print(done.stdout, done.stderr)
    return done


def test_plain_script(project: Path, environment: dict[str, str]) -> None:
    """``python flow.py`` starts a Ray of its own."""
    done = run([sys.executable, "flow.py"], project, environment)
    assert "result: 6.5" in done.stdout
    assert done.returncode == 0


def test_pyflyte_run_from_another_folder(project: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """``pyflyte run FILE wf``: workers import the modules beside the workflow file."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run([str(BIN / "pyflyte"), "run", str(project / "flow.py"), "wf", "--base", "1.5"], elsewhere, environment)
    assert "7.5" in done.stdout
    assert done.returncode == 0


def test_route_upstream_by_environment(project: Path, environment: dict[str, str]) -> None:
    """Unedited code of upstream's plugin runs on Ray by two variables."""
    text = WORKFLOW.replace("from kfpytorch_ray import", "from flytekitplugins.kfpytorch import")
    text = text.replace(', backend="ray"', "")
    (project / "flow.py").write_text(text)
    switches = {"KFPYTORCH_RAY_ROUTE_UPSTREAM": "1", "KFPYTORCH_RAY_BACKEND": "ray"}
    done = run([sys.executable, "flow.py"], project, {**environment, **switches})
    assert "result: 6.5" in done.stdout


@pytest.fixture(scope="module")
def job_server() -> Iterator[HeadCluster]:
    """A cluster of two nodes, the head among them."""
    variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    with HeadCluster(nodes=1, head_cpus=4, env=variables) as head:
        yield head


def submit(
    head: HeadCluster, working_dir: Path, environment: dict[str, str], *entrypoint: str
) -> subprocess.CompletedProcess[str]:
    """``ray job submit`` as a user types it, followed to its end."""
    command = [str(BIN / "ray"), "job", "submit", f"--address={head.address}", "--working-dir", working_dir.name, "--"]
    return run([*command, *entrypoint], working_dir.parent, environment)


@pytest.mark.parametrize(
    ("entrypoint", "promised"),
    [
        (["python", "train_script.py"], r"rank 3: .*'sum': 46"),
        (["pyflyte", "run", "digits.py", "wf", "--epochs", "1"], r"accuracy"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_submitted_example(
    job_server: HeadCluster, environment: dict[str, str], entrypoint: list[str], promised: str
) -> None:
    """``ray job submit --working-dir examples -- ...`` needs no option of ours."""
    done = submit(job_server, EXAMPLES, environment, *entrypoint)
    assert re.search(promised, done.stdout)
    assert done.returncode == 0


@pytest.mark.parametrize("entrypoint", [["python", "flow.py"], ["pyflyte", "run", "flow.py", "wf"]], ids=lambda e: e[0])
def test_submitted_job_that_fails(
    job_server: HeadCluster, project: Path, environment: dict[str, str], entrypoint: list[str]
) -> None:
    """A worker's error, from a module that travelled with the job, fails it, and is in the last lines of its log."""
    broken = HELPER.replace("dist.init_process_group", "raise LookupError('from the helper')  # ")
    (project / "helper.py").write_text(broken)
    done = submit(job_server, project, environment, *entrypoint)
    assert done.returncode != 0
    (job,) = [job for job in job_server.jobs() if f"'{job['submission_id']}'" in done.stdout]
    assert job["status"] == "FAILED"
    # Ray's message of a failed job is made of the last lines of its log.
    assert "LookupError: from the helper" in job["message"]
    log = JobSubmissionClient(job_server.address).get_job_logs(job["submission_id"])
    assert "LookupError: from the helper" in "\n".join(log.splitlines()[-10:])


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_ended_leaves_nothing_and_is_no_success(
    signum: signal.Signals,
    project: Path,
    environment: dict[str, str],
    eventually: Callable[[Callable[[], object], str], None],
) -> None:
    """Killed or cancelled: agents and workers end, and the check around each test finds no file or process of it."""
    (project / "helper.py").write_text(
        f"import os, signal\ndef sum_of_ranks(base):\n"
        f"    open(os.path.join({str(project)!r}, 'started-' + os.environ['RANK']), 'w').close()\n    signal.pause()\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "flow.py"], cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    eventually(lambda: len(list(project.glob("started-*"))) == 4, "all ranks to run")
    driver.send_signal(signum)
    assert driver.wait(60) != 0
