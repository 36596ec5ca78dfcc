"""Heads in codes and chains of two small layers on a GPU: are they right, and how fast are they.

Part of the case `kernels`, whose words on how it is done hold here too. Beside heads stand the dense one and
their own operators one by one, beside chains two products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.measure import Measurement, measured, true
from compress.kernels.low_rank_matmul import cost
from compress.kernels.low_rank_matmul.reference import low_rank_matmul as two_products
from compress.kernels.timing import copies, seconds
from compress.kernels.vq_logits import reference as vq_reference
from compress.kernels.vq_logits.op import vq_logits
from compress.numerics import relative_error

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16)


def float_right() -> Iterator[Measurement]:
    """Against float64, in outputs filled with NaN before."""
    yield from _heads_right()
    yield from _chains_right()


def float_fast(quick: bool) -> Iterator[Measurement]:
    """In CUDA graphs, from other weights each time."""
    yield from _heads_fast(quick)
    yield from _chains_fast(quick)


# -- heads in codes -------------------------------------------------------------------------------

Codes = tuple[Tensor, Tensor, list[int], Tensor]


def _codes(tokens: int, columns: int, sizes: list[int], dtype: torch.dtype) -> Codes:
    """Codebooks, codes, sizes of the codebooks, and biases of tokens."""
    make = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    maps = torch.stack([torch.randint(0, size, (tokens,), device=DEVICE) for size in sizes])
    codes = maps.to(torch.uint8 if max(sizes) <= 256 else torch.int16)
    return make(sum(sizes), columns), codes, sizes, make(tokens)


def _dense(tokens: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and biases of a dense head."""
    make = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    return make(tokens, columns), make(tokens)


