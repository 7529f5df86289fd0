"""What the doctor says: one line for each check, good or bad, with the fix where there is one to make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kfpytorch_ray.errors import ConfigError


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """Something to know, or to mend before it hurts; a launch can succeed all the same."""
    FAIL = "fail"
    """A launch cannot succeed."""


class Group(Enum):
    """What was looked at."""

    MACHINE = "this machine"
    CLUSTER = "cluster"
    NODES = "nodes"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        check: What was checked, in one or two words.
        level: How bad it is.
        text: What was found, and what it means.
        fix: What to do about it; empty where nothing must be done.
        group: What was looked at.
    """

    check: str
    level: Level
    text: str
    fix: str = ""
    group: Group = Group.MACHINE

    def to_json(self) -> dict[str, str]:
        """As ``--json`` has it."""
        return {
            "group": self.group.value,
            "check": self.check,
            "level": self.level.value,
            "text": self.text,
            "fix": self.fix,
        }


def of_message(
    check: str, message: object, group: Group = Group.MACHINE, level: Level = Level.FAIL, prefix: str = ""
) -> Finding:
    """A finding made of an error, or of any text in the shape that ``kfpytorch_ray.errors.explain`` gives it.

    Args:
        check: As in ``Finding``.
        message: The error.
        group: As in ``Finding``.
        level: As in ``Finding``.
        prefix: Put before the text.
    """
    said, fixes = [], []
    text = "\n".join(message.problems) if isinstance(message, ConfigError) else str(message)
    for line in text.splitlines():
        if line.startswith("Fix: "):
            fixes.append(line.removeprefix("Fix: "))
        elif line.strip():
            said.append(line.strip().removeprefix("Why: "))
    return Finding(check, level, f"{prefix}{' '.join(said)}", " ".join(fixes), group)


def failed(findings: Iterable[Finding]) -> bool:
    """Whether anything fails; warnings do not."""
    return any(finding.level is Level.FAIL for finding in findings)
