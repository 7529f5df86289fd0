"""launch() in a notebook, by a real Jupyter kernel: functions of cells, what is shown, and a cell that is interrupted.

One kernel, and so one Ray, for the file. Each test runs cells in it as a person would, one after the other.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from kfpytorch_ray.testing import RunningAgent, RunningRank, running_agents, running_ranks
from kfpytorch_ray.testing.processes import parent

SET_UP = """
import os, time
from kfpytorch_ray import Elastic, LaunchError, RayBackend, launch, progress, stop_requested

elastic = Elastic(nnodes=2, nproc_per_node=1, backend=RayBackend(address="local"))
"""

TRAIN = """
greeting = "hello"  # of the notebook, as the function is

def train(steps):
    for step in range(steps):
        print(f"step {step} of a cell's function")
        progress(step, total=steps, loss=1 / (step + 1))
    return f"{greeting} from rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"

result = launch(train, 3, elastic=elastic)
[result[rank].return_value for rank in sorted(result)]
"""

VALUES = "['hello from rank 0 of 2', 'hello from rank 1 of 2']"

FOREVER = """
def forever():
    progress(1)
    while True:
        time.sleep(0.1)

launch(forever, elastic=elastic)
"""

FAIL = """
def fail():
    raise ArithmeticError(f"on rank {os.environ['RANK']}")

try:
    launch(fail, elastic=elastic)
except LaunchError as error:
    print(type(error.__cause__).__name__, error.__cause__)
"""


@dataclass(frozen=True)
class Ran:
    """A cell that has ended.

    Attributes:
        outputs: Of it, as they are saved.
        raised: Name of the exception that has ended it; None: it has run to its end.
    """

    outputs: list[NotebookNode]
    raised: str | None

    def text(self, *streams: str) -> str:
        """What it has printed to these streams."""
        printed = (output for output in self.outputs if output.output_type == "stream")
        return "".join(output.text for output in printed if output.name in streams)

    @property
    def value(self) -> str | None:
        """Its last expression's."""
        values = [output.data["text/plain"] for output in self.outputs if output.output_type == "execute_result"]
        return values[0] if values else None


class Notebook:
    """Cells, run one after the other by a kernel.

    Args:
        client: Has started the kernel.
    """

    def __init__(self, client: NotebookClient) -> None:
        self._client = client

    def run(self, code: str) -> Ran:
        """Run a cell to its end, whatever that is."""
        cell = new_code_cell(code)
        self._client.nb.cells.append(cell)
        raised = None
        try:
            self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        except CellExecutionError as error:
            # Its outputs do not say it everywhere: flytekit has rich draw tracebacks.
            raised = error.ename
        return Ran(cell.outputs, raised)

    def interrupt(self) -> None:
        """As the button does."""
        self._client.km.interrupt_kernel()

    def agents(self) -> list[RunningAgent]:
        """Those on the Ray that its kernel has started; this machine may have others."""
        kernel = self._client.km.provisioner.pid
        return [agent for agent in running_agents() if parent(agent.raylet) == kernel]

    def ranks(self) -> list[RunningRank]:
        """Those of its agents."""
        kernel = self._client.km.provisioner.pid
        return [rank for rank in running_ranks() if parent(rank.agent.raylet) == kernel]


@pytest.fixture(scope="module")
def notebook(temporary_folder: str) -> Iterator[Notebook]:
    """A new notebook whose kernel runs."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    own |= {
        "RAY_TMPDIR": str(folder),
        "TMPDIR": temporary_folder,
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with pytest.MonkeyPatch.context() as patch:
        # jupyter_client reads its folders from the environment of this process.
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, own[name])
        kernel = KernelManager(kernel_name="python3")
        client = NotebookClient(new_notebook(), km=kernel, timeout=120, resources={"metadata": {"path": str(folder)}})
        with client.setup_kernel(env=own):
            notebook = Notebook(client)
            notebook.run(SET_UP)
            yield notebook
    shutil.rmtree(folder, ignore_errors=True)


def test_a_function_of_a_cell_is_launched_and_its_progress_is_plain_text(notebook: Notebook) -> None:
    """Every rank's value comes home; progress is whole lines, without escape sequences or carriage returns."""
    cell = notebook.run(TRAIN)
    assert cell.value == VALUES, cell
    assert [line for line in cell.text("stdout").splitlines() if "step" in line] == [
        f"[rank 0 | node 0] step {step} of a cell's function" for step in range(3)
    ]
    told = [line for line in cell.text("stderr").splitlines() if line.startswith("kfpytorch_ray: train")]
    assert any("round 1/1, 2 ranks on 2 nodes" in line for line in told), told
    assert "succeeded" in told[-1]
    shown = cell.text("stdout", "stderr")
    # Ray has a tab in its own lines.
    assert not [character for character in shown if character not in "\n\t" and not character.isprintable()], repr(
        shown
    )


def test_interrupting_a_cell_stops_its_run(
    notebook: Notebook, eventually: Callable[[Callable[[], object], str], None]
) -> None:
    """KeyboardInterrupt in the cell, no agent or rank left, and the kernel launches again, whose error is caught."""
    with ThreadPoolExecutor(1) as person:
        running = person.submit(notebook.run, FOREVER)
        try:
            eventually(lambda: len(notebook.ranks()) == 2 or running.done(), "two ranks")
        finally:
            notebook.interrupt()
        cell = running.result()
    assert cell.raised == "KeyboardInterrupt", cell
    assert "stopped" in cell.text("stderr")
    eventually(lambda: not notebook.ranks() and not notebook.agents(), "the end of its ranks and agents")
    again = notebook.run(FAIL)
    assert again.raised is None
    assert "ArithmeticError on rank " in again.text("stdout")
