"""Results on their way: worker -> file in shared memory -> object store -> driver.

A result is pickled with protocol 5: small parts go into one byte string, arrays and tensors stay beside it as raw
buffers, so that each hop copies them once at most. Tensors from any device arrive on the CPU; tensors that share
storage still share it. The driver gets buffers of its own, so that values can be written to.

File layout: magic, number of parts, then for each part its offset and size; the pickle is part 0, buffers follow.
"""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch

_MAGIC = b"KFRSPOOL"
_HEAD = struct.Struct("<8sQ")
_PART = struct.Struct("<QQ")
_ALIGNMENT = 64
_SPARE_SHARE = 0.9
"""Part of a folder's free space that a result may take: object store and data loaders live there as well."""

Spooled = npt.NDArray[np.uint8]
"""A result file as one array; maps memory instead of copying where it can."""


def spool(value: object, directories: tuple[str, ...], name: str) -> Path:
    """Write ``value`` into the first of ``directories`` that has room for it, the last one in any case.

    Raises:
        Exception: Whatever pickling raises.
        OSError: The last folder is full.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]

    offset = _aligned(_HEAD.size + _PART.size * len(parts))
    table = []
    for part in parts:
        table.append((offset, part.nbytes))
        offset = _aligned(offset + part.nbytes)

    path = _directory_with_room(directories, offset) / name
    with path.open("wb") as file:
        file.write(_HEAD.pack(_MAGIC, len(parts)))
        for entry in table:
            file.write(_PART.pack(*entry))
        for (start, _), part in zip(table, parts, strict=True):
            file.seek(start)
            file.write(part)
    return path


def map_spooled(path: Path) -> Spooled:
    """Map a result file; the file may be removed at once, the memory lives as long as the array."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def unspool(spooled: Spooled) -> Any:
    """Rebuild a value; its arrays and tensors get memory of their own."""
    payload, *buffers = _parts(memoryview(spooled))
    return pickle.loads(payload, buffers=[bytearray(buffer) for buffer in buffers])


def _parts(view: memoryview) -> Iterator[memoryview]:
    magic, count = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        msg = f"not a spooled result: it starts with {magic!r}"
        raise ValueError(msg)
    for index in range(count):
        start, size = _PART.unpack_from(view, _HEAD.size + index * _PART.size)
        yield view[start : start + size]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _directory_with_room(directories: tuple[str, ...], size_bytes: int) -> Path:
    for directory in directories[:-1]:
        if os.path.isdir(directory) and shutil.disk_usage(directory).free * _SPARE_SHARE > size_bytes:
            return Path(directory)
    return Path(directories[-1])


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    """cloudpickle with torch storages out of band; torch's own way copies each storage through a zip in memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            untyped = obj._untyped_storage
            # Two tensors on one storage come with two wrappers: the memo must see one object.
            key = (untyped.device, untyped.data_ptr(), untyped.nbytes())
            return _rebuild_typed_storage, (self._storages.setdefault(key, untyped), obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            if obj.nbytes() == 0:
                return torch.UntypedStorage, (0,)
            on_cpu = torch.empty(0, dtype=torch.uint8).set_(obj.cpu())  # type: ignore[call-overload]
            return _rebuild_untyped_storage, (pickle.PickleBuffer(on_cpu.numpy()),)
        return super().reducer_override(obj)


def _rebuild_untyped_storage(buffer: bytearray) -> torch.UntypedStorage:
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _rebuild_typed_storage(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
