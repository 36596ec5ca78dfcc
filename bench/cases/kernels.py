"""4-bit products and heads in codes on a GPU: are they right, and how fast are they beside what there is.

Correctness is against float64, over odd sizes, with outputs filled with NaN before, and repeated for races.
Times are of CUDA graphs over so many weights that none comes from the cache, all contenders in turn:
cuBLAS in bfloat16, torch's `_weight_int4pack_mm` (tinygemm), and gemlite where it is installed.
Heads in codes and chains of small layers are in `bench.kernels_float`.

With `--gpu` launches are tuned in between, for at most eight minutes, so that a GPU there for a short time
gives all there is to know: `python bench/run.py kernels --gpu --no-gate`.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels_float import DEVICE, DTYPES, float_fast, float_right
from bench.measure import Measurement, Setup, measured, true
from compress.encoding import dequantize
from compress.kernels.timing import copies, seconds
from compress.kernels.tune import (
    SHAPES,
    Weight,
    random_blocks,
    random_int8,
    random_sparse24,
    random_weight,
    tune,
)
from compress.kernels.tuning import BLOCK_M, Config, gpu_of
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_bsr_matmul.op import w4_bsr_matmul
from compress.kernels.w4_matmul.layout import LAYOUTS, kwidth_of, layout_for
from compress.kernels.w4_matmul.op import w4_matmul
from compress.kernels.w4_sparse24_matmul import reference
from compress.kernels.w4_sparse24_matmul.layout import Packed
from compress.kernels.w4_sparse24_matmul.op import instruction_is_right, w4_sparse24_matmul
from compress.kernels.w4a8_matmul.op import quantize_dynamic, w4a8_matmul
from compress.numerics import relative_error

_GROUP = 128
_SPARSE_GROUP = 32
_TUNING = 8.0
"""Minutes."""


def run(setup: Setup) -> list[Measurement]:
    """Correctness first: a wrong kernel has no speed."""
    found = [*_right(setup.quick), *_repeatable(), *_sparse_right(), *_blocks_right(), *_int8_right()]
    found += [*float_right(), *_sanitized()]
    if all(m.holds is not False for m in found):
        found += _limits()
        if setup.tune:
            tune(SHAPES, _GROUP, functools.partial(print, flush=True), minutes=1 if setup.quick else _TUNING)
        found += _fast(setup.quick)
        found += float_fast(setup.quick)
    return found


# -- right ----------------------------------------------------------------------------------------


def _right(quick: bool) -> Iterator[Measurement]:
    from compress.kernels.w4_matmul import triton

    worst = {"sums": 0.0, "scaled weights": 0.0}
    exact_decodes = True
    shapes = [(4096, 4096), (70, 600)]
    if not quick:
        shapes += [(40, 130), (257, 4112), (33, 99)]
    own = layout_for(gpu_of(0).capability)
    formats = [*itertools.product((16, 32, 64, 128), (False, True), [own], DTYPES, (False, True))]
    if quick:  # each combination is another program to compile
        formats = formats[::3]
    formats += [(128, True, other, torch.bfloat16, True) for other in LAYOUTS[1:] if other != own]
    launches = itertools.cycle([(1, 1), (40, 2), (16, 1), (33, 1), (5, 2), (17, 1), (18, 2)])
    for (group_size, zero_points, layout, dtype, wide), (rows, columns) in itertools.product(formats, shapes):
        scales = torch.float32 if wide else dtype
        canonical, packed = random_weight(
            rows, columns, group_size, layout, zero_points=zero_points, scales=scales, device=DEVICE
        )
        values = _values(canonical, group_size, columns)
        if not wide:
            decoded = triton.decoded(*packed, columns, kwidth_of(layout), dtype)
            exact_decodes &= torch.equal(decoded, values.to(dtype))
        group = packed[0].shape[1] * 64 // (packed[1].shape[0] * packed[1].shape[2])
        for m, split in itertools.islice(launches, 2):
            x = torch.randn(m, columns, device=DEVICE, dtype=dtype)
            y = torch.full((m, rows), torch.nan, device=DEVICE)
            block_m = next(b for b in BLOCK_M if m <= b)
            config = Config(block_m, 64, 4, 2, min(split, packed[1].shape[0]))
            triton.launch(x, *packed, kwidth_of(layout), config, out=y)
            kind = "scaled weights" if triton.prescaled(group, block_m) else "sums"
            worst[kind] = max(worst[kind], relative_error(x.double() @ values.double().T, y))
    yield true("decoded weights are exact to the last bit", exact_decodes)
    yield measured("scales on sums: relative error, float32 result", worst["sums"], "", "<= 0.00002")
    yield measured(
        "scales on weights: relative error, float32 result", worst["scaled weights"], "", "<= 0.006"
    )


def _repeatable() -> Iterator[Measurement]:
    """The same bits in fifty runs: programs that share K would show a race here."""
    from compress.kernels.w4_matmul import triton

    layout = layout_for(gpu_of(0).capability)
    _, packed = random_weight(
        4096, 4096, _GROUP, layout, zero_points=True, scales=torch.bfloat16, device=DEVICE
    )
    x = torch.randn(16, 4096, device=DEVICE, dtype=torch.bfloat16)
    go = functools.partial(triton.launch, x, *packed, kwidth_of(layout), Config(16, 64, 4, 3, 8))
    first = go()
    yield true("split sums are the same bits in 50 runs", all(torch.equal(first, go()) for _ in range(50)))
    go()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [go() for _ in range(4)]
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    yield true("and in a CUDA graph", all(torch.equal(first, y) for y in captured))


def _sparse_right() -> Iterator[Measurement]:
    """The sparse instruction against float64, for one and two blocks of x, with and without split sums."""
    from compress.kernels.w4_sparse24_matmul import triton

    yield true("the sparse instruction is as documented", all(instruction_is_right(0, d) for d in DTYPES))
    worst, same, exact_decodes = 0.0, True, True
    launches = itertools.cycle([(1, 1), (8, 2), (9, 1), (16, 4), (33, 1)])
    for (rows, columns), zero_points, dtype in itertools.product(
        [(4096, 4096), (70, 600), (33, 100)], (False, True), DTYPES
    ):
        for scales in (torch.float32, dtype):
            packed = _sparse_weight(rows, columns, zero_points, scales)
            codes, metadata, spread, words = packed
            values = reference.decoded(*packed, _SPARSE_GROUP, columns, "sp24").double()
            assert metadata is not None
            decoded = triton.decoded(codes, metadata, spread, words, columns, dtype)
            exact_decodes &= torch.equal(decoded, values.to(dtype))
            for m, split in itertools.islice(launches, 2):
                x = torch.randn(m, columns, device=DEVICE, dtype=dtype)
                first, second = (torch.full((m, rows), torch.nan, device=DEVICE) for _ in range(2))
                for y in (first, second):
                    triton.launch(x, codes, metadata, spread, words, min(split, len(spread)), out=y)
                worst = max(worst, relative_error(x.double() @ values.T, first))
                same &= torch.equal(first, second)
    yield measured("2:4: relative error", worst, "", "<= 0.00002")
    yield true("2:4: the same bits twice", same)
    yield true("2:4: decoded weights are exact to the last bit", exact_decodes)


def _blocks_right() -> Iterator[Measurement]:
    """Weights with zero blocks against float64: all kept, and in turn a row of all, none, and every other."""
    from compress.kernels.w4_bsr_matmul import triton

    worst = {"sums": 0.0, "scaled weights": 0.0}
    same = True
    launches = itertools.cycle([(1, 1), (40, 2), (16, 1), (33, 4), (5, 2), (17, 1), (64, 1)])
    for (rows, columns), group_size, zero_points, dtype in itertools.product(
        [(4096, 4096), (130, 600)], (32, 64, 128), (False, True), DTYPES
    ):
        grid = torch.ones(math.ceil(rows / bsr.ROWS), math.ceil(columns / bsr.COLUMNS), dtype=torch.bool)
        some = grid.clone()
        some[1::3], some[2::3, ::2] = False, False
        for used, layout in itertools.product((grid, some), bsr.LAYOUTS[1:]):
            canonical, packed = random_blocks(
                rows, columns, group_size, layout, DEVICE, used=used.to(DEVICE), zero_points=zero_points
            )
            values = _values(canonical, group_size, columns).double()
            codes, rowptr, colidx, scales, words = packed
            assert rowptr is not None and colidx is not None
            blocks = triton.Blocks(codes, rowptr, colidx, scales, words, kwidth_of(layout))
            for m, split in itertools.islice(launches, 2):
                x = torch.randn(m, columns, device=DEVICE, dtype=dtype)
                config = Config(next(b for b in BLOCK_M if m <= b), 64, 4, 3, split)
                first, second = (torch.full((m, rows), torch.nan, device=DEVICE) for _ in range(2))
                for y in (first, second):
                    triton.launch(x, blocks, config, out=y)
                kind = "scaled weights" if triton.prescaled(blocks.group, config.block_m) else "sums"
                worst[kind] = max(worst[kind], relative_error(x.double() @ values.T, first))
                same &= torch.equal(first, second)
            lost = relative_error(values, triton.decoded(blocks, columns, dtype))
            worst["scaled weights"] = max(worst["scaled weights"], lost)
    yield measured("blocks, scales on sums: relative error", worst["sums"], "", "<= 0.00002")
    yield measured("blocks, scales on weights: relative error", worst["scaled weights"], "", "<= 0.006")
    yield true("blocks: the same bits twice", same)


def _int8_right() -> Iterator[Measurement]:
    """8-bit activations, of other ranges in each row, against float64; whole rows and groups."""
    from compress.kernels.w4a8_matmul import triton

    worst, same = 0.0, True
    launches = itertools.cycle([(1, 1), (40, 2), (16, 4), (33, 1), (5, 2), (64, 1), (300, 1)])
    for (rows, columns), group_size in itertools.product(
        [(4096, 4096), (130, 600), (33, 99)], (64, 128, 1 << 16)
    ):
        canonical, packed = random_int8(rows, columns, min(group_size, columns), DEVICE)
        values = _values(canonical, min(group_size, columns), columns).double()
        for m, split in itertools.islice(launches, 3):
            x = torch.randint(-128, 128, (m, columns), dtype=torch.int8, device=DEVICE)
            scales = torch.rand(m, device=DEVICE) + 0.5
            zeros = torch.randint(-128, 128, (m,), dtype=torch.int32, device=DEVICE)
            config = Config(next((b for b in BLOCK_M if m <= b), 64), 64, 4, 3, split)
            first, second = (torch.full((m, rows), torch.nan, device=DEVICE) for _ in range(2))
            for y in (first, second):
                triton.launch(x, scales, zeros, triton.Packed(*packed), config, out=y)
            exact = (x.double() - zeros[:, None]) * scales.double()[:, None] @ values.T
            worst = max(worst, relative_error(exact, first))
            same &= torch.equal(first, second)
    yield measured("8-bit activations: relative error", worst, "", "<= 0.00002")
    yield true("8-bit activations: the same bits twice", same)


def _sparse_weight(rows: int, columns: int, zero_points: bool, scales: torch.dtype) -> Packed:
    make = functools.partial(random_sparse24, rows, columns, _SPARSE_GROUP, device=DEVICE)
    return make(zero_points=zero_points, scales=scales)[1]


def _values(canonical: Weight, group_size: int, columns: int) -> Tensor:
    codes, scales, zeros = canonical
    return dequantize(codes, scales.float(), zeros, 4, group_size, [scales.shape[0], columns])


# -- fast -----------------------------------------------------------------------------------------


def _sanitized() -> Iterator[Measurement]:
    """Reads and writes out of bounds, of small products by every kernel."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield measured("compute-sanitizer", "not installed")
        return
    script = Path(__file__).resolve().parent.parent / "sanitized.py"
    words = [program, "--error-exitcode", "9", sys.executable, "-P", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    yield true("compute-sanitizer finds nothing", done.returncode == 0)


def _limits() -> Iterator[Measurement]:
    """What the machine gives: copies, matrix products, and a launch that does nothing."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    small = torch.zeros(1, device=DEVICE)
    out, to = torch.empty_like(square), torch.empty_like(big)
    times = seconds(
        {
            "copy": [lambda: to.copy_(big)],
            "matmul": [lambda: torch.mm(square, square, out=out)],
            "launch": [lambda: small.add_(1)] * 100,
        }
    )
    yield measured("copy of 1 GiB: read and written", 2 * big.numel() / times["copy"] / 1e12, "TB/s")
    yield measured("cuBLAS bfloat16, 8192 cubed", 2 * 8192**3 / times["matmul"] / 1e12, "TFLOP/s")
    yield measured("an add of one element, in a graph", times["launch"] * 1e6, "us")


def _fast(quick: bool) -> Iterator[Measurement]:
    for rows, columns in SHAPES[:1] if quick else SHAPES:
        for m in (1, 16) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            yield from _beside(rows, columns, m)


def _beside(rows: int, columns: int, m: int) -> Iterator[Measurement]:
    """One product by everybody; float weights are as large as four packed ones, so fewer are needed."""
    x = torch.randn(m, columns, device=DEVICE, dtype=torch.bfloat16)
    layout = layout_for(gpu_of(0).capability)
    packed_count, float_count = (copies(rows * columns * bits // 8, DEVICE) for bits in (4, 16))
    contenders: dict[str, list[Callable[[], Any]]] = {}
    floats = [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(float_count)]
    contenders["cuBLAS"] = [functools.partial(torch.nn.functional.linear, x, w) for w in floats]
    for zero_points in (False, True):
        weights = [
            random_weight(
                rows, columns, _GROUP, layout,
                zero_points=zero_points, scales=torch.bfloat16, device=DEVICE,
            )[1]
            for _ in range(packed_count)
        ]  # fmt: skip
        contenders["ours, zero points" if zero_points else "ours"] = [
            functools.partial(w4_matmul, x, *w, _GROUP, columns, layout) for w in weights
        ]
    sparse = [_sparse_weight(rows, columns, True, torch.bfloat16) for _ in range(packed_count)]
    contenders["ours, 2:4 in groups of 32"] = [
        functools.partial(w4_sparse24_matmul, x, *w, _SPARSE_GROUP, columns, "sp24") for w in sparse
    ]
    layout = bsr.layout_for(gpu_of(0).capability)
    halves = [random_blocks(rows, columns, _GROUP, layout, DEVICE)[1] for _ in range(2 * packed_count)]
    contenders["ours, half of the blocks zero"] = [
        functools.partial(w4_bsr_matmul, x, *w, _GROUP, columns, layout) for w in halves
    ]
    wide = x.float()
    integers = [random_int8(rows, columns, columns, DEVICE)[1] for _ in range(packed_count)]
    contenders["ours, 8-bit activations, rounding included"] = [
        functools.partial(_rounded_product, wide, *w, columns) for w in integers
    ]
    for name, peer in (("tinygemm", _tinygemm), ("gemlite", _gemlite)):
        try:
            calls = peer(x, rows, columns, packed_count)
            calls[0]()
            contenders[name] = calls
        except Exception as error:  # whatever ails a peer, the others are measured
            print(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    times = seconds(contenders)
    shape = f"{rows} x {columns}, {m} rows"
    weight_bytes = rows * columns * (4 + 16 / _GROUP) / 8
    yield measured(f"{shape}: cuBLAS bfloat16", times["cuBLAS"] * 1e6, "us")
    yield measured(f"{shape}: ours", times["ours"] * 1e6, "us")
    yield measured(f"{shape}: ours, packed weights read", weight_bytes / times["ours"] / 1e12, "TB/s")
    for name in contenders:
        if name != "cuBLAS":
            yield measured(f"{shape}: {name}, speed against cuBLAS", times["cuBLAS"] / times[name], "x")


def _rounded_product(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, columns: int) -> Tensor:
    """Float32 activations rounded to 8 bits, then multiplied."""
    return w4a8_matmul(*quantize_dynamic(x), codes, scales, sums, columns, columns, "frag8")


def _tinygemm(x: Tensor, rows: int, columns: int, count: int) -> list[Callable[[], Any]]:
    """torch's own int4 product, bfloat16 with scales and zero points."""
    calls = []
    for _ in range(count):
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // _GROUP, rows, 2, device=DEVICE, dtype=torch.bfloat16)
        calls.append(functools.partial(torch.ops.aten._weight_int4pack_mm, x, packed, _GROUP, scales))
    return calls


def _gemlite(x: Tensor, rows: int, columns: int, count: int) -> list[Callable[[], Any]]:
    """gemlite (Triton), in float16, the dtype it is tuned for."""
    from gemlite.core import DType, GemLiteLinear

    x = x.half()
    calls = []
    for _ in range(count):
        layer = GemLiteLinear(
            4,
            group_size=_GROUP,
            in_features=columns,
            out_features=rows,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(rows * columns // _GROUP, 1, device=DEVICE, dtype=torch.float16)
        zeros = torch.full_like(scales, 8)
        layer.pack(codes, scales, zeros, None)
        calls.append(functools.partial(layer, x))
    return calls
