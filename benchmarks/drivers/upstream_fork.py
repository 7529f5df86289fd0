"""Upstream's plugin by fork, in a process that has started nothing else: its workers inherit all that is there.

In one that had started workers by spawn before, forked ones were seen to hang.
"""

from __future__ import annotations

from functools import partial

from benchmarks.driver import serve
from benchmarks.drivers.upstream import start, state_dict

if __name__ == "__main__":
    serve({"start": partial(start, start_method="fork"), "state_dict": partial(state_dict, start_method="fork")})
