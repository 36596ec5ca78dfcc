"""What TensorRT-RTX builds for which GPU: one table, asked before any work is done.

Each entry was built with TensorRT-RTX 1.7.1 (`tests/exporters/test_to_tensorrt.py` repeats a part of it). The
oldest GPU of an engine decides for all of it. That is why sm75 is not among the defaults: 8 bits build for
it, but as float16 layers whose weights are decoded on every call, and then for every other GPU of the engine
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from compress.activations import QUANTIZERS, STATIC
from compress.encoding import EncodedWeight
from compress.errors import ExportError
from compress.graph import Graph, argument
from compress.pipeline import Pass

GPUS = {
    75: "Turing (RTX 20, T4)",
    80: "Ampere (A100)",
    86: "Ampere (RTX 30, A10)",
    89: "Ada (RTX 40, L4)",
    120: "Blackwell (RTX 50)",
    121: "Blackwell (GB10)",
}
"""Compute capability -> its name. There is no sm90 (H100, H200): TensorRT-RTX is not for these."""

DEFAULT_GPUS = (86, 89, 120)
"""NVIDIA's own choice of what a portable engine runs on."""

FIRST_GPU = {"float32": 80, "float16": 75, "int8": 75, "int4": 80}
"""Format -> the lowest compute capability that has it. float32 is that of matrix products: convolutions alone
build for sm75 as well."""

_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)

_INSTEAD = {"float32": "--precision float16", "int4": "8-bit weights (bits: 8)"}


def parse_gpus(text: str) -> tuple[int, ...]:
    """Compute capabilities of a text such as "sm89,sm120"; `DEFAULT_GPUS` where it is empty.

    Raises:
        ExportError: one is not in `GPUS`, or given twice.
    """
    if not text.strip():
        return DEFAULT_GPUS
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d+)(?:\.(\d))?", part.strip().lower())
        number = int(match[1] + (match[2] or "")) if match else -1
        if number not in GPUS or number in found:
            known = ", ".join(f"sm{n}" for n in GPUS)
            raise ExportError(
                f"gpu is {text!r}, and {part.strip()!r} is {'there twice' if number in found else 'none'} "
                "that TensorRT-RTX builds for",
                expected=f"some of {known}, as in sm89,sm120",
                fix="for H100 and H200 write a file for PyTorch (--target torch)" if number == 90 else "",
            )
        found.append(number)
    return tuple(sorted(found))


def too_old(formats: Iterable[str], gpus: Sequence[int]) -> list[str]:
    """Reasons why these formats cannot run on all of these GPUs."""
    reasons = []
    for name in dict.fromkeys(formats):
        first = FIRST_GPU[name]
        if min(gpus) < first:
            reasons.append(
                f"{name} needs sm{first} or newer; for sm{min(gpus)} use {_INSTEAD.get(name, 'float16')}"
            )
    return reasons


def reasons_of_passes(passes: Sequence[Pass], gpus: Sequence[int]) -> list[str]:
    """What in a recipe leads to weights or activations that TensorRT does not take."""
    reasons = []
    for step in passes:
        options = step.options()
        bits = options.get("bits")
        if step.name == "quantize_weights":
            if bits == 2:
                reasons.append("TensorRT has no 2-bit weights: bits: 4 with symmetric: true")
            elif not options["symmetric"]:
                reasons.append(f"asymmetric int{bits} is a parse error in TensorRT: symmetric: true")
            elif bits != 8:
                reasons += too_old(["int4"], gpus)
        menu = options.get("formats", ())
        if any("asym" in name or name.startswith("int2") for name in menu):
            reasons.append(
                "of the formats of mixed_precision TensorRT has those without zero points, of 4 and 8 bits: "
                "formats: [int4 g32, int4 g128, int8 per row, float]"
            )
        if step.name == "quantize_activations":
            if options["activations"] in ("auto", "dynamic"):
                reasons.append(
                    "TensorRT has no dynamic 8-bit activations: activations: static with symmetric: true"
                )
            elif options["activations"] == "static" and not options["symmetric"]:
                reasons.append("8-bit activations with zero points are a parse error in TensorRT: "
                               "symmetric: true")  # fmt: skip
    return [f"{reason} (recipes int4-symmetric and int8-static have it so)" if "symmetric" in reason
            else reason for reason in dict.fromkeys(reasons)]  # fmt: skip


def reasons_of_graph(graph: Graph, gpus: Sequence[int]) -> list[str]:
    """What in a graph TensorRT does not take."""
    reasons = []
    floats = [n for n, t in graph.tensors.items() if t.dtype in _OTHER_FLOATS]
    floats += [n for n, e in graph.encodings.items() if e.dtype != torch.float32]
    if floats:
        reasons.append(
            f"{len(floats)} weights are not float32 (e.g. {floats[0]}); convert the module with .float(): "
            "what the engine computes in is --precision"
        )
    formats = []
    integers = {n: e for n, e in graph.encodings.items() if isinstance(e, EncodedWeight)}
    for name, encoded in integers.items():
        encoding = encoded.encoding
        if encoding.bits == 2:
            reasons.append(f"{name} has 2 bits, and TensorRT has 4 and 8: bits: 4 with symmetric: true")
        elif not encoding.symmetric:
            reasons.append(
                f"{name}: asymmetric int{encoding.bits} is a parse error in TensorRT: symmetric: true"
            )
        elif encoding.bits == 4:
            formats.append("int4")
    for node in graph.ops.nodes:
        if node.target in QUANTIZERS and node.target is not STATIC:
            reasons.append(f"{node.name}: TensorRT has no dynamic 8-bit activations: activations: static")
        elif node.target is STATIC and argument(node, "zero_point", 128) != 128:
            reasons.append(f"{node.name}: activations with zero points are a parse error in TensorRT: "
                           "symmetric: true")  # fmt: skip
    if graph.submodules:
        reasons.append("the model holds sub-graphs (torch.cond or similar), which are not written yet")
    shown = reasons[:3] + ([f"and {len(reasons) - 3} more of this kind"] if len(reasons) > 3 else [])
    return shown + too_old(formats, gpus)
