from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kfpytorch_ray
from kfpytorch_ray import heartbeat
from kfpytorch_ray.heartbeat import PAGE_VARIABLE, Beat, HeartbeatPage, agent_folder, beat, progress, stop_requested

NOTHING_YET = Beat(pid=None, rank=None, step=None, progressed_at=None, listens=False, told=False)


@pytest.fixture(autouse=True)
def no_page_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process looks for its page once; here every test is a new one."""
    monkeypatch.delenv(PAGE_VARIABLE, raising=False)
    heartbeat._own_slot.cache_clear()
    yield
    heartbeat._own_slot.cache_clear()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[HeartbeatPage]:
    """Of an agent with three local ranks, in its round 0."""
    with HeartbeatPage.create(tmp_path / "heartbeat", 3) as page:
        page.start_round(0)
        yield page


@pytest.fixture
def worker(page: HeartbeatPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is local rank 1 of the page."""
    monkeypatch.setenv(PAGE_VARIABLE, f"{tmp_path / 'heartbeat'}:1")


def in_a_worker(code: str, value: str | None) -> str:
    """What a fresh process prints that has this variable."""
    environment = {name: text for name, text in os.environ.items() if name != PAGE_VARIABLE}
    if value is not None:
        environment[PAGE_VARIABLE] = value
    command = [sys.executable, "-c", f"from kfpytorch_ray.heartbeat import *\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def in_a_fork(call: object) -> int:
    """The exit code of a forked child that calls and then leaves."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = int(bool(call()))  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_names_are_public() -> None:
    """Users find both at the top of the package."""
    assert kfpytorch_ray.progress is progress
    assert kfpytorch_ray.stop_requested is stop_requested


def test_without_an_agent_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    """The same function runs on the kubeflow backend, under torchrun and in a notebook."""
    progress(3)
    beat()
    assert stop_requested() is False
    assert agent_folder() is None
    assert caplog.records == []


def test_a_new_page_knows_nothing(tmp_path: Path) -> None:
    """No round, no lease, no ranks that have said anything; and it is this user's alone."""
    with HeartbeatPage.create(tmp_path / "heartbeat", 2) as page:
        assert page.read() == (NOTHING_YET, NOTHING_YET)
        assert page.round_index is None
        assert page.idle_s() == 0.0
        assert page.lease_until == 0.0
    assert stat.S_IMODE((tmp_path / "heartbeat").stat().st_mode) == 0o600


def test_a_page_is_made_once(page: HeartbeatPage, tmp_path: Path) -> None:
    """A second one in its place would take the file from under those who have mapped it."""
    with pytest.raises(FileExistsError):
        HeartbeatPage.create(tmp_path / "heartbeat", 3)


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"x" * 128])
def test_another_file_is_no_page(content: bytes, tmp_path: Path) -> None:
    """It is said, and nothing is read from it."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="not a heartbeat page"):
        HeartbeatPage.open(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        HeartbeatPage.open(tmp_path / "absent")


@pytest.mark.usefixtures("worker")
def test_progress_is_seen_with_its_step_and_time(page: HeartbeatPage) -> None:
    """The worker's own row shows the last step; the others are untouched."""
    before = time.monotonic()
    progress(4)
    progress(5)
    other, own, another = page.read()
    assert other == another == NOTHING_YET
    assert own.step == 5
    assert own.progressed_at is not None
    assert before <= own.progressed_at <= time.monotonic()
    assert not own.listens


@pytest.mark.usefixtures("worker")
def test_a_checkpoint_is_progress_without_a_step(page: HeartbeatPage) -> None:
    """It moves the time, and keeps the step that was told before."""
    beat()
    assert page.read()[1].step is None
    assert page.read()[1].progressed_at is not None
    progress(7)
    earlier = page.read()[1].progressed_at
    beat()
    assert page.read()[1].step == 7
    assert (page.read()[1].progressed_at or 0.0) > (earlier or 0.0)


