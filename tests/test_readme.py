"""The README's Python blocks are run as the files that a reader would make of them.

A block after the comment ``needs Ray`` starts a Ray of its own; without the comment it has to do without. Those that
need a cluster elsewhere are run by tests/remote/test_readme.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(?P<ray><!-- needs Ray -->\n+)?(?<!runs -->\n)```python\n(?P<code>.*?)```", re.DOTALL)
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(match["code"], bool(match["ray"]), id=f"line-{TEXT[: match.start('code')].count(chr(10)) + 1}")
    for match in BLOCK.finditer(TEXT)
]


def test_the_readme_has_code() -> None:
    """The pattern still finds the blocks, and those that need Ray among them."""
    assert {ray for _, ray in (block.values for block in BLOCKS)} == {True, False}


@pytest.mark.parametrize(("code", "needs_ray"), BLOCKS)
def test_block_runs(code: str, needs_ray: bool, tmp_path: Path) -> None:
    """A block saved as a file runs to its end, and what its comments promise is what it prints."""
    script = tmp_path / "block.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KFPYTORCH_RAY_"))}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"} if needs_ray else {"RAY_ADDRESS": "a block without Ray needs none"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for promised in re.findall(r"# prints (.+)", code):
        assert promised in done.stdout
