"""What FlytePropeller does around a container, with a folder in the place of its bucket.

Imitates v1.16.8: inputs are written before, outputs, error and deck read after (nodes/task/handler.go). What runs in
between is rendered by our port of its plugins, kfpytorch_ray.cluster.kube.flyte_rayjob and flyte_pytorchjob.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flyteidl.core import errors_pb2, literals_pb2
from flytekit.configuration import SerializationSettings
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.core.utils import load_proto_from_file, write_proto_to_file
from flytekit.models.literals import LiteralMap

from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.rendering import task_template


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a task.

    Attributes:
        task: A Flyte task.
        execution: Where it runs; ``prefix`` is a ``file://`` one.
        settings: With which the task was registered.
    """

    task: Any
    execution: FlyteExecution
    settings: SerializationSettings | None = None

    @property
    def template(self) -> dict[str, Any]:
        """The task as it was registered."""
        return task_template(self.task, self.settings)

    def write_inputs(self, **values: Any) -> None:
        """Write inputs.pb."""
        context = FlyteContextManager.current_context()
        literals = TypeEngine.dict_to_literal_map(context, values, self.task.python_interface.inputs)
        folder = path_of(self.execution.prefix)
        folder.mkdir(parents=True, exist_ok=True)
        write_proto_to_file(literals.to_flyte_idl(), str(folder / "inputs.pb"))

    def outputs(self) -> dict[str, Any] | None:
        """The values in outputs.pb; None where there is none."""
        file = self.folder / "outputs.pb"
        if not file.exists():
            return None
        literals = LiteralMap.from_flyte_idl(load_proto_from_file(literals_pb2.LiteralMap, str(file)))
        # An element of a map has the outputs of the task that is mapped.
        one = getattr(self.task, "python_function_task", self.task)
        values: dict[str, Any] = TypeEngine.literal_map_to_kwargs(
            FlyteContextManager.current_context(), literals, one.python_interface.outputs
        )
        return values

    def error(self, name: str = "error.pb") -> Any:
        """The ``ContainerError`` in an error file; None where there is none."""
        file = self.folder / name
        return load_proto_from_file(errors_pb2.ErrorDocument, str(file)).error if file.exists() else None

    def deck(self) -> str:
        """The deck; empty where there is none."""
        file = self.folder / "deck.html"
        return file.read_text() if file.exists() else ""

    @property
    def folder(self) -> Path:
        """Where it leaves what it leaves."""
        return path_of(self.execution.output_prefix)


def path_of(uri: str) -> Path:
    """The path of a ``file://`` URI."""
    return Path(url2pathname(urlsplit(uri).path))


def values_of(variables: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The variables of a container that have a value of their own."""
    return {one["name"]: one["value"] for one in variables if "value" in one}
