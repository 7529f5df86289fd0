"""Where a person works: above the folder of what is launched, with cluster and storage in the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kfpytorch_ray.cli.group import main
from kfpytorch_ray.config import KubernetesOptions


class Shell:
    """A project whose module and script are in its folder ``jobs``.

    Args:
        project: The current folder, with the module.
        trainings: Name of the module.
        work: Text of the script, ``jobs/work.py``.
        backend: Where cluster and storage are.
        monkeypatch: Sets their variables.
        timeout_s: Longest time for a process to end.
    """

    def __init__(
        self,
        project: Path,
        trainings: str,
        work: str,
        backend: KubernetesOptions,
        monkeypatch: pytest.MonkeyPatch,
        timeout_s: float,
    ) -> None:
        jobs = project / "jobs"
        jobs.mkdir()
        (project / f"{trainings}.py").rename(jobs / f"{trainings}.py")
        (jobs / "work.py").write_text(work)
        self._project = project
        self._timeout_s = timeout_s
        monkeypatch.setenv("KUBECONFIG", str(backend.kubeconfig))
        # The official client reads the variable when it is imported, which it was in this process.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(backend.kubeconfig))
        monkeypatch.setenv("KFPYTORCH_RAY_STORAGE", str(backend.storage))
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
        # For a control plane of tests, whose certificate nobody has signed.
        monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start Python."""
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self._project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL: it has no time to say or do anything."""
        process.kill()
        process.communicate()

    def output_of(self, process: subprocess.Popen[str]) -> str:
        """What a process prints on standard output that ends well."""
        output, errors = process.communicate(timeout=self._timeout_s)
        assert process.returncode == 0, errors
        return output

    def command(self, *arguments: object, ends_with: int = 0) -> str:
        """What ``kfpytorch-ray`` prints on standard output; in this process, where all is imported already."""
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert done.exit_code == ends_with, (done.output, done.exception)
        return done.stdout
