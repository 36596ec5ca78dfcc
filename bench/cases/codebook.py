"""Codebooks against integers of the same size: the error of weights, and the speed of one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from bench.measure import Measurement, Setup, caller, measured
from compress.codebook import CodebookWeight
from compress.exporters.ort import Session
from compress.exporters.timing import interleaved
from compress.passes.cleanup import Cleanup
from compress.passes.quantize_codebook import QuantizeCodebook
from compress.passes.quantize_weights import QuantizeWeights

_GROUP = 128
# relative mean square error at 4 bits: that of an implementation written before this one
_MUSTS = {
    ("normal", "nf4"): "<= 0.0081",
    ("normal", "kmeans"): "<= 0.0079",
    ("normal", "power"): "<= 0.0100",
    ("Student's t5", "nf4"): "<= 0.0128",
    ("Student's t5", "kmeans"): "<= 0.0114",
    ("Student's t5", "power"): "<= 0.0161",
}


def run(setup: Setup) -> list[Measurement]:
    """Errors at 2, 3 and 4 bits without data; 4-bit files of one layer at 1, 8 and 128 rows."""
    rows = 128 if setup.quick else 1024
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, 1024, generator=generator)
    chi = torch.randn(5, rows, 1024, generator=generator).square().mean(0)
    found = []
    for source, weight in (("normal", normal), ("Student's t5", normal / chi.sqrt())):
        for bits in (4, 3, 2):
            found += _errors(source, weight, bits)
    sizes = ((384, 1536),) if setup.quick else ((384, 384), (384, 1536), (1024, 4096))
    for columns, outputs in sizes:
        found += _speeds(columns, outputs, setup)
    return found


def _errors(source: str, weight: Tensor, bits: int) -> list[Measurement]:
    passes: dict[str, compress.Pass] = {}
    if bits != 3:
        passes["integers"] = QuantizeWeights(bits=bits, group_size=_GROUP)  # type: ignore[arg-type]
    tables: tuple[Any, ...] = ("power", "nf4", "kmeans") if bits == 4 else ("power", "kmeans")
    for table in tables:
        passes[table] = QuantizeCodebook(table=table, bits=bits, group_size=_GROUP)  # type: ignore[arg-type]
    layer = _linear(weight)
    found = []
    for name, quantize in passes.items():
        graph = compress.run(layer, [quantize], example_inputs=torch.zeros(2, weight.shape[1])).graph
        error = float((weight - graph.weight("weight")).norm() / weight.norm()) ** 2
        target = _MUSTS.get((source, name), "") if bits == 4 else ""
        found.append(measured(f"{source}, {bits} bits, {name}: relative squared error", error, "", target))
    return found


def _speeds(columns: int, outputs: int, setup: Setup) -> list[Measurement]:
    weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(1))
    example = torch.zeros(2, 3, columns)
    layer = _linear(weight)
    files: dict[str, Path] = {}
    found = []
    for name, passes in (
        ("float", [Cleanup()]),
        ("int4", [QuantizeWeights(bits=4, group_size=64)]),
        ("nf4", [QuantizeCodebook(group_size=64)]),
    ):
        graph = compress.run(
            layer, passes, example_inputs=example, inputs=("1,rows=3,!" + str(columns),)
        ).graph
        files[name] = compress.export(graph, setup.work / f"{name}-{columns}x{outputs}.onnx").path
        if name == "nf4":
            encoded = graph.encodings["weight"]
            assert isinstance(encoded, CodebookWeight)
            files["MatMulBnb4"] = _bnb4(encoded, setup.work / f"bnb4-{columns}x{outputs}.onnx")
            share = 100 * (files[name].stat().st_size / encoded.nbytes - 1)
            found.append(measured(f"{columns}x{outputs}, nf4: file beyond its weight", share, "%", "<= 2"))
    sessions = {name: Session(path) for name, path in files.items()}
    for rows in (1, 8, 128):
        x = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(2))
        calls: dict[str, Callable[[], object]] = {n: caller(s, x) for n, s in sessions.items()}
        for name, speed in interleaved(calls, 1 if setup.quick else 4).items():
            if name != "float":
                what = f"{columns}x{outputs}, {rows} rows, {name}: speed-up"
                found.append(measured(what, speed.speedup, "x"))
    return found


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.eval()


def _bnb4(encoded: CodebookWeight, path: Path) -> Path:
    """The same codes as ONNX Runtime's own NF4 operator reads them: one run of nibbles, high ones first."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    outputs, columns = encoded.shape
    low_first = encoded.codes.flatten().numpy()
    initializers = {
        "codes": (low_first >> 4) | (low_first << 4),
        "absmax": encoded.scales.flatten().numpy(),
    }
    node = helper.make_node(
        "MatMulBnb4",
        ["x", *initializers],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=outputs,
        block_size=encoded.encoding.group_size,
        quant_type=1,
    )
    graph = helper.make_graph(
        [node],
        "bnb4",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "rows", outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in initializers.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path
