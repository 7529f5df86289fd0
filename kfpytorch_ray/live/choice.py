"""Which view a launch gets: as the environment says, else a bar where there is a terminal, and lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from kfpytorch_ray.live.plain import Plain
from kfpytorch_ray.live.view import Live, Silent, View
from kfpytorch_ray.notices import is_terminal

logger = logging.getLogger(__name__)

PROGRESS_VARIABLE = "KFPYTORCH_RAY_PROGRESS"
"""``0`` for silence, ``plain`` for lines, ``rich`` for a bar also where no terminal is seen."""


@contextlib.contextmanager
def live(name: str, run_id: str) -> Iterator[Live]:
    """Show where a launch stands while this lasts, and how it ended.

    Args:
        name: Of the launch.
        run_id: Of the launch.
    """
    shown = Live(name, run_id, view_for(os.environ, sys.stderr))
    how = "succeeded"
    try:
        yield shown
    except (KeyboardInterrupt, SystemExit):
        how = "stopped"
        raise
    except BaseException:
        how = "failed"
        raise
    finally:
        shown.close(how)


def view_for(environment: Mapping[str, str], stream: TextIO) -> View:
    """The view of the next launch.

    Args:
        environment: Of this process.
        stream: Standard error.
    """
    wanted = environment.get(PROGRESS_VARIABLE, "").strip().lower()
    if wanted not in ("", "0", "plain", "rich"):
        logger.warning("%s=%r: expected 0, plain or rich.", PROGRESS_VARIABLE, wanted)
        wanted = ""
    if wanted == "0":
        return Silent()
    if wanted == "rich" or (wanted == "" and _can_draw(environment, stream)):
        from kfpytorch_ray.live.terminal import Terminal, take_terminal

        if take_terminal():
            return Terminal(stream, force=wanted == "rich")
    return Plain()


def _can_draw(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether this is a terminal that nobody else draws on: not pytest, which writes its own lines, nor a notebook."""
    others = "PYTEST_CURRENT_TEST" in environment or "ipykernel" in sys.modules
    return is_terminal(stream) and environment.get("TERM", "dumb") != "dumb" and not others
