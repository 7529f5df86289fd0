"""Options of the whole suite, and what its tests with real processes share: a check that nothing of them stays.

pytest reads the options from here only, whatever part of the suite is run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kfpytorch_ray.testing import nothing_left, wait_until

DEADLINE_S = 120.0

LONG_FILES = (
    "remote/test_laptop.py",
    "remote/test_runs.py",
    "remote/test_clusters.py",
    "remote/test_doctor.py",
    "remote/test_cli.py",
    "remote/test_storages.py",
    "remote/test_head.py",
    "remote/test_shared_head.py",
    "remote/test_readme.py",
    "chaos/test_nodes.py",
    "ray/test_launch.py",
    "ray/test_warm.py",
    "docs/test_blocks.py",
    "flyte/test_kuberay.py",
    "remote/test_network.py",
    "ray/test_ways_in.py",
    "flyte/test_pytorchjob.py",
    "ray/test_examples.py",
    "chaos/test_ranks.py",
    "ray/test_shared_cluster.py",
    "chaos/test_partition.py",
    "chaos/test_driver.py",
    "ray/test_log_lines.py",
    "ray/test_notebook.py",
    "ray/test_cluster.py",
    "ray/test_inspection.py",
    "contract/test_kubeflow_execution.py",
    "kubernetes/test_pytorchjob_training.py",
    "kubernetes/test_kuberay_cluster.py",
    "kubernetes/test_kuberay_training.py",
    "kubernetes/test_ray_operator.py",
    "unit/test_agent.py",
)
"""What takes longer than half a minute. About the longest first, but files that share something stay together: a head,
a control plane.
"""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often, and with which chance, the chaos tests break things."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-runs", type=int, default=2, help="how often each row of the failure table is broken")
    group.addoption("--chaos-seed", type=int, default=None, help="of what is left to chance; the summary shows it")
    parser.addoption(
        "--renew-golden", action="store_true", help="write the rendered manifests instead of comparing them"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes long files come first, so that none is alone with one at the end.

    pytest-xdist gives each process the next file, in this order where it is told --no-loadscope-reorder.
    """
    here = Path(__file__).parent
    assert not [name for name in LONG_FILES if not (here / name).is_file()]
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {here / name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """``wait_until`` for tests."""
    return wait_until


@pytest.fixture(scope="session")
def temporary_folder() -> Iterator[str]:
    """A folder for temporary files of these tests' own, so that they see their leftovers and nobody else's."""
    folder = tempfile.mkdtemp(prefix="k", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nothing_left_behind(temporary_folder: str) -> Iterator[None]:
    """A test ends with the processes and files that were there before it. A folder of tests makes it every test's."""
    with nothing_left(temporary_folder, DEADLINE_S):
        yield


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder with a path short enough for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
