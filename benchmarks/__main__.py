"""``python -m benchmarks``: take all samples, print one table, write one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contender import Contender, FailedSampleError
from benchmarks.figures import EXPERIMENTS, Experiment, Figure

_PACKAGES = ("kfpytorch_ray", "ray", "torch", "flytekit", "flytekitplugins-kfpytorch")


def main(arguments: Sequence[str]) -> int:
    """Returns 0 if every goal that can be judged is met."""
    options = _options(arguments)
    chosen = [each for each in EXPERIMENTS if each.name in options.only] if options.only else _of(options.quick)
    runs = 1 if options.quick else options.runs
    rows: list[dict[str, Any]] = []
    with ExitStack() as undo:
        temporary = tempfile.TemporaryDirectory(prefix="kfpytorch-ray-bench-", ignore_cleanup_errors=True)
        folder = Path(undo.enter_context(temporary))
        drivers = {module: Contender(module, folder / f"{module}.log") for module in _modules(chosen)}
        for driver in drivers.values():
            undo.callback(driver.close)
        for experiment in chosen:
            samples = _samples(experiment, drivers, runs, folder)
            rows += [_row(figure, samples) for figure in experiment.figures]
    setting = {
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "runs": runs,
    }
    Path(options.json).write_text(json.dumps({**setting, "figures": rows}, indent=1) + "\n")
    Console(width=200 if not sys.stdout.isatty() else None).print(_table(rows, setting))
    return 0 if all(goal["met"] is not False for row in rows for goal in row["goals"]) else 1


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure beside the peers.")
    parser.add_argument("--runs", type=int, default=5, help="samples of each contender (5)")
    parser.add_argument("--quick", action="store_true", help="one sample, and without what starts a cluster for each")
    parser.add_argument("--only", action="append", choices=[each.name for each in EXPERIMENTS], help="repeatable")
    parser.add_argument("--json", default="benchmarks.json", help="file for the figures (benchmarks.json)")
    return parser.parse_args(arguments)


def _of(quick: bool) -> list[Experiment]:
    return [each for each in EXPERIMENTS if each.quick or not quick]


def _modules(experiments: Sequence[Experiment]) -> set[str]:
    return {module for each in experiments for module, _, _ in each.contenders.values()}


def _samples(experiment: Experiment, drivers: dict[str, Contender], runs: int, folder: Path) -> dict[str, list[Any]]:
    """Samples by contender, taken in turn; of one that fails there are none, or fewer."""
    samples: dict[str, list[Any]] = defaultdict(list)
    failed: dict[str, str] = {}
    for run in range(runs):
        for number, (name, (module, scenario, arguments)) in enumerate(experiment.contenders.items()):
            place = folder / f"{experiment.name}-{run}-{number}"
            place.mkdir()
            began = time.monotonic()
            try:
                samples[name].append(drivers[module].ask(scenario, folder=str(place), **arguments))
            except FailedSampleError as error:
                failed[name] = str(error)
            took = time.monotonic() - began
            sys.stderr.write(f"{experiment.name} {run + 1}/{runs}: {name}: {took:.1f} s\n")
    for name, why in failed.items():
        sys.stderr.write(f"{experiment.name}: {name} failed: {why}\n")
    return samples


def _row(figure: Figure, samples: dict[str, list[Any]]) -> dict[str, Any]:
    values = {name: sorted(map(figure.pick, samples[name])) for name in figure.contenders if samples[name]}
    medians = {name: statistics.median(found) for name, found in values.items()}
    return {
        "figure": figure.title,
        "unit": figure.unit,
        "medians": medians,
        "values": values,
        "goals": [{"goal": goal.text, "met": goal.met(medians)} for goal in figure.goals],
    }


def _table(rows: list[dict[str, Any]], setting: dict[str, Any]) -> Table:
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    table = Table(
        title=f"Medians of {setting['runs']} (lowest to highest). {setting['cores']} cores, {versions}",
        show_lines=True,
    )
    for heading in ("figure", "of", "median", "goal", "met"):
        table.add_column(heading)
    marks = {True: "met", False: "MISSED", None: "-"}
    for row in rows:
        spread = [
            f"{row['medians'][name]:.3g} {row['unit']} ({values[0]:.3g} to {values[-1]:.3g})"
            for name, values in row["values"].items()
        ]
        goals = row["goals"]
        table.add_row(
            row["figure"],
            "\n".join(row["values"]),
            "\n".join(spread),
            "\n".join(goal["goal"] for goal in goals),
            "\n".join(marks[goal["met"]] for goal in goals),
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
