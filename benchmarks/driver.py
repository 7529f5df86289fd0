"""A contender's driver process: reads one request a line, does it, answers in one line."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def serve(scenarios: Mapping[str, Callable[..., Any]]) -> None:
    """Do what standard input asks for until it ends. Whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"value": sorted(scenarios)}), file=answers)
    for request in sys.stdin:
        asked = json.loads(request)
        try:
            answer = {"value": scenarios[asked["scenario"]](**asked["arguments"])}
        except Exception as error:  # noqa: BLE001 - a contender that fails has no figure, and says why
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers)
