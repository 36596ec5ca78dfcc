"""What a user would do without us: ONNX Runtime's own quantizers on the float export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from compress.graph import Graph
from compress.progress import quiet

Arrays = Mapping[str, np.ndarray]


@quiet()
def dynamic(model: Path, out: Path) -> Path:
    """`quantize_dynamic`: int8 weights for each channel, activations rounded to uint8 on every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    loaded = onnx.load(model)
    # it transposes the weights of Gemm and then stumbles over their recorded shapes
    del loaded.graph.value_info[:]
    quantize_dynamic(loaded, out, per_channel=True, weight_type=QuantType.QInt8)
    return out


@quiet()
def static(model: Path, out: Path, batches: Iterable[Arrays]) -> Path:
    """`quantize_static`: uint8 activations on the ranges seen in the batches, int8 weights for each channel.

    Args:
        batches: arrays by input name.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Arrays | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory(prefix="compress-ort-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        # folds batch normalisations, as its documentation asks for
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(out), Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return out


def rtn(model: Path, out: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """`MatMulNBitsQuantizer`: round to nearest with zero points, embeddings too where it can."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    config = DefaultWeightOnlyQuantConfig(
        block_size=group_size, is_symmetric=False, bits=bits, op_types_to_quantize=("MatMul", "Gather")
    )
    return _nbits(model, out, config)


def hqq(model: Path, out: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """`MatMulNBitsQuantizer` with half-quadratic quantization (zero points fitted to the weights).

    It takes matrix products only, so embeddings are rounded to nearest as in `rtn`.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        HQQWeightOnlyQuantConfig,
    )

    products = HQQWeightOnlyQuantConfig(block_size=group_size, bits=bits, op_types_to_quantize=("MatMul",))
    rest = DefaultWeightOnlyQuantConfig(
        block_size=group_size, is_symmetric=False, bits=bits, op_types_to_quantize=("Gather",)
    )
    return _nbits(_nbits(model, out, products), out, rest)


@quiet()
def _nbits(model: Path, out: Path, config: object) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), False)
    return out


# -- for `compress bench` -------------------------------------------------------------------------


@dataclass(frozen=True)
class OrtPeer:
    """One of these quantizers, with its usual options.

    Attributes:
        name: for reports.
        write: (float file, file to write, real inputs by name) -> the file.
        operators: it does nothing for a model that has none of these with a constant weight.
        calibrated: whether it needs real inputs.
    """

    name: str
    write: Callable[[Path, Path, Iterable[Arrays]], Path]
    operators: frozenset[str]
    calibrated: bool = False

    def unsuitable(self, model: Path, calibrated: bool) -> str:
        """Why it is not for this float file; empty if it is."""
        if not self.operators & weighted_operators(model):
            return f"the float file has no constant weight of {' or '.join(sorted(self.operators))}"
        return "it needs calibration data" if self.calibrated and not calibrated else ""


ORT_PEERS = (
    OrtPeer("ort-int8-dynamic", lambda a, b, _: dynamic(a, b), frozenset({"MatMul", "Gemm"})),
    OrtPeer("ort-int8-static", static, frozenset({"Conv"}), calibrated=True),
    OrtPeer("ort-int4-rtn", lambda a, b, _: rtn(a, b), frozenset({"MatMul"})),
    OrtPeer("ort-int4-hqq", lambda a, b, _: hqq(a, b), frozenset({"MatMul"})),
)


def weighted_operators(model: Path) -> set[str]:
    """Types of the operators of a file that have a constant second input of two axes or more."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) >= 2}
    return {node.op_type for node in graph.node if len(node.input) > 1 and node.input[1] in weights}


def arrays(reference: Graph, batches: Iterable[Sequence[Tensor]]) -> Iterable[Arrays]:
    """Flat inputs of a model as its float file takes them."""
    names = [str(spec.name) for spec in reference.inputs]
    return ({n: t.numpy() for n, t in zip(names, batch, strict=True)} for batch in batches)
