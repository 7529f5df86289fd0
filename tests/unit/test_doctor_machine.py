"""What the doctor says of this machine: facts are given, or found out here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from kfpytorch_ray.cli.doctor import doctor, show
from kfpytorch_ray.doctor import judgement
from kfpytorch_ray.doctor.finding import Finding, Group, Level, failed, of_message
from kfpytorch_ray.doctor.judgement import judge
from kfpytorch_ray.doctor.machine import Machine, Package, Space, measure, try_storage
from kfpytorch_ray.doctor.settings import Settings, TokenFile, judge_settings, read_settings
from kfpytorch_ray.doctor.torch_report import TorchReport
from kfpytorch_ray.errors import ConfigError, StorageError, explain

TORCH = TorchReport("2.13.0+cpu", gloo=True, nccl=False, cuda=None, devices=0)
HEALTHY = Machine(
    python="3.11.7",
    python_fits=True,
    packages=(Package("kfpytorch_ray", "0.1.0", "", fits=True), Package("ray", "2.60.0", ">=2.49", fits=True)),
    job_api_missing=(),
    torch=TORCH,
    torch_error="",
    system="Linux",
    pidfd=True,
    shared_memory=Space("/dev/shm", 8 * 2**30, 7 * 2**30),
    temporary=Space("/tmp", 100 * 2**30, 50 * 2**30),
    temporary_error="",
    open_files=65535,
    hostname="worker",
    addresses=("10.0.0.7",),
    flytekit_config="/root/.flyte/config.yaml",
    flytekit_config_error="",
)
NOT_OK = (Level.WARN, Level.FAIL)


def bad(**changes: Any) -> list[Finding]:
    """What is not all right with a machine that is healthy but for these changes."""
    found = judge(dataclasses.replace(HEALTHY, **changes), is_node=True)
    return [finding for finding in found if finding.level in NOT_OK]


def test_a_healthy_machine() -> None:
    """Nothing is wrong, and nothing is to be mended."""
    assert bad() == []
    assert not any(finding.fix for finding in judge(HEALTHY, is_node=True))


@pytest.mark.parametrize(
    ("changes", "check", "level", "fix"),
    [
        ({"system": "Darwin", "pidfd": False}, "system", Level.WARN, "http://HOST:8265"),
        ({"pidfd": False}, "system", Level.FAIL, "kernel of 5.3"),
        ({"python": "3.9.1", "python_fits": False}, "python", Level.FAIL, "3.10"),
        (
            {"packages": (HEALTHY.packages[0], Package("ray", "2.9.0", ">=2.49", fits=False))},
            "packages",
            Level.FAIL,
            "pip install 'ray>=2.49'",
        ),
        (
            {"packages": (HEALTHY.packages[0], Package("torch", None, ">=2.6", fits=False))},
            "packages",
            Level.FAIL,
            "pip install 'torch>=2.6'",
        ),
        ({"packages": (Package("kfpytorch_ray", None, "", fits=True),)}, "packages", Level.WARN, "pip install"),
        ({"job_api_missing": ("aiohttp",)}, "job API", Level.FAIL, "ray[default]"),
        ({"job_api_missing": ("opencensus",)}, "job API", Level.WARN, "ray[default]"),
        ({"torch": None, "torch_error": "libcudart.so: not found"}, "torch", Level.FAIL, "pytorch.org"),
        ({"torch": dataclasses.replace(TORCH, gloo=False)}, "torch", Level.FAIL, "pip install torch"),
        ({"torch": dataclasses.replace(TORCH, cuda="12.8", devices=2)}, "torch", Level.FAIL, "pip install torch"),
        ({"shared_memory": None}, "/dev/shm", Level.WARN, "medium: Memory"),
        ({"shared_memory": Space("/dev/shm", 64 * 2**20, 2**20)}, "/dev/shm", Level.WARN, "--shm-size"),
        ({"temporary": None, "temporary_error": "read-only"}, "temporary folder", Level.FAIL, "TMPDIR"),
        ({"temporary": Space("/tmp", 2**40, 2**20)}, "temporary folder", Level.WARN, "TMPDIR"),
        ({"open_files": 1024}, "ulimit -n", Level.WARN, "ulimit -n 65535"),
        ({"addresses": ("127.0.1.1",)}, "host name", Level.WARN, "GLOO_SOCKET_IFNAME"),
        ({"addresses": ()}, "host name", Level.WARN, "GLOO_SOCKET_IFNAME"),
        ({"flytekit_config_error": "it is not YAML"}, "flytekit config", Level.WARN, "FLYTECTL_CONFIG"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_fix(changes: dict[str, Any], check: str, level: Level, fix: str) -> None:
    """Each fault is found, alone, as bad as it is."""
    (finding,) = bad(**changes)
    assert (finding.check, finding.level) == (check, level)
    assert fix in finding.fix


def test_a_host_name_matters_to_nodes_only() -> None:
    """A laptop's name is 127.0.1.1 on every Debian, and other machines never ask it."""
    laptop = dataclasses.replace(HEALTHY, addresses=("127.0.1.1", "::1"))
    assert not [one for one in judge(laptop, is_node=False) if one.level in NOT_OK]


