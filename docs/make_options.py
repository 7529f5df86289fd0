"""Write docs/options.md from the options classes: python docs/make_options.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from kfpytorch_ray.config import (
    CallOptions,
    KubeflowBackend,
    KubeRayBackend,
    KubernetesOptions,
    RayBackend,
    RayRunOptions,
    StoredRunOptions,
)

PAGE = Path(__file__).with_name("options.md")
BACKENDS = (RayBackend, KubeRayBackend, KubeflowBackend)
SHARED = (CallOptions, RayRunOptions, StoredRunOptions, KubernetesOptions)

HEAD = """# Options

All options of the three options objects, from their docstrings (`python docs/make_options.py` writes this page). Those
of `Elastic`, `PyTorch` and the classes around them are upstream's; `guide.md` has them by backend.

| options of | `RayBackend` | `KubeRayBackend` | `KubeflowBackend` |
|---|---|---|---|
"""

VARIABLES = """
## Variables

| variable | what it does |
|---|---|
| `KFPYTORCH_RAY_BACKEND` | the backend where a config names none; a task's `environment` comes before the process's |
| `KFPYTORCH_RAY_STORAGE` | the storage of remote runs where `storage` or `--storage` is not given |
| `KFPYTORCH_RAY_PROGRESS` | `0` silence, `plain` lines, `rich` the bar. Default: the bar in a terminal, else lines |
| `KFPYTORCH_RAY_ROUTE_UPSTREAM` | `1` as `kfpytorch_ray.route_upstream()`, for programs that are not to be edited |
| `RAY_ADDRESS` | as for Ray: the cluster where `address` is not given; of the commands the job API's address |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` | as for Ray: the token for its job API |
| `RAY_JOB_HEADERS` | as for `ray job`: HTTP headers of the commands' requests, a JSON object |
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, *(_overview_row(kind) for kind in SHARED)]
    parts += [_section(kind) for kind in (*SHARED, *BACKENDS)]
    return "".join([*parts, VARIABLES])


def _overview_row(kind: type[Any]) -> str:
    marks = ("yes" if issubclass(backend, kind) else "" for backend in BACKENDS)
    return f"| [`{kind.__name__}`](#{kind.__name__.lower()}) | {' | '.join(marks)} |\n"


def _section(kind: type[Any]) -> str:
    summary, meanings = _documented(kind)
    own = [field for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
    rows = (f"| `{field.name}` | {_default(field)} | {meanings[field.name]} |\n" for field in own)
    table = "\n| option | default | what it is |\n|---|---|---|\n" + "".join(rows) if own else ""
    others = f"\n{meanings['**options']}\n" if "**options" in meanings else ""
    return f"\n## {kind.__name__}\n\n{summary}\n{table}{others}"


def _documented(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """The text before the arguments, and what is said of each of them; both as Markdown, without breaks of lines."""
    text, _, arguments = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")
    entries = re.split(r"^    (?=[\w*]+: )", arguments, flags=re.MULTILINE)[1:]
    meanings = dict(entry.split(": ", 1) for entry in entries)
    summary = "\n\n".join(map(_markdown, text.strip().split("\n\n")))
    return summary, {name: _markdown(meaning) for name, meaning in meanings.items()}


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return ", ".join(f"`{item}`" for item in value) if isinstance(value, tuple) and value else f"`{value!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
