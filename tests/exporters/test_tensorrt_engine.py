"""The builder itself, on small files made by hand: formats by GPU, sizes, damage, progress, Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import ExportError, MissingExtra
from compress.exporters.tensorrt_engine import Built, build, tensorrt, weight_bytes
from compress.exporters.tensorrt_progress import interruptible, monitor
from compress.exporters.tensorrt_support import FIRST_GPU

try:
    tensorrt()
except MissingExtra:
    pytest.skip("TensorRT-RTX is not installed (extra tensorrt)", allow_module_level=True)

WIDTH = 64
BITS = {"int4": ml_dtypes.int4, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn, "float16": np.float16}
BUILT_AS = {"int4": "Int4", "int8": "Int8", "fp8": "FP8", "float16": "Half"}


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    import onnx_ir as ir

    return ir.to_proto(ir.tensor(array, name=name))


def product(folder: Path, kind: str, *, rounded: bool = False, width: int = WIDTH, layers: int = 1) -> Path:
    """Square products in float16 with weights of a kind, one after the other."""
    rng = np.random.default_rng(0)
    nodes, constants, value = [], [], "x"
    if rounded:
        constants += [tensor("step", np.float16(0.02)[()] * np.ones((), np.float16))]
        constants += [tensor("zero", np.zeros((), BITS[kind]))]
    for i in range(layers):
        weight = f"w{i}"
        codes = rng.integers(-7, 8, (width, width)).astype(np.float32).astype(BITS[kind])
        constants.append(tensor(weight, codes))
        if kind != "float16":
            blocks = {"axis": 1, "block_size": 32} if kind == "int4" else {"axis": 0}
            shape = (width, width // 32) if kind == "int4" else (width,)
            constants.append(tensor(f"s{i}", np.full(shape, 0.01, np.float16)))
            nodes.append(
                helper.make_node("DequantizeLinear", [weight, f"s{i}"], [f"d{i}"], f"d{i}", **blocks)
            )
            weight = f"d{i}"
        if rounded:
            for op, given, name in (
                ("QuantizeLinear", value, f"q{i}"),
                ("DequantizeLinear", f"q{i}", f"r{i}"),
            ):
                nodes.append(helper.make_node(op, [given, "step", "zero"], [name], name))
            value = f"r{i}"
        made = "y" if i == layers - 1 else f"y{i}"
        nodes.append(helper.make_node("Gemm", [value, weight], [made], f"gemm{i}", transB=1))
        value = made
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", half, ["rows", width])],
        [helper.make_tensor_value_info("y", half, ["rows", width])], constants,
    )  # fmt: skip
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def built(
    path: Path, gpu: int = 89, width: int = WIDTH, rows: tuple[int, int, int] = (1, 4, 8), **more: Any
) -> Built:
    least, usual, most = ((n, width) for n in rows)
    return build(path, {"x": (least, usual, most)}, [gpu], **more)


@pytest.mark.parametrize("gpu", [75, 86, 89, 120])
@pytest.mark.parametrize(
    ("kind", "rounded"),
    [("float16", False), ("int8", False), ("int8", True), ("int4", False), ("fp8", False), ("fp8", True)],
)
def test_what_the_table_says_builds_and_nothing_else(
    kind: str, rounded: bool, gpu: int, tmp_path: Path
) -> None:
    path = product(tmp_path, kind, rounded=rounded)
    if gpu < FIRST_GPU[kind]:
        with pytest.raises(ExportError, match=f"cannot build an engine for sm{gpu}"):
            built(path, gpu)
        return
    found = built(path, gpu)
    assert found.data and any(k == BUILT_AS[kind] for layer in found.layers for k, _ in layer.constants)
    if rounded:
        assert any(layer.inputs == (BUILT_AS[kind],) for layer in found.layers), "a product of 8 bits"


@pytest.mark.parametrize(
    ("kind", "rounded"), [("float16", False), ("int8", True), ("int4", False), ("fp8", True)]
)
def test_engines_differ_by_their_weights(kind: str, rounded: bool, tmp_path: Path) -> None:
    """What is left of an engine without its constants is the same for wider layers: compiled kernels."""
    sizes = {}
    for width in (128, 512):
        found = built(product(tmp_path, kind, rounded=rounded, width=width), width=width)
        scales = {"float16": 0, "int4": width * width // 32 * 2}.get(kind, width * 2)
        stored = width * width * {"float16": 2, "int4": 0.5}.get(kind, 1) + scales
        assert weight_bytes(found.layers) == pytest.approx(stored, rel=0.02)
        sizes[width] = len(found.data) - weight_bytes(found.layers)
    assert sizes[512] == pytest.approx(sizes[128], rel=0.02)


def test_blocks_are_as_long_as_shapes_say(tmp_path: Path) -> None:
    """Whatever `block_size` says: a row that ends within a block has to be written as a longer one."""
    path = product(tmp_path, "int4")
    model = onnx.load(path)
    scales = next(t for t in model.graph.initializer if t.name == "s0")
    for count in (3, 4):
        scales.CopyFrom(tensor("s0", np.full((WIDTH, count), 0.01, np.float16)))
        (size,) = (a for a in model.graph.node[0].attribute if a.name == "block_size")
        assert size.i == 32
        onnx.save(model, path)
        if WIDTH % count:
            with pytest.raises(ExportError, match="must divide into whole blocks"):
                built(path)
        else:
            assert ("Half", (4, WIDTH)) in [c for layer in built(path).layers for c in layer.constants]


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def foreign(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "MatMulNBits", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)


def old(path: Path) -> None:
    """Blocks came with opset 21, and float8 with 19."""
    model = onnx.load(path)
    model.opset_import[0].version = 5
    model.graph.node[0].op_type = "Upsample"
    onnx.save(model, path)


@pytest.mark.parametrize("damage", [broken, foreign, old])
def test_files_it_cannot_read(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = product(tmp_path, "int8")
    damage(path)
    with pytest.raises(ExportError, match="TensorRT cannot read what it was given: ") as error:
        built(path)
    assert len(str(error.value)) < 900 and "/_src/" not in str(error.value)


def test_sizes_out_of_order(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"input tensors x, please ensure .* MIN<=OPT<=MAX"):
        built(product(tmp_path, "float16"), rows=(4, 2, 1))


class Watch:
    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.told: list[Any] = []

    def start(self, title: str, total: int) -> None:
        self.told.append((title, total))

    def step(self, name: str) -> None:
        self.told.append(name)
        if len(self.told) == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def finish(self) -> None:
        self.told.append("finish")


def test_progress_is_told(tmp_path: Path) -> None:
    watch = Watch()
    built(product(tmp_path, "float16", layers=3), progress=watch)
    (title, total), *steps, end = watch.told
    assert title.startswith("TensorRT: ") and end == "finish"
    assert 0 < len(steps) <= total and any(steps)


def test_ctrl_c_ends_a_build(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    watch = Watch(at=3)
    with pytest.raises(KeyboardInterrupt):
        built(product(tmp_path, "float16", layers=3), progress=watch)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(watch.told) < 8, "it did not build on"
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_mark_ends_the_build_at_the_next_step() -> None:
    with interruptible() as mark:
        watching = monitor(tensorrt(), Watch(), mark)
        watching.phase_start("Build", None, 2)
        assert watching.step_complete("Build", 0)
    mark.asked = True
    assert not watching.step_complete("Build", 1)
