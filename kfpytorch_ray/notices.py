"""What a person who waits is told: lines on standard error, so that a script's output stays its own; ranks' lines."""

from __future__ import annotations

import sys


def tell(message: str) -> None:
    """Say something to whoever started this process."""
    sys.stderr.write(f"kfpytorch_ray: {message}\n")
    sys.stderr.flush()


def show(text: str, error: bool) -> None:
    """Pass on whole lines that a rank has printed.

    Args:
        text: The lines.
        error: Whether to standard error.
    """
    stream = sys.stderr if error else sys.stdout
    stream.write(text)
    stream.flush()
