"""What a new process takes: to import a package, and to the first step of the example."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.driver import serve
from benchmarks.marks import wait_for

_EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.py"
_STEP = "        optimizer.step()\n"


def _seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


_OURS = "from kfpytorch_ray import Elastic, launch; import kfpytorch_ray.task"
"""All that it takes to define a task and to run it: the package alone imports nothing until it is asked."""


def ours(folder: str) -> float:
    """Seconds for this package, less those of an interpreter."""
    del folder
    return _seconds(_OURS) - _seconds("pass")


def upstream(folder: str) -> float:
    """The same for the upstream plugin."""
    del folder
    return _seconds("import flytekitplugins.kfpytorch") - _seconds("pass")


def digits(folder: str) -> float:
    """Seconds from the start of the example's process to the first step of both ranks."""
    source = _EXAMPLE.read_text()
    assert source.count(_STEP) == 1
    marking = f"        from benchmarks.marks import mark; mark({folder!r}, 'step')\n"
    script = Path(f"{folder}-digits.py")
    script.write_text(source.replace(_STEP, _STEP + marking))
    began = time.time()
    subprocess.run([sys.executable, str(script), "--epochs", "1"], check=True, stdout=subprocess.DEVNULL)
    return wait_for(folder, "step", 2)[-1].at - began


if __name__ == "__main__":
    serve({scenario.__name__: scenario for scenario in (ours, upstream, digits)})