def test_no_limit_of_open_files_is_no_low_limit() -> None:
    """``unlimited`` is -1."""
    assert judgement.judge_open_files(-1).level is Level.OK


HTTP = "http://head:8265"
READABLE = TokenFile("/run/token", readable=True)


@pytest.mark.parametrize(
    ("settings", "address", "check", "level"),
    [
        (Settings(address="ray://head:10001"), None, "RAY_ADDRESS", Level.FAIL),
        (Settings(address="ray://head:10001"), HTTP, "RAY_ADDRESS", Level.WARN),
        (Settings(address="http://other:8265"), HTTP, "RAY_ADDRESS", Level.WARN),
        (Settings(address=HTTP, api_address="http://other:8265"), HTTP, "RAY_API_SERVER_ADDRESS", Level.WARN),
        (Settings(api_address=HTTP), None, "RAY_API_SERVER_ADDRESS", Level.WARN),
        (Settings(mode="token"), HTTP, "RAY_AUTH_MODE", Level.FAIL),
        (Settings(token=True), HTTP, "RAY_AUTH_MODE", Level.WARN),
        (Settings(token=True, mode="disabled"), HTTP, "RAY_AUTH_MODE", Level.WARN),
        (Settings(token=True, token_file=READABLE, mode="token"), None, "RAY_AUTH_TOKEN", Level.WARN),
        (Settings(token_file=TokenFile("/gone", readable=False)), HTTP, "RAY_AUTH_TOKEN_PATH", Level.FAIL),
        (
            Settings(mode="token", default_token_file=TokenFile("~/.ray/auth_token", readable=True, shared=True)),
            None,
            "token file",
            Level.WARN,
        ),
        (Settings(token=True, mode="token"), HTTP, "token", Level.WARN),
    ],
)
def test_settings_that_contradict_each_other(settings: Settings, address: str | None, check: str, level: Level) -> None:
    """Each contradiction is one line, with its fix."""
    (finding,) = judge_settings(settings, address)
    assert (finding.check, finding.level) == (check, level)
    assert finding.fix


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        (Settings(), None),
        (Settings(), HTTP),
        (Settings(address=f"{HTTP}/"), HTTP),
        (Settings(address="10.0.0.1:6379"), "auto"),
        (Settings(address="10.0.0.1:6379", api_address=HTTP), None),
        (Settings(token=True, mode="token"), "https://head"),
        (Settings(token_file=READABLE, mode="token"), "http://localhost:8265"),
        (Settings(token_file=READABLE, mode="TOKEN"), "http://127.0.0.1:8265"),
        (Settings(default_token_file=READABLE), HTTP),
        (Settings(mode="disabled"), HTTP),
    ],
)
def test_settings_that_go_together(settings: Settings, address: str | None) -> None:
    """Nothing is said but what they are."""
    (finding,) = judge_settings(settings, address)
    assert finding.level is Level.OK


