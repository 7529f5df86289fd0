"""Several drivers, each a process of its own, launch on one cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from kfpytorch_ray.cluster import placement
from kfpytorch_ray.cluster.demand import Demand
from kfpytorch_ray.cluster.sharing import launch_of
from kfpytorch_ray.testing import LaptopCluster, nothing_left, wait_until

pytestmark = pytest.mark.timeout(900)

PATIENCE_S = 300.0
"""Each driver and each agent loads torch or flytekit, on few cores."""

SCRIPT = """
import json, os, sys
from pathlib import Path
from kfpytorch_ray import Elastic, RayBackend, launch
from kfpytorch_ray.cluster import controller
from kfpytorch_ray.testing import wait_until

controller.REPORT_INTERVAL_S = 0.5
address, name, folder, nodes, cpus = sys.argv[1:]


def train(name, folder):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    names = "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"
    values = {name: os.environ[name] for name in names}
    note = Path(folder, f"{name}-{values['RANK']}")
    note.with_suffix(".new").write_text(json.dumps(values))
    note.with_suffix(".new").rename(note)
    wait_until(Path(folder, f"{name} may end").exists, "leave to end", 600)
    numbers = torch.tensor([int(name[-1])])
    dist.all_reduce(numbers)
    return numbers.item()


train.__qualname__ = name
backend = RayBackend(address=address, working_dir="", resources_per_node={"CPU": float(cpus)})
timeouts = {"join_timeout": 600}
elastic = Elastic(int(nodes), 2 // int(nodes), rdzv_configs=timeouts, backend=backend)
result = launch(train, name, folder, elastic=elastic)
print("results:", *(result[rank].return_value for rank in range(2)))
"""


@dataclass
class Driver:
    """A driver that has been started.

    Attributes:
        name: What its function is called.
        folder: Where its ranks leave notes and find leave to end.
        process: The driver.
    """

    name: str
    folder: Path
    process: subprocess.Popen[str]

    def notes(self) -> list[dict[str, str]]:
        """What each rank that trains says of itself."""
        found = [self.folder / f"{self.name}-{rank}" for rank in range(2)]
        return [json.loads(note.read_text()) for note in found if note.exists()]

    def trains(self) -> bool:
        """Whether both ranks do; fails if the driver has ended."""
        assert self.process.poll() is None, self.output()
        return len(self.notes()) == 2

    def may_end(self) -> None:
        """Let its ranks return."""
        Path(self.folder, f"{self.name} may end").touch()

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.folder, f"{self.name}.log").read_text()

    def ended(self) -> str:
        """What it printed, once it has ended well."""
        assert self.process.wait(PATIENCE_S) == 0, self.output()
        return self.output()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LaptopCluster]:
    """Two nodes of four CPUs."""
    with LaptopCluster(nodes=2, cpus_per_node=4) as started:
        yield started


@contextmanager
def driver(cluster: LaptopCluster, name: str, folder: Path, *, nodes: int, cpus: int) -> Iterator[Driver]:
    script = Path(folder, f"{name}.py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), cluster.address, name, str(folder), str(nodes), str(cpus)]
    log = Path(folder, f"{name}.log")
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            yield Driver(name, folder, process)
        finally:
            process.kill()


def listens(note: dict[str, str]) -> bool:
    """Whether the port that a rank was given is open."""
    with socket.create_connection((note["MASTER_ADDR"], int(note["MASTER_PORT"])), timeout=30):
        return True


def test_launches_from_several_drivers_do_not_meet(cluster: LaptopCluster, tmp_path: Path) -> None:
    """Three at once on the same nodes: each has ports, files, run id and placement groups of its own, and its result.

    That is what each rank listens on or writes to while all of them run.
    """
    with (
        nothing_left(cluster.temp_dir),
        driver(cluster, "train1", tmp_path, nodes=2, cpus=1) as one,
        driver(cluster, "train2", tmp_path, nodes=1, cpus=1) as two,
        driver(cluster, "train3", tmp_path, nodes=1, cpus=1) as three,
    ):
        all_three = (one, two, three)
        wait_until(lambda: all(each.trains() for each in all_three), "all six ranks", PATIENCE_S)
        notes = [note for each in all_three for note in each.notes()]
        assert all(listens(note) for note in notes)
        assert len({(note["MASTER_ADDR"], note["MASTER_PORT"]) for note in notes}) == 3
        assert len({note["TORCHELASTIC_RUN_ID"] for note in notes}) == 3
        assert len({note["TORCHELASTIC_ERROR_FILE"] for note in notes}) == 6
        groups = [entry["name"] for entry in placement_group_table().values() if entry["state"] == "CREATED"]
        assert sorted(str(launch_of(group)) for group in groups) == [
            f"{each.name} (run {each.notes()[0]['TORCHELASTIC_RUN_ID']})" for each in all_three
        ]
        for each in all_three:
            each.may_end()
        for number, each in enumerate(all_three, 1):
            assert f"results: {2 * number} {2 * number}" in each.ended()


@pytest.mark.parametrize("end", ["it returns", "its driver is killed"])
def test_a_launch_waits_for_another_and_says_so(cluster: LaptopCluster, tmp_path: Path, end: str) -> None:
    """Two that do not fit together: one waits, names the other, and runs when that one is gone, whatever ended it."""
    with (
        nothing_left(cluster.temp_dir),
        driver(cluster, "holder4", tmp_path, nodes=1, cpus=3) as holder,
    ):
        wait_until(holder.trains, "the first launch", PATIENCE_S)
        run_id = holder.notes()[0]["TORCHELASTIC_RUN_ID"]
        with driver(cluster, "later5", tmp_path, nodes=2, cpus=2) as later:
            line = (
                "later5 waits for nodes. 0 of 2 nodes are placed: all are placed together, and 1 would fit now. "
                "Missing: 1 x {CPU: 2}; the nearest node has {CPU: 4"
            )
            wait_until(
                lambda: f"Behind: holder4 (run {run_id}) with " in later.output(), "a line that says why", PATIENCE_S
            )
            (said, *_) = [text for text in later.output().splitlines() if "Behind: " in text]
            assert line in said
            assert said.endswith(f"Behind: holder4 (run {run_id}) with {{CPU: 3}} on 1 node.")
            assert not later.notes()
            if end == "it returns":
                holder.may_end()
                assert "results: 8 8" in holder.ended()
            else:
                os.kill(holder.process.pid, signal.SIGKILL)
            later.may_end()
            assert "results: 10 10" in later.ended()
            assert len(later.notes()) == 2


def test_a_group_that_would_fit_and_is_not_placed_is_asked_for_again(
    cluster: LaptopCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may forget a group: here the first one asks for nodes that do not exist."""
    asked: list[str] = []

    def forgetful(bundles: Any, strategy: str, name: str, bundle_label_selector: Any) -> PlacementGroup:
        nowhere = [{"ray.io/node-id": "nowhere"}] * len(bundles)
        asked.append(name)
        return placement_group(bundles, strategy, name, bundle_label_selector=nowhere if len(asked) == 1 else None)

    def has_slots() -> bool:
        reservation.refresh(frozenset(), frozenset())
        return len(reservation.slots()) == 2

    monkeypatch.setattr(placement, "RECONSIDER_S", 1.0)
    monkeypatch.setattr(placement, "placement_group", forgetful)
    whole = {"CPU": 4.0}
    wait_until(lambda: ray.available_resources().get("CPU") == 8, "the nodes that an earlier test used")
    with placement.reserved(
        Demand(whole, whole, 2, 2), name="two", run_id="r2", private=False, autoscaling=False
    ) as reservation:
        wait_until(has_slots, "both nodes")
    assert len(asked) >= 2
    wait_until(lambda: ray.available_resources().get("CPU") == 8, "all nodes free")


def test_a_range_that_has_too_few_nodes_gives_them_back(
    cluster: LaptopCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two ranges that each hold half would wait for each other; until it has enough, no agent is started."""
    monkeypatch.setattr(placement, "SWAP_S", 1000.0)
    whole = {"CPU": 4.0}
    second = cluster.nodes[1].node_id

    def placed(bundles: int) -> list[dict[str, Any]]:
        return [
            entry
            for entry in placement_group_table().values()
            if entry["state"] == "CREATED" and len(entry["bundles"]) == bundles and launch_of(entry["name"])
        ]

    def had(count: int) -> bool:
        range_.refresh(frozenset(), frozenset())
        return len(range_.slots()) == count

    def other_runs() -> bool:
        range_.refresh(frozenset(), frozenset())
        return bool(other.wait(0.05))

    def had_first() -> bool:
        # The second one cannot be used in the moment in which it asks for each by itself.
        range_.refresh({second}, frozenset())
        return bool(placed(1))

    wait_until(lambda: ray.available_resources().get("CPU") == 8, "the nodes that an earlier test used")
    # As long as a node is taken, nothing is placed: it is ``had_first`` that sees both nodes free.
    earlier = placement_group([whole], name="earlier")
    assert earlier.wait(30)
    with placement.reserved(
        Demand(whole, whole, 2, 3), name="range", run_id="r1", private=False, autoscaling=False
    ) as range_:
        remove_placement_group(earlier)
        wait_until(had_first, "the first node")
        thief = placement_group([whole], name="thief")
        assert thief.wait(30)
        assert had(0)
        text = range_.waiting()
        assert text.startswith("1 of 2 to 3 nodes are placed.")
        assert re.search(r"Behind: placement group thief with \{CPU: 4\} on 1 node\.$", text)
        other = placement_group([whole], name="other")
        assert not other.wait(0.5)
        assert not other_runs()
        monkeypatch.setattr(placement, "SWAP_S", 0.0)
        wait_until(other_runs, "somebody else on the node that was given back")
        monkeypatch.setattr(placement, "SWAP_S", 30.0)
        for group in (thief, other):
            remove_placement_group(group)
        wait_until(lambda: had(2), "both nodes of the range")
    wait_until(lambda: ray.available_resources().get("CPU") == 8, "all nodes free")
