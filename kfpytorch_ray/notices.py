"""What a person who waits is told: lines on standard error, so that a script's output stays its own."""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def tell(message: str) -> None:
    """Say something to whoever started this process, if anybody is left to read it."""
    write(sys.stderr, f"kfpytorch_ray: {message}\n")


def write(stream: Any, text: str) -> None:
    """Write what is no reason to end a training if it cannot be written.

    Args:
        stream: Standard output or error: a pipe whose reader may have gone, a terminal that was closed, or nothing.
        text: Whole lines.
    """
    try:
        stream.write(text)
        stream.flush()
    except (AttributeError, OSError, ValueError) as broken:
        logger.debug("Lines cannot be written: %s", broken)


def is_terminal(stream: Any) -> bool:
    """Whether somebody may look at a stream, which a program may have replaced by any object that can be written to."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
