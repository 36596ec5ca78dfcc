"""`compress::vq_logits`, the operator: the reference on the CPU, Triton on a GPU."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from compress.errors import PassError
from compress.kernels.vq_logits import reference

_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("compress::vq_logits", mutates_args=())
def vq_logits(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> Tensor:
    """Logits of a head in codes; with `rows`, the first candidates among them are computed exactly.

    ``z_v = sum_j codebook_j[codes[j, v]] . x + token_bias_v`` (arXiv 2505.10202), and, where `rows` is given,
    ``z_v = rows_v . x + bias_v`` for the `candidates` tokens of largest ``z_v`` (SVD-softmax, Shim et al.
    2017). Which of equal logits are candidates is not defined.

    Args:
        x: ``[..., N]``, a floating-point tensor.
        codebook: ``[E, N]``, the codebooks of all stages one below the other, in the dtype of `x`.
        codes: integers ``[stages, V]``: for each token its entry in the codebook of each stage.
        sizes: entries of each codebook, E together.
        token_bias: ``[V]``, or None.
        rows: ``[V, N]``, the dense head, in the dtype of `x`; None for none.
        bias: ``[V]``, of the dense head, or None.
        candidates: tokens whose logits are exact, at most V; 0 without `rows`.

    Returns:
        ``[..., V]`` in the dtype of `x`; sums are taken in float32.

    Raises:
        PassError: the sizes do not fit one another.
    """
    _check(x, codebook, codes, sizes, token_bias, rows, bias, candidates)
    return reference.vq_logits(x, codebook, codes, sizes, token_bias, rows, bias, candidates)


@vq_logits.register_fake
def _(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> Tensor:
    _check(x, codebook, codes, sizes, token_bias, rows, bias, candidates)
    return x.new_empty(*x.shape[:-1], codes.shape[1])


@vq_logits.register_kernel("cuda")
def on_gpu(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> Tensor:
    """The same, on a GPU; without Triton, by the operators of the reference."""
    _check(x, codebook, codes, sizes, token_bias, rows, bias, candidates)
    if x.dtype not in _ON_GPU or importlib.util.find_spec("triton") is None:
        return reference.vq_logits(x, codebook, codes, sizes, token_bias, rows, bias, candidates)
    from compress.kernels.vq_logits import triton

    with torch.cuda.device(x.device):
        return triton.vq_logits(x, codebook, codes, sizes, token_bias, rows, bias, candidates)


def _check(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> None:
    if x.shape[-1] != codebook.shape[1]:
        raise PassError(
            f"x has {x.shape[-1]} columns, the codebooks have {codebook.shape[1]}", expected="as many"
        )
    if len(sizes) != codes.shape[0] or sum(sizes) != codebook.shape[0]:
        raise PassError(
            f"codebooks of {sizes} entries, and {codebook.shape[0]} entries for {codes.shape[0]} stages",
            expected="one codebook for each stage, and all entries in them",
        )
    if (rows is None) != (candidates == 0) or not 0 <= candidates <= codes.shape[1]:
        given = "without" if rows is None else "with"
        raise PassError(
            f"{candidates} candidates of {codes.shape[1]} tokens, {given} rows",
            expected="at most as many as tokens, and none without the rows of the dense head",
        )
    tokens, columns = codes.shape[1], codebook.shape[1]
    for name, tensor, shape in (
        ("token_bias", token_bias, [tokens]),
        ("rows", rows, [tokens, columns]),
        ("bias", bias, [tokens]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise PassError(f"{name} is {list(tensor.shape)}", expected=f"{shape}, one for each token")
