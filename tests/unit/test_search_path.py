"""Where workers look for modules on another machine than the one that launched them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.worker import search_path


def test_what_was_sent_comes_first_and_what_is_not_there_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the launched function's folder wins over one of the same name elsewhere in the working directory."""
    for folder in ("sent/sub", "node", "shared"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sent")
    own = [str(tmp_path / "sent"), str(tmp_path / "node")]
    given = (str(tmp_path / "shared"), "/gone", *own, "sub", ".", "gone")
    assert search_path(own, given) == [
        str(tmp_path / "sent/sub"),
        str(tmp_path / "sent"),
        *own,
        str(tmp_path / "shared"),
    ]


def test_a_worker_of_this_machine_keeps_its_own_order() -> None:
    """Nothing was sent: only what is new is appended."""
    assert search_path(sys.path, tuple(sys.path)) == sys.path
