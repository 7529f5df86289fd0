"""Values on their way from a worker to the driver: parts, the result file, and back."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kfpytorch_ray.cluster.pickling import dump_parts, load_parts
from kfpytorch_ray.cluster.spool import map_spooled, parts_of, spool

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=200)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=10,
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
arrays = st.one_of(hnp.scalar_dtypes(), hnp.array_dtypes(max_size=2)).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
layouts: st.SearchStrategy[Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = st.sampled_from(
    [
        lambda array: array,
        lambda array: array.T,
        lambda array: array[..., ::-1] if array.ndim else array,
        lambda array: array[..., ::2] if array.ndim else array,
        lambda array: array[1:] if array.ndim else array,
        np.asfortranarray,
    ]
)

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.arange(6.0).reshape(2, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "strided": lambda: torch.arange(10)[1::3],
    "expanded": lambda: torch.ones(1).expand(5),
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(7),
    "empty": lambda: torch.empty(0, 3, dtype=torch.int32),
    "bool": lambda: torch.tensor([True, False, True]),
    "bfloat16": lambda: torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "float16": lambda: torch.tensor([1.5, -2.0], dtype=torch.float16),
    "float64": lambda: torch.tensor([1.5, -2.0], dtype=torch.float64),
    "uint8": lambda: torch.tensor([0, 255], dtype=torch.uint8),
    "complex": lambda: torch.tensor([1 + 2j, -3j]),
    "conjugated": lambda: torch.tensor([1 + 2j, -3j]).conj(),
    "shared memory": lambda: torch.arange(3).share_memory_(),
    "from a read-only array": lambda: torch.as_tensor(np.arange(3)),
}


def through_parts(value: Any) -> Any:
    return load_parts(dump_parts(value))


def through_file(value: Any, folder: Path) -> Any:
    """The whole way; the file is gone before anything is read, as the agent removes it."""
    path = spool(dump_parts(value), [str(folder)], "result")
    spooled = map_spooled(path)
    path.unlink()
    return load_parts(parts_of(spooled))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for result files."""
    return tmp_path_factory.mktemp("spool")


@settings(deadline=None, max_examples=60)
@given(value=values)
def test_nested_values_come_back_equal(folder: Path, value: Any) -> None:
    """Lists, tuples, dicts and sets of plain values make the whole way."""
    again = through_file(value, folder)
    assert again == value
    assert type(again) is type(value)


