"""What the commands say, do and end with; runs are doubles, their folders in the storage are real."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kfpytorch_ray
from kfpytorch_ray import (
    AuthenticationError,
    ClusterUnreachableError,
    ElasticResult,
    ElasticWorkerResult,
    KfpytorchRayError,
    PlacementTimeoutError,
    RunPendingError,
    RunStatus,
    RunStoppedError,
    StorageError,
    UnknownRunError,
    VersionMismatchError,
    WorkerFailedError,
)
from kfpytorch_ray.cli.exit_codes import MEANINGS, ExitCode, exit_code_of
from kfpytorch_ray.cli.group import main
from kfpytorch_ray.runs import COLLECTED, MANIFEST, OUTCOME, Manifest, Outcome, run_folder
from kfpytorch_ray.storage import Storage

DAY_S = 86400.0
HEAD = "http://head:8265"


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command puts on the search path is gone after its test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The storage that the environment names."""
    monkeypatch.setenv("KFPYTORCH_RAY_STORAGE", str(tmp_path / "storage"))
    return Storage(str(tmp_path / "storage"))


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="kfpytorch-ray")


def a_run(
    storage: Storage,
    run_id: str,
    state: str | None = None,
    age_s: float = 60.0,
    error: KfpytorchRayError | None = None,
    **fields: Any,
) -> None:
    """What a run has left so far."""
    created = time.time() - age_s
    manifest = {"name": "train", "backend": "detached", "address": HEAD, "created_by": "anna@laptop", **fields}
    written = Manifest(
        run_id,
        storage="/mnt/elsewhere",
        created_at=created,
        nodes="2",
        nproc_per_node=4,
        retention_s=7 * DAY_S,
        **manifest,
    )
    folder = run_folder(storage, run_id)
    folder.write(MANIFEST, written.to_json())
    if state is not None:
        said = (str(error), type(error).__name__) if error else ("", "")
        folder.write(OUTCOME, Outcome(state, created, *said, record=("", 0)).to_json())


def values(*by_rank: Any) -> ElasticResult:
    return ElasticResult(tuple(range(len(by_rank))), lambda rank: ElasticWorkerResult(by_rank[rank], []))


# How a command ends


def tree(error: type[KfpytorchRayError] = KfpytorchRayError) -> list[type[KfpytorchRayError]]:
    return [error, *(one for below in error.__subclasses__() for one in tree(below))]


CODES = {
    ExitCode.MISUSE: {
        "ConfigError",
        "WorkingDirError",
        "BackendUnavailableError",
        "PayloadError",
        "UnknownRunError",
        "ResultCollectedError",
        "InfeasibleError",
    },
    ExitCode.NO_NODES: {
        "PlacementError",
        "PlacementTimeoutError",
        "NodeLostError",
        "RunLostError",
    },
    ExitCode.UNREACHABLE: {
        "ClusterError",
        "ClusterUnreachableError",
        "AuthenticationError",
        "VersionMismatchError",
        "StorageError",
        "IntegrityError",
    },
    ExitCode.RUNNING: {"RunPendingError"},
    ExitCode.STOPPED: {"RunStoppedError"},
    ExitCode.INTERRUPTED: {"LaunchInterruptedError"},
    ExitCode.FAILED: {
        "KfpytorchRayError",
        "RunError",
        "LaunchError",
        "WorkerFailedError",
        "RecoverableWorkerError",
        "WorkerHungError",
        "ResultError",
        "DeadlineExceededError",
    },
}


@pytest.mark.parametrize("kind", [kind for kind in tree() if kind.__module__ == "kfpytorch_ray.errors"])
def test_every_error_of_the_tree_has_an_exit_code(kind: type[KfpytorchRayError]) -> None:
    """A new class is added here on purpose, and not by the way."""
    arguments = ("subject", ("problem",)) if issubclass(kind, kfpytorch_ray.ConfigError) else ("message",)
    (expected,) = (code for code, names in CODES.items() if kind.__name__ in names)
    assert exit_code_of(kind(*arguments)) is expected


