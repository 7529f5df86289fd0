"""The code blocks of the README and of docs/, as a reader sees them, and what stands in tables there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(
    r"(?:^<!-- (?P<note>.+?) -->\n+)?^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        document: File that it is in.
        line: Of its first line.
        language: As the fence names it.
        code: Between the fences.
        note: Of the comment before it, which a reader does not see; empty without one.
    """

    document: Path
    line: int
    language: str
    code: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.document.stem}-{self.line}"

    @property
    def promises(self) -> list[str]:
        """What its comments say that it prints."""
        return re.findall(r"# prints (.+)", self.code)


def blocks(*languages: str) -> list[Block]:
    """All blocks; only those of some languages where these are named."""
    return [block for block in _all() if not languages or block.language in languages]


def _all() -> list[Block]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text[: match.start("code")].count("\n") + 1
            found.append(Block(document, line, match["language"], match["code"], match["note"] or ""))
    return found


def commands() -> list[str]:
    """Every command line of the shell that a document shows, in a block or indented with a prompt."""
    found = [line for block in blocks("bash") for line in block.code.replace("\\\n", " ").splitlines()]
    for document in DOCUMENTS:
        # Of a session, the lines behind a prompt; `make` is shown without one.
        shown = re.findall(r"^ *\$ (.+)$|^    (make .+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
        found += [prompted or plain for prompted, plain in shown]
    return [line for line in found if line.strip() and not line.lstrip().startswith("#")]


def table(document: str, head: str) -> list[list[str]]:
    """The rows of the one table whose first line begins like this, without that line."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (rows,) = re.findall(rf"^{re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip().strip("|").split(" | ")] for row in rows.splitlines()]


def rules(kind: str) -> list[tuple[str, str, list[str]]]:
    """Group, resource and verbs of every rule in the one manifest of this kind: a Role, a ClusterRole."""
    manifests = [one for block in blocks("yaml") for one in yaml.safe_load_all(block.code) if one.get("kind") == kind]
    (manifest,) = manifests
    return [
        (group, resource, rule["verbs"])
        for rule in manifest["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    ]


def code_spans(text: str) -> list[str]:
    """What is in backticks."""
    return re.findall(r"`([^`]+)`", text)
