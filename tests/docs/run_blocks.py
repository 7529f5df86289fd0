"""Runs each of the files that it is given as a program of its own, and says how each ended.

In forks, because an import of the package takes a second: ``run_blocks.py FILE...`` leaves FILE.out and FILE.code.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

import kfpytorch_ray.rendering  # noqa: F401 - what every fork has


def run(path: str) -> int:
    """The exit code of a program that prints where this process prints."""
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for name in sys.argv[1:]:
    if not os.fork():
        output = os.open(f"{name}.out", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        exit_code = run(name)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    Path(f"{name}.code").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
