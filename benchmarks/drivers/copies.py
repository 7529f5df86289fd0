"""What the machine's memory allows: the hops of a result as plain copies, without a launcher."""

from __future__ import annotations

import mmap
import os
import secrets
import time

import numpy as np

from benchmarks.driver import serve
from benchmarks.trainings import STATE_BYTES

_MEMORY = "/dev/shm"  # noqa: S108 - files of random names, removed at once


def state_dict(folder: str) -> dict[str, float]:
    """Seconds for as many bytes from a process's memory to a file of shared memory, to another one, and back."""
    del folder
    value = np.ones(STATE_BYTES, dtype=np.uint8)
    began = time.perf_counter()
    arrived = np.array(_in_shared_memory(_in_shared_memory(value)))
    seconds = time.perf_counter() - began
    assert arrived.nbytes == STATE_BYTES
    return {"seconds": seconds}


def _in_shared_memory(value: np.typing.NDArray[np.uint8]) -> np.typing.NDArray[np.uint8]:
    path = os.path.join(_MEMORY, f"kfpytorch-ray-bench-{secrets.token_hex(8)}")
    with open(path, "x+b") as file:
        os.unlink(path)
        file.write(value.data)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


if __name__ == "__main__":
    serve({"state_dict": state_dict})
