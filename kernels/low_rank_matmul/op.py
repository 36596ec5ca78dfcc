"""`compress::low_rank_matmul`, the operator: two products on the CPU, one launch on a GPU where that pays."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from compress.errors import PassError
from compress.kernels.low_rank_matmul import cost, reference


@torch.library.custom_op("compress::low_rank_matmul", mutates_args=())
def low_rank_matmul(x: Tensor, first: Tensor, last: Tensor, bias: Tensor | None) -> Tensor:
    """``y[..., N] = (x[..., K] @ first[R, K]^T) @ last[N, R]^T + bias[N]``.

    Args:
        x: ``[..., K]``, a floating-point tensor.
        first, last: the factors, in the dtype of `x`.
        bias: ``[N]``, or None.

    Returns:
        ``[..., N]`` in the dtype of `x`; what is between the factors is rounded to it.

    Raises:
        PassError: the sizes do not fit one another.
    """
    _check(x, first, last, bias)
    return reference.low_rank_matmul(x, first, last, bias)


@low_rank_matmul.register_fake
def _(x: Tensor, first: Tensor, last: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, first, last, bias)
    return x.new_empty(*x.shape[:-1], last.shape[0])


@low_rank_matmul.register_kernel("cuda")
def on_gpu(x: Tensor, first: Tensor, last: Tensor, bias: Tensor | None) -> Tensor:
    """The same, on a GPU: in one launch for few rows of x and small factors, else by two products."""
    _check(x, first, last, bias)
    rows, (rank, columns) = x.numel() // max(1, x.shape[-1]), first.shape
    has_kernel = x.dtype in cost.DTYPES and importlib.util.find_spec("triton") is not None
    if not has_kernel or not cost.pays(rows, last.shape[0], columns, rank):
        return reference.low_rank_matmul(x, first, last, bias)
    from compress.kernels.low_rank_matmul import triton

    with torch.cuda.device(x.device):
        y = triton.launch(x.reshape(-1, columns), first, last, bias)
    return y.view(*x.shape[:-1], last.shape[0])


def _check(x: Tensor, first: Tensor, last: Tensor, bias: Tensor | None) -> None:
    if x.shape[-1] != first.shape[1] or first.shape[0] != last.shape[1]:
        raise PassError(
            f"x has {x.shape[-1]} columns, the factors are {list(first.shape)} and {list(last.shape)}",
            expected="[R, K] and [N, R] for K columns",
        )
    if bias is not None and bias.shape != last.shape[:1]:
        raise PassError(f"the bias is {list(bias.shape)}", expected=f"one for each of {len(last)} outputs")
