"""A laptop that loses its network for a minute while it follows a run: with a real link, cut and healed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from kfpytorch_ray.testing import HeadCluster, Laptop, wait_until

SCRIPT = """
import sys
from kfpytorch_ray import Elastic, RayBackend, launch


def main(address, storage, counter, gate):
    def work():
        import threading
        from pathlib import Path

        number = 0
        while not Path(gate).exists():
            print(f"tick {number}", flush=True)
            number += 1
            Path(counter).write_text(str(number))
            threading.Event().wait(0.1)
        return number

    backend = RayBackend(address=address, storage=storage, working_dir="")
    print("returned", launch(work, elastic=Elastic(backend=backend))[0].return_value, flush=True)


main(*sys.argv[1:])
"""
A_MINUTE = 600
"""In ticks."""


@pytest.mark.timeout(600)
def test_the_link_is_cut_for_a_minute(far_head: HeadCluster, laptop: Laptop, storage: str, tmp_path: Path) -> None:
    """The run does not notice; the script says that it tries again, goes on where it stopped, and loses nothing."""
    counter, gate, output = tmp_path / "counter", tmp_path / "gate", tmp_path / "output"

    def ticks() -> int:
        return int(counter.read_text() or 0) if counter.exists() else 0

    def said() -> str:
        return output.read_text(errors="replace")

    with output.open("wb") as file:
        script = laptop.start(
            SCRIPT, far_head.address, storage, str(counter), str(gate), stdout=file, stderr=subprocess.STDOUT
        )
    wait_until(lambda: "tick 20" in said() or script.poll() is not None, "the first lines to arrive")
    laptop.cut()
    try:
        before = ticks()
        wait_until(lambda: ticks() >= before + A_MINUTE, "a minute", timeout_s=300)
        arrived = ticks_in(said())
        assert len(arrived) < before + A_MINUTE / 2
        assert "Trying again." in said()
    finally:
        laptop.heal()
    wait_until(lambda: len(ticks_in(said())) > before + A_MINUTE, "the lines that were missed", timeout_s=120)
    gate.touch()
    assert script.wait(120) == 0, said()
    assert f"returned {ticks()}" in said()
    assert "can be reached again" in said()
    arrived = ticks_in(said())
    assert arrived == list(range(len(arrived)))
    assert len(arrived) > before + A_MINUTE


def ticks_in(text: str) -> list[int]:
    """The numbers of the lines that have come."""
    return [int(number) for number in re.findall(r"tick (\d+)\n", text)]
