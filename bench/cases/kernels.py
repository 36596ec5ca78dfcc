"""4-bit products on a GPU: are they right, and how fast are they beside what there is.

Correctness is against float64, over odd sizes, with outputs filled with NaN before, and repeated for races.
Times are of CUDA graphs over so many weights that none comes from the cache, all contenders in turn:
cuBLAS in bfloat16, torch's `_weight_int4pack_mm` (tinygemm), and gemlite where it is installed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import Measurement, Setup, measured, true
from compress.encoding import dequantize
from compress.encoding import pack as pack_bits
from compress.kernels.timing import copies, seconds
from compress.kernels.tune import SHAPES, Weight, random_weight
from compress.kernels.tuning import BLOCK_M, Config, gpu_of
from compress.kernels.w4_matmul.layout import LAYOUTS, kwidth_of, layout_for
from compress.kernels.w4_matmul.op import w4_matmul
from compress.kernels.w4_sparse24_matmul import reference
from compress.kernels.w4_sparse24_matmul.layout import Packed
from compress.kernels.w4_sparse24_matmul.layout import pack as sparse_pack
from compress.kernels.w4_sparse24_matmul.op import instruction_is_right, w4_sparse24_matmul

_DEVICE = torch.device("cuda", 0)
_GROUP = 128
_SPARSE_GROUP = 32
_DTYPES = (torch.bfloat16, torch.float16)


def run(setup: Setup) -> list[Measurement]:
    """Correctness first: a wrong kernel has no speed."""
    found = [*_right(setup.quick), *_repeatable(), *_sparse_right()]
    if all(m.holds is not False for m in found):
        found += _limits()
        found += _fast(setup.quick)
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
    formats = [*itertools.product((16, 32, 64, 128), (False, True), [own], _DTYPES, (False, True))]
    if quick:  # each combination is another program to compile
        formats = formats[::3]
    formats += [(128, True, other, torch.bfloat16, True) for other in LAYOUTS[1:] if other != own]
    launches = itertools.cycle([(1, 1), (40, 2), (16, 1), (33, 1), (5, 2), (17, 1), (18, 2)])
    for (group_size, zero_points, layout, dtype, wide), (rows, columns) in itertools.product(formats, shapes):
        scales = torch.float32 if wide else dtype
        canonical, packed = random_weight(
            rows, columns, group_size, layout, zero_points=zero_points, scales=scales, device=_DEVICE
        )
        values = _values(canonical, group_size, columns)
        if not wide:
            decoded = triton.decoded(*packed, columns, kwidth_of(layout), dtype)
            exact_decodes &= torch.equal(decoded, values.to(dtype))
        group = packed[0].shape[1] * 64 // (packed[1].shape[0] * packed[1].shape[2])
        for m, split in itertools.islice(launches, 2):
            x = torch.randn(m, columns, device=_DEVICE, dtype=dtype)
            y = torch.full((m, rows), torch.nan, device=_DEVICE)
            block_m = next(b for b in BLOCK_M if m <= b)
            config = Config(block_m, 64, 4, 2, min(split, packed[1].shape[0]))
            triton.launch(x, *packed, kwidth_of(layout), config, out=y)
            kind = "scaled weights" if triton.prescaled(group, block_m) else "sums"
            worst[kind] = max(worst[kind], _error(y, x.double() @ values.double().T))
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
        4096, 4096, _GROUP, layout, zero_points=True, scales=torch.bfloat16, device=_DEVICE
    )
    x = torch.randn(16, 4096, device=_DEVICE, dtype=torch.bfloat16)
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

    yield true("the sparse instruction is as documented", all(instruction_is_right(0, d) for d in _DTYPES))
    worst, same = 0.0, True
    launches = itertools.cycle([(1, 1), (8, 2), (9, 1), (16, 4), (33, 1)])
    for (rows, columns), zero_points, dtype in itertools.product(
        [(4096, 4096), (70, 600), (33, 100)], (False, True), _DTYPES
    ):
        for scales in (torch.float32, dtype):
            packed = _sparse_weight(rows, columns, zero_points, scales)
            codes, metadata, spread, words = packed
            values = reference.decoded(*packed, _SPARSE_GROUP, columns, "sp24").double()
            assert metadata is not None
            for m, split in itertools.islice(launches, 2):
                x = torch.randn(m, columns, device=_DEVICE, dtype=dtype)
                first, second = (torch.full((m, rows), torch.nan, device=_DEVICE) for _ in range(2))
                for y in (first, second):
                    triton.launch(x, codes, metadata, spread, words, min(split, len(spread)), out=y)
                worst = max(worst, _error(first, x.double() @ values.T))
                same &= torch.equal(first, second)
    yield measured("2:4: relative error", worst, "", "<= 0.00002")
    yield true("2:4: the same bits twice", same)


def _sparse_weight(rows: int, columns: int, zero_points: bool, scales: torch.dtype) -> Packed:
    """A random weight with two of every four zero, in the layout of the sparse tensor cores."""
    groups, padded = math.ceil(columns / _SPARSE_GROUP), math.ceil(columns / 64) * 64
    zeros = torch.randint(0, 16, (rows, padded // _SPARSE_GROUP), dtype=torch.uint8, device=_DEVICE)
    if not zero_points:
        zeros.fill_(8)
    codes = torch.randint(0, 16, (rows, padded // 4, 4), dtype=torch.uint8, device=_DEVICE)
    gone = torch.rand(codes.shape, device=_DEVICE).argsort(-1)[..., :2]
    filled = zeros.repeat_interleave(_SPARSE_GROUP // 4, 1).unsqueeze(-1).expand_as(gone)
    codes = codes.scatter(-1, gone, filled).flatten(1)[:, :columns]
    spread = (torch.rand(rows, groups, device=_DEVICE) * 0.02 + 0.01).to(scales)
    words = pack_bits(zeros[:, :groups], 4) if zero_points else None
    return sparse_pack(pack_bits(codes, 4), spread, words, _SPARSE_GROUP, columns, "sp24")


def _values(canonical: Weight, group_size: int, columns: int) -> Tensor:
    codes, scales, zeros = canonical
    return dequantize(codes, scales.float(), zeros, 4, group_size, [scales.shape[0], columns])


def _error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


# -- fast -----------------------------------------------------------------------------------------


def _limits() -> Iterator[Measurement]:
    """What the machine gives: copies, matrix products, and a launch that does nothing."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device=_DEVICE)
    square = torch.randn(8192, 8192, device=_DEVICE, dtype=torch.bfloat16)
    small = torch.zeros(1, device=_DEVICE)
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
    x = torch.randn(m, columns, device=_DEVICE, dtype=torch.bfloat16)
    layout = layout_for(gpu_of(0).capability)
    packed_count, float_count = (copies(rows * columns * bits // 8, _DEVICE) for bits in (4, 16))
    contenders: dict[str, list[Callable[[], Any]]] = {}
    floats = [torch.randn(rows, columns, device=_DEVICE, dtype=torch.bfloat16) for _ in range(float_count)]
    contenders["cuBLAS"] = [functools.partial(torch.nn.functional.linear, x, w) for w in floats]
    for zero_points in (False, True):
        weights = [
            random_weight(
                rows, columns, _GROUP, layout,
                zero_points=zero_points, scales=torch.bfloat16, device=_DEVICE,
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


def _tinygemm(x: Tensor, rows: int, columns: int, count: int) -> list[Callable[[], Any]]:
    """torch's own int4 product, bfloat16 with scales and zero points."""
    calls = []
    for _ in range(count):
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=_DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // _GROUP, rows, 2, device=_DEVICE, dtype=torch.bfloat16)
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
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=_DEVICE)
        scales = torch.rand(rows * columns // _GROUP, 1, device=_DEVICE, dtype=torch.float16)
        zeros = torch.full_like(scales, 8)
        layer.pack(codes, scales, zeros, None)
        calls.append(functools.partial(layer, x))
    return calls
