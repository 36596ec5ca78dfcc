"""Codebook weights in ONNX: packed codes, table and scales, decoded by standard operators.

============ ============================================== ========================================
reader       form in the file                               ONNX Runtime makes of it
============ ============================================== ========================================
linear, conv shift and mask -> Gather(table) -> Mul         float weight, folded at load
embedding    Gather(codes) -> shift and mask ->             the same: only the rows looked up are
             Gather(table) -> Mul                           decoded, the weight stays packed
tied         as linear; the embedding reads the same weight float weight, folded at load
============ ============================================== ========================================

The codes in the file are the bytes of `compress.codebook`, two 4-bit codes a byte, so the file is as
small as the encoding says; speed and memory of a product are those of float. ``MatMulBnb4`` reads NF4
as well and is deliberately not written: on the CPU it decodes the weight on every call and reached
0.08x to 0.3x of the speed of float at 1 and 8 rows, 0.8x at 128 (384x384 to 1024x4096, one thread).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from compress.artifact import Lowered
from compress.codebook import CodebookWeight
from compress.exporters.onnx_weights import Builder, placeholders


def lower_codebooks(model: ir.Model, weights: Mapping[str, CodebookWeight]) -> list[Lowered]:
    """Replace the placeholders of codebook weights, graph inputs by name, by the forms above.

    Args:
        model: rewritten in place.
        weights: by the name of the placeholder.
    """
    lowered = []
    for name, value, uses in placeholders(model, weights):
        weight = weights[name]
        if {kind for kind, _, _ in uses} == {"embedding"}:
            for i, (_, gather, _) in enumerate(uses):
                _Decoder(model, name, weight, gather, f"{i}").rows_of(gather)
            form = Lowered(name, "Gather -> table -> Mul", "decoded row by row")
        else:
            decoder = _Decoder(model, name, weight, next(iter(value.uses())).node, "")
            value.replace_all_uses_with(decoder.all_rows(value.dtype))
            form = Lowered(name, "codes -> table -> Mul", "decoded at load", (f"{name}/decode",))
        lowered.append(form)
    return lowered


class _Decoder:
    """The operators that decode one weight, inserted in front of a node."""

    def __init__(
        self, model: ir.Model, name: str, weight: CodebookWeight, before: ir.Node, suffix: str
    ) -> None:
        self.builder = Builder(model)
        self.name, self.weight, self.before, self.suffix = name, weight, before, suffix
        # a unit of bytes that holds whole codes: three bytes for eight 3-bit codes, else one
        unit = 3 if weight.encoding.bits == 3 else 1
        padded = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % unit))
        self.lanes = padded.shape[1] * 8 // weight.encoding.bits
        self.codes = self.constant("codes", padded.unflatten(1, (-1, unit)).numpy())
        self.scales = self.constant("scales", weight.scales.unsqueeze(-1).numpy())

    def all_rows(self, dtype: ir.DataType | None) -> ir.Value:
        """The whole weight, constant."""
        values = self.values(self.codes, self.scales)
        if dtype is not None and dtype != ir.DataType.FLOAT:
            values = self.node("Cast", [values], "cast_to", to=dtype.value)
        shape = self.constant("shape", np.array(self.weight.shape, dtype=np.int64))
        return self.node("Reshape", [values, shape], "decode")

    def rows_of(self, gather: ir.Node) -> None:
        """In place of a Gather from the weight: gather packed rows, decode those."""
        indices = gather.inputs[1]
        assert indices is not None
        flat = self.node("Reshape", [indices, self.integers("flat", -1)], "flat")
        codes = self.node("Gather", [self.codes, flat], "gather_codes")
        scales = self.node("Gather", [self.scales, flat], "gather_scales")
        values = self.values(codes, scales)
        output = gather.outputs[0]
        if output.dtype is not None and output.dtype != ir.DataType.FLOAT:
            values = self.node("Cast", [values], "cast_to", to=output.dtype.value)
        outer = self.node("Shape", [indices], "outer")
        inner = self.integers("inner", *self.weight.shape[1:])
        shape = self.node("Concat", [outer, inner], "shape_out", axis=0)
        self.builder.take_over(gather, self.node("Reshape", [values, shape], "rows"))

    def values(self, codes: ir.Value, scales: ir.Value) -> ir.Value:
        """uint8 ``[R, units, unit]`` and ``[R, groups, 1]`` -> float ``[R, N]``."""
        encoding, columns = self.weight.encoding, self.weight.columns
        groups, width = encoding.groups(columns), encoding.width(columns)
        if groups == 1:
            width = columns
        flat = self.node("Reshape", [self.unpacked(codes), self.integers("row", 0, -1)], "lanes")
        if self.lanes != columns:
            flat = self.cut(flat, "codes", columns)
        indices = self.node("Cast", [flat], "index", to=ir.DataType.INT32.value)
        table = self.constant("table", self.weight.table.numpy())
        values = self.node("Gather", [table, indices], "lookup")
        if groups * width != columns:
            missing = self.integers("missing", 0, 0, 0, groups * width - columns)
            values = self.node("Pad", [values, missing], "pad")
        values = self.node("Reshape", [values, self.integers("groups", 0, groups, width)], "group")
        values = self.node("Mul", [values, scales], "scale")
        values = self.node("Reshape", [values, self.integers("row", 0, -1)], "ungroup")
        return values if groups * width == columns else self.cut(values, "values", columns)

    def unpacked(self, codes: ir.Value) -> ir.Value:
        """uint8 ``[R, units, unit]`` -> uint8 ``[R, units, codes in a unit]``."""
        bits = self.weight.encoding.bits
        mask = self.constant("mask", np.array([2**bits - 1], dtype=np.uint8))
        if bits != 3:
            shifts = self.constant("shifts", np.arange(0, 8, bits, dtype=np.uint8))
            low = self.node("BitShift", [codes, shifts], "low", direction="RIGHT")
            return self.node("BitwiseAnd", [low, mask], "mask")
        # code i starts at bit 3i; of those that end in the next byte, the rest comes from there. For the
        # others that byte is moved past the mask.
        first = [3 * i // 8 for i in range(8)]
        start = [3 * i % 8 for i in range(8)]
        rest = [min(8 - s, 3) for s in start]
        low = self.node("Gather", [codes, self.integers("first", *first)], "first", axis=2)
        low = self.node("BitShift", [low, self.bytes("start", start)], "low", direction="RIGHT")
        high = self.node(
            "Gather", [codes, self.integers("next", *(min(b + 1, 2) for b in first))], "next", axis=2
        )
        high = self.node("BitShift", [high, self.bytes("rest", rest)], "high", direction="LEFT")
        both = self.node("BitwiseOr", [low, high], "both")
        return self.node("BitwiseAnd", [both, mask], "mask")

    def cut(self, value: ir.Value, name: str, columns: int) -> ir.Value:
        """The first columns of each row."""
        bounds = [self.integers(k, v) for k, v in (("zero", 0), ("columns", columns), ("one", 1))]
        return self.node("Slice", [value, *bounds], f"cut_{name}")

    def bytes(self, name: str, values: list[int]) -> ir.Value:
        return self.constant(name, np.array(values, dtype=np.uint8))

    def integers(self, name: str, *values: int) -> ir.Value:
        return self.constant(name, np.array(values, dtype=np.int64))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self.builder.initializer(f"{self.name}.{name}", np.ascontiguousarray(array))

    def node(self, op: str, inputs: list[ir.Value], name: str, **attributes: int | str) -> ir.Value:
        name = f"{self.name}/{name}{self.suffix}"
        return self.builder.node(self.before, op, inputs, name, "", **attributes)
