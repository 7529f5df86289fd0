"""``python -m benchmarks.markdown FILE``: the figures that ``make bench`` has written, as a table of the README."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_MET = {True: "met", False: "**missed**", None: "no peer"}
_OURS = ("kfpytorch_ray", "agents")


def main(path: str) -> None:
    """Print a table, and below it what was measured with what."""
    measured = json.loads(Path(path).read_text())
    print("| figure | kfpytorch_ray | peers | goal |\n|---|---|---|---|")
    for row in measured["figures"]:
        print(f"| {row['figure']} | {_cell(row, ours=True)} | {_cell(row, ours=False)} | {_goals(row)} |")
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    print(f"\n{measured['cores']} cores, Python {measured['python']}, {versions}; medians of {measured['runs']}.")


def _cell(row: dict[str, Any], *, ours: bool) -> str:
    said = []
    for name, values in row["values"].items():
        if any(word in name for word in _OURS) == ours:
            label = name.removeprefix("kfpytorch_ray").removeprefix(", ")
            spread = f" ({values[0]:.3g} to {values[-1]:.3g})" if ours and len(values) > 1 else ""
            said.append(f"{label} {row['medians'][name]:.3g} {row['unit']}{spread}".lstrip())
    return "<br>".join(said) or "-"


def _goals(row: dict[str, Any]) -> str:
    return "<br>".join(f"{goal['goal']}: {_MET[goal['met']]}" for goal in row["goals"]) or "-"


if __name__ == "__main__":
    main(sys.argv[1])