def _heads_right() -> Iterator[Measurement]:
    """Coarse logits against float64; that as many as asked for are exact, and none smaller than one left."""
    from compress.kernels.vq_logits import triton

    worst, exact_worst, chosen = 0.0, {"float32": 0.0, "16 bits": 0.0}, True
    for (tokens, columns, sizes), m, dtype in itertools.product(
        [(32000, 512, [256] * 4), (129, 1100, [40, 9]), (5003, 96, [1256, 256])],
        (1, 3, 17),
        (torch.float32, *DTYPES),
    ):
        codes, (rows, bias) = _codes(tokens, columns, sizes, dtype), _dense(tokens, columns, dtype)
        x = torch.randn(m, columns, device=DEVICE, dtype=dtype)
        books, picks = codes[0].double().split(sizes), codes[1].int()
        right = sum((x.double() @ b.T).index_select(1, p) for b, p in zip(books, picks, strict=True))
        y = torch.full((m, tokens), torch.nan, device=DEVICE)
        triton.launch(x, *codes, None, None, 0, out=y)
        worst = max(worst, relative_error(right + codes[3].double(), y))
        count = min(100, tokens // 2)
        rough = vq_logits(x, *codes, None, None, 0)
        both = vq_logits(x, *codes, rows, bias, count)
        # in 16 bits the exact logit of a candidate may be its coarse one
        slack, kind = (0, "float32") if dtype == torch.float32 else (5, "16 bits")
        exact = x.double() @ rows.double().T + bias.double()
        for coarse, fine, dense in zip(rough, both, exact, strict=True):
            inside = coarse != fine
            chosen &= count - slack <= int(inside.sum()) <= count
            chosen &= bool(coarse[inside].min() >= coarse[~inside].topk(slack + 1).values[-1])
            exact_worst[kind] = max(exact_worst[kind], relative_error(dense[inside], fine[inside]))
    yield measured("heads in codes: relative error, float32 result", worst, "", "<= 0.00002")
    for kind, limit in (("float32", "<= 0.00001"), ("16 bits", "<= 0.006")):
        yield measured(f"candidates, {kind}: relative error of exact logits", exact_worst[kind], "", limit)
    yield true("candidates: the tokens of the largest coarse logits", chosen)


def _heads_fast(quick: bool) -> Iterator[Measurement]:
    """One position's logits, from other weights each time, beside the dense head and plain operators."""
    for (tokens, columns), m in itertools.product(
        [(32000, 4096), (128256, 4096)][: 1 if quick else 2], (1, 8)
    ):
        x = torch.randn(m, columns, device=DEVICE, dtype=torch.bfloat16)
        dense = [_dense(tokens, columns, torch.bfloat16) for _ in range(copies(2 * tokens * columns, DEVICE))]
        # with other codes there are other candidates: other rows of a dense head are read each time
        coded = [
            _codes(tokens, columns, [256] * 4, torch.bfloat16)
            for _ in range(copies(2 * 4 * 256 * columns + 4 * tokens, DEVICE))
        ]
        heads = list(zip(coded, itertools.cycle(dense)))
        times = seconds(
            {
                "cuBLAS": [functools.partial(torch.nn.functional.linear, x, *d) for d in dense],
                "codes": [functools.partial(vq_logits, x, *c, None, None, 0) for c in coded],
                "codes, plain operators": [
                    functools.partial(vq_reference.vq_logits, x, *c, None, None, 0) for c in coded
                ],
                "256 candidates": [functools.partial(vq_logits, x, *c, *d, 256) for c, d in heads],
                "256 candidates, plain operators": [
                    functools.partial(vq_reference.vq_logits, x, *c, *d, 256) for c, d in heads
                ],
            }
        )
        shape = f"head {tokens} x {columns}, {m} rows"
        yield measured(f"{shape}: cuBLAS bfloat16", times["cuBLAS"] * 1e6, "us")
        for name in list(times)[1:]:
            yield measured(f"{shape}: {name}", times[name] * 1e6, "us")
            yield measured(f"{shape}: {name}, speed against cuBLAS", times["cuBLAS"] / times[name], "x")


# -- chains of two small layers -------------------------------------------------------------------


def _factors(outputs: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    make = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    return make(rank, columns), make(outputs, rank), make(outputs)


def _chains_right() -> Iterator[Measurement]:
    """Against float64, with what is between the factors rounded as a layer would."""
    from compress.kernels.low_rank_matmul import triton

    worst = 0.0
    shapes = [(4096, 4096, 16), (512, 512, 128), (130, 200, 7), (33, 17, 1)]
    for (outputs, columns, rank), m, dtype in itertools.product(shapes, (1, 5, 16), DTYPES):
        first, last, bias = _factors(outputs, columns, rank, dtype)
        x = torch.randn(m, columns, device=DEVICE, dtype=dtype)
        middle = (x.double() @ first.double().T).to(dtype).double()
        y = torch.full((m, outputs), torch.nan, device=DEVICE)
        triton.launch(x, first, last, bias, out=y)
        worst = max(worst, relative_error(middle @ last.double().T + bias.double(), y))
    # sums in another order round to another number now and then
    yield measured("chains: relative error, float32 result", worst, "", "<= 0.001")


def _chains_fast(quick: bool) -> Iterator[Measurement]:
    """One launch beside two products, on both sides of where the model of `cost` sees them equal."""
    from compress.kernels.low_rank_matmul import triton

    shapes = [(4096, 4096, rank) for rank in (8, 16, 32, 64)] + [(14336, 4096, 16), (512, 512, 128)]
    for (outputs, columns, rank), m in itertools.product(shapes[: 2 if quick else None], (1, 16)):
        x = torch.randn(m, columns, device=DEVICE, dtype=torch.bfloat16)
        count = copies(2 * rank * (outputs + columns), DEVICE)
        made = [_factors(outputs, columns, rank, torch.bfloat16) for _ in range(count)]
        times = seconds(
            {
                "one": [functools.partial(triton.launch, x, *f) for f in made],
                "two": [functools.partial(two_products, x, *f) for f in made],
            }
        )
        shape = f"chain {outputs} x {rank} x {columns}, {m} rows"
        chosen = "one launch" if cost.pays(m, outputs, columns, rank) else "two products"
        yield measured(f"{shape}: two products", times["two"] * 1e6, "us")
        ratio = times["two"] / times["one"]
        yield measured(f"{shape}: one launch, speed against them ({chosen} chosen)", ratio, "x")
