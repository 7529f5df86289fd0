"""Every code block of the README and of docs/ does what it says, or is at least what it claims to be.

Python blocks are run as the files that a reader would make of them. One after the comment ``needs Ray`` starts a Ray of
its own; without the comment it has to do without. Those that need a cluster elsewhere are run by
tests/remote/test_readme.py. Commands are read by the real parser of their options. Manifests: test_manifests.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import rich_click as click
from blocks import ROOT, Block, blocks, commands

from kfpytorch_ray.cli.group import main

NEEDS_RAY = "needs Ray"
ELSEWHERE = re.compile(r"needs a cluster: \S+ and \S+")
TESTED = {"python", "bash", "console", "yaml", "dockerfile", "mermaid"}

PYTHON = [block for block in blocks("python") if not ELSEWHERE.fullmatch(block.note)]
JOINED = [block for block in PYTHON if block.document.name != "README.md" and not block.note]
ALONE = [block for block in PYTHON if block not in JOINED]


def test_no_block_escapes() -> None:
    """Every block is of a language that is tested, and notes are of the known kinds."""
    assert {block.language for block in blocks()} == TESTED
    assert {block.note for block in PYTHON} == {"", NEEDS_RAY}
    assert {block.document.name for block in PYTHON} == {"README.md", "guide.md", "operations.md"}


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_block_runs(block: Block, tmp_path: Path) -> None:
    """A block saved as a file runs to its end, and what its comments promise is what it prints."""
    needs_ray = block.note == NEEDS_RAY
    environment = environment_of_a_reader()
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"} if needs_ray else {"RAY_ADDRESS": "a block without Ray needs none"}
    (file,) = written([block], tmp_path)
    done = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_kept(block, done.stdout)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all small blocks have run."""
    folder = tmp_path_factory.mktemp("joined")
    environment = environment_of_a_reader() | {"RAY_ADDRESS": "a block without Ray needs none"}
    command = [sys.executable, str(Path(__file__).with_name("run_blocks.py")), *written(JOINED, folder)]
    subprocess.run(command, cwd=folder, env=environment, timeout=240, check=True)
    return folder


@pytest.mark.parametrize("block", JOINED, ids=str)
def test_small_block_runs(block: Block, joined: Path) -> None:
    """As above, in a fork of a process that has the package loaded."""
    output = (joined / f"{block}.py.out").read_text()
    assert (joined / f"{block}.py.code").read_text() == "0", output
    assert_kept(block, output)


def assert_kept(block: Block, output: str) -> None:
    """What the block's comments promise is printed, in that order."""
    place = 0
    for promised in block.promises:
        assert promised in output[place:], output
        place = output.index(promised, place) + len(promised)


def written(some: list[Block], folder: Path) -> list[str]:
    """Files with these blocks."""
    files = [folder / f"{block}.py" for block in some]
    for block, file in zip(some, files, strict=True):
        file.write_text(block.code)
    return [str(file) for file in files]


def environment_of_a_reader() -> dict[str, str]:
    """Without what surrounds the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KFPYTORCH_RAY_"))}


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_bash_reads_the_block(block: Block) -> None:
    """It has no mistake of syntax."""
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


OURS = [
    shlex.split(words, comments=True) for line in commands() for words in re.findall(r"kfpytorch-ray ([^|&;)>]*)", line)
]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_the_command_line_takes_the_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command exists, its options too, and no argument is missing."""
    # Which certificates they are is not looked at.
    (tmp_path / "ca.pem").touch()
    monkeypatch.chdir(tmp_path)
    name, *rest = words
    main.commands[name].make_context(name, rest, parent=click.Context(main))


def test_what_is_rendered_is_shown(tmp_path: Path) -> None:
    """The commands that need no cluster and write nothing are run, one after the other, where the examples are."""
    rendered = sorted({tuple(words) for words in OURS if words[0] == "render"})
    lines = [f"main({list(words)}, standalone_mode=False)" for words in rendered]
    code = "\n".join(["from kfpytorch_ray.cli.group import main", *lines])
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_of_a_reader(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = re.findall(r"^kind: (\w+)$", done.stdout, re.MULTILINE)
    assert len(kinds) == len(rendered)
    assert set(kinds) == {"RayJob", "PyTorchJob"}


def test_a_command_that_is_wrong_is_found() -> None:
    """What the test above leans on."""
    with pytest.raises(click.NoSuchOption):
        main.commands["gc"].make_context("gc", ["--older", "7d"], parent=click.Context(main))


def test_the_targets_of_make_exist() -> None:
    """Each `make TARGET` that a document tells to run."""
    told = {target for line in commands() for target in re.findall(r"\bmake ([a-z-]+)", line)}
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert told
    assert told <= there


@pytest.mark.parametrize("block", blocks("mermaid"), ids=str)
def test_a_diagram_uses_what_it_declares(block: Block) -> None:
    """A sequence has its participants, a flow chart closes its groups and joins boxes that it has."""
    kind, _, rest = block.code.partition("\n")
    if kind == "sequenceDiagram":
        declared = set(re.findall(r"^ *participant (\w+)", rest, re.MULTILINE))
        used = {end for pair in re.findall(r"^ *(\w+)-+>>?\+?(\w+):", rest, re.MULTILINE) for end in pair}
        assert used
        assert used <= declared
    else:
        assert kind.startswith("flowchart")
        assert len(re.findall(r"^ *subgraph ", rest, re.MULTILINE)) == len(re.findall(r"^ *end$", rest, re.MULTILINE))
        boxes = set(re.findall(r'^ *(?:subgraph )?(\w+)(?: ?\[".*"\])?$', rest, re.MULTILINE))
        arrows = [line for line in rest.splitlines() if "->" in line]
        joined = {word for line in arrows for word in re.findall(r"\w+", re.sub(r'"[^"]*"', "", line))}
        assert arrows
        assert joined <= boxes, joined - boxes