class Scalar:
    """What a numpy integer or a tensor of one element is to Python."""

    def __index__(self) -> int:
        return 12


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("step", "shown"),
    [(0, 0), (-1, -1), (True, 1), (Scalar(), 12), (10**30, 2**63 - 1), (-(10**30), -(2**63) + 1)],
)
def test_any_integer_is_a_step(step: int, shown: int, page: HeartbeatPage) -> None:
    """Training does not fail by telling of itself; a number that does not fit is cut."""
    progress(step)
    assert page.read()[1].step == shown


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("step", [1.5, 2.0, "3", None])
def test_a_step_that_is_no_integer_is_refused(step: int, page: HeartbeatPage) -> None:
    """The message says what, why and how to mend it, and nothing is told."""
    with pytest.raises(TypeError, match=r"progress\(\) was called with(?s:.*)Why:(?s:.*)Fix:"):
        progress(step)
    assert page.read()[1] == NOTHING_YET


def test_a_wrong_step_is_refused_without_an_agent_too() -> None:
    """The mistake shows on the laptop and not on the cluster."""
    with pytest.raises(TypeError, match="Fix:"):
        progress(1.5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("worker")
def test_a_request_to_stop_is_seen_at_once(page: HeartbeatPage) -> None:
    """The page shows who listens and, apart from that, who has been told."""
    assert stop_requested() is False
    assert (page.read()[1].listens, page.read()[1].told) == (True, False)
    page.request_stop()
    assert (page.read()[1].listens, page.read()[1].told) == (True, False)
    assert stop_requested() is True
    assert stop_requested() is True
    assert (page.read()[1].listens, page.read()[1].told) == (True, True)
    assert page.read()[0] == page.read()[2] == NOTHING_YET


@pytest.mark.usefixtures("worker")
def test_any_round_can_be_stopped(page: HeartbeatPage) -> None:
    """Not the first one only."""
    page.start_round(4)
    page.request_stop()
    assert stop_requested() is True


def test_all_workers_of_a_page_see_the_request(page: HeartbeatPage, tmp_path: Path) -> None:
    """Also those that begin after it."""
    page.request_stop()
    for local_rank in range(3):
        assert in_a_worker("print(stop_requested())", f"{tmp_path / 'heartbeat'}:{local_rank}") == "True\n"
    assert [row.told for row in page.read()] == [True, True, True]


@pytest.mark.usefixtures("worker")
def test_a_round_begins_with_a_clean_page(page: HeartbeatPage) -> None:
    """Nothing of the round before is left: no pid, no step, no request to stop."""
    page.join(1, rank=5, pid=4711)
    progress(9)
    page.request_stop()
    assert stop_requested()
    page.end_round()
    assert page.round_index is None
    assert page.read()[1].step == 9, "the end of a round is when its last words are read"
    page.start_round(1)
    assert page.round_index == 1
    assert page.read() == (NOTHING_YET,) * 3
    assert stop_requested() is False


@pytest.mark.usefixtures("worker")
def test_a_request_stops_the_round_that_it_was_meant_for(page: HeartbeatPage) -> None:
    """Between rounds there is nobody to stop, and one that comes late does not stop the next round."""
    page.end_round()
    page.request_stop()
    page.start_round(1)
    assert stop_requested() is False
    late = page._integers[heartbeat._PAGE_ROUND]
    page.start_round(2)
    page._integers[heartbeat._PAGE_STOP] = late
    assert stop_requested() is False


@pytest.mark.usefixtures("worker")
def test_a_round_that_is_begun_anew_is_not_stopped(page: HeartbeatPage) -> None:
    """The same index twice is two rounds."""
    page.request_stop()
    page.start_round(0)
    assert stop_requested() is False


def test_the_page_says_who_is_on_a_slot(page: HeartbeatPage, tmp_path: Path) -> None:
    """Pid and rank by local rank, for anybody who opens the file; rank 0 is a rank."""
    page.join(0, rank=0, pid=100)
    page.join(2, rank=7, pid=102)
    with HeartbeatPage.open(tmp_path / "heartbeat") as reader:
        assert [(row.pid, row.rank) for row in reader.read()] == [(100, 0), (None, None), (102, 7)]
        assert reader.round_index == 0


@pytest.mark.usefixtures("worker")
def test_idle_counts_from_the_newest_progress_of_any_rank(page: HeartbeatPage) -> None:
    """Before there is any, from the beginning of the round."""
    page._floats[heartbeat._PAGE_STARTED_AT] = time.monotonic() - 1000.0
    assert 1000.0 <= page.idle_s() < 2000.0
    page._floats[heartbeat._row(0) + heartbeat._PROGRESSED_AT] = time.monotonic() - 500.0
    assert 500.0 <= page.idle_s() < 1000.0
    progress(1)
    assert 0.0 <= page.idle_s() < 500.0
    page.end_round()
    assert page.idle_s() == 0.0


def test_the_lease_is_kept_across_rounds(page: HeartbeatPage, tmp_path: Path) -> None:
    """It belongs to the agent; another process reads what was written."""
    until = time.clock_gettime(time.CLOCK_BOOTTIME) + 15.0
    page.extend_lease(until)
    page.start_round(1)
    with HeartbeatPage.open(tmp_path / "heartbeat") as guardian:
        assert guardian.lease_until == until


@pytest.mark.usefixtures("page")
def test_a_fork_of_a_process_without_a_page_finds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is a fork of a server that may have looked already, and in vain."""
    assert stop_requested() is False

    def become_a_worker() -> bool:
        os.environ[PAGE_VARIABLE] = f"{tmp_path / 'heartbeat'}:2"
        progress(3)
        return True

    assert in_a_fork(become_a_worker) == 1
    with HeartbeatPage.open(tmp_path / "heartbeat") as page:
        assert [row.step for row in page.read()] == [None, None, 3]


@pytest.mark.usefixtures("worker")
def test_a_child_of_a_worker_is_asked_to_stop_as_well(page: HeartbeatPage) -> None:
    """A data loader's process inherits its worker's place."""
    assert stop_requested() is False
    page.request_stop()
    assert in_a_fork(stop_requested) == 1


@pytest.mark.parametrize("value", ["/nowhere/heartbeat:0", "heartbeat", "{page}:3", "{page}:x"])
@pytest.mark.usefixtures("page")
def test_a_page_that_cannot_be_had_does_not_stop_the_training(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that outlives its agent goes on, having said so once."""
    monkeypatch.setenv(PAGE_VARIABLE, value.format(page=tmp_path / "heartbeat"))
    progress(1)
    progress(2)
    assert stop_requested() is False
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.usefixtures("worker")
def test_workers_work_on_after_the_page_is_removed(tmp_path: Path) -> None:
    """An agent's folder may go before the last worker does."""
    progress(1)
    (tmp_path / "heartbeat").unlink()
    progress(2)
    assert stop_requested() is False


@pytest.mark.usefixtures("worker")
def test_the_agents_folder_is_known_to_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there goes with the agent; a folder that is gone is none."""
    assert agent_folder() == tmp_path
    monkeypatch.setenv(PAGE_VARIABLE, "/nowhere/at/all/heartbeat:0")
    assert agent_folder() is None


def test_telling_needs_the_standard_library_only() -> None:
    """The guardian and other small processes load the module by its file."""
    path = heartbeat.__file__
    code = (
        f"import sys, importlib.util\nspec = importlib.util.spec_from_file_location('heartbeat', {path!r})\n"
        "module = importlib.util.module_from_spec(spec)\nsys.modules['heartbeat'] = module\n"
        "spec.loader.exec_module(module)\nprint('kfpytorch_ray' in sys.modules or 'flytekit' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
