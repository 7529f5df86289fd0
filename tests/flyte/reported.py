"""What the task ``report``, of either backend, leaves of an attempt that has succeeded."""

from __future__ import annotations

from propeller import Attempt


def assert_reported(one: Attempt) -> None:
    """Rank 0's value, under the execution's context, and its deck."""
    assert one.error() is None
    assert one.outputs() == {
        "o0": {
            "sum": "21",
            "execution": "execution",
            "raw": f"{one.execution.output_prefix}/raw",
            "RANK": "0",
            "WORLD_SIZE": "2",
            "OF_THE_TASK": "yes",
            "FLYTE_INTERNAL_EXECUTION_ID": "execution",
            "FLYTE_ATTEMPT_NUMBER": "0",
        }
    }
    assert "drawn by rank 0" in one.deck()
    assert "Where the time went" in one.deck()
    assert "drawn by rank 1" not in one.deck()
