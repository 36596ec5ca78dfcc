"""What TensorRT-RTX builds for which GPU: one table, asked before any work is done.

Each entry was built with TensorRT-RTX 1.7.1, and `tests/exporters/test_tensorrt_engine.py` builds most of
them again. The oldest GPU of an engine decides for all of it. That is why sm75 is not among the defaults: its
8-bit convolutions are float16 ones whose weights are decoded on every call, and then for every other GPU of
the engine too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from compress.activations import QUANTIZERS, Rounding, rounding
from compress.encoding import IntEncoding
from compress.errors import ExportError
from compress.float8 import Float8Encoding
from compress.graph import Graph
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

FIRST_GPU = {"float32": 80, "float16": 75, "int8": 75, "int4": 80, "fp8": 89}
"""Format -> the lowest compute capability that has it. float32 is that of matrix products: convolutions alone
build for sm75 as well."""

_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)

_INSTEAD = {
    "float32": "--precision float16",
    "int4": "8-bit weights (bits: 8)",
    "fp8": "8-bit integers (recipe int8-static)",
}


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


def reasons_of_passes(passes: Sequence[Pass], gpus: Sequence[int], plugins: bool = False) -> list[str]:
    """What in a recipe leads to weights or activations that TensorRT does not take: see `Pass.leaves`.

    Args:
        plugins: whether weights of 4 bits may have zero points, for there are plugins that take them.
    """
    reasons = []
    for step in passes:
        wrong = {form: reason for form in step.leaves() if (reason := _why_not(form, gpus, plugins))}
        menu = [form for form in wrong if isinstance(form, IntEncoding)]
        if len(menu) > 1:
            instead = dict.fromkeys(str(_nearest(form, gpus)) for form in menu)
            reasons.append(
                f"of what {step.name} may choose, TensorRT has no {', '.join(map(str, menu))}; "
                f"in their place it has {', '.join(instead)}"
            )
        else:
            reasons += wrong.values()
    return [f"{reason} (recipes int4-symmetric and int8-static have it so)" if "symmetric" in reason
            else reason for reason in dict.fromkeys(reasons)]  # fmt: skip


def reasons_of_graph(graph: Graph, gpus: Sequence[int], plugins: bool = False) -> list[str]:
    """What in a graph TensorRT does not take; `plugins` as for `reasons_of_passes`."""
    reasons = []
    floats = [n for n, t in graph.tensors.items() if t.dtype in _OTHER_FLOATS]
    floats += [n for n, e in graph.encodings.items() if e.dtype != torch.float32]
    if floats:
        reasons.append(
            f"{len(floats)} weights are not float32 (e.g. {floats[0]}); convert the module with .float(): "
            "what the engine computes in is --precision"
        )
    if graph.submodules:
        reasons.append("the model holds sub-graphs (torch.cond or similar), which are not written yet")
    forms = [(name, encoded.encoding) for name, encoded in graph.encodings.items()]
    forms += [(n.name, rounding(n)) for n in graph.ops.nodes if n.target in QUANTIZERS]
    found: dict[str, list[str]] = {}
    for name, form in forms:
        if reason := _why_not(form, gpus, plugins):
            found.setdefault(reason, []).append(name)
    for reason, names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reasons.append(f"{names[0]}{more}: {reason}")
    return reasons


def _why_not(form: object, gpus: Sequence[int], plugins: bool) -> str:
    """Why TensorRT does not take a format on these GPUs, and what it takes instead; empty where it does. What
    it has no form of at all is decoded when the engine is written."""
    if isinstance(form, IntEncoding):
        if form.bits == 2:
            return "TensorRT has no 2-bit weights: bits: 4 with symmetric: true"
        if not form.symmetric and not (plugins and form.bits == 4):
            return f"asymmetric int{form.bits} is a parse error in TensorRT: symmetric: true"
        return "; ".join(too_old(["int4"], gpus)) if form.bits == 4 else ""
    if isinstance(form, Float8Encoding) or (isinstance(form, Rounding) and form.float8):
        return "; ".join(too_old(["fp8"], gpus))
    if isinstance(form, Rounding):
        if not form.static:
            return "TensorRT has no dynamic 8-bit activations: activations: static with symmetric: true"
        if not form.symmetric:
            return "8-bit activations with zero points are a parse error in TensorRT: symmetric: true"
    return ""


def _nearest(form: IntEncoding, gpus: Sequence[int]) -> IntEncoding:
    """The format that TensorRT has for these GPUs in place of this one."""
    bits = 8 if form.bits == 8 or too_old(["int4"], gpus) else 4
    return IntEncoding(bits, -1 if bits == 8 else form.group_size)
