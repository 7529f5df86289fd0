"""A Flyte context like that of a task with decks in a container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import flytekit
from flytekit.core.context_manager import ExecutionState, FlyteContextManager, OutputMetadataTracker
from flytekit.core.data_persistence import FileAccessProvider


@contextmanager
def task_with_decks(folder: Path) -> Iterator[Path]:
    """Executing a task; its outputs, ``deck.html`` among them, are left in the folder that is given back."""
    context = FlyteContextManager.current_context()
    params = flytekit.current_context().with_enable_deck(enable_deck=True)
    params.decks = []
    params.output_metadata_prefix = str(folder / "outputs")
    params.raw_output_prefix = str(folder / "raw")
    state = context.new_execution_state().with_params(
        mode=ExecutionState.Mode.TASK_EXECUTION, user_space_params=params.build()
    )
    files = FileAccessProvider(str(folder / "sandbox"), str(folder / "raw"))
    builder = context.with_execution_state(state).with_output_metadata_tracker(OutputMetadataTracker())
    with FlyteContextManager.with_context(builder.with_file_access(files)):
        yield folder / "outputs"


def decks() -> dict[str, str]:
    """The task's decks by name."""
    return {deck.name: deck.html for deck in flytekit.current_context().decks}
