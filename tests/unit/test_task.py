from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flytekit
import flytekitplugins.kfpytorch as upstream
import pytest
from flyteidl.core.errors_pb2 import ContainerError, ErrorDocument
from flytekit import PodTemplate, Resources, task, workflow
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.context_manager import (
    ExecutionState,
    FlyteContextManager,
    OutputMetadata,
    OutputMetadataTracker,
)
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import IgnoreOutputs
from google.protobuf.timestamp_pb2 import Timestamp
from kubernetes.client import V1Container, V1PodSpec

from kfpytorch_ray import ConfigError, Elastic, PyTorch, RunPolicy, Worker
from kfpytorch_ray import task as own
from kfpytorch_ray.backends import BACKEND_VARIABLE, Findings
from kfpytorch_ray.errors import (
    BackendUnavailableError,
    InfeasibleError,
    KfpytorchRayError,
    LaunchInterruptedError,
    NodeLostError,
    PayloadError,
    PlacementTimeoutError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
)
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.routing import ROUTE_VARIABLE

IMAGE = Image(name="default", fqn="registry.example/train", tag="1")
SETTINGS = SerializationSettings(
    project="p", domain="d", version="v", image_config=ImageConfig(default_image=IMAGE, images=[IMAGE])
)


def train(x: int) -> int:
    return x * 10


def returning(*results: ElasticWorkerResult) -> Any:
    return staticmethod(lambda plan: ElasticResult(tuple(range(len(results))), results.__getitem__))


def raising(error: Exception) -> Any:
    def fail(plan: Any) -> ElasticResult:
        raise error

    return staticmethod(fail)


@pytest.fixture
def execution() -> Iterator[flytekit.FlyteContext]:
    """A Flyte context like the one in which Flyte executes a task."""
    context = FlyteContextManager.current_context()
    params = flytekit.current_context().builder()
    params.decks = []
    state = context.new_execution_state().with_params(
        mode=ExecutionState.Mode.LOCAL_TASK_EXECUTION, user_space_params=params.build()
    )
    builder = context.with_execution_state(state).with_output_metadata_tracker(OutputMetadataTracker())
    with FlyteContextManager.with_context(builder) as inner:
        yield inner


def test_flytekit_finds_the_task_classes() -> None:
    """``@task(task_config=...)`` makes our tasks."""
    assert isinstance(task(task_config=Elastic())(train), own.PytorchElasticFunctionTask)
    assert isinstance(task(task_config=PyTorch(num_workers=1))(train), own.PyTorchFunctionTask)


def test_upstreams_attributes_are_there() -> None:
    """Code that reads a task's node range and rendezvous goes on working."""
    made: Any = task(task_config=Elastic(nnodes="2:4"))(train)
    assert (made.min_nodes, made.max_nodes, made.rdzv_backend) == (2, 4, "c10d")
    assert made.task_config.nnodes == "2:4"
    assert made.task_function is train


@pytest.mark.parametrize(
    ("config", "arguments", "problems"),
    [
        (PyTorch(num_workers=1, worker=Worker(replicas=1)), {}, 1),
        (PyTorch(), {}, 1),
        (Elastic(nnodes="3:2", nproc_per_node=0, run_policy=RunPolicy(backoff_limit=-1)), {}, 3),
        (Elastic(start_method="forkserver"), {}, 1),
        (
            Elastic(nnodes="0"),
            {
                "pod_template": PodTemplate(
                    pod_spec=V1PodSpec(containers=[V1Container(name="a"), V1Container(name="b")])
                )
            },
            2,
        ),
    ],
)
def test_a_task_that_cannot_work_is_refused_with_all_problems(
    config: Any, arguments: dict[str, Any], problems: int
) -> None:
    """Misuse is a ValueError, as upstream, when the task is defined."""
    with pytest.raises(ValueError, match=r"\d+ problem") as caught:
        task(task_config=config, **arguments)(train)
    assert isinstance(caught.value, ConfigError)
    assert len(caught.value.problems) == problems


def test_clashing_templates_are_fine_where_no_shared_memory_is_added() -> None:
    """``increase_shared_mem=False`` and ``shared_memory=`` both leave the template alone."""
    template = PodTemplate(pod_spec=V1PodSpec(containers=[V1Container(name="a"), V1Container(name="b")]))
    kept: Any = task(task_config=Elastic(increase_shared_mem=False), pod_template=template)(train)
    assert kept.pod_template == template
    shared: Any = task(task_config=Elastic(), pod_template=template, shared_memory=True)(train)
    assert shared.pod_template == template
    assert task(task_config=Elastic(), shared_memory=True)(train).pod_template is None  # type: ignore[attr-defined]


