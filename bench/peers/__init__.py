"""What a user would do without us: ONNX Runtime's own quantizers on the float export."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from compress.exporters.to_onnx import build_model
from compress.graph import Graph


def float_export(graph: Graph, path: Path) -> Path:
    """The uncompressed model as `torch.onnx` writes it, the baseline of every comparison."""
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(build_model(graph, faster=False)[0], path)
    return path


def ort_dynamic(model: Path, out: Path) -> Path:
    """`quantize_dynamic`: int8 weights for each channel, activations rounded to uint8 on every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    loaded = onnx.load(model)
    # it transposes the weights of Gemm and then stumbles over their recorded shapes
    del loaded.graph.value_info[:]
    with _quiet():
        quantize_dynamic(loaded, out, per_channel=True, weight_type=QuantType.QInt8)
    return out


def ort_static(model: Path, out: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> Path:
    """`quantize_static`: uint8 activations on the ranges seen in the batches, int8 weights for each channel.

    Args:
        batches: arrays by input name.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.left, None)

    prepared = out.with_suffix(".prepared.onnx")
    with _quiet():
        # folds batch normalisations, as its documentation asks for
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(out), Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    prepared.unlink()
    return out


def ort_rtn(model: Path, out: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """`MatMulNBitsQuantizer`: round to nearest with zero points, embeddings too where it can."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    config = DefaultWeightOnlyQuantConfig(
        block_size=group_size, is_symmetric=False, bits=bits, op_types_to_quantize=("MatMul", "Gather")
    )
    return _nbits(model, out, config)


def ort_hqq(model: Path, out: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """`MatMulNBitsQuantizer` with half-quadratic quantization (zero points fitted to the weights).

    It takes matrix products only, so embeddings are rounded to nearest as in `ort_rtn`.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        HQQWeightOnlyQuantConfig,
    )

    _nbits(
        model,
        out,
        HQQWeightOnlyQuantConfig(block_size=group_size, bits=bits, op_types_to_quantize=("MatMul",)),
    )
    rest = DefaultWeightOnlyQuantConfig(
        block_size=group_size, is_symmetric=False, bits=bits, op_types_to_quantize=("Gather",)
    )
    return _nbits(out, out, rest)


def _nbits(model: Path, out: Path, config: object) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(out), False)
    return out


class _quiet:  # noqa: N801 - used like a function
    """Keeps the quantizers' progress lines out of the output."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
