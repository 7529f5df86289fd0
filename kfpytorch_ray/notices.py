"""What a person who waits is told: lines on standard error, so that a script's output stays its own."""

from __future__ import annotations

import sys


def tell(message: str) -> None:
    """Say something to whoever started this process."""
    sys.stderr.write(f"kfpytorch_ray: {message}\n")
    sys.stderr.flush()