def test_two_tasks_may_share_a_pod_template() -> None:
    """Defining a task changes nothing of the user's."""
    template = PodTemplate(pod_spec=V1PodSpec(containers=[V1Container(name="primary")]))
    first: Any = task(task_config=Elastic(), pod_template=template)(train)
    second: Any = task(task_config=PyTorch(num_workers=1), pod_template=template)(train)
    assert first.pod_template == second.pod_template
    assert template.pod_spec.volumes is None
    assert template.pod_spec.containers[0].volume_mounts is None


def test_nobody_is_warned_of_an_argument_never_set() -> None:
    """The default of ``increase_shared_mem`` is no reason for a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(task_config=Elastic())(train)


def test_without_torch_an_elastic_task_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the documented one, when the task is defined."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError) as caught:
        task(task_config=Elastic())(train)
    assert str(caught.value) == own.TORCH_IMPORT_ERROR_MESSAGE


def test_the_default_choice_records_nothing() -> None:
    """What upstream registers is what we register."""
    made: Any = task(task_config=Elastic(), environment={"A": "1"}, shared_memory=True)(train)
    assert made.environment == {"A": "1"}
    assert made.get_config(SETTINGS) == {}


def test_a_variable_that_names_another_backend_is_corrected() -> None:
    """The container must choose as the registering process did, where the config outranked the variable."""
    made: Any = task(task_config=Elastic(backend="kubeflow"), environment={BACKEND_VARIABLE: "ray"})(train)
    assert made.environment == {BACKEND_VARIABLE: "kubeflow"}


def test_another_choice_is_recorded(double: Any) -> None:
    """The container runs what was registered, whatever its own surroundings say."""
    mine = {"A": "1"}
    made: Any = task(task_config=Elastic(backend="double"), environment=mine)(train)
    assert mine == {"A": "1"}
    assert made.environment == {"A": "1", BACKEND_VARIABLE: "double"}
    assert made.get_config(SETTINGS) == {"kfpytorch_ray.backend": "double", "primary_container_name": "primary"}
    assert made.task_type == "double"
    assert made.get_custom(SETTINGS) == {"made": "by double"}


def test_the_environment_chooses(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable decides where the config says nothing, the task's before the process's."""
    assert task(task_config=Elastic(), environment={BACKEND_VARIABLE: "double"})(train).task_type == "double"
    monkeypatch.setenv(BACKEND_VARIABLE, "double")
    made = task(task_config=Elastic())(train)
    assert made.task_type == "double"
    assert made.environment[BACKEND_VARIABLE] == "double"


def test_an_unknown_backend_is_refused_when_the_task_is_defined() -> None:
    """Not only when it runs."""
    with pytest.raises(BackendUnavailableError, match="slurm"):
        task(task_config=Elastic(backend="slurm"))(train)


