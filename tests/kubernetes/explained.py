"""Whether an error says why it is one, and how to mend it."""

from __future__ import annotations

from kfpytorch_ray import ConfigError

_LABELS = ("Why", "Fix")


def assert_explained(error: BaseException) -> None:
    """What, why and fix, in this order; where an error lists several problems, each of them has all three."""
    texts = error.problems if isinstance(error, ConfigError) else (str(error),)
    assert texts
    for text in texts:
        what, *lines = text.splitlines()
        labels = [line.partition(": ")[0] for line in lines]
        assert what
        assert [label for label in labels if label in _LABELS] == [*_LABELS], text