@settings(deadline=None, max_examples=60)
@given(array=arrays, layout=layouts)
def test_arrays_of_every_dtype_and_layout_come_back(
    folder: Path, array: npt.NDArray[Any], layout: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    """Bits, dtype and shape are those of numpy's own pickle; a write to the copy does not touch the source."""
    source = layout(array)
    before = source.tobytes()
    # numpy keeps byte order with protocol 5 only, and that of dates not even there.
    expected = pickle.loads(pickle.dumps(source, protocol=5))
    again = through_file({"array": [source]}, folder)["array"][0]
    assert again.dtype == expected.dtype
    assert again.shape == expected.shape
    assert again.tobytes() == expected.tobytes()
    again[...] = np.zeros((), again.dtype)
    assert source.tobytes() == before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_parts_of_any_size_are_told_apart(tmp_path: Path, count: int) -> None:
    """Parts come back byte by byte in their order, empty ones too, and none at all is a result as well."""
    parts = [memoryview(bytes([index]) * size) for index, size in enumerate((65, 0, 1))][:count]
    again = parts_of(map_spooled(spool(parts, [str(tmp_path)], "result")))
    assert [bytes(part) for part in again] == [bytes(part) for part in parts]


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_tensors_come_back(folder: Path, make: Callable[[], torch.Tensor]) -> None:
    """Values, dtype, shape and strides are kept; the copy can be written to, and the source is not touched by it."""
    source = make()
    before = source.clone()
    again = through_file([source], folder)[0]
    assert torch.equal(again, source)
    assert (again.dtype, again.shape, again.stride()) == (source.dtype, source.shape, source.stride())
    assert (again.is_conj(), again.requires_grad, again.device) == (source.is_conj(), False, torch.device("cpu"))
    again.zero_()
    assert not again.any()
    assert torch.equal(source, before)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_come_back(folder: Path, layout: torch.layout) -> None:
    """Sparse stays sparse, in its layout."""
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    again = through_file(dense.to_sparse(layout=layout), folder)
    assert again.layout is layout
    assert torch.equal(again.to_dense(), dense)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters_come_back(folder: Path, requires_grad: bool) -> None:
    """A parameter is one again, and still wants its gradient or not."""
    source = torch.nn.Parameter(torch.ones(3), requires_grad=requires_grad)
    again = through_file(source, folder)
    assert type(again) is torch.nn.Parameter
    assert again.requires_grad is requires_grad
    assert torch.equal(again, source)
    assert through_file(torch.ones(2, requires_grad=True), folder).requires_grad


def test_modules_come_back_and_train_on(folder: Path) -> None:
    """Weights, buffers and mode are kept, the outputs are the same, and a step can follow."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).eval()
    again = through_file(model, folder)
    batch = torch.rand(5, 3)
    assert not again.training
    assert torch.equal(again(batch), model(batch))
    before = model[0].weight.clone()
    again(batch).sum().backward()
    with torch.no_grad():
        again[0].weight -= again[0].weight.grad + 1.0
    assert not torch.equal(again[0].weight, before)
    assert torch.equal(model[0].weight, before)


def test_state_dicts_come_back(folder: Path) -> None:
    """What most training functions return makes the whole way, in its order."""
    model = torch.nn.Linear(2, 2)
    again = through_file({"model": model.state_dict(), "epoch": 3}, folder)
    assert list(again["model"]) == ["weight", "bias"]
    assert torch.equal(again["model"]["weight"], model.weight)
    assert torch.nn.Linear(2, 2).load_state_dict(again["model"]).missing_keys == []
    assert again["epoch"] == 3


def test_tensors_that_share_storage_still_share_it(folder: Path) -> None:
    """A row, a view of another dtype and tied weights see a write to the whole, and each byte is sent once."""
    whole = torch.zeros(256, 256)
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    value = {"whole": whole, "row": whole[3], "bits": whole.view(torch.int32), "again": whole, "tied": tied}
    assert sum(part.nbytes for part in dump_parts(value)) < 1.5 * whole.nbytes
    again = through_file(value, folder)
    again["whole"][3, 0] = 1.0
    assert again["row"][0] == 1.0
    assert again["bits"][3, 0] == 0x3F800000
    assert again["again"] is again["whole"]
    assert again["tied"][0].weight is again["tied"][1].weight
    assert whole[3, 0] == 0.0


def test_tensors_that_share_nothing_do_not_share_afterwards(folder: Path) -> None:
    """Equal content is not the same storage."""
    one, other = through_file((torch.zeros(4), torch.zeros(4)), folder)
    one.fill_(1.0)
    assert not other.any()


class MadeWhilePickled:
    """Its state is a tensor that exists only while it is pickled, as in classes with ``__getstate__``."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return {"number": self.number, "tensor": torch.full((1024,), self.number)}


def test_storages_that_begin_at_one_address_come_back(folder: Path) -> None:
    """torch has a storage for each array that it is given, also for views of one; the first may be the shorter."""
    whole = np.arange(100.0)
    value = {"head": torch.from_numpy(whole[:10]), "all": torch.from_numpy(whole)}
    back = through_file(value, folder)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {"head": [*range(10)], "all": [*range(100)]}


def test_tensors_that_are_made_while_pickling_are_not_mixed_up(folder: Path) -> None:
    """Memory that is free again and used for the next tensor does not count as shared with the last one."""
    again = through_file([MadeWhilePickled(number) for number in range(50)], folder)
    assert [vars(item)["tensor"].unique().tolist() for item in again] == [[number] for number in range(50)]


def test_large_memory_is_not_copied_into_the_pickle() -> None:
    """Parts share the memory of arrays and tensors, so that a result is copied once on its way to the file."""
    array, tensor = np.zeros(100_000), torch.zeros(100_000)
    pickled, *buffers = dump_parts([array, tensor])
    assert pickled.nbytes < 10_000
    assert np.shares_memory(np.frombuffer(buffers[0]), array)
    assert np.shares_memory(np.frombuffer(buffers[1], np.float32), tensor.numpy())


def test_large_memory_comes_back_in_the_order_of_its_bytes(folder: Path) -> None:
    """Several threads copy it piece by piece; the last piece is shorter."""
    value = np.frombuffer(np.random.default_rng(0).bytes(35 * 2**20 + 3), dtype=np.uint8)
    assert np.array_equal(through_file(value, folder), value)


def test_functions_and_classes_come_back_by_value() -> None:
    """What plain pickle refuses travels, as in the payload."""
    factor = 5
    assert through_parts(lambda value: value * factor)(2) == 10


def test_what_cannot_be_pickled_raises() -> None:
    """The worker hears of it and says what it was."""
    with pytest.raises(TypeError, match="generator"):
        dump_parts(value for value in range(3))


def test_the_first_folder_with_room_is_taken(tmp_path: Path) -> None:
    """Shared memory comes first in the list, and is used if it is there."""
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
    folders = [str(tmp_path / name) for name in ("missing", "first", "last")]
    assert spool(dump_parts([1]), folders, "0-1") == tmp_path / "first" / "0-1"
    assert list((tmp_path / "last").iterdir()) == []


def test_a_folder_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    """A node without shared memory uses the last folder."""
    path = spool(dump_parts([1]), [str(tmp_path / "missing"), str(tmp_path)], "0-1")
    assert path == tmp_path / "0-1"
    assert load_parts(parts_of(map_spooled(path))) == [1]


def in_small_folder(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where ``folder`` is a file system of 1 MiB, which nobody else sees and which ends with it."""
    command = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    # Without privileges, a user namespace gives the right to mount in a namespace of one's own.
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a small file system")
    probe = ["sh", "-c", f"mount -t tmpfs -o size=1m tmpfs {folder}"]
    if subprocess.run([*unshare, *probe], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    return subprocess.run(
        [*unshare, "sh", "-c", command, "sh", str(folder), sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_folder_without_room_is_passed_over(tmp_path: Path) -> None:
    """What fits goes into the first folder, what would fill it into the last."""
    small, last = tmp_path / "small", tmp_path / "last"
    small.mkdir()
    last.mkdir()
    code = (
        "import sys; from kfpytorch_ray.cluster.spool import spool; "
        f"folders = [sys.argv[1], {str(last)!r}]; "
        'print(spool([memoryview(bytes(2**19))], folders, "a")); '
        'print(spool([memoryview(bytes(2**19))], folders, "b")); '
        'print(spool([memoryview(bytes(2**17))], folders, "c"))'
    )
    done = in_small_folder(small, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(small / "a"), str(last / "b"), str(small / "c")]


def test_a_full_last_folder_is_an_error(tmp_path: Path) -> None:
    """There is nowhere else to go, and the worker says so."""
    code = (
        "import sys; from kfpytorch_ray.cluster.spool import spool; "
        'spool([memoryview(bytes(2**21))], ["/no/such/folder", sys.argv[1]], "a")'
    )
    done = in_small_folder(tmp_path, code)
    assert done.returncode != 0
    assert "OSError: [Errno 28] No space left on device" in done.stderr


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    """A file that something else wrote is not unpickled."""
    path = tmp_path / "other"
    path.write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(ValueError, match="not a spooled result"):
        parts_of(map_spooled(path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """A worker that died before its first byte left no result."""
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        map_spooled(tmp_path / "empty")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_dtypes_that_torch_itself_cannot_unpickle_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Values, dtype, layout and shared storage of the newer dtypes."""
    base = torch.arange(6).reshape(2, 3).to(dtype)
    again, row = through_file([base, base[1]], tmp_path)
    assert again.dtype == dtype
    assert again.view(torch.uint8).tolist() == base.view(torch.uint8).tolist()
    row.view(torch.uint8).zero_()
    assert again[1].view(torch.uint8).sum() == 0


class Tagged(torch.Tensor):
    """A user's own."""

    tag: str


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.uint16])
@pytest.mark.parametrize("kind", [torch.Tensor, Tagged])
def test_tensors_keep_class_and_attributes_whatever_their_dtype(
    tmp_path: Path, kind: type[torch.Tensor], dtype: torch.dtype
) -> None:
    """Newer dtypes are pickled by us, and others by torch: no difference is seen."""
    given: Any = torch.arange(4).to(dtype).as_subclass(kind)
    given.tag = "validation"
    again, same = through_file([given, given], tmp_path)
    assert (type(again), again.dtype, again.tag) == (kind, dtype, "validation")
    assert again is same


def test_a_default_device_of_the_users_changes_nothing(tmp_path: Path) -> None:
    """A function that called torch.set_default_device returns tensors as any other."""
    with torch.device("meta"):
        (again,) = through_file([torch.ones(2, device="cpu")], tmp_path)
    assert again.tolist() == [1, 1]


def test_unrelated_empty_tensors_stay_unrelated(tmp_path: Path) -> None:
    """Only memory that was shared is shared afterwards."""
    one, other = through_file([torch.empty(0), torch.empty(0)], tmp_path)
    one.resize_(2).fill_(1)
    other.resize_(2).fill_(2)
    assert one.tolist() == [1, 1]


@pytest.mark.parametrize("size", [0, 9, 40, 90])
def test_a_part_of_a_result_is_refused(tmp_path: Path, size: int) -> None:
    """A file that was cut is an error, not a shorter value."""
    path = spool([memoryview(bytes(64)), memoryview(bytes(64))], [str(tmp_path)], "result")
    with pytest.raises(ValueError, match="spooled result"):
        parts_of(np.frombuffer(path.read_bytes()[:size], dtype=np.uint8))
