"""The README's blocks for a cluster elsewhere, run against one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kfpytorch_ray.testing import HeadCluster

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"<!-- needs a cluster: (\S+) and (\S+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize(("address", "folder", "code"), BLOCK.findall(README.read_text(encoding="utf-8")))
def test_block_runs(address: str, folder: str, code: str, head: HeadCluster, new_storage: str, tmp_path: Path) -> None:
    """With the test's cluster in the place of the reader's, a block prints what its comments promise."""
    project = tmp_path / "project"
    project.mkdir()
    script = project / "block.py"
    script.write_text(code.replace(address, head.address).replace(folder, new_storage))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    promises = re.findall(r"# prints (.+)", code)
    assert promises
    for promised in promises:
        assert promised in done.stdout
