"""A laptop that loses its network, for a minute also while it follows a run: with a real link, cut and healed.

The cluster and the storage, which speaks S3, are behind that link both.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from kfpytorch_ray.runs import OUTCOME
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import HeadCluster, Laptop, wait_until

SCRIPT = """
import json, os, sys
from flytekit import FlyteDirectory, FlyteFile
from kfpytorch_ray import Elastic, RayBackend, launch


def main(address, storage, folder, variables):
    def work(file, directory):
        import threading
        from pathlib import Path

        assert Path(file.download()).read_text() == Path(directory.download(), "input.txt").read_text() == "text"
        number = 0
        while not Path(folder, "gate").exists():
            print(f"tick {number}", flush=True)
            number += 1
            Path(folder, "counter").write_text(str(number))
            threading.Event().wait(0.1)
        return number, file

    runtime_env = {"env_vars": json.loads(variables)}
    backend = RayBackend(address=address, storage=storage, working_dir="", runtime_env=runtime_env)
    inputs = FlyteFile(f"{folder}/inputs/input.txt"), FlyteDirectory(f"{folder}/inputs")
    number, file = launch(work, *inputs, elastic=Elastic(backend=backend))[0].return_value
    assert open(file.download()).read() == "text"
    print("returned", number, flush=True)


main(*sys.argv[1:])
"""
ASKS = """
import sys, time, requests
while True:
    try:
        requests.get(sys.argv[1] + "/api/version", timeout=1)
        print("reached", end=",", flush=True)
    except requests.RequestException:
        print("not reached", end=",", flush=True)
    time.sleep(0.1)
"""
A_MINUTE = 600
"""In ticks."""


@pytest.fixture
def object_store(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables by which a bucket is reached, here and on the laptop."""
    server = ThreadedMotoServer(laptop.gateway, port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Every request would be a line.
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("bucket")
    yield variables
    # The buckets of one process are those of all its servers.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()
    S3FileSystem.clear_instance_cache()


def test_a_laptop_loses_its_network(laptop: Laptop, far_head: HeadCluster, tmp_path: Path) -> None:
    """And nobody else does; it has it again afterwards."""
    log = tmp_path / "log"

    def last() -> str:
        return log.read_text().rpartition(",")[0].rpartition(",")[2]

    with log.open("w") as file, laptop.start(ASKS, far_head.address, stdout=file) as asking:
        wait_until(lambda: last() == "reached", "the laptop to reach the head")
        laptop.cut()
        try:
            wait_until(lambda: last() == "not reached", "the laptop to be cut off")
            assert far_head.jobs() == []
            assert last() == "not reached"
        finally:
            laptop.heal()
        wait_until(lambda: last() == "reached", "the laptop to reach the head again")
        asking.kill()


@pytest.mark.timeout(600)
def test_the_link_is_cut_for_a_minute(
    far_head: HeadCluster, laptop: Laptop, object_store: dict[str, str], tmp_path: Path
) -> None:
    """The run does not notice, and ends meanwhile; the script goes on where it stopped, and loses nothing.

    Its inputs, which lie in the bucket, are removed with the result; the one that it returns is not.
    """
    counter, gate, output = tmp_path / "counter", tmp_path / "gate", tmp_path / "output"
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "input.txt").write_text("text")
    storage = Storage("s3://bucket/launches")

    def ticks() -> int:
        return int(counter.read_text() or 0) if counter.exists() else 0

    def said() -> str:
        return output.read_text(errors="replace")

    def names() -> list[str]:
        (run,) = storage.folder("runs").names()
        return storage.folder(f"runs/{run}").names()

    with output.open("wb") as file:
        arguments = (far_head.address, storage.uri, str(tmp_path), json.dumps(object_store))
        script = laptop.start(SCRIPT, *arguments, stdout=file, stderr=subprocess.STDOUT)
    wait_until(lambda: "tick 20" in said() or script.poll() is not None, "the first lines to arrive")
    assert script.poll() is None, said()
    laptop.cut()
    try:
        before = ticks()
        wait_until(lambda: ticks() >= before + A_MINUTE, "a minute", timeout_s=300)
        assert len(ticks_in(said())) < before + A_MINUTE / 2
        gate.touch()
        wait_until(lambda: OUTCOME in names(), "the run to end")
    finally:
        gate.touch()
        laptop.heal()
    assert script.wait(240) == 0, said()
    assert f"returned {ticks()}" in said()
    assert "Trying again." in said()
    assert "can be reached again" in said()
    assert ticks_in(said()) == list(range(ticks()))
    assert names() == ["collected.json", "driver.log", "manifest.json", "outcome.json"]


def ticks_in(text: str) -> list[int]:
    """The numbers of the lines that have come."""
    return [int(number) for number in re.findall(r"tick (\d+)\n", text)]
