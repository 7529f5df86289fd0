"""A backend made for tests, found as any third-party backend is: by an entry point of an installed distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import Manifest


class DoubleAdapter:
    """Records the plans it is given and behaves as a test says."""

    findings: ClassVar[Findings] = Findings()
    answer: ClassVar[Callable[[LaunchPlan], ElasticResult]]
    plans: ClassVar[list[LaunchPlan]] = []

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def check(self, config: JobConfig) -> Findings:
        return self.findings

    def task_type(self, config: JobConfig) -> str:
        return "double"

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        return {"made": "by double"}

    def launches(self, config: JobConfig) -> bool:
        return True

    def build(self, plan: LaunchPlan) -> Any:
        return plan

    def run(self, plan: LaunchPlan) -> ElasticResult:
        self.plans.append(plan)
        return type(self).answer(plan)


class DoubleRun:
    """A run that goes on elsewhere, as far as a test says."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.now = RunStatus.RUNNING
        self.problem: Exception | None = None
        self.lines: list[str] = []
        self.answer: ElasticResult | Exception = ElasticResult((), lambda rank: ElasticWorkerResult(None, []))
        self.calls: list[tuple[Any, ...]] = []

    def status(self) -> RunStatus:
        self.calls.append(("status",))
        if self.problem:
            raise self.problem
        return self.now

    def logs(self, *, follow: bool = False, rank: int | None = None) -> Iterator[str]:
        self.calls.append(("logs", follow, rank))
        yield from self.lines
        if self.problem:
            raise self.problem

    def cancel(self) -> RunStatus:
        self.calls.append(("cancel",))
        return self.now

    def result(self, timeout: float | None = None, *, keep: bool = False) -> ElasticResult:
        self.calls.append(("result", timeout, keep))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def forget(self) -> None:
        self.calls.append(("forget",))

    def collect(self) -> None:
        self.calls.append(("collect",))


class DetachedDouble(DoubleAdapter):
    """A backend whose runs go on without this process."""

    plans: ClassVar[list[LaunchPlan]] = []
    runs: ClassVar[dict[str, DoubleRun]] = {}

    def start(self, plan: LaunchPlan) -> DoubleRun:
        self.plans.append(plan)
        return self.handle(f"kfr-{plan.name}")

    def attach(self, manifest: Manifest) -> DoubleRun:
        return self.handle(manifest.run_id)

    @classmethod
    def handle(cls, run_id: str) -> DoubleRun:
        return cls.runs.setdefault(run_id, DoubleRun(run_id))


def write_distribution(folder: Path, entry_points: str) -> None:
    """What pip leaves behind of a distribution that has entry points."""
    info = folder / "double_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: double-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[DoubleAdapter]:
    """The adapter class of the backend ``double``, installed for one test."""
    adapters = f"double = {__name__}:DoubleAdapter\ndetached = {__name__}:DetachedDouble\n"
    write_distribution(tmp_path / "site", f"[kfpytorch_ray.adapters]\n{adapters}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(DoubleAdapter, "findings", Findings())
    monkeypatch.setattr(DoubleAdapter, "plans", [])
    monkeypatch.setattr(DoubleAdapter, "answer", staticmethod(lambda plan: ElasticResult((), lambda rank: None)), False)  # type: ignore[arg-type,return-value]
    return DoubleAdapter


@pytest.fixture
def detached(double: type[DoubleAdapter], monkeypatch: pytest.MonkeyPatch) -> type[DetachedDouble]:
    """The adapter class of the backend ``detached``, installed for one test."""
    monkeypatch.setattr(DetachedDouble, "plans", [])
    monkeypatch.setattr(DetachedDouble, "runs", {})
    return DetachedDouble


@pytest.fixture(autouse=True)
def no_choice_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests has no say in the backend."""
    from flytekit.configuration.file import get_config_file

    for variable in (
        "KFPYTORCH_RAY_BACKEND",
        "FLYTE_KFPYTORCH_RAY_BACKEND",
        "FLYTE_INTERNAL_EXECUTION_ID",
        "KFPYTORCH_RAY_STORAGE",
        "RAY_ADDRESS",
        "RAY_JOB_HEADERS",
    ):
        monkeypatch.delenv(variable, raising=False)
    empty = tmp_path / "flytekit.yaml"
    empty.write_text("admin: {}\n")
    monkeypatch.setenv("FLYTECTL_CONFIG", str(empty))
    get_config_file.cache_clear()
