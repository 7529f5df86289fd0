"""Every row of the failure table is broken for real, ``--chaos-runs`` times; the counts are shown at the end.

A run that does not end within its deadline is a hang: it is killed and counted. What is still there a minute after a
run is a leftover.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
import pytest
import training
from training import Log

from kfpytorch_ray import KfpytorchRayError
from kfpytorch_ray.testing import LaptopCluster, Leftovers, left_after, wait_until

DEADLINE_S = 240
NODES = 3

# Workers need not find this folder.
cloudpickle.register_pickle_by_value(training)


LEFTOVERS = pytest.StashKey[int]()


@dataclass
class Counts:
    """What became of the runs of one row."""

    runs: int = 0
    hangs: int = 0
    leftovers: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)


class Tally:
    """Counts in the process that reports, also where pytest-xdist runs the tests in others."""

    def __init__(self) -> None:
        self._rows: dict[str, Counts] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = getattr(report, "row", None)
        if row is None:
            return
        counts = self._rows.setdefault(row, Counts())
        if report.when == "call":
            counts.runs += not report.skipped
            counts.seconds.append(report.duration)
        counts.failed += report.failed
        if report.failed:
            # Now, because the end may be an hour away, and the run be given up before it.
            print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        counts.hangs += report.hang
        counts.leftovers += report.leftovers

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        rows = self._rows
        if not rows:
            return
        terminalreporter.section(f"failure table, --chaos-seed={config.option.chaos_seed}")
        width = max(map(len, rows))
        terminalreporter.line(f"{'event':{width}}  runs  hangs  leftovers  failed  seconds (median)")
        for row, counts in sorted(rows.items()):
            median = sorted(counts.seconds)[len(counts.seconds) // 2] if counts.seconds else 0.0
            terminalreporter.line(
                f"{row:{width}}  {counts.runs:4}  {counts.hangs:5}  {counts.leftovers:9}  {counts.failed:6}"
                f"  {median:7.1f}"
            )
        names = ("runs", "hangs", "leftovers", "failed")
        runs, hangs, leftovers, failed = (sum(getattr(counts, name) for counts in rows.values()) for name in names)
        terminalreporter.line(f"{'in all':{width}}  {runs:4}  {hangs:5}  {leftovers:9}  {failed:6}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.chaos_seed is None:
        # Workers of pytest-xdist get the options as they are now.
        config.option.chaos_seed = random.randrange(10**6)
    config.pluginmanager.register(Tally())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("run", range(metafunc.config.getoption("--chaos-runs")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(DEADLINE_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    error = call.excinfo.value if report.failed else None
    # What the launch itself raises, after a limit of its own, is no hang.
    late = isinstance(error, TimeoutError | subprocess.TimeoutExpired) and not isinstance(error, KfpytorchRayError)
    (report.row,) = item.get_closest_marker("row").args
    report.hang = late or "from pytest-timeout" in str(error)
    report.leftovers = item.stash.get(LEFTOVERS, 0) if call.when == "teardown" else 0
    return report


@pytest.fixture(scope="module")
def cluster() -> Iterator[LaptopCluster]:
    """A head and three nodes; what a test breaks is mended before the next one."""
    with LaptopCluster(nodes=NODES) as started:
        yield started


@pytest.fixture
def whole(cluster: LaptopCluster) -> LaptopCluster:
    """The cluster with all its nodes."""
    import ray

    draining = ray._private.state.state.get_draining_nodes()
    for node in cluster.nodes:
        if node.node_id in draining:
            cluster.remove_node(node)
    while len(cluster.nodes) > NODES:
        cluster.remove_node(cluster.nodes[-1])
    while len(cluster.nodes) < NODES:
        cluster.add_node()
    living = {node.node_id for node in cluster.nodes}

    def free() -> bool:
        available = ray._private.state.available_resources_per_node()
        return (
            all(available.get(node, {}).get("CPU") == 4 for node in living)
            and sum(node["Alive"] for node in ray.nodes()) == NODES + 1
        )

    wait_until(free, "a whole and idle cluster")
    return cluster


@pytest.fixture(autouse=True)
def counted(run: int, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a run does to the cluster, nothing of the launch stays behind."""
    temp_dir = request.getfixturevalue("cluster").temp_dir
    before = Leftovers.now(temp_dir)
    yield
    left = left_after(before, temp_dir)
    request.node.stash[LEFTOVERS] = len(left)
    assert not left, f"left behind:\n{left}"


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Where the ranks note what they do."""
    return Log(str(tmp_path))


@pytest.fixture
def chance(run: int, request: pytest.FixtureRequest) -> random.Random:
    """Another in every run, the same for the same ``--chaos-seed``."""
    return random.Random(f"{request.config.option.chaos_seed} {request.node.originalname} {run}")