def test_upstreams_configs_record_that_they_were_routed(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container must route too, or upstream's own class would run there."""
    monkeypatch.setenv(BACKEND_VARIABLE, "double")
    made: Any = own.PytorchElasticFunctionTask(upstream.Elastic(nnodes=2), train)
    assert made.environment == {BACKEND_VARIABLE: "double", ROUTE_VARIABLE: "1"}
    pytorch: Any = own.PyTorchFunctionTask(upstream.PyTorch(num_workers=1), train)
    assert pytorch.environment[ROUTE_VARIABLE] == "1"


def test_an_overridden_config_is_followed(double: Any) -> None:
    """After ``with_overrides(task_config=...)`` task type, nodes and backend are the new config's."""
    made: Any = task(task_config=Elastic(nnodes=2))(train)
    assert made.task_type == "pytorch"

    @workflow
    def flow() -> int:
        result: int = made(x=1).with_overrides(task_config=Elastic(nnodes=1))
        return result

    assert flow.nodes[0].flyte_entity is made
    assert (made.task_type, made.min_nodes, made.get_custom(SETTINGS)) == ("python-task", 1, None)
    made._task_config = Elastic(backend="double")
    assert made.environment == {BACKEND_VARIABLE: "double"}
    assert made.task_type == "double"


def test_the_plan_is_of_the_task(double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Function, inputs, resources and environment are the task's; the run is the execution's."""
    monkeypatch.setattr(double, "answer", returning(ElasticWorkerResult(7, [])))
    made: Any = task(
        task_config=Elastic("1:2", 2, backend="double"), requests=Resources(cpu="3"), environment={"A": "1"}
    )(train)
    assert made.execute(x=4) == 7
    (plan,) = double.plans
    assert plan.function is train
    assert plan.kwargs == {"x": 4}
    assert plan.name == made.name
    assert plan.run_id == flytekit.current_context().execution_id.name
    assert plan.resources.amounts == {"CPU": 3.0}
    assert plan.environment == {"A": "1", BACKEND_VARIABLE: "double"}


def test_rank_0s_decks_become_the_tasks(double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but its timeline, because the task has one; other ranks' stay with their results."""
    with FlyteContextManager.with_context(
        FlyteContextManager.current_context().with_execution_state(
            FlyteContextManager.current_context().new_execution_state()
        )
    ):
        curve = flytekit.Deck("curve", "<b>loss</b>", auto_add_to_deck=False)
        timeline = flytekit.deck.deck.TimeLineDeck("Timeline", auto_add_to_deck=False)
        other = flytekit.Deck("other", "", auto_add_to_deck=False)
    monkeypatch.setattr(
        double, "answer", returning(ElasticWorkerResult(1, [curve, timeline]), ElasticWorkerResult(2, [other]))
    )
    assert task(task_config=Elastic(backend="double"))(train).execute(x=1) == 1  # type: ignore[attr-defined]
    assert flytekit.current_context().decks == [curve]


def test_rank_0s_output_metadata_becomes_the_tasks(
    double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts made in the worker are the task's."""
    value, metadata = ["model"], OutputMetadata(None, None)
    monkeypatch.setattr(double, "answer", returning(ElasticWorkerResult(value, [], metadata)))
    assert task(task_config=Elastic(backend="double"))(train).execute(x=1) is value  # type: ignore[attr-defined]
    assert FlyteContextManager.current_context().output_metadata_tracker.get(value) is metadata


def test_without_rank_0_the_outputs_are_ignored(double: Any, execution: Any) -> None:
    """Another pod of the same job brings rank 0's."""
    with pytest.raises(IgnoreOutputs):
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error",
    [
        RecoverableWorkerError("rank 1 asked for it", 12.5),
        NodeLostError("gone", 12.5),
        LaunchInterruptedError("SIGTERM", 12.5),
        PlacementTimeoutError("full"),
    ],
)
def test_what_may_be_retried_is_recoverable_for_flyte(
    error: KfpytorchRayError, double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flyte runs the task again where our error says that it may."""
    monkeypatch.setattr(double, "answer", raising(error))
    with pytest.raises(FlyteRecoverableException) as caught:
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]
    assert str(error) in str(caught.value)
    assert caught.value.timestamp == getattr(error, "timestamp", None)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [WorkerFailedError("rank 1", 12.5), ResultError("rank 1", 12.5), PayloadError("x"), InfeasibleError("x")]
)
def test_what_may_not_is_a_user_error_for_flyte(
    error: KfpytorchRayError, double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the task is not tried again."""
    monkeypatch.setattr(double, "answer", raising(error))
    with pytest.raises(FlyteUserRuntimeException) as caught:
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]
    assert caught.value.value is error
    assert caught.value.timestamp == getattr(error, "timestamp", None)


def test_the_users_exception_is_the_cause(double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever catches Flyte's error finds the exception that the user's code raised."""
    error, users = WorkerFailedError("rank 1", 12.5), KeyError("lr")
    error.__cause__ = users
    monkeypatch.setattr(double, "answer", raising(error))
    with pytest.raises(FlyteUserRuntimeException) as caught:
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]
    assert caught.value.__cause__ is users


def test_a_failure_that_follows_from_another_pods_is_not_told(
    double: Any, execution: flytekit.FlyteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Flyte reads one error file per attempt: the first failure stays in it. The pod's log has this one."""
    earlier = ContainerError(timestamp=Timestamp(seconds=12))
    (tmp_path / "error.pb").write_bytes(ErrorDocument(error=earlier).SerializeToString())
    monkeypatch.setattr(execution.user_space_params, "_output_metadata_prefix", tmp_path.as_uri())
    monkeypatch.setattr(double, "answer", raising(WorkerFailedError("rank 1: connection lost", 12.5)))
    with pytest.raises(IgnoreOutputs):
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]
    assert "rank 1: connection lost" in caplog.text


@pytest.mark.parametrize("error", [BackendUnavailableError("x"), ConfigError("Elastic", ("x",))])
def test_errors_of_the_setting_stay_what_they_are(
    error: KfpytorchRayError, double: Any, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not about the launch."""
    monkeypatch.setattr(double, "answer", raising(error))
    with pytest.raises(type(error)):
        task(task_config=Elastic(backend="double"))(train).execute(x=1)  # type: ignore[attr-defined]


def test_a_pytorch_task_calls_its_function_where_the_operator_started_it(double: Any, execution: Any) -> None:
    """On kubeflow this process is one of the replicas; elsewhere all are launched."""
    here: Any = task(task_config=PyTorch(num_workers=1))(train)
    assert here.execute(x=2) == 20
    elsewhere: Any = task(task_config=PyTorch(num_workers=1, backend="double"))(train)
    with pytest.raises(IgnoreOutputs):
        elsewhere.execute(x=2)
    (plan,) = double.plans
    assert plan.max_nodes == 2


def test_warnings_of_the_backend_are_logged_when_the_task_is_defined(
    double: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that has no effect is said aloud."""
    monkeypatch.setattr(double, "findings", Findings(warnings=("rdzv_configs has no effect",)))
    task(task_config=Elastic(backend="double"))(train)
    assert "rdzv_configs has no effect" in caplog.text
