"""Calibration data: every kind of source, what is refused, and that passes over it repeat exactly."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress import data_text
from compress.data import Batch, CalibrationData, describe_missing, load_calibration
from compress.errors import CalibrationError
from compress.inputs import InputSpec, parse_input_specs


def specs(*texts: str) -> tuple[InputSpec, ...]:
    return parse_input_specs(texts)


X = specs("x:float32[1,3,4]")
IDS = specs("ids:int64[1,seq=6]")
PAIR = specs("ids:int64[1,seq=6]", "mask:int64[1,seq=6]")


def floats(count: int = 7) -> np.ndarray[Any, Any]:
    return np.arange(count * 12, dtype=np.float32).reshape(count, 3, 4)


def whole(data: CalibrationData, index: int = 0) -> torch.Tensor:
    return torch.cat([batch.inputs[index] for batch in data])


def assert_repeats(data: CalibrationData) -> None:
    first, second = list(data), list(data)
    assert len(first) == len(second) == len(data)
    assert sum(batch.inputs[0].shape[0] for batch in first) == data.num_samples
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert (one.labels is None) == (other.labels is None)
        assert one.labels is None or other.labels is None or torch.equal(one.labels, other.labels)


# -- arrays ----------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray[Any, Any]]], None]] = {
    "stored.npz": lambda path, arrays: np.savez(path, **arrays),  # type: ignore[arg-type]
    "packed.npz": lambda path, arrays: np.savez_compressed(path, **arrays),  # type: ignore[arg-type]
    "data.safetensors": lambda path, arrays: save_file(
        {name: torch.from_numpy(array) for name, array in arrays.items()}, str(path)
    ),
}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_arrays_by_name_with_labels(name: str, tmp_path: Path) -> None:
    rows = np.arange(42).reshape(7, 6)
    path = tmp_path / name
    WRITERS[name](path, {"mask": rows % 2, "labels": np.arange(7), "ids": rows, "extra": np.zeros(3)})
    data = load_calibration(path, inputs=PAIR, batch_size=3)
    assert [batch.inputs[0].shape[0] for batch in data] == [3, 3, 1]
    assert torch.equal(whole(data), torch.from_numpy(rows)) and torch.equal(whole(data, 1), whole(data) % 2)
    assert [batch.labels.tolist() for batch in data if batch.labels is not None] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    assert data.description == f"7 samples from {name} (not used: extra)"
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_repeats(data)


@pytest.mark.parametrize("name", [*sorted(WRITERS), "one.npy"])
def test_a_seeded_choice_in_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "one.npy":
        np.save(path, floats(50))
    else:
        WRITERS[name](path, {"whatever": floats(50)})
    data = load_calibration(str(path), inputs=X, samples=10, batch_size=4, seed=3)
    rows = (whole(data)[:, 0, 0] / 12).to(torch.int64).tolist()
    assert len(set(rows)) == 10 and rows == sorted(rows) and rows != list(range(10))
    assert torch.equal(whole(data), torch.from_numpy(floats(50)[rows]))
    assert data.description == f"10 samples from {name}" and len(data) == 3
    assert_repeats(data)
    again = load_calibration(path, inputs=X, samples=10, batch_size=4, seed=3)
    other = load_calibration(path, inputs=X, samples=10, batch_size=4, seed=4)
    assert torch.equal(whole(data), whole(again)) and not torch.equal(whole(data), whole(other))


def test_kinds_are_found_by_content(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    with path.open("wb") as stream:
        np.savez(stream, x=floats())
    assert load_calibration(path, inputs=X).num_samples == 7


def test_npy_is_mapped_and_read_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", floats(20))
    modes = []
    real = np.load

    def spy(*args: Any, **options: Any) -> Any:
        modes.append((options["mmap_mode"], options["allow_pickle"]))
        return real(*args, **options)

    monkeypatch.setattr(np, "load", spy)
    data = load_calibration(tmp_path / "x.npy", inputs=X, batch_size=4)
    assert modes == [("r", False)]
    batch = next(iter(data))
    assert batch.inputs[0].untyped_storage().nbytes() == 4 * 12 * 4
    batch.inputs[0].zero_()  # memory of its own: neither the file nor the next pass changes
    assert torch.equal(whole(data), torch.from_numpy(floats(20)))


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_fortran_order_and_foreign_bytes(compressed: bool, tmp_path: Path) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "d.npz", a=np.asfortranarray(floats().astype(">f8")), y=np.arange(7, dtype=np.uint16))
    data = load_calibration(tmp_path / "d.npz", inputs=X, batch_size=3)
    assert torch.equal(whole(data), torch.from_numpy(floats()))
    assert next(iter(data)).labels is not None


CONVERSIONS = [
    ("x:float32[1,2]", np.array([[0.5, 1.0]], np.float64)),
    ("x:float16[1,2]", np.array([[0.5, 1.0]], np.float32)),
    ("x:bfloat16[1,2]", np.array([[0.5, 1.0]], np.float16)),
    ("x:int64[1,2]", np.array([[5, 1]], np.int32)),
    ("x:int32[1,2]", np.array([[5, 1]], np.int64)),
    ("x:int64[1,2]", np.array([[5, 1]], np.uint8)),
    ("x:int64[1,2]", np.array([[5, 1]], np.uint64)),
    ("x:int64[1,2]", np.array([[True, False]])),
    ("x:int8[1,2]", np.array([[-5, 1]], np.int64)),
    ("x:bool[1,2]", np.array([[0, 1]], np.int64)),
]


@pytest.mark.parametrize(("spec", "array"), CONVERSIONS)
def test_safe_conversions(spec: str, array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    for source in (tmp_path / "x.npy", [array], [array[0]], {"x": array}):
        (batch,) = load_calibration(source, inputs=specs(spec))
        assert batch.inputs[0].dtype == specs(spec)[0].dtype
        assert batch.inputs[0].tolist() == array.astype(float).tolist()


BAD_ARRAYS = [
    ("x:float32[1,2]", np.zeros((3, 2), np.uint8), "is uint8", "preprocessed floats"),
    ("x:float32[1,2]", np.zeros((3, 2), bool), "is bool", "float32 of shape"),
    ("x:int64[1,2]", np.zeros((3, 2), np.float32), "is float32", "not rounded"),
    ("x:float32[1,2]", np.zeros((3, 4), np.float32), "shape [3, 4]", "[batch, 2]"),
    ("x:float32[1,2]", np.zeros((3,), np.float32), "shape [3]", "[batch, 2]"),
    ("x:float32[1,2]", np.zeros((3, 2, 1), np.float32), "shape [3, 2, 1]", "[batch, 2]"),
    ("x:float32[1,2]", np.zeros((0, 2), np.float32), "no samples", "at least one"),
    ("x:float32[1,2]", np.float32(1.0), "shape []", "[batch, 2]"),
    ("x:float32[1,n=2]", np.zeros((3, 0), np.float32), "shape [3, 0]", "[batch, n]"),
    ("x:float32[1,2]", np.array([[1, 2], [3, np.nan]], np.float32), "holds nan", "finite"),
    ("x:float32[1,2]", np.array([[1, 2], [np.inf, 1]], np.float32), "holds inf", "finite"),
    ("x:float16[1,2]", np.array([[1, 2], [1, 1e6]], np.float32), "value 1000000.0", "fit float16"),
    ("x:int32[1,2]", np.array([[1, 2**40]], np.int64), "value 1099511627776", "int32"),
    ("x:int64[1,2]", np.array([[1, -2]], np.int64), "negative value -2", "0 or more"),
    ("x:bool[1,2]", np.array([[1, 2]], np.int64), "value 2", "0 to 1"),
    ("x:float32[1,2]", np.zeros((3, 2), np.complex64), "dtype complex64", "floats, integers"),
    ("x:float32[1,2]", np.array([["a", "b"]]), "dtype <U1", "floats, integers"),
    ("x:float32[1,2]", np.array([[None, 1]], object), "dtype object", "floats, integers"),
    ("x:float32[1,3,4,5]", np.zeros((2, 4, 5, 3), np.float32), "shape [2, 4, 5, 3]", "transpose(0, 3, 1, 2)"),
    ("x:float32[1,3,4,5]", np.zeros((3, 4, 5), np.float32), "shape [3, 4, 5]", "data[None]"),
]


@pytest.mark.parametrize("form", ["npy", "npz", "mapping", "iterable"])
@pytest.mark.parametrize(("spec", "array", "problem", "advice"), BAD_ARRAYS)
def test_bad_arrays(
    spec: str, array: np.ndarray[Any, Any], problem: str, advice: str, form: str, tmp_path: Path
) -> None:
    array = np.asarray(array)
    source: Any = tmp_path / f"x.{form}"
    if form == "npy":
        np.save(source, array)
    elif form == "npz":
        np.savez_compressed(source, x=array)
    elif form == "mapping":
        source = {"x": array}
    else:
        source = [array]
        if array.ndim != len(specs(spec)[0].shape) or 0 in array.shape:
            return  # an item of one axis less is a sample; the table of bad items has the rest
    with pytest.raises(CalibrationError) as caught:
        load_calibration(source, inputs=specs(spec))
    assert problem in str(caught.value) and advice in str(caught.value)


def test_errors_name_the_sample(tmp_path: Path) -> None:
    array = floats(40)
    array[37, 2, 1] = np.nan
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(CalibrationError, match="sample 37 holds nan"):
        load_calibration(tmp_path / "x.npy", inputs=X)


def test_names_that_do_not_match_are_listed_with_near_misses() -> None:
    rows = np.zeros((4, 6), np.int64)
    with pytest.raises(CalibrationError) as caught:
        load_calibration({"idz": rows, "attention": rows}, inputs=PAIR)
    for part in ("'idz'", "'attention'", "'ids', 'mask'", "'idz' may be meant as 'ids'", "rename"):
        assert part in str(caught.value)
    two = specs("int64[1,6]", "int64[1,6]")
    with pytest.raises(CalibrationError, match="no names"):
        load_calibration({"a": rows, "b": rows}, inputs=two)
    data = load_calibration({"arr_1": rows + 1, "arr_0": rows, "y": rows[:, 0]}, inputs=two)
    assert int(whole(data, 1).min()) == 1 and next(iter(data)).labels is not None


def test_names_of_labels_may_be_inputs_and_single_arrays_may_have_any_name() -> None:
    rows = np.zeros((4, 6), np.int64)
    (batch,) = load_calibration({"y": rows}, inputs=IDS)
    assert batch.labels is None
    (batch,) = load_calibration(
        {"label": rows, "ids": rows}, inputs=specs("ids:int64[1,6]", "label:int64[1,6]")
    )
    assert batch.labels is None and len(batch.inputs) == 2


def test_lengths_and_shared_sizes_must_agree() -> None:
    with pytest.raises(CalibrationError, match="'ids' has 4, 'mask' has 5"):
        load_calibration({"ids": np.zeros((4, 6), int), "mask": np.zeros((5, 6), int)}, inputs=PAIR)
    with pytest.raises(CalibrationError, match="'ids' has 4, 'labels' has 3"):
        load_calibration({"ids": np.zeros((4, 6), int), "labels": np.zeros(3)}, inputs=IDS)
    with pytest.raises(CalibrationError, match="seq is 6 at axis 1 of input 'ids', but 7"):
        load_calibration({"ids": np.zeros((4, 6), int), "mask": np.zeros((4, 7), int)}, inputs=PAIR)


def test_a_fixed_batch_decides_the_batch_size() -> None:
    fixed = specs("x:float32[!3,3,4]")
    for source in (floats(8), list(floats(8)), {"x": floats(8)}):
        data = load_calibration(source, inputs=fixed)
        assert [batch.inputs[0].shape[0] for batch in data] == [3, 3] and data.num_samples == 6
        assert_repeats(data)
    for source in (floats(2), list(floats(2))):
        with pytest.raises(CalibrationError, match="gives 2 samples"):
            load_calibration(source, inputs=fixed)
    with pytest.raises(CalibrationError, match=r"shape \[2, 3, 4\]"):
        load_calibration([floats(2)], inputs=fixed)
    with pytest.raises(CalibrationError, match="different sizes"):
        load_calibration(
            {"a": floats(), "b": floats()}, inputs=specs("a:float32[!1,3,4]", "b:float32[!2,3,4]")
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 25), st.integers(0, 3), st.booleans())
def test_batches_cover_the_choice(count: int, size: int, samples: int, seed: int, tensor: bool) -> None:
    source = torch.from_numpy(floats(count)) if tensor else floats(count)
    data = load_calibration(source, inputs=X, samples=samples, batch_size=size, seed=seed)
    sizes = [batch.inputs[0].shape[0] for batch in data]
    assert sum(sizes) == data.num_samples == min(count, samples)
    assert all(size == full for full in sizes[:-1]) and 1 <= sizes[-1] <= size
    numbers = whole(data)[:, 0, 0].tolist()
    assert numbers == sorted(set(numbers))


def test_memory_sources_are_copied_and_fingerprinted_by_value() -> None:
    array = floats()
    data = load_calibration({"x": array}, inputs=X)
    same = load_calibration(torch.from_numpy(array.copy()), inputs=X, batch_size=2)
    array[:] = 0
    assert torch.equal(whole(data), torch.from_numpy(floats()))
    assert data.sha256 == same.sha256 == load_calibration(list(floats()), inputs=X).sha256
    assert data.sha256 != load_calibration(array, inputs=X).sha256


# -- files that are nothing of the kind ------------------------------------------------------------


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_unreadable_files(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "t.pt")
    np.savez_compressed(tmp_path / "good.npz", x=np.random.default_rng(0).normal(size=(50, 3, 4)))
    packed = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "good.npy", floats())
    npy = (tmp_path / "good.npy").read_bytes()
    save_file({"x": torch.zeros(7, 3, 4)}, str(tmp_path / "good.safetensors"))
    safe = (tmp_path / "good.safetensors").read_bytes()
    spoiled = bytearray(packed)
    spoiled[len(packed) // 2] ^= 0xFF
    cases = [
        (write(tmp_path / "empty.npz", b""), "is empty"),
        (write(tmp_path / "p.pkl", pickle.dumps([1])), "pickle, which is never opened"),
        (tmp_path / "t.pt", "looks like torch.save's"),
        (write(tmp_path / "cut.npz", packed[:-30]), "cannot be read"),
        (write(tmp_path / "spoiled.npz", bytes(spoiled)), "cannot be read"),
        (write(tmp_path / "cut.npy", npy[:-5]), "cannot be read"),
        (write(tmp_path / "cut.safetensors", safe[:-5]), "cannot be read"),
        (write(tmp_path / "head.npy", npy[:20]), "cannot be read"),
        (write(tmp_path / "b.gz", gzip.compress(b"\x00\xff")), "gzip of something binary"),
        (write(tmp_path / "cut.gz", gzip.compress(b"text " * 999)[:-9]), "cannot be read"),
        (write(tmp_path / "noise", b"\x00\x01\xfe\xff" * 9), "none of the files"),
        (write(tmp_path / "f.py", b"x = 1\n"), "is a Python file"),
        (tmp_path / "good.npzz", "there is no calibration data at"),
    ]
    for path, message in cases:
        with pytest.raises(CalibrationError, match=message):
            load_calibration(path, inputs=X)
    with pytest.raises(CalibrationError, match=r"try:\s+.*good\.npz"):
        load_calibration(tmp_path / "good.npzz", inputs=X)


def test_object_arrays_matter_only_where_wanted(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", x=floats(), names=np.array([None, "a"], object))
    assert load_calibration(tmp_path / "o.npz", inputs=X).num_samples == 7
    with pytest.raises(CalibrationError, match="dtype object"):
        load_calibration(tmp_path / "o.npz", inputs=specs("names:int64[1,2]"))


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"normalize": ([0.0], [1.0])}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError):
        load_calibration(floats(), inputs=X, **options)


def test_inputs_without_a_batch_are_refused() -> None:
    with pytest.raises(CalibrationError, match="input 't' has no axes"):
        load_calibration(floats(), inputs=specs("t:float32[]"))
    with pytest.raises(CalibrationError, match="no inputs"):
        load_calibration(floats(), inputs=())


# -- Python iterables ------------------------------------------------------------------------------


def sample(value: float = 0.0) -> torch.Tensor:
    return torch.full((3, 4), value, dtype=torch.float32)


ITEMS: list[tuple[str, Sequence[Any], bool]] = [
    ("tensors", [sample(i) for i in range(7)], False),
    ("arrays", [sample(i).numpy() for i in range(7)], False),
    ("pairs", [(sample(i), i) for i in range(7)], True),
    ("lists", [[sample(i), torch.tensor(i)] for i in range(7)], True),
    ("mappings", [{"x": sample(i), "labels": np.int32(i)} for i in range(7)], True),
    ("batches", [Batch((sample(i)[None],), torch.tensor([i])) for i in range(7)], True),
]


@pytest.mark.parametrize(("name", "items", "labelled"), ITEMS, ids=[name for name, _, _ in ITEMS])
def test_items(name: str, items: Sequence[Any], labelled: bool) -> None:
    data = load_calibration((item for item in items), inputs=X, batch_size=3)
    assert data.num_samples == 7 and data.description == "7 samples from a Python generator"
    assert [len(batch.inputs[0]) for batch in data] == ([1] * 7 if name == "batches" else [3, 3, 1])
    assert whole(data)[:, 0, 0].tolist() == list(range(7))
    if labelled:
        labels = torch.cat([batch.labels for batch in data if batch.labels is not None])
        assert labels.tolist() == list(range(7)) and labels.dtype == torch.int64
    assert_repeats(data)
    for batch in data:
        batch.inputs[0].add_(1)
    assert whole(data)[:, 0, 0].tolist() == list(range(7))


def test_an_endless_iterable_is_read_only_as_far_as_needed() -> None:
    taken = []

    def forever() -> Iterator[torch.Tensor]:
        buffer = sample()
        while True:
            taken.append(1)
            yield buffer.add_(1)  # the same memory each time

    data = load_calibration(forever(), inputs=X, samples=5, batch_size=2)
    assert len(taken) == 5 and whole(data)[:, 0, 0].tolist() == [1, 2, 3, 4, 5]
    data = load_calibration(forever, inputs=X, samples=3)
    assert data.num_samples == 3


def test_batches_stay_as_they_are_and_lengths_may_differ() -> None:
    batches = [torch.zeros(4, 6, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int32)]
    data = load_calibration(batches, inputs=IDS, batch_size=3)
    assert [tuple(batch.inputs[0].shape) for batch in data] == [(4, 6), (2, 9)]
    data = load_calibration(batches, inputs=IDS, samples=5)
    assert [tuple(batch.inputs[0].shape) for batch in data] == [(4, 6), (1, 9)]
    rows = [torch.zeros(length, dtype=torch.int64) for length in (5, 5, 6, 5)]
    data = load_calibration(rows, inputs=IDS)
    assert [tuple(batch.inputs[0].shape) for batch in data] == [(2, 5), (1, 6), (1, 5)]


def test_a_torch_data_loader_and_data_set() -> None:
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(floats()), torch.arange(7))
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True)
    data = load_calibration(loader, inputs=X)
    assert len(data) == 3
    assert_repeats(data)
    assert load_calibration(dataset, inputs=X).num_samples == 7


def broken() -> Iterator[torch.Tensor]:
    yield sample()
    raise KeyError("nothing more")


BAD_ITEMS: list[tuple[Any, str, str]] = [
    ([], "gave no items", "at least one"),
    (["abc"], "item 0, input 'x' is a str", "torch tensor"),
    ([sample(), None], "item 1, input 'x' is a NoneType", "torch tensor"),
    ([1.0], "item 0, input 'x' is a float", "torch tensor"),
    ([(sample(), 1, 2)], "item 0 has 3 tensors", "1 (input 'x')"),
    ([()], "item 0 has 0 tensors", "1 (input 'x')"),
    ([sample()[:2]], "item 0, input 'x' has shape [1, 2, 4]", "[batch, 3, 4]"),
    ([sample()[0]], "item 0, input 'x' has shape [4]", "[batch, 3, 4]"),
    ([sample(), sample() / 0], "item 1, input 'x' holds nan", "finite"),
    ([sample().long()], "item 0, input 'x' is int64", "float32"),
    ([sample().to(torch.complex64)], "is a complex tensor", "dense"),
    ([sample().to_sparse()], "torch.sparse_coo", "dense"),
    ([sample().to("meta")], "is a meta tensor", "dense"),
    ([{"z": sample(), "w": sample()}], "item 0 holds 'z', 'w', but not 'x'", "'x'"),
    ([(sample()[None], torch.zeros(2))], "item 0, labels has shape [2]", "1 samples"),
    ([(sample(), 1), sample()], "item 1 has no labels", "every item or"),
    ([(sample(), "cat")], "labels is a str", "torch tensor"),
    ([(sample(), float("nan"))], "labels holds NaN", "finite"),
    (3, "int failed: TypeError", "iterable of items"),
    (broken(), "item 1 failed: KeyError: 'nothing more'", "iterable"),
    (lambda missing: missing, "function failed: TypeError", "without arguments"),
]


@pytest.mark.parametrize(("source", "problem", "expected"), BAD_ITEMS)
def test_bad_items(source: Any, problem: str, expected: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_calibration(source, inputs=X)
    assert problem in str(caught.value) and expected in str(caught.value)


def test_shared_sizes_are_checked_in_items() -> None:
    with pytest.raises(CalibrationError, match=r"item 0: seq is 6 .* but 7"):
        load_calibration([(np.zeros(6, int), np.ones(7, int))], inputs=PAIR)
    with pytest.raises(CalibrationError, match=r"item 0: batch is 2 .* but 3"):
        load_calibration([(np.zeros((2, 6), int), np.ones((3, 6), int))], inputs=PAIR)


def test_a_named_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve_callable(spec: str, what: str) -> Callable[[], Any]:
        asked.append((spec, what))
        return lambda: iter(list(floats()))

    loading = types.ModuleType("compress.loading")
    loading.resolve_callable = resolve_callable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.loading", loading)
    load_calibration(Path("mine:batches"), inputs=X)
    data = load_calibration("mine:batches", inputs=X)
    assert asked == [("mine:batches", "calibration data")] * 2
    assert data.description == "7 samples from mine:batches"


# -- images ----------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    colours = {
        "b/2.png": (255, 0, 0),
        "a.bmp": (0, 255, 0),
        "b/1.webp": (0, 0, 255),
        "c.JPG": (128, 128, 128),
    }
    for name, colour in colours.items():
        image.new("RGB", (20, 10), colour).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_are_sorted_scaled_and_normalised(images: Path) -> None:
    spec = specs("x:float32[1,3,8,12]")
    data = load_calibration(images, inputs=spec, batch_size=3)
    assert data.description == "4 samples from images" and [len(b.inputs[0]) for b in data] == [3, 1]
    values = whole(data)
    assert values.shape == (4, 3, 8, 12)
    assert values[:3, :, 4, 4].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # a.bmp, b/1.webp, b/2.png
    assert abs(float(values[3].mean()) - 128 / 255) < 0.01
    scaled = load_calibration(images, inputs=spec, normalize=((0.5, 0.5, 0.5), (0.25, 0.5, 1.0)))
    assert torch.allclose(whole(scaled)[0, :, 0, 0], torch.tensor([-2.0, 1.0, -0.5]))
    assert_repeats(data)
    assert data.sha256 == scaled.sha256
    grey = load_calibration(images, inputs=specs("x:float16[1,1,8,8]"), normalize=([0.0], [1.0]))
    assert whole(grey).shape == (4, 1, 8, 8) and whole(grey).dtype == torch.float16


def test_images_keep_their_proportions(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255  # the middle third is what a square centre crop shows
    image.fromarray(pixels).save(tmp_path / "wide.png")
    (batch,) = load_calibration(tmp_path, inputs=specs("x:float32[1,3,10,10]"))
    assert float(batch.inputs[0].min()) == 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_are_scaled(tmp_path: Path, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image.fromarray(grey).save(tmp_path / "a.png")
    data = load_calibration(tmp_path, inputs=specs(f"1,{channels},8,8"))
    got = next(iter(data)).inputs[0][0, 0].numpy()
    assert np.abs(got - grey / 65535).max() < 1 / 255


def test_images_are_decoded_when_asked_for(images: Path) -> None:
    data = load_calibration(images, inputs=specs("x:float32[1,3,8,8]"), batch_size=1)
    (images / "c.JPG").write_bytes(b"broken")
    batches = iter(data)
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(CalibrationError, match=r"c\.JPG cannot be read as an image"):
        next(batches)


@pytest.mark.parametrize(
    ("spec", "normalize", "message"),
    [
        (["x:float32[1,4,8,8]"], None, "one float input"),
        (["x:uint8[1,3,8,8]"], None, "one float input"),
        (["x:float32[1,8,8]"], None, "one float input"),
        (["x:float32[1,3,8,8]", "y:float32[1,3,8,8]"], None, "one float input"),
        (["x:float32[1,3,8,8]"], ([0.0, 0.0], [1.0]), "3 finite numbers"),
        (["x:float32[1,3,8,8]"], ([0.0], [0.0]), "above 0"),
    ],
)
def test_bad_image_requests(images: Path, spec: list[str], normalize: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(images, inputs=specs(*spec), normalize=normalize)


def test_folders_without_images_and_missing_pillow(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no images"):
        load_calibration(images / "empty", inputs=specs("x:float32[1,3,8,8]"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(Exception, match=r"compress-models\[images\]"):
        load_calibration(images, inputs=specs("x:float32[1,3,8,8]"))


# -- text ------------------------------------------------------------------------------------------

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *(f"w{i}" for i in range(50))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=99, pad_id=3)  # the file's own wishes, which must not win
    made.enable_truncation(2)
    (tmp_path / "tok").mkdir()
    made.save(str(tmp_path / "tok" / "tokenizer.json"))
    return tmp_path / "tok"


ENCODER = specs("input_ids:int64[1,seq=6]", "attention_mask:int64[1,seq=6]", "token_type_ids:int64[1,seq=6]")


def test_encoder_lines(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("w0 w1\n\n   \nw2 w3 w4 w5 w6 w7\r\nw8", encoding="utf-8")
    data = load_calibration(path, inputs=ENCODER, tokenizer=tokenizer, batch_size=2)
    assert whole(data).tolist() == [[1, 4, 5, 2, 3, 3], [1, 6, 7, 8, 9, 2], [1, 12, 2, 3, 3, 3]]
    assert whole(data, 1).tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]]
    assert int(whole(data, 2).abs().sum()) == 0
    assert data.num_samples == 3 and len(data) == 2
    assert_repeats(data)
    # the order of the inputs is the model's
    turned = load_calibration(path, inputs=ENCODER[::-1], tokenizer=tokenizer / "tokenizer.json")
    assert torch.equal(whole(turned, 2), whole(data))


def test_encoder_chooses_lines(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"w{i}" for i in range(50)))
    mask = specs("ids:int32[1,3]", "mask:bool[1,3]")
    data = load_calibration(path, inputs=mask, tokenizer=tokenizer, samples=9, batch_size=4, seed=1)
    rows = whole(data)[:, 1].tolist()
    assert len(rows) == 9 and rows == sorted(set(rows)) and whole(data, 1).dtype == torch.bool


@pytest.mark.parametrize("zipped", [False, True])
def test_causal_windows(zipped: bool, tokenizer: Path, tmp_path: Path) -> None:
    text = "\n".join(f"w{i}" for i in range(20)).encode()
    path = write(tmp_path / "text.anything", gzip.compress(text) if zipped else text)
    data = load_calibration(path, inputs=IDS, tokenizer=str(tokenizer), batch_size=2)
    assert whole(data).tolist() == [
        list(range(4 + at, 10 + at)) for at in (0, 6, 12)
    ]  # 20 tokens, 2 left out
    assert data.description == "3 samples from text.anything"
    assert_repeats(data)


def test_long_text_is_read_up_to_a_limit(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_text, "_PIECE", 100)
    monkeypatch.setattr(data_text, "TEXT_LIMIT", 1000)
    (tmp_path / "t.txt").write_text("w1 w2 w3\n" * 500)
    data = load_calibration(tmp_path / "t.txt", inputs=IDS, tokenizer=tokenizer)
    assert 40 < data.num_samples <= 1000 / 18 and "from its first" in data.description


def test_a_slow_tokenizer_is_loaded_locally(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.txt").write_text("w1 w2")
    with pytest.raises(CalibrationError, match="holds no tokenizer"):
        load_calibration(tmp_path / "t.txt", inputs=IDS, tokenizer=tmp_path / "folder")


BAD_TEXT: list[tuple[bytes, tuple[InputSpec, ...], str]] = [
    (b"w1 w2", IDS, "holds 2 tokens"),
    (b"\n \n", ENCODER, "holds no text"),
    (b"\n \n", IDS, "holds 0 tokens"),
    (b'{"text": "w1"}\n', IDS, "holds JSON"),
    (b"w1 " * 40000 + b"\xff", IDS, "not UTF-8"),
    (b"w1", X, "is text, and the model takes x:float32"),
    (b"w1", specs("a:int64[1,6]", "b:int64[1,6]"), "is text, and the model takes"),
    (b"w1", specs("a:int64[1,6]", "mask:int64[1,5]"), "is text, and the model takes"),
    (b"w1", specs("a:int64[1,6]", "mask:float32[1,6]"), "is text, and the model takes"),
]


@pytest.mark.parametrize(("text", "inputs", "message"), BAD_TEXT)
def test_bad_text(
    text: bytes, inputs: tuple[InputSpec, ...], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(write(tmp_path / "t.txt", text), inputs=inputs, tokenizer=tokenizer)


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", b"w1 w2 w3 w4 w5 w6")
    with pytest.raises(CalibrationError, match="--tokenizer"):
        load_calibration(path, inputs=IDS)
    with pytest.raises(CalibrationError, match="no tokenizer at"):
        load_calibration(path, inputs=IDS, tokenizer=tmp_path / "none.json")
    with pytest.raises(CalibrationError, match="is no tokenizer"):
        load_calibration(path, inputs=IDS, tokenizer=write(tmp_path / "t.json", b"{}"))


def test_the_line_for_no_data_is_one_line() -> None:
    assert describe_missing().startswith("no calibration data: weights are rounded data-free")
    assert "\n" not in describe_missing()


@given(count=st.integers(2, 70), data=st.data())
def test_parts_are_the_first_and_the_last_samples(count: int, data: st.DataObject) -> None:
    held = data.draw(st.integers(1, count - 1))
    size = data.draw(st.integers(1, 40))
    x, y = torch.arange(count * 2.0).reshape(count, 2), torch.arange(count)
    whole = load_calibration(
        [(x[i], y[i]) for i in range(count)], inputs=parse_input_specs(["1,2"]), batch_size=size
    )
    kept, last = whole.parted(held)
    assert (kept.num_samples, last.num_samples) == (count - held, held)
    for part, begin, end in ((kept, 0, count - held), (last, count - held, count)):
        assert torch.equal(torch.cat([b.inputs[0] for b in part]), x[begin:end])
        assert torch.equal(torch.cat([b.labels for b in part]), y[begin:end])
        assert sum(1 for _ in part) == len(part)
        assert part.sha256 == whole.sha256
    assert last.description == f"{held} of {whole.description}"
    for wrong in (0, count):
        with pytest.raises(ValueError, match="held out"):
            whole.parted(wrong)
