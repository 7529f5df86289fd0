"""What a worker made by fork inherits, it must not destroy.

It has none of its parent's threads, but the objects that belong to them: those of Ray, gRPC or torch. A garbage
collection that happens to find such an object unreachable in the worker calls a destructor that expects its threads,
and the worker dies of SIGSEGV at any line of its own. CPython's documentation of ``gc.freeze`` describes the remedy.
Used where start_method is "fork": by kfpytorch_ray.cluster.torch_elastic.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextvars import ContextVar

_keeps: ContextVar[bool] = ContextVar("keeps", default=False)


@contextlib.contextmanager
def inheritance_kept() -> Iterator[None]:
    """Processes that this thread forks meanwhile never collect what was there before them."""
    token = _keeps.set(True)
    try:
        yield
    finally:
        _keeps.reset(token)


def _begin_in_child() -> None:
    if _keeps.get():
        gc.freeze()


os.register_at_fork(after_in_child=_begin_in_child)
