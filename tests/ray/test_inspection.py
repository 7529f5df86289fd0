"""Looking inside the ranks of a run from another process: by the command line, and by Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kfpytorch_ray import ConfigError, RayBackend, RunError, UnknownRunError, stacks
from kfpytorch_ray.cluster import inspection
from kfpytorch_ray.cluster.inspection import AgentName
from kfpytorch_ray.cluster.stacks import find_py_spy
from kfpytorch_ray.testing import wait_until

pytestmark = pytest.mark.timeout(300)

DRIVER = """
import os, sys, tempfile, time
import ray
from kfpytorch_ray import Elastic, RayBackend, launch

def computes_without_end(folder):
    open(os.path.join(folder, f"begun-{os.environ['RANK']}"), "w").close()
    while not os.path.exists(os.path.join(folder, "over")):
        sum(range(1000))

def other_name(folder):
    computes_without_end(folder)

ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=sys.argv[2], logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
launch(other_name, sys.argv[1], elastic=Elastic(2, 1, backend=RayBackend(silence_timeout_s=120)))
"""


@dataclass(frozen=True)
class Running:
    """A run that another process has launched."""

    address: str
    run: str
    driver: int


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its ranks compute until the tests are over."""
    folder = tmp_path_factory.mktemp("run")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
        with (folder / "errors").open("wb") as errors:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder), temp_dir],
                env={**clean, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert driver.stdout is not None
            address = driver.stdout.readline().strip()
            wait_until(lambda: len([*folder.glob("begun-*")]) == 2 or driver.poll() is not None, "both ranks", 120)
            said = (folder / "errors").read_text()
            assert "other_name (launch-" in said, said
            yield Running(address, said.partition("other_name (")[2].partition(")")[0], driver.pid)
            (folder / "over").touch()
            assert driver.wait(60) == 0, (folder / "errors").read_text()
        finally:
            driver.kill()
            driver.communicate()


def command_line(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kfpytorch_ray.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_stacks_of_all_ranks(running: Running) -> None:
    """Each rank's, by the beginning of the run's id; they go on as before."""
    done = command_line("stacks", running.run[:-2], "--address", running.address, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"0", "1"}
    assert all("computes_without_end" in text for text in found.values())


def test_stacks_of_one_rank_by_python(running: Running) -> None:
    """What is not there is said, with what is."""
    backend = RayBackend(address=running.address)
    assert stacks(running.run, rank=1, backend=backend).keys() == {1}
    with pytest.raises(UnknownRunError, match="no rank 7 now"):
        stacks(running.run, rank=7, backend=backend)
    with pytest.raises(UnknownRunError, match=running.run):
        stacks("launch-of-somebody-else", backend=backend)


def test_a_node_that_does_not_answer_does_not_hide_the_others(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be what everybody waits for; its own rank is not to be had."""
    monkeypatch.setattr(inspection, "_WAIT_S", 3.0)
    backend = RayBackend(address=running.address)
    started = psutil.Process(running.driver).children(recursive=True)
    agents = [process for process in started if "ElasticAgent" in _title(process)]
    assert len(agents) == 2
    agents[0].suspend()
    try:
        (answered,) = stacks(running.run, backend=backend)
        assert "1 of 2 nodes have not answered" in caplog.text
        assert stacks(running.run, rank=answered, backend=backend).keys() == {answered}
        with pytest.raises(RunError, match="1 of 2 nodes"):
            stacks(running.run, rank=1 - answered, backend=backend)
    finally:
        agents[0].resume()
    assert stacks(running.run, backend=backend).keys() == {0, 1}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.skipif(find_py_spy() is None, reason="py-spy is not installed")
def test_a_flamegraph(running: Running, tmp_path: Path) -> None:
    """An SVG with the function that takes the time."""
    file = tmp_path / "rank-1.svg"
    arguments = ("--rank", 1, "--duration", "1s", "--address", running.address)
    done = command_line("flamegraph", running.run, *arguments, "-o", file)
    if "Permission" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("processes may not be looked at here")
    assert done.returncode == 0, done.stderr
    assert file.read_text().startswith("<?xml")
    assert "computes_without_end" in file.read_text()


def test_names_of_agents() -> None:
    """A run's id may have slashes; other actors' names are nobody's."""
    name = AgentName("a/b", "1f", 3)
    assert AgentName.parsed(str(name)) == name
    assert AgentName.parsed("somebody else's") is None
    assert AgentName.parsed("a/b/c") is None


def test_a_flamegraph_takes_whole_seconds() -> None:
    """As py-spy does."""
    from kfpytorch_ray import flamegraph

    with pytest.raises(ConfigError, match="duration_s"):
        flamegraph("run", 0, duration_s=0)
