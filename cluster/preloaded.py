"""The last import of a fork server: the user's modules, and the end of what kfpytorch_ray.cluster.uncollected began.

The names come by the environment, because that is all that a fork server is given; what came of them is read in its
forks.
"""

from __future__ import annotations

import gc
import json
import os
import sys

from kfpytorch_ray.cluster.environment import PRELOAD_VARIABLE
from kfpytorch_ray.cluster.preloading import preload
from kfpytorch_ray.cluster.worker import search_path


def _preload_what_is_asked() -> tuple[dict[str, str], dict[str, str]]:
    asked = json.loads(os.environ.pop(PRELOAD_VARIABLE, "{}"))
    own = [*sys.path]
    sys.path[:] = search_path(own, asked.get("sys_path", ()))
    try:
        return preload(tuple(asked.get("modules", ())))
    finally:
        sys.path[:] = own


MISSING, REFUSED = _preload_what_is_asked()

# What is imported stays, in every fork: a collection that looked through it would take a quarter of a second each time,
# and copy its pages.
gc.freeze()
gc.enable()