def test_a_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the variable nor that of a file; whether others can read the file is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "token"
    path.write_text("secret-of-the-file")
    path.chmod(0o644)
    environment = {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    settings = read_settings(environment)
    assert settings.token_file == TokenFile(str(path), readable=True, shared=True)
    assert settings.default_token_file is None
    said = json.dumps([finding.to_json() for finding in judge_settings(settings, "https://head")])
    assert "secret" not in said
    assert "secret" not in repr(settings)


def test_this_machine_is_measured() -> None:
    """The tests run here, so it can launch: nothing fails."""
    machine = measure()
    assert machine.torch is not None, machine.torch_error
    assert machine.torch.gloo
    assert {package.name for package in machine.packages} >= {"kfpytorch_ray", "ray", "torch", "flytekit"}
    assert not failed(judge(machine, is_node=True))


@pytest.mark.parametrize(("content", "wrong"), [("admin: {}\n", ""), ("a: [\n", "it is not YAML")])
def test_flytekits_config_file_is_read(
    content: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that flytekit passes over in silence is named."""
    path = tmp_path / "config.yaml"
    path.write_text(content)
    monkeypatch.setenv("FLYTECTL_CONFIG", str(path))
    machine = measure()
    assert (machine.flytekit_config, machine.flytekit_config_error) == (str(path), wrong)


def test_a_config_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """flytekit goes on without; the doctor says so."""
    monkeypatch.setenv("FLYTECTL_CONFIG", "/nowhere/config.yaml")
    assert "is not there" in measure().flytekit_config_error


def test_a_storage_is_left_as_it_was(tmp_path: Path) -> None:
    """Written, read, and nothing stays; neither do the folders that were not there."""
    before = set(tmp_path.iterdir())
    try_storage(str(tmp_path))
    try_storage(str(tmp_path / "new" / "storage"))
    assert set(tmp_path.iterdir()) == before


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    """The storage's own error says why."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        try_storage(str(tmp_path / "file" / "below"))


def test_errors_become_lines() -> None:
    """What and why are its text, the fix is apart; every problem of a config is told."""
    one = of_message("reachable", explain("It broke.", "It was old.", "Buy another."), Group.CLUSTER)
    assert one == Finding("reachable", Level.FAIL, "It broke. It was old.", "Buy another.", Group.CLUSTER)
    two = of_message("storage", ConfigError("storage", ("first", explain("second", "why", "mend it"))))
    assert (two.text, two.fix) == ("first second why", "mend it")


FINDINGS = [
    Finding("python", Level.OK, "Python 3.11.7"),
    Finding("clocks", Level.WARN, "off " * 60, "Set them.", Group.NODES),
    Finding("reachable", Level.FAIL, "nobody", "Start it.", Group.CLUSTER),
]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Levels are words, groups stand in their order, every fix is there; no colours where there is no terminal."""
    show(FINDINGS, Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("this machine", "cluster", "nodes")] == [
        "this machine",
        "cluster",
        "nodes",
    ]
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert all(f"\n{level} " in text for level in ("ok  ", "warn", "fail"))
    assert "Fix: Set them." in text
    assert lines[-1] == "1 ok, 1 warn, 1 fail"
    assert max(map(len, lines)) <= 60


def test_this_machine_alone_by_the_command(tmp_path: Path) -> None:
    """Without an address nothing else is looked at; 0 where nothing fails, and a list in JSON."""
    storage = tmp_path / "storage"
    done = CliRunner().invoke(doctor, ["--json", "--storage", str(storage)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {one["group"] for one in found} == {"this machine"}
    assert "storage" in {one["check"] for one in found}
    assert found[0].keys() == {"group", "check", "level", "text", "fix"}


def test_a_failure_is_exit_code_1(tmp_path: Path) -> None:
    """Here: the storage lies below a file."""
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(doctor, ["--storage", str(tmp_path / "file" / "storage")])
    assert done.exit_code == 1
    assert "fail" in done.stdout
    assert not any(line != line.rstrip() for line in done.stdout.splitlines())
