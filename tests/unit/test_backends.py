from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flytekit.configuration.file import get_config_file

from kfpytorch_ray.backends import (
    BACKEND_VARIABLE,
    BackendChoice,
    choose_backend,
    known_backends,
    load_adapter,
    require_package,
)
from kfpytorch_ray.config import KubeflowBackend, RayBackend
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError


def use_config_file(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    path.write_text(text)
    monkeypatch.setenv("FLYTECTL_CONFIG", str(path))
    get_config_file.cache_clear()


def test_without_any_choice_kubeflow_runs_the_task() -> None:
    """A drop-in: nothing chosen is upstream's way."""
    assert choose_backend(None) == BackendChoice("kubeflow")
    assert choose_backend(None).is_default


@pytest.mark.parametrize("options", [RayBackend(address="auto"), KubeflowBackend()])
def test_an_options_object_names_its_backend(options: Any) -> None:
    """``backend=RayBackend(...)`` chooses ray and hands the options on."""
    assert choose_backend(options) == BackendChoice(options.name, options)


def test_the_order_of_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config before task environment before process environment before config file."""
    use_config_file(monkeypatch, tmp_path / "c.yaml", "kfpytorch_ray:\n  backend: ray\n")
    assert choose_backend(None).name == "ray"
    monkeypatch.setenv(BACKEND_VARIABLE, "kubeflow")
    assert choose_backend(None).name == "kubeflow"
    assert choose_backend(None, {BACKEND_VARIABLE: "ray"}).name == "ray"
    assert choose_backend("kubeflow", {BACKEND_VARIABLE: "ray"}).name == "kubeflow"


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.yaml", "kfpytorch_ray:\n  backend: ray\n"), ("c.config", "[kfpytorch_ray]\nbackend=ray\n")],
)
def test_both_forms_of_flytekits_config_file_are_read(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML, as flytectl has it, and INI."""
    use_config_file(monkeypatch, tmp_path / name, text)
    assert choose_backend(None).name == "ray"


def test_a_remote_execution_does_not_look_into_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was registered is what runs, whatever file lies in the image."""
    use_config_file(monkeypatch, tmp_path / "c.yaml", "kfpytorch_ray:\n  backend: ray\n")
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f123")
    assert choose_backend(None).is_default


@pytest.mark.parametrize("where", ["config", "environment"])
def test_an_unknown_backend_names_the_known_ones(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what was named, by whom, and what there is."""
    monkeypatch.setenv(BACKEND_VARIABLE, "slurm")
    with pytest.raises(BackendUnavailableError, match="slurm") as caught:
        choose_backend("slurm" if where == "config" else None)
    assert "kubeflow, ray" in str(caught.value)
    assert (BACKEND_VARIABLE in str(caught.value)) == (where == "environment")


def test_neither_name_nor_options_is_an_error() -> None:
    """An object that names no backend is refused."""
    with pytest.raises(ConfigError, match="RayBackend"):
        choose_backend(42)  # type: ignore[arg-type]


def test_backends_of_others_are_found_by_their_entry_point(double: Any) -> None:
    """A distribution with the entry point adds a backend."""
    assert "double" in known_backends()
    assert isinstance(load_adapter(choose_backend("double")), double)


def test_a_missing_package_names_the_pip_command() -> None:
    """Who lacks a package is told how to install it."""
    with pytest.raises(BackendUnavailableError, match="pip install surely-missing"):
        require_package("surely_missing", "double", "pip install surely-missing")
    require_package("flytekit", "double", "pip install flytekit")