def test_the_help_lists_commands_and_exit_codes() -> None:
    """What a person looks up first."""
    shown = cli("--help")
    assert shown.exit_code == 0
    for name in ("run", "status", "list", "logs", "cancel", "result", "gc"):
        assert f" {name} " in shown.output
    for code, meaning in MEANINGS.items():
        assert f"{code.value:<3} {meaning}" in shown.output


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself_and_takes_no_secret(command: str) -> None:
    """What is typed is seen by everybody on the machine."""
    shown = cli(command, "--help")
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
    options = [option for parameter in main.commands[command].params for option in parameter.opts]
    assert not [option for option in options if "token" in option or "header" in option]


def test_the_help_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    """It is there at once."""
    code = (
        "import sys\nfrom kfpytorch_ray.cli.group import main\n"
        "main(['--help'], standalone_mode=False)\nprint({'ray', 'torch', 'kubernetes'} & set(sys.modules))"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_it_is_a_module_too(tmp_path: Path) -> None:
    """Where the script is not on the PATH; wrong use ends with 2."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PYTHONPATH": root}
    arguments = [sys.executable, "-m", "kfpytorch_ray.cli", "status"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.MISUSE
    assert "kfpytorch-ray status" in done.stderr


# run

TRAIN = """
print("imported")

def train(x: int, names: list[str] = []) -> dict:
    '''Doubles.'''
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """FILE:FUNCTION of a function."""
    path = tmp_path / f"train_{tmp_path.name}.py"
    path.write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    return f"{path}:train"


@pytest.fixture
def answers(double: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has the backend ``double`` return a value from every rank, or raise an error."""

    def answer(with_: Any) -> None:
        def run(plan: Any) -> ElasticResult:
            if isinstance(with_, BaseException):
                raise with_
            return values(with_, "of rank 1")

        monkeypatch.setattr(double, "answer", staticmethod(run))

    return answer


def test_run_prints_what_rank_0_returns(double: Any, answers: Callable[[Any], None], train: str) -> None:
    """Options and arguments have become the plan."""
    answers({"loss": 0.5})
    arguments = ("--arg", "x=3", "--arg", 'names=["a"]', "--nnodes", "1:2", "--nproc-per-node", 4, "--max-restarts", 2)
    done = cli("run", train, "--backend", "double", *arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout == "imported\n{'loss': 0.5}\n"
    (plan,) = double.plans
    assert (plan.args, plan.kwargs) == ((), {"x": 3, "names": ["a"]})
    assert (plan.min_nodes, plan.max_nodes, plan.nproc_per_node, plan.max_restarts) == (1, 2, 4, 2)


def test_run_says_all_problems_before_anything_runs(double: Any, train: str) -> None:
    """In one error."""
    done = cli("run", train, "--backend", "double", "--arg", "y=3")
    assert done.exit_code == ExitCode.MISUSE
    assert done.stderr.startswith("Error: Arguments of train: 2 problems")
    assert double.plans == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, None]}, {"value": {"a": [1, None]}}),
        (None, {"value": None}),
        (float("nan"), {"value_repr": "nan"}),
        ({1, 2}, {"value_repr": "{1, 2}"}),
        (Outcome("s", 1.0, "", "", ("", 0)), {"value": json.loads(Outcome("s", 1.0, "", "", ("", 0)).to_json())}),
    ],
)
def test_run_has_json_for_scripts(
    answers: Callable[[Any], None], train: str, value: Any, shown: dict[str, Any]
) -> None:
    """One document on standard output, whatever else is printed; values that JSON has not got as their repr."""
    answers(value)
    done = cli("run", train, "--backend", "double", "--arg", "x=1", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"run_id": None, "status": "succeeded", "rank": 0, "rounds": [], **shown}
    assert "imported" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerFailedError("rank 1: ValueError: bad\nWhy: x\nFix: y"), 1),
        (AuthenticationError("no"), 4),
        (RunStoppedError("cancelled"), 6),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_run_ends_with_the_code_of_its_error(
    answers: Callable[[Any], None], train: str, error: BaseException, code: int
) -> None:
    """The message, without a traceback."""
    answers(error)
    done = cli("run", train, "--backend", "double", "--arg", "x=1")
    assert done.exit_code == code
    assert "Traceback" not in done.stderr
    if isinstance(error, Exception):
        assert done.stderr == f"Error: {error}\n"


def test_an_error_is_json_too_and_verbose_shows_where_it_came_from(answers: Callable[[Any], None], train: str) -> None:
    """``-v`` before the command or behind it."""
    answers(ClusterUnreachableError("nobody"))
    arguments = ("run", train, "--backend", "double", "--arg", "x=1")
    done = cli(*arguments, "--json")
    assert json.loads(done.stdout) == {"error": "ClusterUnreachableError", "message": "nobody", "retryable": True}
    for verbose in (cli("-v", *arguments), cli(*arguments, "-v")):
        assert verbose.exit_code == ExitCode.UNREACHABLE
        assert "Traceback" in verbose.stderr


def test_a_detached_run_prints_its_id_alone(detached: Any, train: str) -> None:
    """For ``ID=$(kfpytorch-ray run --detach ...)``."""
    arguments = ("run", train, "--backend", "detached", "--arg", "x=1", "--detach")
    done = cli(*arguments)
    assert (done.exit_code, done.stdout) == (0, "kfr-train\n")
    assert json.loads(cli(*arguments, "--json").stdout) == {"run_id": "kfr-train", "status": "pending"}


def test_a_backend_whose_runs_end_with_the_process_cannot_detach(double: Any, train: str) -> None:
    """Said before anything runs."""
    done = cli("run", train, "--backend", "double", "--arg", "x=1", "--detach")
    assert (done.exit_code, done.stdout) == (ExitCode.MISUSE, "")
    assert double.plans == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("--arg", "x"),
        ("--env", "=1"),
        ("--lease", "soon"),
        ("--on-interrupt", "wait"),
        ("--verify", "/no/such/ca.pem"),
        ("--working-dir", "/no/such/folder"),
        ("--nproc-per-node", "two"),
        ("--resources", "CPU"),
        ("--runtime-env", "no-such-file.yaml"),
        ("--backend", "slurm"),
        ("--backend", "double", "--address", HEAD),
        ("--nnodes", "3:1"),
    ],
)
def test_wrong_options_end_with_2(double: Any, train: str, wrong: Sequence[str]) -> None:
    """click's and ours alike."""
    assert cli("run", train, "--arg", "x=1", *wrong).exit_code == ExitCode.MISUSE


# status, list, logs


def test_status_tells_what_a_run_is_and_how_to_go_on(detached: Any, storage: Storage) -> None:
    """The storage is the one that it was found in, not what it is called elsewhere."""
    a_run(storage, "kfr-a", age_s=120)
    done = cli("status", "kfr-a")
    assert done.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (facts["run"], facts["status"], facts["cluster"]) == ("kfr-a", "running", HEAD)
    assert facts["storage"] == storage.uri
    assert "2 min ago) by anna@laptop" in facts["created"]
    assert "kfpytorch-ray logs -f kfr-a" in done.stderr
    assert "--storage" not in done.stderr
    assert f"--storage {storage.uri}" in cli("status", "kfr-a", "--storage", storage.uri).stderr


def test_status_of_a_failed_run_shows_its_error(detached: Any, storage: Storage) -> None:
    """And is no failure of the command."""
    a_run(storage, "kfr-a", "failed", error=WorkerFailedError("rank 1: bad"))
    detached.handle("kfr-a").now = RunStatus.FAILED
    done = cli("status", "kfr-a")
    assert done.exit_code == 0
    assert done.stdout.endswith("WorkerFailedError: rank 1: bad\n")
    shown = json.loads(cli("status", "kfr-a", "--json").stdout)
    assert (shown["status"], shown["error"], shown["message"]) == ("failed", "WorkerFailedError", "rank 1: bad")
    assert (shown["run_id"], shown["nodes"], shown["collected"]) == ("kfr-a", "2", False)


def test_an_unknown_run_and_a_missing_storage_are_wrong_use(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says what to do."""
    for command in ("status", "logs", "cancel", "result"):
        done = cli(command, "kfr-none")
        assert done.exit_code == ExitCode.MISUSE
        assert "kfpytorch-ray list" in done.stderr
    monkeypatch.delenv("KFPYTORCH_RAY_STORAGE")
    assert "Fix: Give --storage URI" in cli("list").stderr


def test_list_shows_runs_newest_first_and_asks_their_clusters(detached: Any, storage: Storage) -> None:
    """A cluster that does not answer is asked once, whatever number of runs it has."""
    a_run(storage, "kfr-done", "succeeded", age_s=300, name="flow.train")
    run_folder(storage, "kfr-done").write(COLLECTED, b"{}")
    a_run(storage, "kfr-live", age_s=200)
    for age_s, run_id in enumerate(("kfr-mute-a", "kfr-mute-b"), 1):
        a_run(storage, run_id, age_s=age_s, address="http://gone:8265")
        detached.handle(run_id).problem = ClusterUnreachableError("x")
    done = cli("list")
    assert done.exit_code == 0
    header, *rows = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    assert header[:2] == ["run", "name"]
    assert [row[0] for row in rows] == ["kfr-mute-a", "kfr-mute-b", "kfr-live", "kfr-done"]
    assert rows[0][2].startswith("unknown (cluster does not answer)")
    assert rows[2][2].split() == ["running", "2", "x", "4", "3", "min", "ago", "anna@laptop", "head:8265"]
    assert rows[3][1] == "flow.train"
    asked = [run for run in detached.runs.values() if ("status",) in run.calls]
    assert len(asked) == 2
    shown = json.loads(cli("list", "--json").stdout)
    assert [run["status"] for run in shown] == ["unknown", "unknown", "running", "succeeded"]
    assert shown[0]["detail"] == "cluster does not answer"
    assert [run["collected"] for run in shown] == [False, False, False, True]


def test_list_is_a_screen_long_unless_all_are_asked_for(detached: Any, storage: Storage) -> None:
    """It says how many there are beside."""
    for number in range(22):
        a_run(storage, f"kfr-{number:02}", "succeeded")
    done = cli("list")
    assert len(done.stdout.splitlines()) == 21
    assert "2 older runs are not shown: --all" in done.stderr
    assert len(json.loads(cli("list", "--all", "--json").stdout)) == 22


def test_an_empty_storage_has_no_runs(storage: Storage) -> None:
    """For people and for scripts."""
    assert (cli("list").exit_code, cli("list").stdout) == (0, "")
    assert json.loads(cli("list", "--json").stdout) == []


def test_a_cluster_named_for_all_does_not_make_runs_lost(storage: Storage) -> None:
    """A run that it does not know may be at work on its own cluster."""
    from kfpytorch_ray.cli.options import Reach
    from kfpytorch_ray.cli.reaching import _believed

    a_run(storage, "kfr-a")
    manifest = kfpytorch_ray.runs.read_manifest(storage, "kfr-a")
    assert str(_believed(RunStatus.LOST, manifest, Reach(address="http://other:1"))) == "unknown (not on this cluster)"
    assert str(_believed(RunStatus.LOST, manifest, Reach(address=HEAD))) == "lost"
    assert str(_believed(RunStatus.RUNNING, manifest, Reach(address="http://other:1"))) == "running"


def test_logs_are_passed_on(detached: Any, storage: Storage) -> None:
    """Line by line, of one rank where it is asked for; what broke them off is the exit code."""
    a_run(storage, "kfr-a")
    run = detached.handle("kfr-a")
    run.lines = ["one", "two"]
    done = cli("logs", "-f", "--rank", 1, "kfr-a")
    assert (done.exit_code, done.stdout) == (0, "one\ntwo\n")
    assert run.calls == [("logs", True, 1)]
    run.problem = KeyboardInterrupt()
    assert cli("logs", "-f", "kfr-a").exit_code == 130
    run.problem = ClusterUnreachableError("gone")
    assert cli("logs", "kfr-a").exit_code == ExitCode.UNREACHABLE


# cancel, result


def test_cancel_says_how_the_run_has_ended(detached: Any, storage: Storage) -> None:
    """Also one that had ended before."""
    a_run(storage, "kfr-a")
    run = detached.handle("kfr-a")
    run.now = RunStatus.STOPPED
    done = cli("cancel", "kfr-a")
    assert (done.exit_code, done.stdout) == (0, "stopped\n")
    run.now = RunStatus.SUCCEEDED
    done = cli("cancel", "kfr-a")
    assert (done.exit_code, done.stdout) == (0, "succeeded\n")
    assert "had ended before" in done.stderr
    assert json.loads(cli("cancel", "kfr-a", "--json").stdout) == {"run_id": "kfr-a", "status": "succeeded"}


@pytest.fixture
def ended(detached: Any, storage: Storage) -> Any:
    """A run whose ranks have returned 10 and 11."""
    a_run(storage, "kfr-a", "succeeded")
    run = detached.handle("kfr-a")
    run.answer = values(10, 11)
    return run


KEPT, TAKEN = ("result", None, True), ("result", 0, False)


def test_a_result_is_removed_once_it_has_arrived(ended: Any) -> None:
    """Never before, and not with --keep."""
    done = cli("result", "kfr-a")
    assert (done.exit_code, done.stdout) == (0, "10\n")
    assert ended.calls == [KEPT, ("collect",)]
    ended.calls.clear()
    assert cli("result", "kfr-a", "--keep", "--rank", 1).stdout == "11\n"
    assert ended.calls == [KEPT]


def test_a_result_that_did_not_arrive_is_not_removed(ended: Any, tmp_path: Path) -> None:
    """It does not unpickle here, its file cannot be written, or there is no such rank."""
    assert cli("result", "kfr-a", "--rank", 2).exit_code == ExitCode.MISUSE
    (tmp_path / "full").symlink_to("/dev/full")
    assert cli("result", "kfr-a", "--output", "/proc/none/out.pkl").exit_code == ExitCode.UNREACHABLE

    def fails(rank: int) -> ElasticWorkerResult:
        raise kfpytorch_ray.ResultError("no module named train")

    ended.answer = ElasticResult((0,), fails)
    assert cli("result", "kfr-a").exit_code == ExitCode.FAILED
    assert ended.calls == [KEPT] * 3


def test_a_result_can_go_to_a_file(ended: Any, tmp_path: Path) -> None:
    """A pickle, written whole or not at all."""
    path = tmp_path / "out.pkl"
    done = cli("result", "kfr-a", "--rank", 1, "--output", path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert pickle.loads(path.read_bytes()) == 11
    assert [one.name for one in tmp_path.iterdir() if "out.pkl" in one.name] == ["out.pkl"]
    shown = json.loads(cli("result", "kfr-a", "--output", path, "--json").stdout)
    assert (shown["output"], shown["rank"]) == (str(path), 0)
    assert "value" not in shown


@pytest.mark.parametrize(
    ("error", "now", "code"),
    [
        (WorkerFailedError("rank 1: bad"), RunStatus.FAILED, ExitCode.FAILED),
        (PlacementTimeoutError("no nodes"), RunStatus.FAILED, ExitCode.NO_NODES),
        (VersionMismatchError("another image"), RunStatus.FAILED, ExitCode.UNREACHABLE),
        (RunStoppedError("its lease ran out"), RunStatus.STOPPED, ExitCode.STOPPED),
    ],
)
def test_a_failed_run_fails_here_as_it_would_have_there(
    ended: Any, error: KfpytorchRayError, now: RunStatus, code: ExitCode
) -> None:
    """Whatever its error, what it left is removed as a result is, unless it is kept."""
    ended.answer, ended.now = error, now
    done = cli("result", "kfr-a")
    assert (done.exit_code, done.stderr) == (code, f"Error: {error}\n")
    assert ended.calls == [KEPT, ("status",), TAKEN]
    ended.calls.clear()
    assert cli("result", "kfr-a", "--keep").exit_code == code
    assert ended.calls == [KEPT]


@pytest.mark.parametrize("now", [RunStatus.RUNNING, RunStatus.SUCCEEDED])
def test_a_run_that_cannot_be_followed_now_keeps_what_it_has_left(ended: Any, now: RunStatus) -> None:
    """It goes on, or its result can be taken later."""
    ended.answer, ended.now = StorageError("away"), now
    assert cli("result", "kfr-a").exit_code == ExitCode.UNREACHABLE
    assert ended.calls == [KEPT, ("status",)]


def test_a_run_that_has_not_ended_is_not_waited_for_longer(ended: Any) -> None:
    """The timeout has a unit, where one is given."""
    ended.answer = RunPendingError("not yet")
    assert cli("result", "kfr-a", "--timeout", "2m").exit_code == ExitCode.RUNNING
    assert ended.calls == [("result", 120.0, True), ("status",)]


# gc


def test_gc_removes_what_was_cut_short(detached: Any, storage: Storage, tmp_path: Path) -> None:
    """Answers of clusters, questions, and what was staged for a launch that never was: all of it when it is old."""
    root = tmp_path / "storage"
    old = (
        "clusters/a.json",
        "clusters/b.question",
        "clusters/.c.json.0123",
        "runs/kfr-half/inputs/x/data",
        "runs/kfr-0",
    )
    new = ("clusters/d.json", "clusters/e.question", "runs/kfr-staging/inputs/y/data", "outputs/kfr-half/model")
    for name in (*old, *new):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x") if name != "runs/kfr-0" else (root / name).mkdir()
    for name in (*old, new[-1]):
        os.utime(root / name, (time.time() - 25 * 3600,) * 2)
    a_run(storage, "kfr-mine", "succeeded")
    gone = ["clusters/.c.json.0123", "clusters/a.json", "clusters/b.question", "runs/kfr-0", "runs/kfr-half"]
    assert cli("gc", "--dry-run").stdout.splitlines() == [f"would remove {name}" for name in gone]
    assert json.loads(cli("gc", "--json").stdout)["stale"] == gone
    assert {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == {
        *new,
        "runs/kfr-mine/manifest.json",
        "runs/kfr-mine/outcome.json",
    }
    assert "Nothing to remove" in cli("gc").stderr


def test_gc_removes_what_is_over_and_nothing_that_may_be_at_work(detached: Any, storage: Storage) -> None:
    """Without an outcome only what its cluster says was stopped, or whose retention is over.

    On a cluster that does not answer it may be at work for all that.
    """
    a_run(storage, "kfr-old", "succeeded", age_s=8 * DAY_S)
    a_run(storage, "kfr-new", "succeeded", age_s=6 * DAY_S)
    standing = {
        "kfr-running": RunStatus.RUNNING,
        "kfr-pending": RunStatus.PENDING,
        "kfr-stopped": RunStatus.STOPPED,
        "kfr-lost": RunStatus.LOST,
        "kfr-mute": None,
    }
    for run_id, status in standing.items():
        for age_s in (2 * DAY_S, 9 * DAY_S):
            name = f"{run_id}-{age_s / DAY_S:.0f}"
            a_run(storage, name, age_s=age_s, address=f"http://{run_id}:1")
            run = detached.handle(name)
            if status is None:
                run.problem = ClusterUnreachableError("x")
            else:
                run.now = status
    before = {run["run_id"] for run in json.loads(cli("list", "--all", "--json").stdout)}
    expired = {"kfr-old", "kfr-stopped-9", "kfr-lost-9"}
    done = cli("gc", "--dry-run")
    assert {line.split()[-1] for line in done.stdout.splitlines()} == expired
    assert {run["run_id"] for run in json.loads(cli("list", "--all", "--json").stdout)} == before
    done = cli("gc")
    assert done.exit_code == 0
    assert "kept kfr-running-9: running" in done.stderr
    assert "kept kfr-mute-9: unknown (cluster does not answer): --older-than removes it" in done.stderr
    assert {run["run_id"] for run in json.loads(cli("list", "--all", "--json").stdout)} == before - expired
    shown = json.loads(cli("gc", "--older-than", "1d", "--json").stdout)
    assert set(shown["removed"]) == {"kfr-new", "kfr-stopped-2", "kfr-mute-9"}
    kept = {one["run_id"]: one["reason"] for one in shown["kept"]}
    assert set(kept) == {
        f"kfr-{name}" for name in ("running-2", "running-9", "pending-2", "pending-9", "lost-2", "mute-2")
    }
    assert kept["kfr-mute-2"] == "unknown (cluster does not answer), for another 4 d"


def test_gc_leaves_what_functions_wrote(storage: Storage) -> None:
    """Outputs and checkpoints are the user's."""
    a_run(storage, "kfr-old", "succeeded", age_s=8 * DAY_S)
    storage.write("outputs/kfr-old/model", b"x")
    storage.write("checkpoints/kfr-old/step", b"x")
    assert cli("gc").stdout == "removed kfr-old\n"
    assert storage.read("outputs/kfr-old/model") == storage.read("checkpoints/kfr-old/step") == b"x"
    with pytest.raises(UnknownRunError):
        kfpytorch_ray.attach("kfr-old")
    assert "Nothing to remove." in cli("gc").stderr


def test_gc_keeps_a_run_whose_custom_resource_it_cannot_remove(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would lead to the RayJob; --older-than removes what is in the storage all the same."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    a_run(storage, "kfr-old", "succeeded", age_s=8 * DAY_S, backend="kuberay", address="lab/training")
    done = cli("gc", "--json")
    (kept,) = json.loads(done.stdout)["kept"]
    assert kept["run_id"] == "kfr-old"
    assert kept["reason"].startswith("its RayJob cannot be removed (")
    assert json.loads(done.stdout)["removed"] == []
    done = cli("gc", "--older-than", "1d")
    assert done.stdout == "removed kfr-old\n"
    assert "kfr-old: its RayJob cannot be removed (" in done.stderr


def test_gc_leaves_a_run_that_turns_out_to_be_at_work(
    detached: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cluster was silent when all were asked, and answers when the run is to be removed."""
    a_run(storage, "kfr-old", age_s=9 * DAY_S, backend="kuberay", address="training@")

    class Waking(type(detached.handle("kfr-other"))):  # type: ignore[misc]
        def status(self) -> RunStatus:
            self.problem = None if self.calls else ClusterUnreachableError("x")
            now: RunStatus = super().status()
            return now

    run = Waking("kfr-old")
    for module in ("clean", "reaching"):
        monkeypatch.setattr(f"kfpytorch_ray.cli.{module}.open_run", lambda *_: run)
    done = cli("gc", "--older-than", "1d")
    assert done.exit_code == 0
    assert "kept kfr-old: running" in done.stderr
    assert run.calls == [("status",), ("status",)]
    assert cli("list", "--json").exit_code == 0


def test_an_address_of_ray_is_none_of_a_kubernetes_cluster(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage may hold runs of several backends: what is said of Ray's job servers concerns these only."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    a_run(storage, "kfr-old", "succeeded", age_s=8 * DAY_S, backend="kubeflow", address="training@")
    done = cli("gc", "--address", HEAD, "--verify", "false")
    assert "kept kfr-old: its PyTorchJob cannot be removed (no cluster is named" in done.stderr


@dataclasses.dataclass
class Counted:
    """What a function returns that asdict cannot copy."""

    counts: Any = dataclasses.field(default_factory=lambda: Uncopied(list))


class Uncopied(defaultdict[str, Any]):
    """As every defaultdict up to Python 3.11."""

    def __init__(self, factory: Any) -> None:
        if not callable(factory):
            msg = "first argument must be callable or None"
            raise TypeError(msg)
        super().__init__(factory)


def test_json_of_a_value_that_cannot_be_copied(ended: Any) -> None:
    """The training is over, and its value is said as well as it can be."""
    ended.answer = values(Counted())
    assert "Counted(" in json.loads(cli("result", "kfr-a", "--json").stdout)["value_repr"]


def test_json_is_all_that_a_script_reads(ended: Any) -> None:
    """Modules that are imported with a value may print."""

    def fetch(rank: int) -> ElasticWorkerResult:
        print("loading the tokenizer")
        return ElasticWorkerResult(rank, [])

    ended.answer = ElasticResult((0,), fetch)
    done = cli("result", "kfr-a", "--json")
    assert json.loads(done.stdout)["value"] == 0
    assert "loading the tokenizer" in done.stderr


def test_a_folder_that_is_not_there_is_said_before_a_rank_is_watched(detached: Any, tmp_path: Path) -> None:
    """Watching takes minutes."""
    done = cli("flamegraph", "kfr-a", "--output", tmp_path / "none" / "x.svg", "--duration", "10m")
    assert done.exit_code == ExitCode.MISUSE
    assert "there is no folder" in done.stderr
