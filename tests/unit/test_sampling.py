"""What ranks use: real processes, and a double of NVIDIA's library, for this machine need not have a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kfpytorch_ray.cluster.sampling import Gpus, RankSample, Sampler, find_gpus, installed_versions, node_facts
from kfpytorch_ray.heartbeat import HeartbeatPage
from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import is_running

MIB = 2**20

BUSY = """
import subprocess, sys
held = bytearray(120 * 2**20)
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(90 * 2**20)\\nwhile True: pass"])
print("ready", flush=True)
child.wait()
"""
IDLE = "import time; print('ready', flush=True); time.sleep(600)"


class NvmlError(Exception):
    """As ``pynvml.NVMLError``."""


class Nvml:
    """As ``pynvml`` on a node with three GPUs, the last a slice that does not say how busy it is."""

    NVMLError = NvmlError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVIDIA's names
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return {"GPU-b": 1, "MIG-c": 2}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return b"Old" if handle == 0 else f"New {handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Nvml:  # noqa: N802
        if handle == 2:
            raise NvmlError
        self.gpu = 10 * handle
        return self

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Nvml:  # noqa: N802
        self.used = handle * MIB
        return self


@pytest.fixture
def page(tmp_path: Path) -> Iterator[HeartbeatPage]:
    with HeartbeatPage.create(tmp_path / "page", 2) as created:
        created.start_round(0)
        yield created


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Two workers, each in a group of its own: rank 4 has a busy child, rank 5 sleeps."""
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for code in (BUSY, IDLE)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield started
    for process in started:
        os.killpg(process.pid, 9)
        process.communicate()


def test_each_ranks_processes_are_looked_at(page: HeartbeatPage, processes: list[subprocess.Popen[str]]) -> None:
    """CPU and memory of a worker and its children; samples name rank and round, and are given out once."""
    for local_rank, process in enumerate(processes):
        page.join(local_rank, 4 + local_rank, process.pid)
    sampler = Sampler(page)
    sampler.gpus = Gpus(Nvml(), "1")
    seen: list[RankSample] = []

    def enough() -> bool:
        seen.extend(sampler.take())
        busy = [sample for rank, sample in seen if rank == 4]
        # The worker itself waits: what is seen of CPU and of the second half of the memory is its child's.
        child = len(busy) >= 4 and busy[-1].cpu_percent > 5 and busy[-1].memory_bytes > 200 * MIB
        return child and len(seen) > len(busy)

    with sampler.during(0):
        wait_until(enough, "samples of both ranks", timeout_s=60)
    wait_until(lambda: not looking(), "the last look to be over")
    used_s = cpu_seconds(processes[0].pid)
    seen.extend(sampler.take())
    busy = [sample for rank, sample in seen if rank == 4]
    idle = [sample for rank, sample in seen if rank == 5]
    assert {sample.round_index for _, sample in seen} == {0}
    assert [sample.at for sample in busy] == sorted(sample.at for sample in busy)
    # What was used before the sample before does not count again: together they have not seen more than there was.
    pairs = itertools.pairwise(busy)
    assert sum(after.cpu_percent / 100 * (after.at - before.at) for before, after in pairs) < used_s + 0.1
    assert max(sample.memory_bytes for sample in idle) < 100 * MIB
    assert idle[-1].cpu_percent < 10
    assert {(sample.gpu_percent, sample.gpu_memory_bytes) for sample in busy} == {(10.0, MIB)}
    assert {(sample.gpu_percent, sample.gpu_memory_bytes) for sample in idle} == {(None, None)}
    assert sampler.take() == ()


def looking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sampling"]


def cpu_seconds(pid: int) -> float:
    """What a process and those below it have used."""
    process = psutil.Process(pid)
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def test_ranks_that_have_ended_are_passed_over(page: HeartbeatPage, processes: list[subprocess.Popen[str]]) -> None:
    """The others are still looked at."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: not is_running(ended.pid), "it to end")
    page.join(0, 0, ended.pid)
    page.join(1, 1, processes[1].pid)
    sampler = Sampler(page)
    seen: list[RankSample] = []

    def two_more() -> bool:
        seen.extend(sampler.take())
        return len([rank for rank, _ in seen if rank == 1]) >= 2

    with sampler.during(0):
        # A zombie first, and then nothing at all.
        wait_until(two_more, "samples", timeout_s=60)
        ended.wait()
        seen.clear()
        wait_until(two_more, "samples", timeout_s=60)
    assert {rank for rank, _ in seen} == {1}


def test_another_round_is_not_taken_for_this_one(page: HeartbeatPage, processes: list[subprocess.Popen[str]]) -> None:
    """Nothing is said of a round that has not begun on the page, or is over there."""
    page.join(0, 0, processes[1].pid)
    sampler = Sampler(page)
    with sampler.during(1):
        pass
    page.end_round()
    with sampler.during(0):
        pass
    assert sampler.take() == ()


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ("Old", "New 1", "New 2")),
        ("2,0", ("New 2", "Old")),
        ("GPU-b, MIG-c", ("New 1", "New 2")),
        ("", ()),
    ],
)
def test_gpus_are_those_that_the_agent_may_use(visible: str | None, names: tuple[str, ...]) -> None:
    """In the order of CUDA_VISIBLE_DEVICES, by number or by name."""
    assert Gpus(Nvml(), visible).names() == names


def test_a_local_rank_has_the_gpu_of_its_number() -> None:
    """What a GPU does not say is not known; a rank without one has none."""
    gpus = Gpus(Nvml(), "1,2")
    assert gpus.use(0) == (10.0, MIB)
    assert gpus.use(1) == (None, 2 * MIB)
    assert gpus.use(2) == (None, None)


def test_a_node_says_what_it_is() -> None:
    """Name, processors, memory, GPUs and versions; without GPUs there is nothing to look at."""
    facts = node_facts(Gpus(Nvml(), "1"))
    assert facts.hostname
    assert facts.processor
    assert facts.cpus >= 1
    assert facts.memory_bytes > 2**30
    assert facts.devices == ("New 1",)
    assert dict(facts.versions) == dict(installed_versions())
    assert {"kfpytorch_ray", "torch", "ray", "flytekit", "python"} <= dict(facts.versions).keys()
    if not os.path.exists("/dev/nvidiactl"):
        assert find_gpus({}) is None
