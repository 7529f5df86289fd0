"""Values to parts and back: one pickle, and beside it the raw memory of arrays and tensors.

Protocol 5 keeps large memory out of the pickle, so that each hop copies it once at most. Tensors from any device arrive
on the CPU; tensors that share storage still share it. What is rebuilt has memory of its own and can be written to.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import cloudpickle
import numpy as np
import torch

from kfpytorch_ray.cluster.spool import Spooled, parts_of
from kfpytorch_ray.errors import ResultError, explain, text_of
from kfpytorch_ray.payload import blame_result
from kfpytorch_ray.results import ElasticWorkerResult

_UNTYPED_DTYPES = torch.storage._new_dtypes()
"""float8 and unsigned integers: torch pickles them with a bare storage, which its own unpickling does not take."""
_CHUNK_BYTES = 16 * 2**20
_COPYING_THREADS = 4
"""As many fill the memory of a machine; more only wait for it."""
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dump_parts(value: object) -> list[memoryview]:
    """Pickle a value: part 0 is the pickle, the others are its buffers. They share the value's memory.

    Raises:
        Exception: Whatever pickling raises.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def dump_result_parts(result: ElasticWorkerResult) -> list[memoryview]:
    """The parts of what a rank brings home.

    Raises:
        ResultError: It cannot be pickled; says what of it.
    """
    try:
        return dump_parts(result)
    except Exception as error:  # noqa: BLE001 - objects of the user's may fail to pickle in any way
        raise ResultError(blame_result(result, int(os.environ["RANK"]), error)) from None


def load_parts(parts: Sequence[memoryview]) -> Any:
    """Rebuild a value from its parts: those that may be written to become its memory, others are copied."""
    payload, *buffers = parts
    return pickle.loads(payload, buffers=[_copied(buffer) if buffer.readonly else buffer for buffer in buffers])


def _copied(buffer: memoryview) -> memoryview:
    """Memory of its own with the same bytes."""
    # Not a bytearray: numpy asks the kernel for huge pages and lets go of the interpreter while it copies, which
    # together is four times as fast on two cores.
    source = np.frombuffer(buffer, dtype=np.uint8)
    own = np.empty_like(source)
    chunks = [slice(start, start + _CHUNK_BYTES) for start in range(0, source.size, _CHUNK_BYTES)]
    with ThreadPoolExecutor(_COPYING_THREADS) as pool:
        for copied in [pool.submit(np.copyto, own[chunk], source[chunk]) for chunk in chunks]:
            copied.result()
    view: memoryview = own.data
    return view


def rebuilt_result(spooled: Spooled, rank: int) -> ElasticWorkerResult:
    """A rank's result from its spooled form.

    Raises:
        ResultError: It cannot be unpickled in this process.
    """
    try:
        result: ElasticWorkerResult = load_parts(parts_of(spooled))
    except Exception as error:
        raise ResultError(
            explain(
                f"The result of rank {rank} cannot be rebuilt here.",
                text_of(error),
                "Return values whose classes can be imported in the driver as well, such as a state dict.",
            )
        ) from error
    return result


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # its base differs by Python implementation
    """cloudpickle with torch storages out of band; torch's own way copies each storage through a zip in memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and _pickles_as_torch_does(type(obj)) and obj.dtype in _UNTYPED_DTYPES:
            bits = obj.detach().as_subclass(torch.Tensor).view(_SAME_SIZE[obj.dtype.itemsize])
            return _rebuild_as, (bits, obj.dtype, type(obj), vars(obj))
        if isinstance(obj, torch.storage.TypedStorage):
            untyped = obj._untyped_storage
            # Two tensors on one storage come with two wrappers: the memo must see one object. Two storages may begin at
            # one address, as those of numpy's views.
            if size := untyped.nbytes():
                untyped = self._storages.setdefault((untyped.device, untyped.data_ptr(), size), untyped)
            return _rebuild_typed_storage, (untyped, obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            if obj.nbytes() == 0:
                return torch.UntypedStorage, (0,)
            on_cpu = torch.empty(0, dtype=torch.uint8, device="cpu").set_(obj.cpu())
            return _rebuild_untyped_storage, (pickle.PickleBuffer(on_cpu.numpy().data),)
        return super().reducer_override(obj)


def _rebuild_untyped_storage(buffer: bytearray | memoryview) -> torch.UntypedStorage:
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _rebuild_typed_storage(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _pickles_as_torch_does(kind: type[torch.Tensor]) -> bool:
    """Not so a Parameter, or a subclass that has no memory of its own: they say how, of tensors within them."""
    default = torch.Tensor
    return kind.__reduce_ex__ is default.__reduce_ex__ and kind.__torch_dispatch__ is default.__torch_dispatch__


def _rebuild_as(
    bits: torch.Tensor, dtype: torch.dtype, kind: type[torch.Tensor], attributes: dict[str, Any]
) -> torch.Tensor:
    rebuilt = bits.view(dtype).as_subclass(kind)
    vars(rebuilt).update(attributes)
    return rebuilt
