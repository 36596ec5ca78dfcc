"""The Triton kernels of `compress::vq_logits` in Triton's interpreter, beside float64.

Not collected by itself: `tests/kernels/test_triton.py` runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.kernels.vq_logits import plugin
from compress.kernels.vq_logits import triton as kernels
from compress.numerics import relative_error


def head(
    tokens: int, columns: int, sizes: list[int], dtype: torch.dtype, codes: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codebooks, codes, biases of tokens, and the rows and biases of a dense head."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(sum(sizes), columns, generator=generator).to(dtype)
    maps = torch.stack([torch.randint(0, size, (tokens,), generator=generator) for size in sizes]).to(codes)
    token_bias, bias = (torch.randn(tokens, generator=generator).to(dtype) for _ in range(2))
    return codebook, maps, token_bias, torch.randn(tokens, columns, generator=generator).to(dtype), bias


def coarse(x: Tensor, codebook: Tensor, codes: Tensor, sizes: list[int], token_bias: Tensor | None) -> Tensor:
    """Logits in float64, one token at a time."""
    books = codebook.double().split(sizes)
    rows = []
    for v in range(codes.shape[1]):
        row = sum((books[s][int(codes[s, v])] for s in range(len(sizes))), torch.zeros(1).double())
        rows.append(x.double() @ row + (0 if token_bias is None else float(token_bias[v])))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("m", "tokens", "columns", "sizes", "dtype", "codes", "biased"),
    [
        (1, 700, 24, [7], torch.float32, torch.uint8, True),
        (1, 513, 33, [5, 4, 4, 3], torch.bfloat16, torch.uint8, True),
        (3, 300, 20, [300, 8], torch.float16, torch.int16, False),
        (5, 129, 17, [40, 9, 9], torch.float32, torch.int32, True),
        (19, 130, 16, [6, 6], torch.bfloat16, torch.uint8, False),
    ],
)
def test_codes(
    m: int,
    tokens: int,
    columns: int,
    sizes: list[int],
    dtype: torch.dtype,
    codes: torch.dtype,
    biased: bool,
) -> None:
    codebook, maps, bias, _, _ = head(tokens, columns, sizes, dtype, codes, m)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.full((m, tokens), float("nan"))
    given = bias if biased else None
    kernels.launch(x, codebook, maps, sizes, given, None, None, 0, out=y)
    assert relative_error(coarse(x, codebook, maps, sizes, given), y) < 1e-6
    rounded = kernels.vq_logits(x, codebook, maps, sizes, given, None, None, 0)
    assert rounded.dtype == dtype
    assert relative_error(y, rounded) < (1e-7 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize(("sizes", "codes"), [([8, 6, 6], torch.uint8), ([300, 8], torch.int16)])
def test_arguments_in_the_order_of_a_plugin(sizes: list[int], codes: torch.dtype) -> None:
    """Inputs, whole numbers, output: what a host passes, and no more; products are float16."""
    m, tokens, columns = 5, 701, 24
    codebook, maps, bias, _, _ = head(tokens, columns, sizes, torch.float16, codes, 3)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1)).half()
    products = (codebook.float() @ x.float().T).half()
    words, biases = plugin.packed(maps, sizes, bias)
    assert words.dtype == torch.int32 and words.numel() == -(-maps.numel() * codes.itemsize // 4)
    for rows, block, _ in plugin.CONFIGS:
        y = torch.full((m, tokens), float("nan"), dtype=torch.float16)
        given = (products, words.view(codes), biases, m, tokens, y)
        fixed = {"BM": rows, "BV": block, "BIAS": True, "SUB": 0}
        starts = tuple(sum(sizes[:stage]) for stage in range(len(sizes)))
        plugin.plugin_kernel[(-(-tokens // block), -(-m // rows))](*given, STARTS=starts, **fixed)
        picked = [p[c.long()] for p, c in zip(products.double().split(sizes), maps, strict=True)]
        exact = torch.stack(picked).sum(0).T + bias.double()
        assert relative_error(exact, y) < 4e-4, "one rounding to float16"
        assert relative_error(coarse(x, codebook, maps, sizes, bias), y) < 2e-3


@pytest.mark.parametrize(
    ("m", "tokens", "candidates", "dtype", "biased"),
    [
        (1, 900, 9, torch.float32, True),
        (3, 257, 16, torch.float32, False),
        (1, 70, 69, torch.float32, True),
        (1, 32, 32, torch.float32, False),
        (18, 140, 1, torch.float16, True),
        (2, 333, 21, torch.bfloat16, True),
    ],
)
def test_candidates(m: int, tokens: int, candidates: int, dtype: torch.dtype, biased: bool) -> None:
    sizes, columns = [12, 10], 1030 if m == 1 else 24  # more than one program takes at a time
    codebook, maps, token_bias, rows, bias = head(tokens, columns, sizes, dtype, torch.uint8, tokens)
    if not biased:
        token_bias, bias = token_bias.zero_(), torch.zeros_like(bias)  # tokens of equal codes tie
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    rough = kernels.vq_logits(x, codebook, maps, sizes, token_bias, None, None, 0)
    y = kernels.vq_logits(x, codebook, maps, sizes, token_bias, rows, bias if biased else None, candidates)
    exact = x.double() @ rows.double().T + bias.double()
    for row in range(m):
        changed = y[row] != rough[row]
        assert int(changed.sum()) == candidates
        assert relative_error(exact[row, changed], y[row, changed]) < (
            1e-6 if dtype == torch.float32 else 6e-3
        )
        if candidates < tokens:
            assert rough[row, changed].min() >= rough[row, ~changed].max()


@pytest.mark.parametrize("seed", range(2))
def test_selection_of_any_numbers(seed: int) -> None:
    """Ties, infinities, zeros of both signs: as many as asked for, none smaller than one left out."""
    generator = torch.Generator().manual_seed(seed)
    tokens, candidates = 150 + seed, 20 + seed
    y = torch.randint(-4, 5, (2, tokens), generator=generator).float()
    y[0, ::7], y[0, 1::5], y[1, ::11] = -0.0, float("-inf"), float("inf")
    y[1, 3::2] = 1e-40  # subnormal
    sub = kernels.subtile(tokens, candidates)
    assert sub > 1
    padded = torch.nn.functional.pad(y, (0, -tokens % sub), value=float("-inf"))
    chosen = kernels.selected(y, padded.unflatten(1, (-1, sub)).amax(-1), candidates, sub)
    for row in range(2):
        found = y[row, chosen[row].long()]
        assert len(set(chosen[row].tolist())) == candidates
        assert torch.equal(found.sort().values, y[row].topk(candidates).values.flip(0))


def test_too_many_candidates_are_found_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SELECTED", 16)
    assert kernels.subtile(100, 30) == 0
    sizes = [8, 8]
    codebook, maps, token_bias, rows, _ = head(100, 20, sizes, torch.float32, torch.uint8, 0)
    x = torch.randn(2, 20)
    y = kernels.vq_logits(x, codebook, maps, sizes, token_bias, rows, None, 30)
    exact = (x @ rows.T).isclose(y, atol=1e-4)
    assert exact.sum(1).tolist() == [30, 30]


def test_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, maps, token_bias, rows, _ = head(40, 8, [4, 4], torch.float32, torch.uint8, 0)
    x = torch.randn(5, 8)
    arguments = (codebook, maps, [4, 4], token_bias, rows, None, 3)
    whole = kernels.vq_logits(x, *arguments)
    monkeypatch.setattr(kernels, "ROWS", 2)
    torch.testing.assert_close(kernels.vq_logits(x, *arguments), whole)


def test_tensors_with_strides() -> None:
    given = head(60, 8, [4, 4], torch.float32, torch.uint8, 0)
    strided = [torch.stack([t, t], -1)[..., 0] for t in given]
    x = torch.randn(2, 8)
    (codebook, maps, token_bias, rows, bias), (a, b, c, d, e) = given, strided
    whole = kernels.vq_logits(x, codebook, maps, [4, 4], token_bias, rows, bias, 5)
    assert torch.equal(kernels.vq_logits(x, a, b, [4, 4], c, d, e, 5), whole)
    strided_x = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(kernels.launch(strided_x, a, b, [4, 4], c, d, e, 5), whole)


def test_no_rows() -> None:
    codebook, maps, token_bias, _, _ = head(30, 8, [4], torch.float32, torch.uint8, 0)
    assert kernels.vq_logits(torch.ones(0, 8), codebook, maps, [4], token_bias, None, None, 0).shape == (
        0,
        30,
    )
